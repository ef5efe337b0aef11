"""torchvision's data sets, from tiny ones in their layouts."""

import csv
import hashlib
import json
import pickle
import struct

import numpy as np
import pytest
import scipy.io
import torchvision.datasets as sets

from clip_helpers import write_image
from saft_clip.data import available_splits, load_dataset, resolved
from saft_clip.data.layouts import recognise
from saft_clip.data.torchvision_sets import RECIPES
from saft_clip.errors import DataError

RANDOM = np.random.default_rng(0)


def load(name, root, split="test"):
    return load_dataset(f"torchvision:{name}:{root}", split, lambda image: image)


def images(*paths):
    for path in paths:
        write_image(path)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(*shape):
    return RANDOM.integers(0, 256, shape, np.uint8)


# One maker for each: it writes a tiny data set into a folder and returns what must be loaded from
# the test split (or from all): labels, and some of the names of the classes.


def cifar(root, patch, name, labels_key, meta_key):
    make = getattr(sets, name)
    folder = root / make.base_folder
    folder.mkdir()

    def dump(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return md5(folder / file)

    for attribute, labels in (("train_list", [0, 1, 1]), ("test_list", [1, 0])):
        file = getattr(make, attribute)[0][0]
        content = {"data": noise(len(labels), 3072), labels_key: labels}
        patch.setattr(make, attribute, [[file, dump(file, content)]])
    file = make.meta["filename"]
    sum_ = dump(file, {meta_key: ["maple_tree", "cat"]})
    patch.setattr(make, "meta", {**make.meta, "md5": sum_})
    return [1, 0], ("maple tree", "cat")


def cifar10(root, patch):
    return cifar(root, patch, "CIFAR10", "labels", "label_names")


def cifar100(root, patch):
    return cifar(root, patch, "CIFAR100", "fine_labels", "fine_label_names")


def mnist(root, patch, name="MNIST", expected=("0", "1")):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, labels in (("train", [0, 1, 1]), ("t10k", [1, 0])):
        count = len(labels)
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + noise(count, 784).tobytes())
        header = struct.pack(">ii", 2049, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(labels))
    return [1, 0], expected


def fashion(root, patch):
    return mnist(root, patch, "FashionMNIST", ("T-shirt/top", "Trouser"))


def stl10(root, patch):
    folder = root / "stl10_binary"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(noise(2, 3, 96, 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([2, 1]))
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    patch.setattr(sets.STL10, "_check_integrity", lambda self: True)
    return [1, 0], ("airplane", "bird")


def svhn(root, patch):
    split_list = dict(sets.SVHN.split_list)
    for part in ("train", "test"):
        url, file, _ = split_list[part]
        values = {"X": noise(32, 32, 3, 2), "y": np.array([[10], [3]], np.uint8)}
        scipy.io.savemat(root / file, values)
        split_list[part] = [url, file, md5(root / file)]
    patch.setattr(sets.SVHN, "split_list", split_list)
    return [0, 3], ("0", "1")


def gtsrb(root, patch):
    base = root / "gtsrb"
    images(*(base / "GTSRB" / "Training" / f"0000{label}" / "0.ppm" for label in range(2)))
    images(*(base / "GTSRB" / "Final_Test" / "Images" / f"{number}.ppm" for number in range(2)))
    with open(base / "GT-final_test.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("Filename", "ClassId"), ("0.ppm", 14), ("1.ppm", 0)])
    return [14, 0], ("red and white circle 20 kph speed limit",)


def food101(root, patch):
    base = root / "food-101"
    content = {"apple_pie": ["apple_pie/1"], "pho": ["pho/1"]}
    images(*(base / "images" / f"{name}.jpg" for (name,) in content.values()))
    (base / "meta").mkdir()
    for part in ("train", "test"):
        (base / "meta" / f"{part}.json").write_text(json.dumps(content))
    return [0, 1], ("apple pie", "pho")


def dtd(root, patch):
    base = root / "dtd" / "dtd"
    names = ("polka-dotted/1.jpg", "banded/1.jpg")
    images(*(base / "images" / name for name in names))
    (base / "labels").mkdir()
    for part in ("train", "val", "test"):
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")
    return [1, 0], ("banded", "polka-dotted")


def eurosat(root, patch):
    folder = root / "eurosat" / "2750"
    images(folder / "SeaLake" / "1.jpg", folder / "AnnualCrop" / "1.jpg")
    return [0, 1], ("Annual Crop Land", "Sea or Lake")


def pets(root, patch):
    base = root / "oxford-iiit-pet"
    names = ("Maine_Coon_1", "pug_2")
    images(*(base / "images" / f"{name}.jpg" for name in names))
    (base / "annotations").mkdir()
    for part in ("trainval", "test"):
        lines = [f"{name} {number} 1 1" for number, name in enumerate(names, 1)]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    return [0, 1], ("Maine Coon", "Pug")


def flowers(root, patch):
    base = root / "flowers-102"
    images(*(base / "jpg" / f"image_{number:05d}.jpg" for number in (1, 2)))
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([3, 1])})
    splits = {key: np.array([2, 1]) for key in ("trnid", "valid", "tstid")}
    scipy.io.savemat(base / "setid.mat", splits)
    files = dict(sets.Flowers102._file_dict)
    for key, file in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        files[key] = (file, md5(base / file))
    patch.setattr(sets.Flowers102, "_file_dict", files)
    return [0, 2], ("pink primrose",)


