"""DomainNet."""

import pytest

from clip_helpers import write_folder, write_image
from saft_clip.data import available_splits, load_dataset, match_classes
from saft_clip.data.layouts import recognise
from saft_clip.errors import DataError

LISTS = {
    "sketch_train": ["sketch/aircraft_carrier/1.jpg 0", "sketch/zebra/1.jpg 2"],
    "sketch_test": ["sketch/zebra/2.jpg 2", "sketch/aircraft_carrier/2.jpg 0"],
    "real_train": ["real/t-shirt/1.jpg 1", "real/aircraft_carrier/1.jpg 0"],
    "clipart_test": ["clipart/zebra/1.jpg 2"],
}


@pytest.fixture
def root(tmp_path):
    for name, lines in LISTS.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            write_image(tmp_path / line.split()[0])
    return tmp_path


def load(spec, split="test"):
    return load_dataset(str(spec), split, lambda image: image)


def test_a_domain(root):
    sketches = load(root / "sketch")
    assert sketches.name == "sketch"
    assert sketches.class_names == ("aircraft carrier", "t-shirt", "zebra")
    assert sketches.labels.tolist() == [2, 0]
    assert sketches.images[0] == str(root / "sketch" / "zebra" / "2.jpg")
    assert sketches[0][0].size == (24, 20)
    assert load(root / "sketch", "train").labels.tolist() == [0, 2]
    assert available_splits(str(root / "sketch")) == ("train", "test")
    assert recognise(str(root / "sketch")).kind == "domain of DomainNet"


def test_labels_mean_the_same_in_every_domain(root):
    photos, clipart = load(root / "real", "train"), load(root / "clipart")
    assert match_classes(photos.class_names, clipart.class_names).pairs == ((0, 0), (1, 1), (2, 2))
    assert photos.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"clipart has no train split, only test"):
        load(root / "clipart", "train")


def test_the_domain_may_be_where_one_is(root, monkeypatch):
    monkeypatch.chdir(root / "sketch")
    assert load(".").labels.tolist() == [2, 0]


def test_without_lists_it_is_an_image_folder(tmp_path):
    write_folder(tmp_path / "sketch", {"a": 1, "b": 1})
    assert recognise(str(tmp_path / "sketch")).kind == "image folder"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sketch/zebra/1.jpg", "has the line 'sketch/zebra/1.jpg'; expected the path"),
        ("sketch/zebra/1.jpg two", "expected the path of an image and a label"),
        ("sketch/zebra/1.jpg 99999999999999999999", "expected the path"),
        ("sketch/none/1.jpg 2", "first image of .*sketch_test.txt, sketch/none/1.jpg, is not in"),
        ("sketch/zebra/2.jpg 0", "has the label 0 for '.*', another .* for '.*'"),
        ("sketch/zebra/2.jpg 5", "must be 0 to 3 without a gap"),
        ("", "lists no image"),
    ],
)
def test_malformed_lists(root, line, message):
    (root / "sketch_test.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        load(root / "sketch")
