"""Image folders, CoOp split files, built-in domains, few-shot samples and unreadable images."""

import json
import os
import pickle
import random
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_helpers import cut_short, write_folder, write_image, write_split_file
from saft_clip.config import FinetuneConfig
from saft_clip.data import (
    HALVES,
    available_splits,
    distinct_names,
    divided,
    drop_unreadable,
    few_shot,
    load_dataset,
    printable,
    require_classes,
)
from saft_clip.data.images import to_rgb
from saft_clip.errors import DataError, UnreadableImageError
from saft_clip.prompts import DEFAULT_TEMPLATES
from saft_clip.train import RunData
from saft_kernels.errors import SaftError


def pixels(image):
    return torch.from_numpy(np.array(image))


def load(spec, split="train", **options):
    return load_dataset(str(spec), split, pixels, **options)


# Image folders


def test_folder_lists_sorted_classes_and_images(tmp_path):
    root = write_folder(tmp_path / "pets", {"tabby_cat": 2, "Dog": 3})
    write_image(root / "Dog" / "more" / "999.JPG")
    write_image(root / "Dog" / ".hidden.png")
    write_image(root / ".git" / "x.png")
    (root / "Dog" / "notes.txt").write_text("no image")
    dataset = load(root)
    assert dataset.name == "pets"
    assert dataset.class_names == ("Dog", "tabby cat")
    assert dataset.templates == DEFAULT_TEMPLATES
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert dataset.images == sorted(dataset.images)
    image, label = dataset[4]
    assert torch.equal(image, pixels(Image.open(root / "tabby_cat" / "000.png")))
    assert label == 1
    assert isinstance(label, int)


def test_split_folders_share_their_classes(tmp_path):
    write_folder(tmp_path / "train", {"a": 2, "b": 2, "c": 1})
    write_folder(tmp_path / "test", {"a": 1, "c": 3})
    assert available_splits(str(tmp_path)) == ("train", "test")
    test = load(tmp_path, "test")
    assert test.class_names == ("a", "b", "c")
    assert test.labels.tolist() == [0, 2, 2, 2]
    with pytest.raises(DataError, match="has no val folder, only train, test"):
        load(tmp_path, "val")


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, {"bus": 1, "train": 1})
    assert available_splits(str(tmp_path)) == ()
    assert load(tmp_path, "test").class_names == ("bus", "train")


def test_templates_are_resolved(tmp_path):
    root = write_folder(tmp_path, {"a": 1})
    assert load(root, templates="simple").templates[0] == "itap of a {}."
    with pytest.raises(DataError, match="no prompt templates"):
        load(root, templates="nonsense")


def decoded(tmp_path, image, suffix="png", **options):
    """The pixels [H, W, 3] that loading gives once the image has been saved."""
    (tmp_path / "x").mkdir(exist_ok=True)
    image.save(tmp_path / "x" / f"image.{suffix}", **options)
    return load(tmp_path)[0][0]