def aircraft(root, patch):
    base = root / "fgvc-aircraft-2013b" / "data"
    images(*(base / "images" / f"{number}.jpg" for number in range(2)))
    (base / "variants.txt").write_text("707-320\nDC-9-30\n")
    for part in ("train", "val", "test"):
        (base / f"images_variant_{part}.txt").write_text("0 DC-9-30\n1 707-320\n")
    return [1, 0], ("707-320", "DC-9-30")


def country211(root, patch):
    photo = write_image(root / "photo.jpg")
    for part in ("train", "valid", "test"):
        for number in range(211):
            folder = root / "country211" / part / f"{number:03d}"
            folder.mkdir(parents=True)
            (folder / "1.jpg").symlink_to(photo)
    return list(range(211)), ("Andorra", "United Arab Emirates")


def sst2(root, patch):
    for part in ("train", "valid", "test"):
        folder = root / "rendered-sst2" / part
        images(folder / "positive" / "1.png", folder / "negative" / "1.png")
    return [0, 1], ("negative", "positive")


def caltech(root, patch):
    folder = root / "caltech101" / "101_ObjectCategories"
    for name in ("BACKGROUND_Google", "Faces", "yin_yang"):
        images(folder / name / "image_0001.jpg")
    return [0, 1], ("face", "yin yang")


def cars(root, patch):
    base = root / "stanford_cars"
    images(base / "cars_test" / "1.jpg", base / "cars_train" / "1.jpg")
    (base / "devkit").mkdir()
    kinds = [("fname", "O"), ("class", "O")]
    rows = {"annotations": np.array([("1.jpg", 2), ("1.jpg", 1)], dtype=kinds)}
    scipy.io.savemat(base / "devkit" / "cars_train_annos.mat", rows)
    scipy.io.savemat(base / "cars_test_annos_withlabels.mat", rows)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return [1, 0], ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")


MAKERS = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "MNIST": mnist,
    "FashionMNIST": fashion,
    "STL10": stl10,
    "SVHN": svhn,
    "GTSRB": gtsrb,
    "Food101": food101,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "OxfordIIITPet": pets,
    "Flowers102": flowers,
    "FGVCAircraft": aircraft,
    "Country211": country211,
    "RenderedSST2": sst2,
    "Caltech101": caltech,
    "StanfordCars": cars,
}
UNDIVIDED = ("EuroSAT", "Caltech101")
THREE = ("DTD", "Flowers102", "FGVCAircraft", "Country211", "RenderedSST2")


