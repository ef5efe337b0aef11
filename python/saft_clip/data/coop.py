"""Split files in CoOp's format: for each split, a list of ``[path, label, class name]``.

Zhou et al. 2022 ("Learning to Prompt for Vision-Language Models") published one for each of their
data sets, named ``split_zhou_<data set>.json``; most few-shot work on CLIP uses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saft_clip.errors import DataError
from saft_kernels.untrusted import is_file, parse_json, quoted, shown

#: Stands between the split file and the folder of its images.
ROOT_SEPARATOR = "::"

_FORMAT = 'expected {"train": [[path, label, class name], ...], "val": ..., "test": ...}'


def list_images(spec: str, split: str) -> tuple[str, list[str], list[int], tuple[str, ...]]:
    """List the images of one split in the file's order.

    Labels and class names are taken from all splits together. Underscores become spaces in class
    names, as in CoOp.

    Args:
        spec: ``SPLIT.json`` or ``SPLIT.json::FOLDER``; without a folder, the images are looked for
            beside the file and in each folder beside it.
        split: ``train``, ``val`` or ``test``.

    Returns:
        Name of the data set, image paths, labels, class names.

    Raises:
        DataError: if the file is missing or malformed, has no such split, or its images are not
            found.
    """
    content = read_split_file(spec)
    file, _, root = spec.partition(ROOT_SEPARATOR)
    if split not in content:
        raise DataError(f"{file} has no split {split!r}, only {shown(', '.join(content))}")
    entries = content[split]
    if not entries:
        raise DataError(f"the split {split!r} of {file} is empty")
    folder = _image_root(Path(file).expanduser(), root, entries[0][0])
    return (
        Path(file).stem.removeprefix("split_zhou_"),
        [str(folder / path) for path, _, _ in entries],
        [label for _, label, _ in entries],
        _class_names(file, content),
    )


def read_split_file(spec: str) -> dict[str, list[tuple[str, int, str]]]:
    """The entries (path, label, class name) of each split that the file holds; null is no split.

    Raises:
        DataError: if the file is missing or malformed.
    """
    file = spec.partition(ROOT_SEPARATOR)[0]
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


def _image_root(file: Path, root: str, first: str) -> Path:
    if root:
        if not is_file(Path(root).expanduser() / first):
            raise DataError(
                f"the first image of {file}, {shown(first)}, is not in {root}; check the folder"
            )
        return Path(root).expanduser()
    beside = sorted(entry for entry in file.parent.iterdir() if entry.is_dir())
    found = [folder for folder in (file.parent, *beside) if is_file(folder / first)]
    if len(found) != 1:
        where = "nowhere" if not found else "in more than one folder"
        raise DataError(
            f"the first image of {file}, {shown(first)}, is {where} beside it; "
            f"name the folder of images: {file}{ROOT_SEPARATOR}FOLDER"
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