def with_palette(mode, colours, indices):
    image = Image.new(mode, (len(indices), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata([(index, 255) for index in indices] if mode == "PA" else indices)
    return image


RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "suffix", "colour", "expected"),
    [
        ("1", "png", 1, WHITE),
        ("L", "png", 77, (77, 77, 77)),
        ("RGB", "png", (1, 2, 3), (1, 2, 3)),
        ("CMYK", "tif", (0, 255, 255, 0), RED),
        ("RGBA", "png", (1, 2, 3, 255), (1, 2, 3)),
        ("RGBA", "png", (0, 0, 0, 0), WHITE),
        ("RGBA", "png", (255, 0, 0, 128), (255, 127, 127)),
        ("RGBA", "webp", (0, 0, 0, 0), WHITE),
        ("LA", "png", (50, 255), (50, 50, 50)),
        ("LA", "png", (0, 0), WHITE),
        ("I;16", "png", 0, BLACK),
        ("I;16", "png", 0x4321, (0x43,) * 3),
        ("I;16", "tif", 0xFFFF, WHITE),
        ("I;16", "tif", 200, BLACK),
        ("I;16B", "tif", 0x4321, (0x43,) * 3),
        ("I", "tif", 200, (200,) * 3),
        ("I", "tif", 0x4321, (0x43,) * 3),
        ("I", "pgm", 0x4321, (0x43,) * 3),
        ("F", "tif", 0.5, (128,) * 3),
        ("F", "tif", 1.0, WHITE),
        ("F", "tif", 200.4, (200,) * 3),
    ],
)
def test_every_image_mode_becomes_rgb(tmp_path, mode, suffix, colour, expected):
    """An older test looked at shapes only: 16 bits became white, what was transparent black."""
    found = decoded(tmp_path, Image.new(mode, (5, 4), colour), suffix)
    assert torch.equal(found, torch.tensor(expected, dtype=torch.uint8).expand(4, 5, 3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
def test_palettes_become_rgb(tmp_path, suffix):
    image = with_palette("P", [RED, GREEN, BLACK], [0, 1, 2])
    assert decoded(tmp_path, image, suffix)[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 0]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("suffix", "transparency"), [("png", 2), ("gif", 2), ("png", b"\xff\xff\x00")]
)
def test_transparent_palette_entries_become_white(tmp_path, suffix, transparency):
    """Pillow warns of the last kind unless its alpha is taken along."""
    image = with_palette("P", [RED, GREEN, BLACK], [0, 1, 2])
    found = decoded(tmp_path, image, suffix, transparency=transparency)
    assert found[0].tolist() == [[255, 0, 0], [0, 255, 0], [255, 255, 255]]


def test_palette_with_alpha_becomes_rgb():
    image = with_palette("PA", [RED, GREEN], [0, 1])
    image.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert np.array(to_rgb(image)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "values"),
    [("I", [0, 70_000]), ("I", [-1, 9]), ("F", [-0.5, 1]), ("F", [0, 300]), ("F", [0, np.nan])],
)
def test_unknown_ranges_are_unreadable(tmp_path, mode, values):
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    with pytest.raises(UnreadableImageError, match="of which none is known to be white"):
        decoded(tmp_path, image, "tif")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    file = write_image(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"one.png is neither a folder"):
        load(file)
    with pytest.raises(DataError, match="holds no class folders"):
        load(tmp_path)
    (tmp_path / "empty class").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty class holds no image"):
        load(tmp_path)
    with pytest.raises(DataError, match="no split 'training'"):
        load(tmp_path, "training")


@pytest.mark.parametrize(
    ("link", "target"), [("loop", "."), ("zero/again", "."), ("zero/up", "..")]
)
def test_links_back_are_not_followed(tmp_path, link, target):
    root = write_folder(tmp_path / "digits", {"one": 3, "zero": 3})
    expected = load(root)
    (root / link).symlink_to(target)
    assert load(root).images == expected.images
    assert load(root).class_names == expected.class_names


