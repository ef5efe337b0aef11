"""Image folders: ``<class name>/xxx.jpg``, optionally in ``train``, ``val``, ``test`` folders.

The classes are the class folders of all splits together, sorted by folder name, so that a label
means the same class in each. Underscores in a folder's name become spaces in the class name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from saft_clip.data.listing import Layout, Listing
from saft_clip.errors import DataError
from saft_kernels.untrusted import shown

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


class Folder(Layout):
    """A folder of class folders, or of ``train``, ``val`` and ``test`` folders of those.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def kind(self) -> str:
        """An image folder."""
        return "image folder"

    def splits(self) -> tuple[str, ...]:
        """The split folders."""
        return split_folders(self.root)

    def listing(self, split: str) -> Listing:
        """The images below the class folders."""
        splits = self.splits()
        if splits and split not in splits:
            raise DataError(f"{self.root} has no {split} folder, only {', '.join(splits)}")
        folders = class_folders(self.root, splits)
        images, labels = images_of_classes(self.root / split if splits else self.root, folders)
        name = self.root.resolve().name
        return Listing(name, images, labels, _class_names(self.root, folders))


def class_folders(root: Path, splits: Sequence[str] = ()) -> list[str]:
    """The names of the class folders of all these splits together, sorted.

    Raises:
        DataError: if there is none.
    """
    folders = sorted({name for part in splits or (".",) for name in subfolders(root / part)})
    if not folders:
        raise DataError(
            f"{root} holds no class folders; put the images of each class in a folder of its name"
        )
    return folders


def images_of_classes(base: Path, folders: Sequence[str]) -> tuple[list[str], list[int]]:
    """The images of each class folder, by class and then by path, and their labels.

    Symbolic links are followed, but never back to a folder on the way there.

    Args:
        base: where the class folders are; some may be missing.
        folders: their names, by class.

    Raises:
        DataError: if class folders are empty.
    """
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(folders):
        found = images_below(base / name)
        if not found and (base / name).is_dir():
            empty.append(name)
        paths += found
        labels += [label] * len(found)
    if empty:
        raise DataError(_empty_folders(base, empty))
    return paths, labels


def _empty_folders(base: Path, empty: Sequence[str]) -> str:
    more = f", and so do {len(empty) - 1} more: {shown(', '.join(empty[1:]))}" if empty[1:] else ""
    return (
        f"the class folder {base / empty[0]} holds no image{more} "
        f"({' '.join(sorted(IMAGE_SUFFIXES))}); add some or remove it"
    )


def split_folders(root: Path) -> tuple[str, ...]:
    """Which of ``train``, ``val`` and ``test`` hold class folders, rather than being classes."""
    return tuple(name for name in ("train", "val", "test") if subfolders(root / name))


def subfolders(folder: Path) -> list[str]:
    """The folders in a folder, by name, without hidden ones and links that lead back."""
    if not folder.is_dir():
        return []
    here = _with_parents(folder)
    return [
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and entry.name[0] != "." and os.path.realpath(entry.path) not in here
    ]


def images_below(folder: Path) -> list[str]:
    """The images in a folder and in those below, sorted by path."""
    return sorted(
        os.path.join(parent, file)
        for parent, files in _walk(folder)
        for file in files
        if file[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
    )


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below and the files in it, once, however many links lead there."""
    seen = _with_parents(top)
    for parent, folders, files in os.walk(top, followlinks=True):
        yield parent, files
        new: dict[str, str] = {}
        for name in sorted(folders):  # so that of several links the same one is followed each time
            new.setdefault(os.path.realpath(os.path.join(parent, name)), name)
        # In place: os.walk goes on with what is left in its list.
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen |= new.keys()


def _with_parents(folder: Path) -> set[str]:
    """The real paths of a folder and of those that hold it: a link to one of them is a loop."""
    real = folder.resolve()
    return {str(real), *map(str, real.parents)}


def _class_names(root: Path, folders: list[str]) -> tuple[str, ...]:
    names = tuple(folder.replace("_", " ") for folder in folders)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two class folders of {root} stand for the class {name!r}; rename one")
    return names
