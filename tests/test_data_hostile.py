"""Files that were made or damaged to do harm: each is read, or refused in one sentence."""

import io
import json
import random
import tarfile
import time
from contextlib import suppress

import pytest

from clip_helpers import write_image
from saft_clip.cli import main
from saft_clip.data import available_splits, find_duplicates, load_dataset
from saft_clip.errors import DataError, UnreadableImageError
from saft_clip.run_folder import describe_data

TRIES = 300


def tried(spec):
    """Whether it was accepted; whatever else is raised is a fault."""
    try:
        look_at_all(str(spec))
    except DataError as error:
        said = str(error)
    else:
        return True
    assert len(said) < 2000
    assert said.isprintable()
    return False


def look_at_all(spec):
    for split in available_splits(spec) or ("test",):
        dataset = load_dataset(spec, split, lambda image: image)
        for index in range(min(len(dataset), 3)):
            with suppress(UnreadableImageError):
                dataset[index]
            dataset.source(index).mark(True)
    find_duplicates([dataset], decode=False, show_progress=False)


def damaged(content, choices):
    """The bytes with a few of them changed, left out, or there twice."""
    content = bytearray(content)
    for _ in range(choices.randint(1, 4)):
        at = choices.randrange(len(content))
        kind = choices.randrange(4)
        if kind == 0:
            content[at] = choices.randrange(256)
        elif kind == 1:
            content[at] = choices.choice(b'0123456789,:\n\0\x80\xff"[{ -')
        elif kind == 2:
            del content[at : at + choices.randint(1, 600)]
        else:
            content[at:at] = content[at : at + choices.randint(1, 600)]
        content = content or bytearray(b"x")
    return bytes(content)


def archive(tmp_path, form):
    photo = write_image(tmp_path / "image.png").read_bytes()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for index in range(3):
            for ending, text in ((".png", photo), (".json", b'{"label": "a"}')):
                info = tarfile.TarInfo(f"{'folder/' * 30}{index}{ending}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return stream.getvalue()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives(tmp_path, form):
    content, choices, path = archive(tmp_path, form), random.Random(form), tmp_path / "x.tar"
    start = time.process_time()
    accepted = 0
    for _ in range(TRIES):
        path.write_bytes(damaged(content, choices))
        accepted += tried(path)
    assert 0 < accepted < TRIES
    assert time.process_time() - start < 60


def test_an_archive_that_leads_backwards(tmp_path):
    """A negative size once sent tarfile round in circles."""
    content = bytearray(archive(tmp_path, tarfile.USTAR_FORMAT))
    content[124:136] = (-1024).to_bytes(12, "big", signed=True)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"x.tar cannot be read"):
        load_dataset(str(tmp_path / "x.tar"), "test", lambda image: image)


def test_an_archive_of_long_names_only(tmp_path):
    """Each is read inside the one before."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 512
    block = header.tobuf(tarfile.GNU_FORMAT) + b"x" * 511 + b"\0"
    (tmp_path / "x.tar").write_bytes(block * 5000)
    assert not tried(tmp_path / "x.tar")


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_csv_files(tmp_path, ending):
    write_image(tmp_path / "a.png")
    rows = ["path,label,split", *(f"a.png,{name},{part}" for name in "xyz" for part in ("train",))]
    content = "\n".join(rows).replace(",", "\t" if ending == ".tsv" else ",").encode()
    choices, path = random.Random(0), tmp_path / f"x{ending}"
    outcomes = set()
    for _ in range(TRIES):
        path.write_bytes(damaged(content, choices))
        outcomes.add(tried(path))
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", ["split_zhou_OxfordPets.json", "sketch_train.txt", "classnames"])
def test_lists_beside_images(tmp_path, name):
    root = tmp_path / "sketch"
    write_image(root / "images" / "a.png")
    for wnid in ("n01440764", "n01443537") if name == "classnames" else ():
        write_image(root / "images" / wnid / "a.png")
    spec, path, content = {
        "split_zhou_OxfordPets.json": (
            root,
            root / name,
            json.dumps({"train": [["a.png", 0, "cat"], ["a.png", 1, "dog"]]}),
        ),
        "sketch_train.txt": (root, tmp_path / name, "sketch/images/a.png 0\n"),
        "classnames": (
            root / "images",
            root / "images" / "classnames.txt",
            "n01440764 tench\nn01443537 goldfish\n",
        ),
    }[name]
    choices, outcomes = random.Random(0), set()
    for _ in range(TRIES):
        path.write_bytes(damaged(content.encode(), choices))
        outcomes.add(tried(spec))
    assert outcomes == {True, False}


@pytest.mark.parametrize("path", ["b\0.png", "\ud800.png", "b" * 5000, "../" * 20 + "etc/passwd"])
def test_paths_that_no_file_can_have(tmp_path, path):
    write_image(tmp_path / "a.png")
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"test": [["a.png", 0, "a"], [path, 1, "b"]]}))
    dataset = load_dataset(str(file), "test", lambda image: image)
    with pytest.raises(UnreadableImageError):
        dataset[1]
    assert len(describe_data(dataset, content=True)["sha256"]) == 16
    assert main(["data", "check", str(file), "--quick"]) == (1 if "/" not in path else 0)
    assert main(["data", "check", str(file)]) == 1
