"""Labelled images, unreadable ones, and few-shot samples."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from saft_clip.console import progress, warn
from saft_clip.data.images import ImageSource, source_of
from saft_clip.data.names import printable
from saft_clip.errors import DataError, UnreadableImageError


@dataclass
class ImageDataset(Dataset[tuple[Tensor, int]]):
    """N labelled images of C classes.

    Attributes:
        name: what tables call it.
        images: N file paths, uint8 arrays [H, W, 3], or other sources, see
            :mod:`saft_clip.data.images`.
        labels: int64 [N], each in [0, C).
        class_names: C names as they appear in prompts.
        templates: prompt templates with ``{}`` for the class name.
        transform: PIL image (RGB) -> tensor.
        skipped: images that could not be read and were left out, each as ``path: reason``.
    """

    name: str
    images: Sequence[Any]
    labels: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed image and its label.

        Raises:
            UnreadableImageError: if the file cannot be decoded.
        """
        return self.transform(self.open(index)), int(self.labels[index])

    def open(self, index: int) -> Image.Image:
        """The image as it is stored, in 8-bit RGB; what is transparent shows white.

        A 16-bit image keeps the upper 8 bits of its values. Where the format does not tell the
        range, the values do: whole numbers that all lie below 256 are 8-bit, others up to 65,535
        are 16-bit; floats reach from 0 to 1, or to 255 if any is above 1. An image with other
        values (negative, larger, nan) is unreadable, as nobody knows which of them is white.

        Raises:
            UnreadableImageError: if the file cannot be decoded.
        """
        return self.source(index).open()

    def source(self, index: int) -> ImageSource:
        """Where the image comes from."""
        return source_of(self.images[index])

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """The images at these positions, in this order, with the same classes."""
        return replace(
            self, images=[self.images[i] for i in indices], labels=self.labels[list(indices)]
        )

    def evenly(self, limit: int) -> ImageDataset:
        """At most ``limit`` images, evenly spaced among those of each class in turn."""
        order = torch.argsort(self.labels, stable=True)
        count = min(limit, len(order))
        return self.subset(order[torch.arange(count) * len(order) // count].tolist())

    def half(self, which: str) -> ImageDataset:
        """One half of the classes, numbered anew from 0, as CoOp divides them.

        Of C classes in the order of their numbers, ``base`` has the first ceil(C / 2), ``new`` the
        others (Zhou et al. 2022, CVPR, Section 4.1, and their code).

        Raises:
            DataError: if there is one class, or the half has no images.
        """
        classes = self.half_of_classes(which)
        first, last = classes.start, classes.stop
        chosen = ((self.labels >= first) & (self.labels < last)).nonzero().flatten().tolist()
        if not chosen:
            raise DataError(f"the {which} half of the classes of {self.name} has no images")
        return replace(
            self.subset(chosen),
            name=f"{self.name} ({which})",
            labels=self.labels[chosen] - first,
            class_names=self.class_names[first:last],
        )

    def half_of_classes(self, which: str) -> range:
        """The numbers of the classes in a half."""
        middle = -(-len(self.class_names) // 2)
        return range(middle) if which == "base" else range(middle, len(self.class_names))


def drop_unreadable(dataset: ImageDataset, *, show_progress: bool = True) -> ImageDataset:
    """Decode every image once and leave out those that cannot be read; warn of them by name.

    Call it before training on all images of a data set, so that no epoch meets a surprise. It costs
    about as much time as one epoch of image loading. :func:`few_shot` needs it not: it checks the
    images it draws.

    Raises:
        DataError: if no image can be read.
    """
    bad = _find_unreadable(dataset, range(len(dataset)), show_progress)
    if not bad:
        return dataset
    good = [index for index in range(len(dataset)) if index not in bad]
    if not good:
        raise DataError(f"none of the {len(dataset)} images of {dataset.name} can be read")
    kept = dataset.subset(good)
    kept.skipped = [*dataset.skipped, *bad.values()]
    say_skipped(kept.name, kept.skipped)
    return kept


def say_skipped(name: str, skipped: Sequence[str], limit: int = 5) -> None:
    """Warn of a data set's unreadable images, if there are any: how many, and the first names."""
    if skipped:
        more = len(skipped) - limit
        tail = f"; and {more} more" if more > 0 else ""
        warn(
            f"{len(skipped)} unreadable image(s) of {name} skipped: "
            f"{'; '.join(skipped[:limit])}{tail}"
        )


def require_classes(dataset: ImageDataset) -> None:
    """Refuse to train on one class: whatever the model says is right, and the loss is 0.

    Raises:
        DataError: if there are fewer than two.
    """
    if len(dataset.class_names) < 2:
        raise DataError(
            f"fine-tuning needs at least two classes, {dataset.name} has one "
            f"({dataset.class_names[0]!r})"
        )


def few_shot(
    dataset: ImageDataset, shots: int, seed: int, needed: Container[int] | None = None
) -> ImageDataset:
    """Draw the same number of images of every class, as CoOp does.

    One ``random.Random(seed)`` draws ``sample(images, shots)`` for each class, in the order in
    which classes first appear and from their images in data set order: with a CoOp split file this
    is CoOp's own training set for that seed. The drawn images are then decoded once; unreadable
    ones are named, skipped, and replaced by further draws of the same generator from the rest of
    their class. Unlike CoOp, which repeats images of a class that has too few, this is an error
    here.

    Args:
        dataset: where to draw from.
        shots: images per class, at least 1.
        seed: of the generator.
        needed: classes that must have so many images; others are drawn, as far as there are any,
            only so that what is drawn of these is what it is without them. None: all.

    Returns:
        ``shots`` images of each class, class by class.

    Raises:
        DataError: if a class has fewer readable images than that.
    """
    if shots < 1:
        raise DataError(f"--shots must be at least 1, not {shots}")
    pools: dict[int, list[int]] = {}
    for index, label in enumerate(dataset.labels.tolist()):
        pools.setdefault(label, []).append(index)
    needed = range(len(dataset.class_names)) if needed is None else needed
    for label in range(len(dataset.class_names)):
        if label in needed:
            _check_enough(dataset, label, len(pools.get(label, ())), shots)
    generator = random.Random(seed)
    drawn = {n: generator.sample(pool, min(shots, len(pool))) for n, pool in pools.items()}
    skipped: dict[int, str] = {}
    new = [index for label, indices in drawn.items() if label in needed for index in indices]
    while bad := _find_unreadable(dataset, new):
        skipped |= bad
        new = []
        for label in sorted({int(dataset.labels[index]) for index in bad}):
            good = [index for index in drawn[label] if index not in bad]
            rest = sorted({*pools[label]} - {*good, *skipped})
            _check_enough(dataset, label, len(good) + len(rest), shots)
            redrawn = generator.sample(rest, shots - len(good))
            drawn[label] = good + redrawn
            new += redrawn
    sample = dataset.subset([index for indices in drawn.values() for index in indices])
    sample.skipped = [*dataset.skipped, *skipped.values()]
    say_skipped(sample.name, sample.skipped)
    return sample


def _check_enough(dataset: ImageDataset, label: int, found: int, shots: int) -> None:
    if found < shots:
        raise DataError(
            f"class {dataset.class_names[label]!r} of {dataset.name} has {found} readable "
            f"image(s), fewer than --shots {shots}; add images or take fewer shots"
        )


def _find_unreadable(
    dataset: ImageDataset, indices: Iterable[int], show_progress: bool = True
) -> dict[int, str]:
    """Which of these images cannot be decoded: index -> ``path: reason``."""
    indices = list(indices)
    bad = {}
    # Threads suffice: PIL releases the interpreter lock while it decodes.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(f"checking {dataset.name}", len(indices), show=show_progress) as advance,
    ):
        reasons = pool.map(lambda index: _why_unreadable(dataset.source(index)), indices)
        for index, reason in zip(indices, reasons, strict=True):
            advance()
            if reason is not None:
                bad[index] = reason
    return bad


def _why_unreadable(image: ImageSource) -> str | None:
    try:
        image.check()
    except UnreadableImageError as error:
        return printable(f"{error.path}: {error.reason}")
    return None
