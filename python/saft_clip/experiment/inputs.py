"""Whether the data that a plan names are there and fit, before anything is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saft_clip.console import say, warn
from saft_clip.data import (
    ImageDataset,
    available_splits,
    divided,
    load_dataset,
    match_classes,
    require_classes,
)
from saft_clip.errors import DataError
from saft_clip.experiment.cells import tasks
from saft_clip.experiment.plan import Plan
from saft_kernels.untrusted import shown


def check_data(plan: Plan) -> None:
    """List every data set of a plan; no image is opened.

    Classes are matched by name: a shifted data set that lacks some of those that are trained, or
    has others, is warned of. It is evaluated on its own classes, whichever they are.

    Raises:
        DataError: if a data set is missing or malformed, or has no split that is needed; or if a
            class has too few images.
    """
    for task in tasks(plan):
        trained = _load(task.train, "train")
        require_classes(trained)
        _require_images(divided(task.train)[0], max(plan.shots))
        if plan.tuning is not None and "val" not in available_splits(task.train):
            raise DataError(
                f"{task.train} has no validation images, by which settings could be chosen: add a "
                "val split, or leave tuning out of the plan"
            )
        for data, role in task.roles.items():
            dataset = _load(data, "test")
            if role == "shifted":
                _say_unmatched(trained, dataset)


def _require_images(data: str, shots: int) -> None:
    """CoOp draws from whole data sets, also where half of the classes is trained on."""
    dataset = _load(data, "train")
    counts = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
    if counts.min() < shots:
        name = dataset.class_names[int(counts.argmin())]
        raise DataError(
            f"class {name!r} of {dataset.name} has {int(counts.min())} images, fewer than the "
            f"{shots} shots of the plan; add images or take fewer shots"
        )


def _say_unmatched(trained: ImageDataset, other: ImageDataset) -> None:
    found = match_classes(trained.class_names, other.class_names)
    if found.only_first:  # as of ImageNet's variants, some of which have a fifth of its classes
        total, names = len(trained.class_names), shown(", ".join(found.only_first), 200)
        say(f"{other.name} lacks {len(found.only_first)} of the {total} trained classes: {names}")
    if found.only_other:
        new, total = len(found.only_other), len(other.class_names)
        names = shown(", ".join(found.only_other), 200)
        warn(f"{new} of the {total} classes of {other.name} are not trained: {names}")


def _load(data: str, split: str) -> ImageDataset:
    return load_dataset(data, split, _never)


def _never(image: Any) -> Tensor:
    raise AssertionError("only listed")
