"""ImageNet, its variants, and the names of its classes."""

import pytest

from clip_helpers import write_folder, write_image
from saft_clip.data import available_splits, load_dataset
from saft_clip.data.imagenet import class_names, table
from saft_clip.data.layouts import recognise
from saft_clip.errors import DataError

TENCH, GOLDFISH, MISSILE, PROJECTILE = "n01440764", "n01443537", "n03773504", "n04008634"


def load(spec, split="test"):
    return load_dataset(str(spec), split, lambda image: image)


def folders(root, wnids, file="0.png"):
    """Class folders with one image each: a link, to make many of them fast."""
    image = write_image(root.parent / "image.png")
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        (root / wnid / file).symlink_to(image)
    return root


def test_names_of_the_thousand_classes():
    names = class_names()
    assert list(names) == sorted(names)
    assert len(names) == len(set(names.values())) == 1000
    assert (names[TENCH], names[MISSILE], names[PROJECTILE]) == ("tench", "missile", "projectile")
    assert names["n04355933"] == "sunglass"
    assert len(table("imagenet_a")) == len(table("imagenet_r")) == 200


@pytest.mark.parametrize("inner", ["images", "."])
def test_imagenet_as_coop_has_it(tmp_path, inner):
    """Their validation set is the test set."""
    root = tmp_path / "imagenet"
    write_folder(root / inner / "train", {TENCH: 2, GOLDFISH: 1})
    write_folder(root / inner / "val", {TENCH: 1, GOLDFISH: 2})
    dataset = load(root)
    assert dataset.class_names == ("tench", "goldfish")
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.name == "imagenet"
    assert dataset.templates == ("a photo of a {}.",)
    assert load(root, "train").labels.tolist() == [0, 0, 1]
    assert available_splits(str(root)) == ("train", "test")
    with pytest.raises(DataError, match="has no val split, only train, test"):
        load(root, "val")


def test_other_folders_beside_the_images_are_left_alone(tmp_path):
    """CoOp's own code makes one."""
    write_folder(tmp_path / "images" / "val", {TENCH: 1, GOLDFISH: 1})
    (tmp_path / "split_fewshot").mkdir()
    assert load(tmp_path).class_names == ("tench", "goldfish")


def test_several_places_are_not_guessed_between(tmp_path):
    for name in ("imagenetv2-a", "imagenetv2-b"):
        write_folder(tmp_path / name, {"0": 1, "1": 1})
    with pytest.raises(DataError, match=r"\(imagenetv2-a, imagenetv2-b\); name the one to use"):
        load(tmp_path)
    assert load(tmp_path / "imagenetv2-b").class_names == ("tench", "goldfish")


def test_val_stays_what_it_is_where_there_is_a_test_set(tmp_path):
    for split in ("train", "val", "test"):
        write_folder(tmp_path / split, {TENCH: 1, GOLDFISH: 1})
    assert available_splits(str(tmp_path)) == ("train", "val", "test")
    assert "/val/" in load(tmp_path, "val").images[0]


