"""Image folders: ``<class name>/xxx.jpg``, optionally in ``train``, ``val``, ``test`` folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from saft_clip.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


def list_images(root: Path, split: str) -> tuple[str, list[str], list[int], tuple[str, ...]]:
    """List a folder's images, sorted by class folder and then by path.

    The classes are the class folders of all splits together, sorted by folder name, so that a label
    means the same class in each. Underscores in a folder's name become spaces in the class name.
    Symbolic links are followed, but never back to a folder on the way there.

    Returns:
        Name of the data set, image paths, labels, class names.

    Raises:
        DataError: if there is no class folder or no such split, a class folder is empty, or two
            stand for the same class.
    """
    splits = split_folders(root)
    if splits and split not in splits:
        raise DataError(f"{root} has no {split} folder, only {', '.join(splits)}")
    base = root / split if splits else root
    folders = sorted({name for part in splits or (".",) for name in _subfolders(root / part)})
    if not folders:
        raise DataError(
            f"{root} holds no class folders; put the images of each class in a folder of its name"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(folders):
        found = _images_below(base / name)
        if not found and (base / name).is_dir():
            raise DataError(
                f"the class folder {base / name} holds no image "
                f"({' '.join(sorted(IMAGE_SUFFIXES))}); add some or remove it"
            )
        paths += found
        labels += [label] * len(found)
    return root.resolve().name, paths, labels, _class_names(root, folders)


def split_folders(root: Path) -> tuple[str, ...]:
    """Which of ``train``, ``val`` and ``test`` hold class folders, rather than being classes."""
    return tuple(name for name in ("train", "val", "test") if _subfolders(root / name))


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    here = _with_parents(folder)
    return [
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and entry.name[0] != "." and os.path.realpath(entry.path) not in here
    ]


def _images_below(folder: Path) -> list[str]:
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
