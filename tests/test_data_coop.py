"""CoOp's data sets, by their folders."""

import json

import pytest

from clip_helpers import write_folder, write_image, write_split_file
from saft_clip.data import available_splits, load_dataset
from saft_clip.data.coop import PUBLISHED
from saft_clip.data.layouts import recognise
from saft_clip.errors import DataError

#: Image folder and prompt of each, as KaiyangZhou/CoOp's DATASETS.md and zsclip.py have them.
SETS = {
    "Caltech101": ("caltech-101/101_ObjectCategories", "a photo of a {}."),
    "OxfordPets": ("oxford_pets/images", "a photo of a {}, a type of pet."),
    "StanfordCars": ("stanford_cars", "a photo of a {}."),
    "OxfordFlowers": ("oxford_flowers/jpg", "a photo of a {}, a type of flower."),
    "Food101": ("food-101/images", "a photo of {}, a type of food."),
    "SUN397": ("sun397/SUN397", "a photo of a {}."),
    "DescribableTextures": ("dtd/images", "{} texture."),
    "EuroSAT": ("eurosat/2750", "a centered satellite photo of {}."),
    "UCF101": ("ucf101/UCF-101-midframes", "a photo of a person doing {}."),
}


def load(spec, split="train", **options):
    return load_dataset(str(spec), split, lambda image: image, **options)


def rows(*names):
    entries = [(f"some/{name}.jpg", label, name) for label, name in enumerate(names)]
    return {"train": entries, "val": entries[:1], "test": entries}


def make(tmp_path, name, *classes):
    folder = tmp_path / SETS[name][0]
    root = tmp_path / SETS[name][0].split("/")[0]
    splits = rows(*classes)
    for path, _, _ in splits["train"]:
        write_image(folder / path)
    write_split_file(root / f"split_zhou_{name}.json", splits)
    return root


def test_all_with_a_split_file_are_here():
    assert set(SETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", SETS)
def test_the_folder_is_enough(tmp_path, name):
    root = make(tmp_path, name, "big_cat", "dog")
    dataset = load(root)
    assert dataset.name == name
    assert dataset.class_names == ("big cat", "dog")
    assert dataset.templates == (SETS[name][1],)
    assert dataset.labels.tolist() == [0, 1]
    assert dataset[0][0].size == (24, 20)
    assert available_splits(str(root)) == ("train", "val", "test")
    assert recognise(str(root)).kind == f"CoOp's {name}"
    assert load(root, templates="a {}").templates == ("a {}",)


def test_the_split_file_alone_has_the_prompt_too(tmp_path):
    root = make(tmp_path, "OxfordPets", "cat", "dog")
    assert load(root / "split_zhou_OxfordPets.json").templates == (SETS["OxfordPets"][1],)


def test_their_folder_is_preferred_to_others_with_the_same_images(tmp_path):
    root = make(tmp_path, "OxfordPets", "cat", "dog")
    write_image(root / "copies" / "some" / "cat.jpg")
    assert load(root).images[0] == str(root / "images" / "some" / "cat.jpg")


def test_raw_names_are_renamed_as_in_coop(tmp_path):
    root = make(tmp_path, "EuroSAT", "AnnualCrop", "Sea or Lake", "River")
    assert load(root).class_names == ("Annual Crop Land", "Sea or Lake", "River")
    root = make(tmp_path, "Caltech101", "Faces", "ant")
    assert load(root).class_names == ("face", "ant")


def test_images_in_an_unusual_folder_are_found(tmp_path):
    root = make(tmp_path, "UCF101", "PlayingPiano", "Archery")
    (root / "UCF-101-midframes").rename(root / "frames")
    assert load(root).images[0] == str(root / "frames" / "some" / "PlayingPiano.jpg")


def test_other_split_files_of_that_format_keep_the_usual_prompt(tmp_path):
    splits = rows("a", "b")
    for path, _, _ in splits["train"]:
        write_image(tmp_path / path)
    write_split_file(tmp_path / "split_zhou_Mine.json", splits)
    dataset = load(tmp_path)
    assert (dataset.name, dataset.templates) == ("Mine", ("a photo of a {}.",))


def test_several_split_files_are_not_guessed_between(tmp_path):
    root = make(tmp_path, "OxfordPets", "cat", "dog")
    (root / "split_zhou_Other.json").write_text(json.dumps(rows("x")))
    with pytest.raises(DataError, match=r"several split files \(.*Pets.json.*; name the one"):
        load(root)


# FGVC-Aircraft


def aircraft(folder):
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nDC-9-30\nF/A-18\n")
    for number in range(4):
        write_image(folder / "images" / f"00{number}.jpg")
    (folder / "images_variant_train.txt").write_text("000 DC-9-30\n001 707-320\n")
    (folder / "images_variant_test.txt").write_text("002 F/A-18\n\n003 707-320\n")


@pytest.mark.parametrize("inner", ["", "data"])
def test_aircraft(tmp_path, inner):
    root = tmp_path / "fgvc_aircraft"
    aircraft(root / inner)
    dataset = load(root)
    assert dataset.class_names == ("707-320", "DC-9-30", "F/A-18")
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.templates == ("a photo of a {}, a type of aircraft.",)
    assert dataset[1][0].size == (24, 20)
    assert load(root, "test").labels.tolist() == [2, 0]
    assert available_splits(str(root)) == ("train", "test")
    assert recognise(str(root)).kind == "CoOp's FGVCAircraft"
    with pytest.raises(DataError, match="has no val split, only train, test"):
        load(root, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"000 Boeing\n", "line 1 of .*train.txt names the variant 'Boeing', which is not in var"),
        (b"000\n", "line 1 of .*train.txt names the variant ''"),
        (b"", "train.txt lists no image"),
        (b"\xff\xfe", "train.txt is not a text file in UTF-8"),
    ],
)
def test_malformed_aircraft_lists(tmp_path, content, message):
    aircraft(tmp_path / "data")
    (tmp_path / "data" / "images_variant_train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_folder_with_other_text_files_is_an_image_folder(tmp_path):
    root = write_folder(tmp_path / "pets", {"a": 1, "b": 1})
    (root / "variants.txt").write_text("x\n")
    (root / "split.json").write_text("{}")
    assert recognise(str(root)).kind == "image folder"
    assert load(root).class_names == ("a", "b")
