"""CoOp's data sets and split files: for each split, a list of ``[path, label, class name]``.

Zhou et al. 2022 ("Learning to Prompt for Vision-Language Models") published one for nine of their
eleven data sets, named ``split_zhou_<data set>.json``; most few-shot work on CLIP uses them.
FGVC-Aircraft has lists of its own, and ImageNet is in :mod:`saft_clip.data.imagenet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saft_clip.data.listing import SPLITS, Layout, Listing, read_lines, require_split
from saft_clip.data.spec import SEPARATOR
from saft_clip.errors import DataError
from saft_clip.prompts import DEFAULT_TEMPLATES
from saft_kernels.untrusted import is_file, parse_json, quoted, shown

_FORMAT = 'expected {"train": [[path, label, class name], ...], "val": ..., "test": ...}'


@dataclass(frozen=True)
class Published:
    """What belongs to one of CoOp's split files (KaiyangZhou/CoOp: DATASETS.md, zsclip.py).

    Attributes:
        template: its prompt.
        folder: that of the images, beside the split file.
        renamed: names of classes that its authors write in another way than the data; their split
            files have these names already, files that others make need not.
    """

    template: str
    folder: str
    renamed: Mapping[str, str] = field(default_factory=dict)


#: By the name of the split file, without ``split_zhou_`` and ``.json``.
PUBLISHED = {
    "Caltech101": Published(
        "a photo of a {}.",
        "101_ObjectCategories",
        {
            "airplanes": "airplane",
            "Faces": "face",
            "Leopards": "leopard",
            "Motorbikes": "motorbike",
        },
    ),
    "OxfordPets": Published("a photo of a {}, a type of pet.", "images"),
    "StanfordCars": Published("a photo of a {}.", "."),
    "OxfordFlowers": Published("a photo of a {}, a type of flower.", "jpg"),
    "Food101": Published("a photo of {}, a type of food.", "images"),
    "SUN397": Published("a photo of a {}.", "SUN397"),
    "DescribableTextures": Published("{} texture.", "images"),
    "EuroSAT": Published(
        "a centered satellite photo of {}.",
        "2750",
        {
            "AnnualCrop": "Annual Crop Land",
            "HerbaceousVegetation": "Herbaceous Vegetation Land",
            "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings",
            "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land",
            "Residential": "Residential Buildings",
            "SeaLake": "Sea or Lake",
        },
    ),
    "UCF101": Published("a photo of a person doing {}.", "UCF-101-midframes"),
}

#: That of FGVC-Aircraft, which comes with lists of its own.
AIRCRAFT_TEMPLATE = "a photo of a {}, a type of aircraft."

_PREFIX = "split_zhou_"


class SplitFile(Layout):
    """A split file.

    Args:
        spec: ``SPLIT.json`` or ``SPLIT.json::FOLDER``; without a folder, the images are looked for
            beside the file and in each folder beside it.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @property
    def kind(self) -> str:
        """A split file in CoOp's format, and whose if it is one of theirs."""
        name = _name(self.spec)
        return f"CoOp's {name}" if name in PUBLISHED else "split file in CoOp's format"

    def splits(self) -> tuple[str, ...]:
        """The splits of the file that hold images."""
        content = read_split_file(self.spec)
        return tuple(split for split in SPLITS if content.get(split))

    def listing(self, split: str) -> Listing:
        """The images in the file's order."""
        return list_images(self.spec, split)


def find_split_file(root: Path) -> Path | None:
    """The split file of CoOp's in a data set's folder, if there is one.

    Raises:
        DataError: if there are several.
    """
    found = sorted(root.glob(f"{_PREFIX}*.json"))
    if len(found) > 1:
        raise DataError(
            f"{root} holds several split files ({', '.join(file.name for file in found)}); "
            "name the one to use"
        )
    return found[0] if found else None


class Aircraft(Layout):
    """FGVC-Aircraft as it was published, with variants as classes: the folder ``data`` of it.

    Args:
        root: the folder that holds ``variants.txt`` and ``images``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def find(root: Path) -> Path | None:
        """The folder with the lists: this one, or ``data`` in it."""
        for folder in (root, root / "data"):
            if (folder / "variants.txt").is_file() and any(_aircraft_lists(folder)):
                return folder
        return None

    @property
    def kind(self) -> str:
        """CoOp's FGVCAircraft."""
        return "CoOp's FGVCAircraft"

    def splits(self) -> tuple[str, ...]:
        """The splits that have a list."""
        return tuple(_aircraft_lists(self.root))

    def listing(self, split: str) -> Listing:
        """The images in the list's order."""
        require_split(self.root, split, self.splits())
        names = read_lines(self.root / "variants.txt")
        numbers = {name: number for number, name in enumerate(names)}
        file = _aircraft_list(self.root, split)
        images, labels = [], []
        for position, line in enumerate(read_lines(file), start=1):
            image, _, name = line.partition(" ")
            if name not in numbers:
                raise DataError(
                    f"line {position} of {file} names the variant {quoted(name)}, "
                    "which is not in variants.txt"
                )
            images.append(str(self.root / "images" / f"{image}.jpg"))
            labels.append(numbers[name])
        if not images:
            raise DataError(f"{file} lists no image")
        return Listing("FGVCAircraft", images, labels, tuple(names), (AIRCRAFT_TEMPLATE,))


