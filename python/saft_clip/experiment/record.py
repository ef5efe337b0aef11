"""What the cells of an experiment have found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saft_clip.errors import CheckpointError
from saft_clip.experiment.cells import Cell, Contest, final_cells, tasks, trial_cells
from saft_clip.experiment.plan import Plan
from saft_clip.forms import is_text, optional, require_form
from saft_clip.methods import find
from saft_clip.results import read_results
from saft_clip.run_folder import read_json
from saft_kernels.errors import SaftError

PLAN = "plan.yaml"
FAILURES = "failures"


@dataclass(frozen=True)
class Row:
    """One evaluation of one run.

    Attributes:
        model: its name in the plan.
        method: its name in the plan.
        train: what it was trained on.
        shots: training images per class.
        seed: of the run.
        data: what was evaluated, as it was given.
        role: of that data, see :mod:`saft_clip.experiment.protocols`; ``train`` for the training
            images themselves.
        top1: accuracy, a fraction of 1.
        n: number of images.
        alpha: share of the way from the pretrained weights, where it is not the run's result.
    """

    model: str
    method: str
    train: str
    shots: int
    seed: int
    data: str
    role: str
    top1: float
    n: int
    alpha: float | None = None


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        cell: which.
        results: what its ``results.json`` holds.
    """

    cell: Cell
    results: Mapping[str, Any]


@dataclass
class Record:
    """Everything that an experiment has found so far.

    Attributes:
        plan: of the experiment.
        folder: of the experiment.
        rows: evaluations; those of methods that train nothing stand for all shots and seeds.
        runs: finished cells.
        chosen: settings that trials have found.
        trials: contest -> settings and validation accuracy of each trial; None if it failed.
        failures: what is known of each run that failed.
        missing: cells that have not run (yet), or with other settings.
        untuned: contests whose trials have not found anything (yet), so that they have no cells.
        names: data set as it was given -> what tables call it.
    """

    plan: Plan
    folder: Path
    rows: list[Row] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    chosen: dict[Contest, Mapping[str, Any]] = field(default_factory=dict)
    trials: dict[Contest, list[tuple[Mapping[str, Any], float | None]]] = field(
        default_factory=dict
    )
    failures: list[dict[str, Any]] = field(default_factory=list)
    missing: int = 0
    untuned: list[Contest] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def read_record(folder: Path) -> Record:
    """Read what is there.

    Raises:
        CheckpointError: if the folder holds no experiment, or a file in it is broken.
        ConfigError: if its plan is broken.
    """
    plan = read_plan(folder)
    record = Record(plan, folder)
    trials = list(trial_cells(plan, folder))
    for cell in trials:
        assert cell.trial is not None
        record.trials.setdefault(cell.contest, []).append((cell.trial, score_of_trial(cell)))
    record.chosen = choose(trials)
    cells = list(final_cells(plan, folder, record.chosen))
    roles = {task.train: task.roles for task in tasks(plan)}
    for cell in cells:
        results = _results_of(cell, record)
        if results is None:
            record.missing += 1
        else:
            record.runs.append(Run(cell, results))
            record.rows += _rows(plan, cell, roles[cell.contest[1]], results)
            record.names |= {line["spec"]: line["dataset"] for line in results["evaluations"]}
    record.untuned = [contest for contest in record.trials if contest not in record.chosen]
    record.failures += [
        _failure(file)
        for cell in [*trials, *cells]
        if (file := failure_file(folder, cell.name)).exists()
    ]
    return record


def read_plan(folder: Path) -> Plan:
    """What an experiment compares, as it was last run.

    Raises:
        CheckpointError: if the folder holds no experiment.
        ConfigError: if its plan is broken.
    """
    if not (folder / PLAN).exists():
        raise CheckpointError(f"{folder} holds no experiment (there is no {PLAN})")
    return Plan.load(folder / PLAN)


def choose(trials: Iterable[Cell]) -> dict[Contest, Mapping[str, Any]]:
    """The settings of each contest's best trial on validation images; of equals, the first."""
    best: dict[Contest, tuple[float, Mapping[str, Any]]] = {}
    for cell in trials:
        score = score_of_trial(cell)
        assert cell.trial is not None
        if score is not None and score > best.get(cell.contest, (-1.0, {}))[0]:
            best[cell.contest] = (score, cell.trial)
    return {contest: trial for contest, (_, trial) in best.items()}


def score_of_trial(cell: Cell) -> float | None:
    """Its accuracy on validation images; None if it has not run."""
    results = _results_of(cell)
    if results is None:
        return None
    return next(x["top1"] for x in results["evaluations"] if x["when"] == "after")


def failure_file(folder: Path, name: str) -> Path:
    """Where it is written why a cell failed."""
    return folder / FAILURES / f"{name}.json"


def _failure(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file)
    form = {"cell": is_text, "command": is_text, "error": is_text, "traceback": optional(is_text)}
    require_form(found, form, str(file))
    return found


def _results_of(cell: Cell, record: Record | None = None) -> dict[str, Any] | None:
    """What it has found; None if it has not run, with these settings, or its files are broken."""
    try:
        return read_results(cell.folder.results) if cell.finished() else None
    except SaftError as error:
        if record is not None:
            about = {"cell": cell.name, "command": cell.config.command(), "traceback": None}
            record.failures.append({**about, "error": str(error)})
        return None


def _rows(
    plan: Plan, cell: Cell, roles: Mapping[str, str], results: Mapping[str, Any]
) -> Iterator[Row]:
    model, train, method = cell.contest
    trained = find(cell.config.method).trains
    shots = [cell.shots] if trained else plan.shots
    seeds = [cell.seed] if trained else plan.seeds
    for line in results["evaluations"]:
        if line["when"] == "before":
            continue
        role = "train" if line["when"] == "train" else roles.get(line["spec"])
        if role is None:  # an earlier plan evaluated more
            continue
        for number in shots:
            for seed in seeds:
                yield Row(
                    model, method, train, number, seed, line["spec"], role, line["top1"], line["n"],
                    line.get("alpha"),
                )  # fmt: skip
