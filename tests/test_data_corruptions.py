"""Corrupted data sets."""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clip_helpers import write_folder
from saft_clip.config import FinetuneConfig
from saft_clip.data import available_splits, divided, drop_unreadable, load_dataset, parse_spec
from saft_clip.data.corruptions import CORRUPTIONS, _package
from saft_clip.errors import DataError, MissingExtraError, UnreadableImageError
from saft_clip.run_folder import describe_data
from saft_clip.train import RunData


def pixels(image):
    return torch.from_numpy(np.array(image))


def load(spec, split="test"):
    return load_dataset(str(spec), split, pixels)


def photos(root, width=48, height=40):
    values = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8, 3), np.uint8)
    for name, images in zip(("ant", "bee"), values, strict=True):
        (root / name).mkdir(parents=True)
        for index, image in enumerate(images):
            smooth = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            smooth.save(root / name / f"{index}.png")
    return root


def test_specs():
    whole = parse_spec("a/b#c.csv::x#fog:3#new")
    assert (whole.source, whole.corruption, whole.half) == ("a/b#c.csv::x", "fog:3", "new")
    assert parse_spec("a#new#fog:3") == parse_spec("a#fog:3#new")
    assert parse_spec("a#base#new").source == "a#base"
    assert parse_spec("a#b").source == "a#b"
    assert divided("a#fog:3#new") == ("a#fog:3", "new")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_the_same_each_time(tmp_path, name):
    """On small, on wide and on built-in images; severity 5 changes more than severity 1."""
    root = photos(tmp_path / "photos", 60, 36)
    for spec in (root, "builtin:mnist"):
        plain = load(spec)[3][0].double()
        changes = []
        for severity in (1, 5):
            dataset = load(f"{spec}#{name}:{severity}")
            first, again = dataset[3][0], load(f"{spec}#{name}:{severity}")[3][0]
            assert torch.equal(first, again)
            assert (first.shape, first.dtype) == (plain.shape, torch.uint8)
            # Severity 1 of saturate takes colour away, which grey digits have not.
            assert severity == 1 or not torch.equal(first, load(spec)[3][0])
            changes.append((first.double() - plain).square().mean())
        assert changes[0] < changes[1] or name in ("spatter", "elastic_transform", "saturate")


def test_images_differ_in_their_noise_and_the_global_generator_is_left_alone(tmp_path):
    root = photos(tmp_path / "photos")
    for path in (root / "ant" / "0.png", root / "ant" / "1.png"):
        Image.new("RGB", (32, 32), (128, 128, 128)).save(path)
    dataset = load(f"{root}#gaussian_noise:3")
    before = np.random.get_state()[1].copy()
    assert not torch.equal(dataset[0][0], dataset[1][0])
    assert np.array_equal(before, np.random.get_state()[1])


def test_names_labels_and_halves(tmp_path):
    root = photos(tmp_path / "photos")
    dataset = load(f"{root}#gaussian_noise:3")
    assert dataset.name == "photos (gaussian noise 3)"
    assert dataset.labels.tolist() == load(root).labels.tolist()
    half = load(f"{root}#gaussian_noise:3#new")
    assert half.name == "photos (gaussian noise 3) (new)"
    assert torch.equal(half[2][0], dataset[8][0]), "an image has the same noise in a half"
    assert available_splits("builtin:uci#fog:1") == ("test",)


def test_corrupted_images_are_loaded_in_other_processes(tmp_path):
    dataset = load(f"{photos(tmp_path / 'photos')}#glass_blur:2")
    loaded = [image for images, _ in DataLoader(dataset, 4, num_workers=2) for image in images]
    assert all(torch.equal(image, dataset[i][0]) for i, image in enumerate(loaded))
    copy = pickle.loads(pickle.dumps(dataset.images[3]))
    assert np.array_equal(np.array(copy.open()), dataset[3][0].numpy())


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("rain:3", "there is no corruption 'rain'; choose one of brightness, contrast"),
        ("fog:0", "the severity of fog must be 1 to 5, not 0"),
        ("fog:12", "the severity of fog must be 1 to 5, not 12"),
    ],
)
def test_bad_corruptions(tmp_path, ending, message):
    with pytest.raises(DataError, match=message):
        load(f"{photos(tmp_path / 'photos')}#{ending}")


def test_small_images_are_unreadable(tmp_path):
    root = photos(tmp_path / "photos")
    Image.new("RGB", (40, 31)).save(root / "ant" / "0.png")
    dataset = load(f"{root}#fog:1")
    with pytest.raises(UnreadableImageError, match=r"0.png: its 40 x 31 pixels are too few for"):
        dataset[0]
    assert len(drop_unreadable(dataset)) == 11


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    root = photos(tmp_path / "photos")
    _package.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'saft-kernels\[data\]'"):
        load(f"{root}#fog:1")
    _package.cache_clear()


def test_runs_tell_corrupted_data_from_others(tmp_path, capsys):
    root = write_folder(tmp_path / "photos", dict.fromkeys("ab", 3))

    class Clip:
        preprocess_val = preprocess_train = staticmethod(lambda image: image)

    specs = tuple(f"{root}{ending}" for ending in ("", "#fog:1", "#fog:2"))
    config = FinetuneConfig(train_data=f"{root}", eval_data=specs, shots=2, augment=False)
    data = RunData(config, Clip())
    assert [data.is_shifted(spec) for spec in specs] == [False, True, True]
    assert [data.includes_training(spec) for spec in specs] == [True, True, True]
    assert "#fog:2 has no test split" in capsys.readouterr().err
    marks = {describe_data(data.evaluation[spec], content=False)["sha256"] for spec in specs}
    assert len(marks) == 3