def test_classnames_file_wins(tmp_path):
    root = tmp_path / "imagenet"
    write_folder(root / "images" / "val", {TENCH: 1, GOLDFISH: 1})
    (root / "classnames.txt").write_text(f"{TENCH} a fish\n{GOLDFISH} gold fish\n")
    assert load(root).class_names == ("a fish", "gold fish")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{TENCH} tench\n", f"classnames.txt has no name for {GOLDFISH}"),
        (f"{TENCH}\n", f"has the line '{TENCH}'; write a WordNet number and a name"),
        ("tench\n", "has the line 'tench'"),
    ],
)
def test_malformed_classnames_files(tmp_path, content, message):
    write_folder(tmp_path / "val", {TENCH: 1, GOLDFISH: 1})
    (tmp_path / "classnames.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_any_folder_of_its_classes_has_their_names(tmp_path):
    """It can be trained on, as any image folder."""
    root = write_folder(tmp_path / "some", {TENCH: 2, GOLDFISH: 2})
    assert recognise(str(root)).kind == "folders of ImageNet classes"
    assert load(root, "train").class_names == ("tench", "goldfish")
    assert available_splits(str(root)) == ()


def test_one_other_folder_makes_it_an_image_folder(tmp_path):
    root = write_folder(tmp_path / "some", {TENCH: 1, "cat": 1})
    assert recognise(str(root)).kind == "image folder"
    assert load(root).class_names == ("cat", TENCH)


@pytest.mark.parametrize(
    ("variant", "classes", "outer"),
    [
        ("ImageNet-A", "imagenet_a", "imagenet-adversarial/imagenet-a"),
        ("ImageNet-R", "imagenet_r", "imagenet-rendition/imagenet-r"),
        ("ImageNet-A", "imagenet_a", "renamed"),
    ],
)
def test_variants_of_200_classes(tmp_path, variant, classes, outer):
    folders(tmp_path / outer, table(classes))
    (tmp_path / outer / "README.txt").write_text("not a class")
    for root in {tmp_path / outer.split("/")[0], tmp_path / outer}:
        dataset = load(root)
        assert dataset.name == recognise(str(root)).kind == variant
        assert dataset.class_names == tuple(class_names()[wnid] for wnid in table(classes))
        assert dataset.labels.tolist() == list(range(200))
        assert available_splits(str(root)) == ("test",)
        assert recognise(str(root)).complaints() == []
        with pytest.raises(DataError, match="has no train split, only test"):
            load(root, "train")


def test_a_variant_that_is_not_complete_says_so(tmp_path):
    root = folders(tmp_path / "imagenet-a", table("imagenet_a")[2:])
    missing = ", ".join(table("imagenet_a")[:2])
    assert recognise(str(root)).complaints() == [
        f"2 of the 200 class folders of ImageNet-A are missing: {missing}"
    ]
    assert len(load(root).class_names) == 198


@pytest.mark.parametrize(
    ("variant", "name", "file"),
    [
        ("ImageNet-Sketch", "imagenet-sketch/images", "x.png"),
        ("ImageNet-Sketch", "drawings", "sketch_0.JPEG"),
        ("ImageNet's validation set", "pictures", "ILSVRC2012_val_00000293.JPEG"),
    ],
)
def test_variants_of_all_classes(tmp_path, variant, name, file):
    folders(tmp_path / name, [TENCH, GOLDFISH], file)
    root = tmp_path / name.split("/")[0]
    assert recognise(str(root)).kind == variant
    assert available_splits(str(root)) == ("test",)
    assert len(load(root)) == 2
    assert recognise(str(root)).complaints()[0].startswith("998 of the 1,000 class folders of")


def test_v2_has_class_numbers(tmp_path):
    """Sorted as text, 10 would come before 2."""
    root = folders(tmp_path / "v2", map(str, range(1000)))
    dataset = load(root)
    assert dataset.name == "ImageNetV2"
    assert dataset.labels.tolist() == list(range(1000))
    assert dataset.class_names == tuple(class_names().values())
    assert [path.split("/")[-2] for path in dataset.images[:12]] == list(map(str, range(12)))
    assert available_splits(str(root)) == ("test",)


def test_v2_with_classnames_as_coop_has_it(tmp_path):
    inner = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    folders(inner, ["0", "2", "10"])
    wnids = table("imagenet")
    lines = [f"{wnid} class {number}" for number, wnid in enumerate(wnids)]
    (tmp_path / "imagenetv2" / "classnames.txt").write_text("\n".join(lines))
    for root in (inner, inner.parent):
        assert load(root).class_names == ("class 0", "class 2", "class 10")
        assert recognise(str(root)).kind == "ImageNetV2"


def test_folders_of_digits_are_digits(tmp_path):
    root = write_folder(tmp_path / "digits", {str(digit): 1 for digit in range(10)})
    assert load(root).class_names == tuple("0123456789")
    assert recognise(str(root)).kind == "image folder"
