"""Tar archives of images."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clip_helpers import write_folder
from saft_clip.config import FinetuneConfig
from saft_clip.data import available_splits, drop_unreadable, few_shot, load_dataset
from saft_clip.data.layouts import recognise
from saft_clip.errors import DataError, UnreadableImageError
from saft_clip.run_folder import describe_data
from saft_clip.train import RunData


def pixels(image):
    return torch.from_numpy(np.array(image))


def load(spec, split="test"):
    return load_dataset(str(spec), split, pixels)


def png(seed):
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), np.uint8)
    Image.fromarray(values).save(stream, "png")
    return stream.getvalue()


def write_tar(path, files, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else str(content).encode()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def numbered(first, labels):
    """Samples with a .cls each."""
    files = {}
    for index, label in enumerate(labels, first):
        files |= {f"{index:04d}.png": png(index), f"{index:04d}.cls": f"{label}\n"}
    return files


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "shards"
    write_tar(root / "part-000.tar", numbered(0, [0, 1, 2]))
    write_tar(root / "part-001.tar", numbered(3, [2, 0]), tarfile.GNU_FORMAT)
    (root / "classnames.txt").write_text("big_cat\ndog\ncow\n\n")
    return root


def test_every_way_to_name_them(shards):
    for spec in (shards, f"{shards}/part-{{000..001}}.tar"):
        dataset = load(spec)
        assert dataset.class_names == ("big cat", "dog", "cow")
        assert dataset.labels.tolist() == [0, 1, 2, 2, 0]
        for index in range(5):
            expected = pixels(Image.open(io.BytesIO(png(index))))
            assert torch.equal(dataset[index][0], expected)
        assert available_splits(str(spec)) == ()
        assert recognise(str(spec)).kind == "WebDataset shards"
    assert load(shards).name == "shards"
    assert load(shards / "part-001.tar").labels.tolist() == [2, 0]
    assert load(shards / "part-001.tar").name == "part-001"
    assert load(f"{shards}#new").class_names == ("cow",)


def test_split_folders(tmp_path):
    root = tmp_path / "data"
    for split, labels in (("train", ["a", "b"]), ("test", ["b", "c"])):
        files = {}
        for index, name in enumerate(labels):
            files |= {f"x/{index}.png": png(index), f"x/{index}.json": json.dumps({"label": name})}
        write_tar(root / split / "0.tar", files)
    assert available_splits(str(root)) == ("train", "test")
    assert load(root, "train").class_names == load(root).class_names == ("a", "b", "c")
    assert load(root).labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="has no val split, only train, test"):
        load(root, "val")
    (root / "classes.txt").write_text("c\nb\na\n")
    assert load(root).labels.tolist() == [1, 0]
    assert load(root / "test" / "0.tar").class_names == ("c", "b", "a")


def test_class_names_from_the_samples(tmp_path):
    files = {}
    for index, (number, name) in enumerate([(1, "big_cat"), (0, "dog"), (1, "big_cat")]):
        fields = {"label": number, "class_name": name, "other": [1]}
        files |= {f"{index}.jpg": png(index), f"{index}.json": json.dumps(fields)}
    dataset = load(write_tar(tmp_path / "x.tar", files | {"0.txt": "a caption"}))
    assert dataset.class_names == ("dog", "big cat")
    assert dataset.labels.tolist() == [1, 0, 1]


def test_wordnet_numbers_in_classnames(shards):
    (shards / "classnames.txt").write_text("n01440764 tench\nn01443537 goldfish\nn01484850 x y\n")
    assert load(shards).class_names == ("tench", "goldfish", "x y")


def test_other_processes_open_them(shards):
    """Those that are forked inherit the data set, those that are spawned get it by pickle."""
    dataset = load(shards)
    images = [image for batch, _ in DataLoader(dataset, 2, num_workers=2) for image in batch]
    copy = pickle.loads(pickle.dumps(dataset))
    for index, image in enumerate(images):
        assert torch.equal(image, dataset[index][0])
        assert torch.equal(image, copy[index][0])


def test_unreadable_members_are_named_and_skipped(shards, capsys):
    files = numbered(0, [0, 1, 2]) | {"0001.png": b"no image"}
    write_tar(shards / "part-000.tar", files)
    dataset = load(shards)
    with pytest.raises(UnreadableImageError, match=r"part-000.tar/0001.png: cannot identify"):
        dataset[1]
    kept = drop_unreadable(dataset)
    assert kept.labels.tolist() == [0, 2, 2, 0]
    assert kept.skipped[0].startswith(f"{shards}/part-000.tar/0001.png: ")
    (shards / "part-001.tar").unlink()
    with pytest.raises(UnreadableImageError, match=r"part-001.tar/0003.png: No such file"):
        dataset[3]


def test_runs_tell_changed_members(shards):
    def marks():
        return [describe_data(load(shards), content=content)["sha256"] for content in (0, 1)]

    before = marks()
    assert marks() == before
    path = shards / "part-001.tar"
    content = bytearray(path.read_bytes())
    at = content.index(png(4)) + len(png(4)) // 2
    assert len(png(4)) < 8192, "all of it is looked at in either way"
    content[at] ^= 255
    path.write_bytes(content)
    assert all(a != b for a, b in zip(before, marks(), strict=True))


def test_they_can_be_trained_on(shards, capsys):
    class Clip:
        preprocess_val = preprocess_train = staticmethod(pixels)

    write_tar(shards / "part-002.tar", numbered(5, [1, 1, 2, 0]))
    config = FinetuneConfig(train_data=f"{shards}#fog:1", shots=2, augment=False)
    data = RunData(config, Clip())
    assert data.plain.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [image.image for image in data.plain.images] == few_shot(load(shards), 2, 1).images
    assert data.plain[0][0].shape == (40, 36, 3)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_archives_cut_short(shards, kept):
    path = shards / "part-001.tar"
    content = path.read_bytes()
    data = len(content.rstrip(b"\0")) // 512 * 512
    path.write_bytes(content[: int(data * kept)])
    with pytest.raises(DataError, match=r"part-001.tar cannot be read: .*whole and not compr"):
        load(shards)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"part-001.tar cannot be read: empty file; it must be"):
        load(shards)


def test_an_archive_cut_short_between_two_files(shards):
    path = shards / "part-001.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:last])
    with pytest.raises(DataError, match="it is cut short"):
        load(shards)


def test_compressed_archives_are_refused(shards, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.add(shards, arcname="x")
    with pytest.raises(DataError, match="not compressed"):
        load(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"", "0.txt": "an ant"}, r"x.tar/0.png has no class: a sample needs a .cls"),
        ({"0.png": b"", "0.cls": "ant"}, r"x.tar/0.cls is not a class number"),
        ({"0.png": b"", "0.cls": "-1"}, r"x.tar/0.png has the class number -1"),
        ({"0.png": b"", "0.cls": "9999999999"}, r"x.tar/0.png has the class number 9999999999"),
        ({"0.png": b"", "0.cls": "0"}, "nothing names the classes of .*: put classnames.txt"),
        ({"0.png": b"", "0.json": "{"}, r"x.tar/0.json is broken"),
        ({"0.png": b"", "0.json": "[" * 100_000}, r"x.tar/0.json is broken"),
        ({"0.png": b"", "0.json": "[]"}, "has no class"),
        ({"0.png": b"", "0.json": '{"label": true}'}, "has no class"),
        ({"0.png": b"", "0.jpg": b""}, "has two images of the name '0'"),
        ({"0.cls": "0", ".0.png": b""}, "holds no image"),
        (
            {"0.png": b"", "0.cls": "0", "1.png": b"", "1.json": '{"label": "a"}'},
            "class numbers and class names, not one of them throughout",
        ),
        (
            {
                **{"0.png": b"", "0.json": '{"label": 0, "class_name": "a"}'},
                **{"1.png": b"", "1.json": '{"label": 0, "class_name": "b"}'},
            },
            "the class 0 of .* is called 'a' and 'b'",
        ),
        ({"0.png": b"", "0.json": '{"label": 1, "class_name": "a"}'}, "must be 0 to 0 without a"),
        ({"\x1b[2J.png": b"", "0.cls": "0"}, r"x.tar/\\x1b\[2J.png has no class"),
    ],
)
def test_malformed_samples(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load(write_tar(tmp_path / "x.tar", files))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a\nb\n", "has the class number 2, but there are 2 class names"),
        ("a\n\nb\n", "must have the name of one class in each line, and no empty line"),
        ("", "must have the name of one class in each line"),
    ],
)
def test_bad_files_of_class_names(shards, names, message):
    (shards / "classnames.txt").write_text(names)
    with pytest.raises(DataError, match=message):
        load(shards)


def test_a_name_that_no_line_has(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    files = {"0.png": b"", "0.json": '{"label": "c"}'}
    with pytest.raises(DataError, match="has the class 'c', which no line names"):
        load(write_tar(tmp_path / "x.tar", files))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("part-{000..002}.tar", "there is no archive .*part-002.tar"),
        ("part-{3..1}.tar", "names no range of archives"),
        ("part-{0..99999999999}.tar", "names no range of archives"),
        ("none.tar", "there is no archive .*none.tar"),
    ],
)
def test_archives_that_are_not_there(shards, pattern, message):
    with pytest.raises(DataError, match=message):
        load(shards / pattern)


def test_links_and_gaps_in_archives(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match="holds no image"):
        load(tmp_path / "x.tar")


def test_class_folders_beside_an_archive_that_is_a_folder(tmp_path):
    root = write_folder(tmp_path / "x.tar", {"a": 1, "b": 1})
    assert recognise(str(root)).kind == "image folder"


def test_an_archive_beside_what_was_unpacked_from_it(tmp_path):
    root = write_folder(tmp_path / "pets", {"a": 1, "b": 1})
    write_tar(root / "pets.tar", {"a/000.png": b""})
    assert recognise(str(root)).kind == "image folder"
