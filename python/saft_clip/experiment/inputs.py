"""Whether models and data that a plan names are there and fit, before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saft_clip.config import AUTO
from saft_clip.console import say, warn
from saft_clip.data import (
    ImageDataset,
    available_splits,
    load_dataset,
    match_classes,
    require_classes,
)
from saft_clip.errors import DataError
from saft_clip.experiment.cells import final_cells, tasks, trial_cells
from saft_clip.experiment.plan import Plan
from saft_clip.models import require_model
from saft_clip.prompts import resolve_templates
from saft_kernels.untrusted import shown


def check_inputs(plan: Plan) -> None:
    """Look for every model and list every data set of a plan; nothing is loaded or decoded.

    Classes are matched by name: a shifted data set that lacks some of those that are trained, or
    has others, is warned of. It is evaluated on its own classes, whichever they are.

    Raises:
        ModelError: if there is no such model, weights or device.
        ConfigError: if a file of templates is missing or broken.
        DataError: if a data set is missing or malformed, or has no split that is needed; or if a
            class has too few images, or is to be shown and is in no data set.
    """
    cells = [*trial_cells(plan, Path()), *final_cells(plan, Path(), {})]
    configs = [cell.config for cell in cells]
    for model in {(config.model, config.weights, config.device) for config in configs}:
        require_model(*model)
    for template in {config.template for config in configs if config.template}:
        resolve_templates(template)
    listed: dict[tuple[str, str], ImageDataset] = {}

    def load(data: str, split: str) -> ImageDataset:
        if (data, split) not in listed:
            listed[data, split] = load_dataset(data, split, _never)
        return listed[data, split]

    shots = max(*plan.shots, plan.tuning.shots if plan.tuning else 0)
    choosing = plan.tuning is not None or any(config.density == AUTO for config in configs)
    for task in tasks(plan):
        trained = load(task.train, "train")
        require_classes(trained)
        _require_images(trained, shots)
        _require_splits(task.train, choosing)
        for data, role in task.roles.items():
            dataset = load(data, "test")
            if role == "shifted":
                _say_unmatched(trained, dataset)
    classes = {name for dataset in listed.values() for name in dataset.class_names}
    for name in plan.retrieval:
        if name not in classes:
            raise DataError(f"no data set of the plan has the class {name!r} of its retrieval")


def _require_splits(data: str, choosing: bool) -> None:
    splits = available_splits(data)
    if "test" not in splits:
        raise DataError(
            f"{data} has no test images, and would be tested on what it was trained on: divide it "
            "into train and test folders"
        )
    if choosing and "val" not in splits:
        raise DataError(
            f"{data} has no validation images, by which settings could be chosen: add a val "
            "split, or leave tuning and the density auto out of the plan"
        )


def _require_images(dataset: ImageDataset, shots: int) -> None:
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


def _never(image: Any) -> Tensor:
    raise AssertionError("only listed")