def _aircraft_list(root: Path, split: str) -> Path:
    return root / f"images_variant_{split}.txt"


def _aircraft_lists(root: Path) -> list[str]:
    return [split for split in SPLITS if _aircraft_list(root, split).is_file()]


def list_images(spec: str, split: str) -> Listing:
    """List the images of one split of a split file, in the file's order.

    Labels and class names are taken from all splits together. Underscores become spaces in class
    names, as in CoOp. One of CoOp's own files has the prompt that they give it.

    Args:
        spec: see :class:`SplitFile`.
        split: ``train``, ``val`` or ``test``.

    Raises:
        DataError: if the file is missing or malformed, has no such split, or its images are not
            found.
    """
    content = read_split_file(spec)
    file, _, root = spec.partition(SEPARATOR)
    if split not in content:
        raise DataError(f"{file} has no split {split!r}, only {shown(', '.join(content))}")
    entries = content[split]
    if not entries:
        raise DataError(f"the split {split!r} of {file} is empty")
    name = _name(spec)
    ours = PUBLISHED.get(name)
    folder = _image_root(Path(file).expanduser(), root, entries[0][0], ours)
    names = _class_names(file, content)
    return Listing(
        name,
        [str(folder / path) for path, _, _ in entries],
        [label for _, label, _ in entries],
        names if ours is None else tuple(ours.renamed.get(name, name) for name in names),
        DEFAULT_TEMPLATES if ours is None else (ours.template,),
    )


def _name(spec: str) -> str:
    return Path(spec.partition(SEPARATOR)[0]).stem.removeprefix(_PREFIX)


def read_split_file(spec: str) -> dict[str, list[tuple[str, int, str]]]:
    """The entries (path, label, class name) of each split that the file holds; null is no split.

    Raises:
        DataError: if the file is missing or malformed.
    """
    file = spec.partition(SEPARATOR)[0]
    try:
        content = parse_json(Path(file).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the split file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"the split file {file} is not JSON ({shown(error)}); {_FORMAT}") from error
    splits = content if isinstance(content, dict) else {}
    found = {
        split: _entries(file, split, entries)
        for split, entries in splits.items()
        if entries is not None
    }
    if not found:
        raise DataError(f"the split file {file} holds no split; {_FORMAT}")
    return found


def _entries(file: str, split: str, entries: Any) -> list[tuple[str, int, str]]:
    try:
        return [(str(path), int(label), str(name)) for path, label, name in entries]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"the split {quoted(split)} of {file} is malformed; {_FORMAT}") from None


def _image_root(file: Path, root: str, first: str, ours: Published | None) -> Path:
    if root:
        if not is_file(Path(root).expanduser() / first):
            raise DataError(
                f"the first image of {file}, {shown(first)}, is not in {root}; check the folder"
            )
        return Path(root).expanduser()
    if ours is not None and is_file(file.parent / ours.folder / first):
        return file.parent / ours.folder
    beside = sorted(entry for entry in file.parent.iterdir() if entry.is_dir())
    found = [folder for folder in (file.parent, *beside) if is_file(folder / first)]
    if len(found) != 1:
        where = "nowhere" if not found else "in more than one folder"
        raise DataError(
            f"the first image of {file}, {shown(first)}, is {where} beside it; "
            f"name the folder of images: {file}{SEPARATOR}FOLDER"
        )
    return found[0]


def _class_names(file: str, content: dict[str, list[tuple[str, int, str]]]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for entries in content.values():
        for _, label, name in entries:
            if names.setdefault(label, name) != name:
                raise DataError(
                    f"label {shown(label)} of {file} stands for both {quoted(names[label])} and "
                    f"{quoted(name)}"
                )
    if sorted(names) != list(range(len(names))):
        raise DataError(f"the labels of {file} must be 0 to {len(names) - 1} without a gap")
    return tuple(names[label].replace("_", " ") for label in range(len(names)))
