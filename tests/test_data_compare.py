"""Classes of the same name and images that are there twice."""

import numpy as np
import torch
from PIL import Image

from clip_helpers import write_folder
from saft_clip.data import find_duplicates, load_dataset, match_classes
from saft_clip.data.duplicates import Place
from saft_clip.data.images import ImagePart, source_of


def load(spec, split="test"):
    return load_dataset(str(spec), split, lambda image: image)


def test_classes_match_by_name():
    match = match_classes(
        ["Great_White-Shark", "tench", "T-shirt", "dog"], [" dog ", "great white shark", "t shirts"]
    )
    assert match.pairs == ((3, 0), (0, 1))
    assert match.only_first == ("tench", "T-shirt")
    assert match.only_other == ("t shirts",)


def test_no_class_and_repeated_classes():
    assert match_classes([], ["a"]).only_other == ("a",)
    match = match_classes(["a", "A"], ["a", "a_"])
    assert match.pairs == ((0, 0),)
    assert (match.only_first, match.only_other) == ((), ())


def pictures(root):
    """Two classes of one picture each, in two formats that lose nothing, and one of its own."""
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    names = ("ant/a.png", "ant/b.png", "bee/a.bmp", "bee/c.png")
    for name, image in zip(names, values[[0, 1, 0, 2]], strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return root


def test_equal_pixels_are_found_within_and_across(tmp_path):
    first = load(pictures(tmp_path / "first"))
    second = load(write_folder(tmp_path / "second", {"x": 2}))
    Image.open(first.images[3]).save(second.images[1])
    found = find_duplicates([first, second], show_progress=False)
    assert found == [(Place(0, 0), Place(0, 2)), (Place(0, 3), Place(1, 1))]


def test_equal_bytes_are_found_without_decoding(tmp_path):
    dataset = load(pictures(tmp_path / "first"))
    assert find_duplicates([dataset], decode=False) == []
    copy = tmp_path / "first" / "bee" / "d.png"
    copy.write_bytes((tmp_path / "first" / "ant" / "b.png").read_bytes())
    dataset = load(tmp_path / "first")
    assert find_duplicates([dataset], decode=False) == [(Place(0, 1), Place(0, 4))]


def test_unreadable_images_equal_none(tmp_path):
    root = write_folder(tmp_path / "some", {"a": 3})
    for name in ("000.png", "001.png"):
        (root / "a" / name).write_text("no image")
    dataset = load(root)
    assert find_duplicates([dataset]) == []
    (root / "a" / "000.png").unlink()
    (root / "a" / "001.png").unlink()
    assert find_duplicates([dataset], decode=False) == []


def test_sizes_count_and_arrays_are_compared_too():
    digits = load("builtin:mnist")
    assert find_duplicates([digits.subset(range(20))]) == []
    found = find_duplicates([digits.subset([1, 2]), digits.subset([2, 2])])
    assert found == [(Place(0, 1), Place(1, 0)), (Place(0, 1), Place(1, 1))]


def test_corrupted_images_are_compared_as_they_were(tmp_path):
    root = pictures(tmp_path / "first")
    found = find_duplicates([load(root), load(f"{root}#fog:1")])
    assert (Place(0, 3), Place(1, 3)) in found


def test_an_image_inside_another_file(tmp_path):
    dataset = load(pictures(tmp_path / "first"))
    stored = source_of(dataset.images[1]).read()
    holder = tmp_path / "all"
    holder.write_bytes(b"xyz" + stored + b"more")
    part = ImagePart(str(holder), "b.png", 3, len(stored))
    assert torch.equal(
        torch.from_numpy(np.array(part.open())), torch.from_numpy(np.array(dataset.open(1)))
    )
    assert part.read() == stored
    assert part.label == f"{holder}/b.png"
    assert part.mark(True) == b"b.png" + stored
    assert part.mark(False) == source_of(dataset.images[1]).mark(False)
