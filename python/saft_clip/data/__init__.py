"""Labelled images: what a user names (``spec``) becomes an :class:`ImageDataset`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saft_clip.data import coop, folder
from saft_clip.data.dataset import (
    HALVES,
    ImageDataset,
    drop_unreadable,
    few_shot,
    require_classes,
    say_skipped,
)
from saft_clip.data.names import distinct_names, printable
from saft_clip.domains import domain_splits, load_domain
from saft_clip.errors import DataError
from saft_clip.prompts import DEFAULT_TEMPLATES, resolve_templates

__all__ = [
    "HALVES",
    "SPLITS",
    "ImageDataset",
    "available_splits",
    "distinct_names",
    "divided",
    "drop_unreadable",
    "few_shot",
    "load_dataset",
    "printable",
    "require_classes",
    "say_skipped",
]

SPLITS = ("train", "val", "test")

BUILTIN = "builtin:"


def load_dataset(
    spec: str,
    split: str,
    transform: Callable[[Any], Tensor],
    *,
    templates: str | Sequence[str] | None = None,
) -> ImageDataset:
    """List the labelled images of one split; no image is decoded yet.

    Args:
        spec: one of

            - a folder of class folders, ``<class name>/xxx.jpg``, or of ``train``, ``val`` and
              ``test`` folders of those;
            - a split file in CoOp's format, ``split_zhou_OxfordPets.json``, its images beside it or
              in one folder beside it; ``SPLIT.json::FOLDER`` names any other folder of images;
            - ``builtin:<domain>``, images that ship with this package or are rendered by it;

            each of them with ``#base`` or ``#new`` behind it for one half of its classes, see
            :meth:`ImageDataset.half`.
        split: ``train``, ``val`` or ``test``. A folder without split folders gives all its images
            for each: :func:`available_splits` tells.
        transform: PIL image -> tensor, a model's ``preprocess_train`` or ``preprocess_val``.
        templates: prompt templates, see :func:`saft_clip.prompts.resolve_templates`; None for the
            data set's own, ``a photo of a {}.`` if it has none.

    Raises:
        DataError: if there is no such data, no such split, or it is malformed or empty.
        DomainError: if there is no such built-in domain or it has no such split.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    whole, half = divided(spec)
    if half:
        return load_dataset(whole, split, transform, templates=templates).half(half)
    chosen = None if templates is None else resolve_templates(templates)
    if spec.startswith(BUILTIN):
        domain = load_domain(spec.removeprefix(BUILTIN), split)
        return ImageDataset(
            domain.name,
            list(domain.images.permute(0, 2, 3, 1).numpy()),
            domain.labels,
            domain.class_names,
            chosen or domain.templates,
            transform,
        )
    if _is_split_file(spec):
        listing = coop.list_images(spec, split)
    else:
        listing = folder.list_images(_folder(spec), split)
    name, paths, labels, class_names = listing
    return ImageDataset(
        printable(name),
        paths,
        torch.tensor(labels),
        tuple(map(printable, class_names)),
        chosen or DEFAULT_TEMPLATES,
        transform,
    )


def divided(spec: str) -> tuple[str, str]:
    """What a user names without ``#base`` or ``#new``, and which of them it was; or nothing."""
    for half in HALVES:
        if spec.endswith(f"#{half}"):
            return spec.removesuffix(f"#{half}"), half
    return spec, ""


def available_splits(spec: str) -> tuple[str, ...]:
    """The splits that the data itself makes and that hold images.

    There is none for a folder of class folders alone.

    Raises:
        DataError: if there is no such data or it is malformed.
        DomainError: if there is no such built-in domain.
    """
    spec, _ = divided(spec)
    if spec.startswith(BUILTIN):
        own = domain_splits(spec.removeprefix(BUILTIN))
        return tuple(split for split in SPLITS if split in own)
    if _is_split_file(spec):
        content = coop.read_split_file(spec)
        return tuple(split for split in SPLITS if content.get(split))
    return folder.split_folders(_folder(spec))


def _is_split_file(spec: str) -> bool:
    return coop.ROOT_SEPARATOR in spec or spec.endswith(".json")


def _folder(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(
            f"there is no folder {spec}; give a folder of class folders or a split file"
        )
    if not path.is_dir():
        raise DataError(
            f"{spec} is neither a folder of class folders nor a .json split file in CoOp's format"
        )
    return path
