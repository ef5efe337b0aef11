"""saft data check."""

import json

import numpy as np
import pytest
from PIL import Image

from clip_helpers import cut_short, write_folder, write_image, write_split_file
from saft_clip.cli import main
from saft_clip.data.check import check_data


def photos(root, counts, seed=0):
    """Class folders of images that all differ."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = random.integers(0, 256, (20 + index, 30, 3), np.uint8)
            Image.fromarray(image).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def pets(tmp_path):
    root = tmp_path / "pets"
    photos(root / "train", {"big_cat": 3, "dog": 2})
    photos(root / "test", {"big_cat": 1, "dog": 4}, seed=1)
    return root


def problems(*specs, **options):
    return check_data([str(spec) for spec in specs], show_progress=False, **options).problems


def test_what_is_in_data_without_faults(pets):
    found = check_data([str(pets)], show_progress=False)
    assert found.problems == found.matches == []
    (facts,) = found.data
    assert (facts.kind, facts.name, facts.classes) == ("image folder", "pets", ("big cat", "dog"))
    assert facts.templates == ("a photo of a {}.",)
    train, test = facts.splits
    assert (train.split, train.images, train.per_class) == ("train", 5, {"big cat": 3, "dog": 2})
    assert (train.smallest, train.largest) == ((30, 20), (30, 22))
    assert (test.split, test.images, test.largest) == ("test", 5, (30, 23))


def test_the_command(pets, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert main(["data", "check", str(pets), "builtin:uci", "--json", str(file), "--quick"]) == 1
    shown = capsys.readouterr().out
    for text in ("image folder", "built-in domain", "a photo of a {}.", "big cat: 3", "1,797"):
        assert text in shown, text
    assert "not decoded" in shown
    assert "10 class(es) of builtin:uci are not in" in shown
    found = json.loads(file.read_text())
    assert found["data"][0]["splits"][0]["per_class"] == {"big cat": 3, "dog": 2}
    assert found["problems"][-1] in shown.replace("wrong: ", "")
    assert main(["data", "check", str(pets)]) == 0
    shown = capsys.readouterr().out
    assert "nothing wrong found" in shown
    assert "30 x 20 to 22" in shown


def test_wrong_specs_do_not_end_it(pets, tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "none"), str(pets), f"{pets}#rain:3"]) == 1
    shown = capsys.readouterr().out
    assert f"wrong: there is no folder {tmp_path}/none" in shown
    assert "there is no corruption 'rain'" in shown
    assert "big cat: 3" in shown


def test_a_json_file_that_cannot_be_written_is_found_first(pets, tmp_path, capsys):
    assert main(["data", "check", str(pets), "--json", str(tmp_path / "no" / "x.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_unreadable_images(pets):
    cut_short(pets / "train" / "dog" / "1.png")
    (said,) = problems(pets)
    assert said.startswith(f"1 image(s) of {pets} (train) cannot be read: {pets}/train/dog/1.png: ")
    assert problems(pets, decode=False) == []
    (pets / "train" / "dog" / "1.png").unlink()
    (pets / "train" / "dog" / "1.png").symlink_to("nowhere.png")
    (said,) = problems(pets, decode=False)
    assert said.endswith("1.png: it cannot be read")


def test_all_images_unreadable(tmp_path, capsys):
    root = photos(tmp_path / "x", {"a": 1, "b": 1})
    for name in "ab":
        (root / name / "0.png").write_text("no image")
    assert main(["data", "check", str(root)]) == 1
    assert "none can be read" in capsys.readouterr().out


def test_empty_and_absent_classes(pets):
    for name in ("x", "y"):
        (pets / "train" / name).mkdir()
    (said,) = (line for line in problems(pets) if "(train)" not in line and "(test)" not in line)
    assert f"the class folder {pets}/train/x holds no image, and so do 1 more: y" in said
    for name in ("x", "y"):
        (pets / "train" / name).rmdir()
    photos(pets / "test", {"fox": 1}, seed=2)
    assert problems(pets) == [f"1 class(es) have no image in {pets} (train): fox"]


def test_one_class(tmp_path):
    (said,) = problems(photos(tmp_path / "x", {"a": 2}))
    assert "has one class only, 'a'" in said


def test_two_classes_of_one_name(tmp_path):
    (said,) = problems(photos(tmp_path / "x", {"big-cat": 1, "Big_Cat": 1}))
    assert "have the same name: 'Big Cat' and 'big-cat'" in said


def test_duplicates(pets, tmp_path):
    copy = (pets / "train" / "dog" / "0.png").read_bytes()
    (pets / "train" / "big_cat" / "copy.png").write_bytes(copy)
    Image.open(pets / "train" / "dog" / "1.png").save(pets / "test" / "dog" / "same.bmp")
    twice, across = problems(pets)
    assert twice.startswith(f"1 image(s) of {pets} (train) are there twice, 1 of them in another")
    assert twice.endswith(f"{pets}/train/big_cat/copy.png = {pets}/train/dog/0.png")
    assert across.startswith(f"1 image(s) of {pets} (train) are in {pets} (test), too: ")
    assert len(problems(pets, decode=False)) == 1, "another format needs decoding"


def test_duplicates_across_specs(pets, tmp_path):
    other = photos(tmp_path / "other", {"dog": 7}, seed=3)
    for index in range(7):
        (pets / "train" / "dog" / f"_{index}.png").write_bytes(
            (other / "dog" / f"{index}.png").read_bytes()
        )
    said = problems(pets, other)[0]
    assert said.startswith(f"7 image(s) of {pets} (train) are in {other}, too: ")
    assert said.endswith("; and 2 more")


def test_classes_that_do_not_match(pets, tmp_path):
    fewer = photos(tmp_path / "fewer", {"Big-Cat": 2}, seed=4)
    other = photos(tmp_path / "other", {"BIG CAT": 1, "hound": 1}, seed=5)
    found = check_data([str(pets), str(fewer), str(other)], show_progress=False)
    first, second = found.matches
    assert (first.shared, first.only_first, first.only_other) == (1, ("dog",), ())
    assert (second.shared, second.only_first, second.only_other) == (1, ("dog",), ("hound",))
    assert found.problems == [
        f"{fewer} has one class only, 'Big Cat': there is nothing to tell".replace(" Cat", "-Cat"),
        f"1 class(es) of {other} are not in {pets}: hound (only the first has dog)",
    ]


def test_corrupted_data(tmp_path):
    root = tmp_path / "x"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (name == "a" and "red") or "blue").save(root / name / "0.png")
    write_image(root / "a" / "small.png")
    found = check_data([f"{root}#fog:2"], show_progress=False)
    assert found.data[0].splits[0].smallest == (40, 40)
    assert "24 x 20 pixels are too few" in found.problems[0]


def test_split_files_and_terminal_codes(tmp_path, capsys):
    rows = [("1.png", 0, "a\x1b[2J"), ("2.png", 1, "[red]b")]
    for path, _, _ in rows:
        write_image(tmp_path / path)
    file = write_split_file(tmp_path / "split.json", {"train": rows, "test": rows[:1]})
    assert main(["data", "check", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[red]b" in shown
    assert "1 image(s) of" in shown


def test_links_in_folders_of_one_class(tmp_path):
    root = write_folder(tmp_path / "x", {"a": 1, "b": 1})
    (root / "b" / "again.png").symlink_to(root / "a" / "000.png")
    assert "1 of them in another class" in problems(root)[0]


def test_a_corrupted_copy_of_the_same_split_is_no_duplicate(pets, capsys):
    """Its training images in the other's test set would be."""
    assert problems("builtin:uci", "builtin:uci#fog:2", decode=False) == []
    copy = (pets / "train" / "dog" / "0.png").read_bytes()
    (pets / "test" / "dog" / "copy.png").write_bytes(copy)
    here, *_ = problems(pets, f"{pets}/../pets#fog:1", decode=False)
    assert "(train) are in" in here
    assert problems(pets, pets, decode=False) == [here, here]


def test_what_is_wrong_with_all_splits_is_said_once():
    found = check_data(["builtin:mnist#fog:9"], show_progress=False).problems
    assert found == ["the severity of fog must be 1 to 5, not 9"]