def test_every_one_is_tested():
    assert set(MAKERS) == set(RECIPES)


@pytest.mark.parametrize("name", MAKERS)
def test_what_torchvision_has_is_loaded(tmp_path, monkeypatch, name):
    """Every image and label is what torchvision itself gives."""
    labels, names = MAKERS[name](tmp_path, monkeypatch)
    dataset = load(name, tmp_path)
    assert dataset.name == name
    assert dataset.labels.tolist() == labels
    assert dataset.class_names[: len(names)] == names
    assert all("{}" in template for template in dataset.templates)
    options = RECIPES[name].splits["" if name in UNDIVIDED else "test"]
    own = getattr(sets, name)(root=str(tmp_path), **options)
    assert len(own) == len(dataset)
    for index, label in enumerate(labels):
        image, target = own[index]
        assert target == label
        assert np.array_equal(np.array(image.convert("RGB")), np.array(dataset[index][0]))
    spec = f"torchvision:{name}:{tmp_path}"
    splits = () if name in UNDIVIDED else ("train", "val", "test")
    splits = splits if name in THREE else tuple(split for split in splits if split != "val")
    assert available_splits(spec) == splits
    assert len(load(name, tmp_path, "train")) > 0
    assert recognise(spec).kind == f"torchvision's {name}"
    if splits and name not in THREE:
        with pytest.raises(DataError, match=f"torchvision's {name} has no val split, only train"):
            load(name, tmp_path, "val")


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_not_there_is_not_downloaded(tmp_path, name):
    with pytest.raises(DataError, match=r"never downloaded here|is missing or is not the file"):
        load(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Exploit:
    def __reduce__(self):
        return (open, ("exploited", "w"))


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_a_pickle_that_was_changed_is_never_read(tmp_path, monkeypatch, name, which):
    MAKERS[name](tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    make = getattr(sets, name)
    # torchvision's own checks come second: ours must not need them.
    monkeypatch.setattr(make, "_check_integrity", lambda self: True)
    file = make.meta["filename"] if which == "meta" else getattr(make, f"{which}_list")[0][0]
    (tmp_path / make.base_folder / file).write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(DataError, match=f"{file} is missing or is not the file that was published"):
        load(name, tmp_path)
    assert not (tmp_path / "exploited").exists()


def test_broken_files_are_one_sentence(tmp_path, monkeypatch):
    food101(tmp_path, monkeypatch)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(DataError, match=r"torchvision finds no whole Food101 in .* .Expecting"):
        load("Food101", tmp_path)
    gtsrb(tmp_path, monkeypatch)
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;99\n")
    with pytest.raises(DataError, match=r"GTSRB in .* is empty or malformed"):
        load("GTSRB", tmp_path)


def test_some_countries_have_no_names(tmp_path):
    for number in range(2):
        write_image(tmp_path / "country211" / "test" / f"{number}" / "1.jpg")
    with pytest.raises(DataError, match="it has 2 of 211 countries"):
        load("Country211", tmp_path)


@pytest.mark.parametrize("spec", ["torchvision:LSUN:x", "torchvision:CIFAR10", "torchvision:"])
def test_bad_specs(spec):
    with pytest.raises(DataError, match=r"must be torchvision:NAME:ROOT, with a NAME out of CIFAR"):
        available_splits(spec)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*none with MNIST in it"):
        load("MNIST", tmp_path / "none")


def test_the_same_folder_in_another_way(tmp_path):
    first = resolved(f"torchvision:MNIST:{tmp_path}")
    assert first == resolved(f"torchvision:MNIST:{tmp_path}/x/..")
    assert first != resolved(f"torchvision:CIFAR10:{tmp_path}")
