"""Data sets that torchvision has stored on this disk: ``torchvision:CIFAR10:ROOT``.

Nothing is ever downloaded. CIFAR is stored as pickles, and a pickle can run code: each file is read
only if its MD5 is that of the published one, which is compared here, before torchvision does so
again. torchvision reads the other data sets from images, text, MATLAB's and plain binary files (and
what versions of years ago have left of MNIST as tensors only).

Prompts are CoOp's where it has the data set, else those of Radford et al. 2021 (openai/CLIP,
data/prompts.md), from which the names of the countries and of the traffic signs are, too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from saft_clip.data.coop import AIRCRAFT_TEMPLATE, PUBLISHED
from saft_clip.data.listing import Layout, Listing, class_name, require_split
from saft_clip.data.spec import TORCHVISION
from saft_clip.errors import DataError, MissingExtraError
from saft_clip.prompts import DEFAULT_TEMPLATES
from saft_clip.shortages import is_shortage
from saft_kernels.untrusted import reason


@dataclass(frozen=True)
class Recipe:
    """How one of torchvision's classes gives images, labels and names.

    Attributes:
        splits: our name of a split -> what its constructor is given for it.
        images: from an instance: file paths or uint8 arrays.
        labels: from an instance: the number of each image's class.
        names: from an instance: the names of the classes.
        templates: prompts.
    """

    splits: Mapping[str, Mapping[str, Any]]
    images: Callable[[Any], Iterable[Any]]
    labels: Callable[[Any], Iterable[Any]]
    names: Callable[[Any], Sequence[str]]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


def _paths(data: Any) -> Iterator[str]:
    return map(str, data._image_files)


def _own_labels(data: Any) -> Any:
    return data._labels


def _classes(data: Any) -> Any:
    return data.classes


def _channels_last(data: Any) -> Any:
    return np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))


def _caltech_paths(data: Any) -> Iterator[str]:
    for label, number in zip(data.y, data.index, strict=True):
        folder = os.path.join(data.root, "101_ObjectCategories", data.categories[label])
        yield os.path.join(folder, f"image_{number:04d}.jpg")


def _asset(name: str) -> tuple[str, ...]:
    file = resources.files("saft_clip") / "assets" / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def _countries(data: Any) -> Sequence[str]:
    """Their folders have two-letter codes, in whose order the names are."""
    names = _asset("country211")
    if len(data.classes) != len(names):
        raise ValueError(f"it has {len(data.classes)} of {len(names)} countries")
    return names


def _of(data: str) -> Callable[[Any], list[Any]]:
    """Paths from the pairs of path and label that an attribute holds."""
    return lambda made: [path for path, _ in getattr(made, data)]


def _with(data: str) -> Callable[[Any], list[Any]]:
    """The labels of such pairs."""
    return lambda made: [label for _, label in getattr(made, data)]


def _renamed(name: str) -> Callable[[Any], list[str]]:
    """Names of the classes as CoOp writes them."""
    renamed = PUBLISHED[name].renamed
    return lambda data: [
        renamed.get(one, one) for one in getattr(data, "classes", None) or data.categories
    ]


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_BY_NAME = {"train": {"split": "train"}, "test": {"split": "test"}}
_BY_THREE_NAMES = {split: {"split": split} for split in ("train", "val", "test")}
_UNDIVIDED: Mapping[str, Mapping[str, Any]] = {"": {}}
_NUMBER = ('a photo of the number: "{}".',)


def _coop(name: str) -> tuple[str, ...]:
    return (PUBLISHED[name].template,)


RECIPES = {
    "CIFAR10": Recipe(_BY_FLAG, lambda d: d.data, lambda d: d.targets, _classes),
    "CIFAR100": Recipe(_BY_FLAG, lambda d: d.data, lambda d: d.targets, _classes),
    "MNIST": Recipe(
        _BY_FLAG,
        lambda d: d.data.numpy(),
        lambda d: d.targets,
        lambda d: [name.partition(" ")[0] for name in d.classes],  # "0 - zero"
        _NUMBER,
    ),
    "FashionMNIST": Recipe(_BY_FLAG, lambda d: d.data.numpy(), lambda d: d.targets, _classes),
    "STL10": Recipe(_BY_NAME, _channels_last, lambda d: d.labels, _classes),
    "SVHN": Recipe(
        _BY_NAME, _channels_last, lambda d: d.labels, lambda d: tuple("0123456789"), _NUMBER
    ),
    "GTSRB": Recipe(
        _BY_NAME,
        _of("_samples"),
        _with("_samples"),
        lambda d: _asset("gtsrb"),
        (
            'a zoomed in photo of a "{}" traffic sign.',
            'a centered photo of a "{}" traffic sign.',
            'a close up photo of a "{}" traffic sign.',
        ),
    ),
    "Food101": Recipe(_BY_NAME, _paths, _own_labels, _classes, _coop("Food101")),
    "DTD": Recipe(_BY_THREE_NAMES, _paths, _own_labels, _classes, _coop("DescribableTextures")),
    "EuroSAT": Recipe(
        _UNDIVIDED, _of("samples"), _with("samples"), _renamed("EuroSAT"), _coop("EuroSAT")
    ),
    "OxfordIIITPet": Recipe(
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        lambda d: map(str, d._images),
        _own_labels,
        _classes,
        _coop("OxfordPets"),
    ),
    "Flowers102": Recipe(_BY_THREE_NAMES, _paths, _own_labels, _classes, _coop("OxfordFlowers")),
    "FGVCAircraft": Recipe(_BY_THREE_NAMES, _paths, _own_labels, _classes, (AIRCRAFT_TEMPLATE,)),
    "Country211": Recipe(
        {**_BY_NAME, "val": {"split": "valid"}},
        _of("samples"),
        _with("samples"),
        _countries,
        (
            "a photo i took in {}.",
            "a photo i took while visiting {}.",
            "a photo from my home country of {}.",
            "a photo from my visit to {}.",
            "a photo showing the country of {}.",
        ),
    ),
    "RenderedSST2": Recipe(
        _BY_THREE_NAMES,
        _of("_samples"),
        _with("_samples"),
        _classes,
        ("a {} review of a movie.",),
    ),
    "Caltech101": Recipe(
        _UNDIVIDED,
        _caltech_paths,
        lambda d: d.y,
        _renamed("Caltech101"),
        _coop("Caltech101"),
    ),
    "StanfordCars": Recipe(
        _BY_NAME, _of("_samples"), _with("_samples"), _classes, _coop("StanfordCars")
    ),
}


class TorchvisionSet(Layout):
    """A data set of torchvision's.

    Args:
        spec: ``torchvision:NAME:ROOT``, with the ROOT that torchvision was given.

    Raises:
        DataError: if there is no such data set, or no such folder.
    """

    def __init__(self, spec: str) -> None:
        self.name, _, root = spec.removeprefix(TORCHVISION).partition(":")
        if self.name not in RECIPES or not root:
            raise DataError(
                f"{spec} must be {TORCHVISION}NAME:ROOT, with a NAME out of {', '.join(RECIPES)}"
            )
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"there is no folder {self.root} with {self.name} in it")
        self.recipe = RECIPES[self.name]

    @property
    def kind(self) -> str:
        """A data set of torchvision's."""
        return f"torchvision's {self.name}"

    def splits(self) -> tuple[str, ...]:
        """The splits of the data set."""
        splits = self.recipe.splits
        return tuple(split for split in ("train", "val", "test") if split in splits)

    def listing(self, split: str) -> Listing:
        """The images, as torchvision lists them; those that it keeps in memory are loaded."""
        require_split(f"torchvision's {self.name}", split, self.splits())
        made = self._made(self.recipe.splits[split if self.splits() else ""])
        try:
            labels = [int(label) for label in self.recipe.labels(made)]
            images = list(self.recipe.images(made))
            names = tuple(map(class_name, self.recipe.names(made)))
        except (AttributeError, ValueError) as error:
            raise self._refused(error) from error
        if not images or not all(0 <= label < len(names) for label in labels):
            raise DataError(f"torchvision's {self.name} in {self.root} is empty or malformed")
        return Listing(self.name, images, labels, names, self.recipe.templates)

    def _made(self, options: Mapping[str, Any]) -> Any:
        import torchvision.datasets

        make = getattr(torchvision.datasets, self.name)
        self._require_published(make)
        if self.name == "Caltech101" and not (self.root / "caltech101").is_dir():
            raise self._refused(RuntimeError("there is no folder caltech101"))  # it would make one
        try:
            return make(root=str(self.root), download=False, **options)
        except ImportError as error:
            raise MissingExtraError(
                f"torchvision's {self.name} needs a package that cannot be imported ({error}): "
                "install the data extra, pip install 'saft-kernels[data]'"
            ) from error
        # Broken files make torchvision raise anything.
        except Exception as error:
            if is_shortage(error):
                raise
            raise self._refused(error) from error

    def _require_published(self, make: Any) -> None:
        """Refuse pickles that are not the published ones, before anything reads them."""
        if not self.name.startswith("CIFAR"):
            return
        files = [*make.train_list, *make.test_list, (make.meta["filename"], make.meta["md5"])]
        for file, md5 in files:
            path = self.root / make.base_folder / file
            if _md5(path) != md5:
                raise DataError(
                    f"{path} is missing or is not the file that was published (MD5 {md5}); as a "
                    "pickle it could run any code, and is not read"
                )

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"torchvision finds no whole {self.name} in {self.root} ({reason(error)}); it is never "
            "downloaded here"
        )


def _md5(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    except OSError:
        return None
