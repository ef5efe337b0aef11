"""ImageNet and its variants: folders whose names are WordNet numbers (``n01440764``).

Deng et al. 2009 (ImageNet), Recht et al. 2019 (ImageNetV2), Wang et al. 2019 (ImageNet-Sketch),
Hendrycks et al. 2021 (ImageNet-A, ImageNet-R). Numbers, their order and the 200 classes of A and R
are from timm's tables, class names from open_clip's (OpenAI's list).
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from saft_clip.data.folder import images_below, images_of_classes, split_folders, subfolders
from saft_clip.data.listing import Layout, Listing, read_lines, require_split
from saft_clip.errors import DataError
from saft_kernels.untrusted import quoted, shown

#: A file of class names in CoOp's format, ``n01440764 tench`` in each line.
CLASSNAMES = "classnames.txt"


@dataclass(frozen=True)
class Variant:
    """A test set with ImageNet's classes.

    Attributes:
        name: its name.
        folders: what folders of it are called.
        classes: timm's table of its classes; empty for all 1,000.
    """

    name: str
    folders: tuple[str, ...]
    classes: str = ""


_A = Variant("ImageNet-A", ("imagenet-a", "imagenet-adversarial"), "imagenet_a")
_R = Variant("ImageNet-R", ("imagenet-r", "imagenet-rendition"), "imagenet_r")
_SKETCH = Variant("ImageNet-Sketch", ("imagenet-sketch",))
_V2 = Variant("ImageNetV2", ("imagenetv2",))
_VALIDATION = Variant("ImageNet's validation set", ())

#: More folders than these are classes, and none of them is looked into.
_MOST_BESIDE = 10

#: What the files of a test set with all classes begin with.
_FILES = {"sketch_": _SKETCH, "ILSVRC2012_val_": _VALIDATION}


class ImageNet(Layout):
    """Folders of ImageNet's classes.

    Args:
        root: what the user named.
        base: where they are: class folders, or ``train``, ``val`` and ``test`` folders of those.
    """

    def __init__(self, root: Path, base: Path) -> None:
        self.root = root
        self.base = base
        # As in CoOp and most work, the validation set is the test set where there is no other.
        self._folders = {split: split for split in split_folders(base)}
        if "val" in self._folders and "test" not in self._folders:
            self._folders["test"] = self._folders.pop("val")
        parts = self._folders.values() or (".",)
        found = sorted({name for part in parts for name in subfolders(base / part)})
        self._numbered = not self._folders and _has_numbers(base)
        self.wnids = sorted(table("imagenet")[int(n)] for n in found) if self._numbered else found
        self.variant = None if self._folders else _variant(self)

    @staticmethod
    def find(root: Path) -> ImageNet | None:
        """The data in a folder, or in one folder in it (``images``, ``imagenet-a``).

        Raises:
            DataError: if there are several such folders in it.
        """
        if _has_classes(root):
            return ImageNet(root, root)
        inside = subfolders(root)
        if len(inside) > _MOST_BESIDE:
            return None
        found = [root / name for name in sorted(inside) if _has_classes(root / name)]
        if len(found) > 1:
            raise DataError(
                f"{root} holds several folders of ImageNet classes "
                f"({shown(', '.join(folder.name for folder in found))}); name the one to use"
            )
        return ImageNet(root, found[0]) if found else None

    @property
    def kind(self) -> str:
        """Which variant it is."""
        return self.variant.name if self.variant else "folders of ImageNet classes"

    def splits(self) -> tuple[str, ...]:
        """``test`` for a variant; else what the folders say, with ``val`` as the test set."""
        return ("test",) if self.variant else tuple(self._folders)

    def listing(self, split: str) -> Listing:
        """The images below the class folders; the classes are those that there are folders of."""
        require_split(self.root, split, self.splits())
        base = self.base / self._folders.get(split, ".")
        folders = [str(_order()[w]) for w in self.wnids] if self._numbered else self.wnids
        images, labels = images_of_classes(base, folders)
        return Listing(self._name(), images, labels, self._class_names())

    def complaints(self) -> list[str]:
        """Classes of the variant that have no folder."""
        if self.variant is None:
            return []
        known = table(self.variant.classes) if self.variant.classes else tuple(_order())
        missing = sorted(set(known) - set(self.wnids))
        if not missing:
            return []
        return [
            f"{len(missing)} of the {len(known):,} class folders of {self.variant.name} are "
            f"missing: {shown(', '.join(missing), 100)}"
        ]

    def _name(self) -> str:
        return self.variant.name if self.variant else self.root.resolve().name

    def _class_names(self) -> tuple[str, ...]:
        for folder in dict.fromkeys((self.base, self.root, self.base.parent)):
            if (folder / CLASSNAMES).is_file():
                names = read_classnames(folder / CLASSNAMES)
                break
        else:
            names = class_names()
        unnamed = [wnid for wnid in self.wnids if wnid not in names]
        if unnamed:
            raise DataError(
                f"{folder / CLASSNAMES} has no name for {unnamed[0]}, of which there is a folder; "
                "add a line for it"
            )
        return tuple(names[wnid] for wnid in self.wnids)


def _has_classes(folder: Path) -> bool:
    parts = split_folders(folder) or (".",)
    return _has_numbers(folder) or all(_has_wnids(folder / part) for part in parts)


def _has_wnids(folder: Path) -> bool:
    names = subfolders(folder)
    return bool(names) and all(name in _order() for name in names)


def _has_numbers(folder: Path) -> bool:
    """Whether all folders in there are numbers of ImageNet classes, as in ImageNetV2.

    Digits have such folders, too. So all of them must be there, or the folder's name must say so.
    """
    names = set(subfolders(folder))
    every = {str(number) for number in range(len(_order()))}
    return bool(names) and names <= every and (names == every or _named(_V2, folder))


def _variant(data: ImageNet) -> Variant | None:
    if data._numbered:
        return _V2
    for variant in (_A, _R):
        if set(data.wnids) == set(table(variant.classes)):
            return variant
    for variant in (_A, _R, _SKETCH):
        if _named(variant, data.base) or _named(variant, data.root):
            return variant
    first = next(iter(images_below(data.base / data.wnids[0])), "")
    for start, variant in _FILES.items():
        if Path(first).name.startswith(start):
            return variant
    return None


def _named(variant: Variant, folder: Path) -> bool:
    name = folder.resolve().name.lower()
    if variant is _V2:
        return name.startswith(variant.folders)
    return name in variant.folders


# Names --------------------------------------------------------------------------------------------


@functools.cache
def table(name: str) -> tuple[str, ...]:
    """One of timm's tables of WordNet numbers, in the order of the class numbers.

    Args:
        name: ``imagenet`` (1,000), ``imagenet_a`` or ``imagenet_r`` (200 each).
    """
    file = resources.files("timm.data") / "_info" / f"{name}_synsets.txt"
    return tuple(file.read_text(encoding="utf-8").split())


@functools.cache
def _order() -> dict[str, int]:
    return {wnid: number for number, wnid in enumerate(table("imagenet"))}


def is_wnid(text: str) -> bool:
    """Whether this is the WordNet number of one of the 1,000 classes."""
    return text in _order()


@functools.cache
def class_names() -> dict[str, str]:
    """WordNet number -> class name, for the 1,000 classes."""
    from open_clip import IMAGENET_CLASSNAMES

    return told_apart(dict(zip(_order(), IMAGENET_CLASSNAMES, strict=True)))


def read_classnames(file: Path) -> dict[str, str]:
    """WordNet number -> class name, from a file in CoOp's format.

    Raises:
        DataError: if it cannot be read, or a line is malformed.
    """
    names = {}
    for line in read_lines(file):
        wnid, _, name = line.partition(" ")
        if not name.strip() or wnid not in _order():
            raise DataError(
                f"{file} has the line {quoted(line)}; write a WordNet number and a name: "
                "n01440764 tench"
            )
        names[wnid] = name.strip()
    return told_apart(names)


def told_apart(names: dict[str, str]) -> dict[str, str]:
    """The names by WordNet number, with WordNet's own word where two classes have the same.

    In OpenAI's list two classes are called missile and two sunglasses, which no prompt could tell
    apart. WordNet's first words for them are missile and projectile, sunglass and sunglasses.
    """
    from timm.data import ImageNetInfo

    described = ImageNetInfo("imagenet-1k").label_name_to_description
    counts = Counter(names.values())
    return {
        wnid: described(wnid).split(",")[0].strip() if counts[name] > 1 else name
        for wnid, name in names.items()
    }