def test_links_to_other_places_are_followed_once(tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", {"deep": 2, "more": 1})
    root = write_folder(tmp_path / "things", {"ant": 1})
    (root / "bee").symlink_to(elsewhere / "deep")
    for name in ("x", "y"):
        (root / "ant" / name).symlink_to(elsewhere / "more")
    (elsewhere / "more" / "back").symlink_to(root / "ant" / "y")
    paths = ["ant/000.png", "ant/x/000.png", "bee/000.png", "bee/001.png"]
    assert load(root).images == [str(root / path) for path in paths]


def test_two_folders_of_one_class(tmp_path):
    write_folder(tmp_path, {"big cat": 1, "big_cat": 1})
    with pytest.raises(DataError, match="stand for the class 'big cat'"):
        load(tmp_path)


def test_names_that_are_not_utf8(tmp_path, capsys):
    root = write_folder(tmp_path / "data", {"ant": 2, "bee": 2})
    shutil.copy(root / "ant" / "000.png", os.fsencode(root / "ant") + b"/\xff\xfe.png")
    with open(os.fsencode(root / "ant") + b"/\xff.png", "wb") as file:
        file.write(b"this is no image")
    os.rename(root / "bee", os.fsencode(root) + b"/b\xffe")
    os.rename(root, os.fsencode(tmp_path) + b"/\xff")
    kept = drop_unreadable(load(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    assert kept.name == r"\udcff"
    assert kept.class_names == ("ant", r"b\udcffe")
    assert len(kept) == 5
    assert all(kept[i][0].shape == (20, 24, 3) for i in range(5))
    assert [line.split(": ")[0] for line in kept.skipped] == [rf"{tmp_path}/\udcff/ant/\udcff.png"]
    assert r"ant/\udcff.png" in capsys.readouterr().err


def test_printable():
    assert printable("ä b") == "ä b"
    assert printable(os.fsdecode(b"a\xff")) == r"a\udcff"


def test_distinct_names():
    assert distinct_names(["a/x", "b/x", "c/y"], ["x", "x", "y"]) == ["a/x", "b/x", "y"]
    assert distinct_names(["a/\udcff"], ["\udcff"]) == [r"\udcff"]


# CoOp split files

ROWS = {
    "train": [("b/1.jpg", 1, "big_cat"), ("a/1.jpg", 0, "ant")],
    "val": [("a/2.jpg", 0, "ant")],
    "test": [("b/2.jpg", 1, "big_cat"), ("c/1.jpg", 2, "cow")],
}


def write_rows(root, splits=ROWS):
    for rows in splits.values():
        for path, _, _ in rows:
            write_image(root / path)


@pytest.mark.parametrize("folder", [".", "images"])
def test_split_file_finds_images_beside_it(tmp_path, folder):
    file = write_split_file(tmp_path / "split_zhou_Zoo.json", ROWS)
    write_rows(tmp_path / folder)
    dataset = load(file)
    assert dataset.name == "Zoo"
    assert dataset.class_names == ("ant", "big cat", "cow")
    assert dataset.labels.tolist() == [1, 0]
    assert dataset[0][0].shape == (20, 24, 3)
    assert load(file, "test").labels.tolist() == [1, 2]
    assert available_splits(str(file)) == ("train", "val", "test")


def test_split_file_with_a_folder_elsewhere(tmp_path):
    file = write_split_file(tmp_path / "lists" / "zoo.json", ROWS)
    write_rows(tmp_path / "photos")
    with pytest.raises(DataError, match=r"is nowhere beside it; name the folder.*json::FOLDER"):
        load(file)
    assert len(load(f"{file}::{tmp_path / 'photos'}")) == 2
    with pytest.raises(DataError, match=r"is not in .*lists"):
        load(f"{file}::{tmp_path / 'lists'}")


def test_split_file_with_two_candidate_folders(tmp_path):
    file = write_split_file(tmp_path / "zoo.json", ROWS)
    write_rows(tmp_path / "one")
    write_rows(tmp_path / "two")
    with pytest.raises(DataError, match="in more than one folder beside it"):
        load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no split"),
        ("{}", "holds no split"),
        ('{"train": [["x.jpg", 0]]}', "'train' of .* is malformed; expected"),
        ('{"train": [["x.jpg", "one", "a"]]}', "malformed"),
        ('{"train": 3}', "malformed"),
        ('{"test": [["x.jpg", 0, "a"]]}', "has no split 'train', only test"),
        ("[" * 100_000, "is not JSON"),
        ('{"train": [["x.jpg", Infinity, "a"]]}', "'train' of .* is malformed"),
        (f'{{"{"x" * 5000}": 3}}', "'x{100}' of .* is malformed"),
        (f'{{"{"x" * 5000}": []}}', "only x+…"),
        (f'{{"train": [["{"x" * 5000}", 0, "a"]]}}', "x…, is nowhere beside it"),
        ('{"train": [["\\u001b[2J\\ud800", 0, "a"]]}', r"\\x1b\[2J\\ud800, is nowhere beside it"),
        ('{"train": [["a\\u0000b", 0, "a"]]}', r"a\\x00b, is nowhere beside it"),
        ('{"train": []}', "'train' of .* is empty"),
        ('{"train": [["x.jpg", 0, "a"], ["x.jpg", 0, "b"]]}', "label 0 of .* both 'a' and 'b'"),
        ('{"train": [["x.jpg", 0, "a"], ["x.jpg", 2, "b"]]}', "must be 0 to 1 without a gap"),
    ],
)
def test_malformed_split_files(tmp_path, content, message):
    write_image(tmp_path / "x.jpg")
    file = tmp_path / "split.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load(file)


def test_empty_splits_are_not_there(tmp_path):
    rows = [["x.jpg", 0, "a"]]
    write_image(tmp_path / "x.jpg")
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": rows, "val": [], "test": None}))
    assert available_splits(str(file)) == ("train",)
    assert len(load(file)) == 1
    with pytest.raises(DataError, match=r"'val' of .* is empty"):
        load(file, "val")
    with pytest.raises(DataError, match="has no split 'test', only train, val"):
        load(file, "test")
    file.write_text('{"train": null}')
    with pytest.raises(DataError, match="holds no split"):
        load(file)


def test_missing_split_file(tmp_path):
    with pytest.raises(DataError, match=r"split file .*none.json cannot be read: No such file"):
        load(tmp_path / "none.json")


# Built-in domains


def test_builtin_domain():
    dataset = load("builtin:mnist", "test")
    assert dataset.class_names == tuple("0123456789")
    assert len(dataset) == len(dataset.labels) == 2000
    assert dataset[0][0].shape == (32, 32, 3)
    assert all("{}" in template for template in dataset.templates)
    assert load("builtin:mnist", "test", templates="digit {}").templates == ("digit {}",)
    assert available_splits("builtin:mnist") == ("train", "val", "test")
    assert available_splits("builtin:uci") == ("test",)


def test_builtin_domain_errors():
    with pytest.raises(SaftError, match="no built-in domain 'mnits'"):
        load("builtin:mnits")
    with pytest.raises(SaftError, match="has no split 'train'"):
        load("builtin:uci", "train")


# Training sets


def test_one_class_is_nothing_to_train_on(tmp_path):
    one = write_folder(tmp_path / "one", {"zero": 2})
    with pytest.raises(DataError, match=r"at least two classes, one has one \('zero'\)"):
        require_classes(load(one))
    assert len(load(one, "test")) == 2
    require_classes(load(write_folder(tmp_path / "two", {"zero": 1, "one": 1})))


# Few-shot samples


def coop_sample(items, shots, seed):
    """What CoOp does with a split file: seed the global generator, then sample class by class."""
    random.seed(seed)
    by_class = defaultdict(list)
    for path, label in items:
        by_class[label].append(path)
    return [path for paths in by_class.values() for path in random.sample(paths, shots)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_shot_is_coops_sample(tmp_path, seed):
    order = random.Random(0)
    rows = [(f"{label}/{i}.png", label, f"c{label}") for label in range(3) for i in range(8)]
    order.shuffle(rows)
    write_rows(tmp_path, {"train": rows})
    dataset = load(write_split_file(tmp_path / "split.json", {"train": rows}))
    sample = few_shot(dataset, 4, seed)
    expected = coop_sample([(path, label) for path, label, _ in rows], 4, seed)
    assert [path.removeprefix(f"{tmp_path}/") for path in sample.images] == expected
    assert torch.bincount(sample.labels).tolist() == [4, 4, 4]
    assert sample.class_names == dataset.class_names
    assert few_shot(dataset, 4, seed).images == sample.images
    assert few_shot(dataset, 4, seed + 10).images != sample.images


def test_few_shot_of_arrays():
    sample = few_shot(load("builtin:mnist"), 16, 1)
    assert torch.bincount(sample.labels).tolist() == [16] * 10
    assert sample.skipped == []


def test_few_shot_replaces_unreadable_images(tmp_path, capsys):
    dataset = load(write_folder(tmp_path, {"a": 6, "b": 6, "c": 6}))
    before = few_shot(dataset, 3, 1)
    broken = [before.images[3], before.images[5]]
    for path in broken:
        cut_short(tmp_path / path)
    after = few_shot(dataset, 3, 1)
    assert after.images[:3] == before.images[:3]
    assert after.images[6:] == before.images[6:]
    assert torch.bincount(after.labels).tolist() == [3, 3, 3]
    assert len(set(after.images)) == 9
    assert not set(broken) & set(after.images)
    assert [line.split(": ")[0] for line in after.skipped] == broken
    warning = capsys.readouterr().err
    assert "2 unreadable image(s)" in warning
    assert all(path in warning for path in broken)


def test_few_shot_names_the_class_that_is_too_small(tmp_path):
    dataset = load(write_folder(tmp_path, {"ant": 3, "big_cat": 2}))
    with pytest.raises(DataError, match=r"'big cat' of .* has 2 readable .* fewer than --shots 3"):
        few_shot(dataset, 3, 1)
    with pytest.raises(DataError, match="at least 1"):
        few_shot(dataset, 0, 1)


def test_few_shot_counts_readable_images_only(tmp_path):
    dataset = load(write_folder(tmp_path, {"ant": 3, "bee": 3}))
    cut_short(tmp_path / "ant" / "001.png")
    with pytest.raises(DataError, match=r"'ant' of .* has 2 readable"):
        few_shot(dataset, 3, 1)


# Unreadable images


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp"])
def test_images_cut_short_are_found_named_and_skipped(tmp_path, suffix, capsys):
    dataset = load(write_folder(tmp_path, {"a": 3, "b": 3}, suffix))
    cut_short(tmp_path / "a" / f"001{suffix}", 0.7)
    cut_short(tmp_path / "b" / f"002{suffix}", 0.0)
    kept = drop_unreadable(dataset)
    names = [f"{tmp_path}/a/001{suffix}", f"{tmp_path}/b/002{suffix}"]
    assert kept.images == [path for path in dataset.images if path not in names]
    assert kept.labels.tolist() == [0, 0, 1, 1]
    assert [line.split(": ")[0] for line in kept.skipped] == names
    assert "2 unreadable image(s)" in capsys.readouterr().err


def test_readable_data_is_left_alone(tmp_path, capsys):
    dataset = load(write_folder(tmp_path, {"a": 2}))
    assert drop_unreadable(dataset) is dataset
    assert capsys.readouterr().err == ""


def test_long_lists_of_skipped_images_are_shortened(tmp_path, capsys):
    dataset = load(write_folder(tmp_path, {"a": 9}))
    for index in range(8):
        (tmp_path / "a" / f"{index:03d}.png").unlink()
    assert len(drop_unreadable(dataset)) == 1
    warning = capsys.readouterr().err
    assert "8 unreadable image(s)" in warning
    assert "000.png: No such file or directory" in warning
    assert "and 3 more" in warning


def test_no_readable_image(tmp_path):
    dataset = load(write_folder(tmp_path, {"a": 1}))
    cut_short(tmp_path / "a" / "000.png")
    with pytest.raises(DataError, match="none of the 1 images"):
        drop_unreadable(dataset)


def test_opening_an_unreadable_image_names_it(tmp_path):
    dataset = load(write_folder(tmp_path, {"a": 1}))
    (tmp_path / "a" / "000.png").write_text("this is no image")
    with pytest.raises(UnreadableImageError, match=r"000.png: cannot identify") as caught:
        dataset[0]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.path == caught.value.path


# Halves of the classes


def test_halves_are_coops(tmp_path):
    """Of five classes, three are base ones; labels of either half begin at 0."""
    root = write_folder(tmp_path / "pets", {"a": 1, "b": 2, "c": 1, "d": 2, "e": 3})
    base, new = (load_dataset(f"{root}#{half}", "test", lambda image: image) for half in HALVES)
    assert base.class_names == ("a", "b", "c")
    assert base.labels.tolist() == [0, 1, 1, 2]
    assert new.class_names == ("d", "e")
    assert new.labels.tolist() == [0, 0, 1, 1, 1]
    assert [Path(image).parent.name for image in new.images] == list("ddeee")
    assert (base.name, new.name) == ("pets (base)", "pets (new)")
    assert divided(f"{root}#new") == (str(root), "new")
    assert divided("a#b") == ("a#b", "")


def test_halves_of_domains_and_split_files(tmp_path):
    assert load_dataset("builtin:mnist#new", "test", lambda image: image).class_names[0] == "5"
    rows = [(f"{name}/0.png", label, name) for label, name in enumerate("abc")]
    for path, _, _ in rows:
        write_image(tmp_path / path)
    file = write_split_file(tmp_path / "split.json", {"train": rows, "test": rows})
    half = load_dataset(f"{file}#new", "train", lambda image: image)
    assert (half.class_names, half.labels.tolist()) == (("c",), [0])
    assert available_splits(f"{file}#base") == ("train", "test")


def test_a_half_without_images(tmp_path):
    root = write_folder(tmp_path / "one", {"a": 2})
    with pytest.raises(DataError, match=r"the new half of the classes of one has no images"):
        load_dataset(f"{root}#new", "train", lambda image: image)


def test_few_shot_draws_before_the_classes_are_divided(tmp_path):
    """As CoOp does, whose base images are a part of all its images."""
    root = write_folder(tmp_path / "pets", dict.fromkeys("abcd", 9))
    whole = few_shot(load_dataset(str(root), "train", lambda image: image), 3, 1).half("new")
    config = FinetuneConfig(train_data=f"{root}#new", shots=3, seed=1, augment=False)

    class Clip:
        preprocess_val = preprocess_train = staticmethod(lambda image: image)

    assert RunData(config, Clip()).plain.images == whole.images


def test_the_other_half_may_have_few_images(tmp_path):
    root = write_folder(tmp_path / "pets", {"a": 1, "b": 4, "c": 4, "d": 4})
    whole = load_dataset(str(root), "train", lambda image: image)
    drawn = few_shot(whole, 3, 1, whole.half_of_classes("new")).half("new")
    assert drawn.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="class 'a' of pets has 1 readable"):
        few_shot(whole, 3, 1, whole.half_of_classes("base"))


def test_training_images_that_are_evaluated_are_told_in_halves_too(tmp_path, capsys):
    root = write_folder(tmp_path / "pets", dict.fromkeys("abcd", 3))

    class Clip:
        preprocess_val = preprocess_train = staticmethod(lambda image: image)

    specs = tuple(f"{root}{half}" for half in ("", "#base", "#new"))
    config = FinetuneConfig(train_data=f"{root}#base", eval_data=specs, shots=2, augment=False)
    data = RunData(config, Clip())
    assert [data.includes_training(spec) for spec in specs] == [True, True, False]
    assert [data.is_shifted(spec) for spec in specs] == [True, False, True]
    assert "training images included" in capsys.readouterr().err
