"""Cells: the single runs of an experiment, each a ``saft finetune`` in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from saft_clip.config import FinetuneConfig, has_setting
from saft_clip.experiment.plan import Entry, Plan
from saft_clip.experiment.protocols import Task, find_protocol
from saft_clip.methods import find
from saft_clip.run_folder import RunFolder

#: Model, what is trained on, and method, by their names in the plan: what trials choose for.
Contest = tuple[str, str, str]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        contest: what it belongs to.
        shots: training images per class.
        seed: of everything that is drawn.
        name: of its folder, below the experiment's; unique, and what messages call it.
        config: its settings.
        trial: the settings that it tries, if it is a trial.
        retrieval: class names to show the best images of.
    """

    contest: Contest
    shots: int
    seed: int
    name: str
    config: FinetuneConfig
    trial: Mapping[str, Any] | None = None
    retrieval: tuple[str, ...] = ()

    @property
    def folder(self) -> RunFolder:
        """Where it runs."""
        return RunFolder(self.config.output)

    def finished(self) -> bool:
        """Whether it has run, with the settings that the plan asks for now.

        Raises:
            ConfigError: if what it has written is broken.
        """
        folder = self.folder
        return folder.complete() and not self.config.differences(FinetuneConfig.load(folder.config))


def tasks(plan: Plan) -> list[Task]:
    """What is trained on and what is evaluated on."""
    return find_protocol(plan.protocol).tasks(plan.train, plan.evaluate)


def trial_cells(plan: Plan, folder: Path) -> Iterator[Cell]:
    """The trials of all methods that are tuned; evaluated on validation images only."""
    tuning = plan.tuning
    if tuning is None:
        return
    for model, task, method in product(plan.models, tasks(plan), plan.methods):
        contest = (model.name, task.train, method.name)
        for trial in tuning.tried.get(method.name, ()):
            config = plan.config(model, method, task.train, tuning.shots, tuning.seed, trial)
            # By what is tried, not by its place in the plan: a plan may grow.
            what = json.dumps([trial, tuning.seed, tuning.shots], sort_keys=True)
            parts = [*map(_folder_name, contest), f"trial-{_digest(what)}"]
            name = "/".join(["trials", *parts])
            config = config.changed(
                eval_data=(task.train,), eval_split="val", **_of_all(folder, name)
            )
            yield Cell(contest, tuning.shots, tuning.seed, name, config, trial)


def final_cells(
    plan: Plan, folder: Path, chosen: Mapping[Contest, Mapping[str, Any]]
) -> Iterator[Cell]:
    """The runs that the results come from.

    Args:
        plan: of the experiment.
        folder: of the experiment.
        chosen: settings that trials have found; contests that are missing have no cells if the plan
            tunes their method.
    """
    tuned = set(plan.tuning.tried) if plan.tuning else set()
    for model, task, method in product(plan.models, tasks(plan), plan.methods):
        contest = (model.name, task.train, method.name)
        if method.name in tuned and contest not in chosen:
            continue
        for shots, seed in _draws(plan, method):
            yield _final(plan, folder, model, method, task, shots, seed, chosen.get(contest, {}))


def _final(
    plan: Plan,
    folder: Path,
    model: Entry,
    method: Entry,
    task: Task,
    shots: int,
    seed: int,
    chosen: Mapping[str, Any],
) -> Cell:
    contest = (model.name, task.train, method.name)
    config = plan.config(model, method, task.train, shots, seed, chosen)
    trains = find(config.method).trains
    parts = [f"{shots}-shots", f"seed-{seed}"] if trains else []
    name = "/".join(["cells", *map(_folder_name, contest), *parts])
    config = config.changed(
        eval_data=tuple(task.roles),
        eval_train=trains and shots > 0,
        alphas=plan.alphas if has_setting(config.method, "alpha") else (),
        **_of_all(folder, name),
    )
    shown = not trains or (shots, seed) == (plan.most_shots, plan.seeds[0])
    return Cell(contest, shots, seed, name, config, retrieval=plan.retrieval if shown else ())


def _draws(plan: Plan, method: Entry) -> list[tuple[int, int]]:
    """Shots and seed of each run of a method; where nothing is trained, one stands for all."""
    if not find(method.settings["method"]).trains:
        return [(1, 0)]
    return list(product(plan.shots, plan.seeds))


def _of_all(folder: Path, name: str) -> dict[str, Any]:
    return {"output": str(folder / name), "resume": True, "val_frequency": 0}


def _folder_name(text: str) -> str:
    """A name for a folder; told from that of another text by a digest, if it had to be changed."""
    plain = re.sub(r"[^A-Za-z0-9.+=%-]+", "-", text).strip("-.")[-60:]
    if plain == text:
        return plain
    return f"{plain}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:6]
