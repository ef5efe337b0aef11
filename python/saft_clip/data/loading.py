"""From a spec to an :class:`ImageDataset`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saft_clip.data.corruptions import corrupted
from saft_clip.data.dataset import ImageDataset
from saft_clip.data.layouts import recognise
from saft_clip.data.listing import SPLITS
from saft_clip.data.names import printable
from saft_clip.data.spec import parse_spec
from saft_clip.errors import DataError
from saft_clip.prompts import resolve_templates


def load_dataset(
    spec: str,
    split: str,
    transform: Callable[[Any], Tensor],
    *,
    templates: str | Sequence[str] | None = None,
) -> ImageDataset:
    """List the labelled images of one split; no image is decoded yet.

    Args:
        spec: where the data are, see :func:`saft_clip.data.layouts.recognise`; behind it
            ``#<corruption>:<severity>`` to corrupt the images (:mod:`saft_clip.data.corruptions`)
            and ``#base`` or ``#new`` for one half of the classes (:meth:`ImageDataset.half`).
        split: ``train``, ``val`` or ``test``. Data that make no splits, such as a folder of class
            folders alone, give all their images for each: :func:`available_splits` tells.
        transform: PIL image -> tensor, a model's ``preprocess_train`` or ``preprocess_val``.
        templates: prompt templates, see :func:`saft_clip.prompts.resolve_templates`; None for the
            data set's own, ``a photo of a {}.`` if it has none.

    Raises:
        DataError: if there is no such data, no such split, or it is malformed or empty.
        DomainError: if there is no such built-in domain or it has no such split.
        MissingExtraError: if it needs a package that is not installed.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    chosen = None if templates is None else resolve_templates(templates)
    parts = parse_spec(spec)
    listing = recognise(parts.source).listing(split)
    dataset = ImageDataset(
        printable(listing.name),
        listing.images,
        torch.as_tensor(listing.labels),
        tuple(map(printable, listing.class_names)),
        chosen or listing.templates,
        transform,
    )
    if parts.corruption:
        dataset = corrupted(dataset, parts.corruption)
    return dataset.half(parts.half) if parts.half else dataset


def divided(spec: str) -> tuple[str, str]:
    """What a user names without ``#base`` or ``#new``, and which of them it was; or nothing."""
    parts = parse_spec(spec)
    return parts.whole, parts.half


def available_splits(spec: str) -> tuple[str, ...]:
    """The splits that the data itself makes and that hold images.

    There is none for a folder of class folders alone.

    Raises:
        DataError: if there is no such data or it is malformed.
        DomainError: if there is no such built-in domain.
    """
    return recognise(parse_spec(spec).source).splits()
