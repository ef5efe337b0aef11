"""Tables of what an experiment found: which methods, on which data, how sure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from saft_clip.data import distinct_names
from saft_clip.experiment.cells import tasks
from saft_clip.experiment.protocols import Task, find_protocol
from saft_clip.experiment.record import Record, Row
from saft_clip.experiment.statistics import (
    Estimate,
    above,
    estimate,
    harmonic_mean,
    holm,
    p_value,
)
from saft_clip.methods import find

#: A difference is marked if its p-value, with Holm's correction, is below this.
SIGNIFICANCE = 0.05

#: What methods are compared with.
REFERENCES = ("full", "zero-shot")

Place = tuple[str, str]
"""What was trained on, and what was evaluated."""


@dataclass(frozen=True)
class Column:
    """What a column of a table holds.

    Attributes:
        title: its head.
        places: whose mean it is.
        against: for a harmonic mean, the places of the other mean.
    """

    title: str
    places: tuple[Place, ...]
    against: tuple[Place, ...] = ()


@dataclass
class Value:
    """One entry of a table.

    Attributes:
        estimate: mean over seeds, a fraction of 1.
        place: 1 for the best of its column, 2 for the second best, else 0.
        p_values: reference -> corrected p-value of the difference from it, where there is one.
        signs: reference -> 1 if above it, -1 if below, for differences that are significant.
    """

    estimate: Estimate
    place: int = 0
    p_values: dict[str, float] = field(default_factory=dict)
    signs: dict[str, int] = field(default_factory=dict)


@dataclass
class Table:
    """Methods down, data sets across.

    Attributes:
        title: what it is about.
        columns: heads.
        rows: method -> one value per column; None where nothing was measured.
        shots: training images per class.
        model: its name in the plan.
    """

    title: str
    columns: list[str]
    rows: dict[str, list[Value | None]]
    shots: int
    model: str


def accuracy_tables(record: Record) -> list[Table]:
    """All tables of accuracies: for each model and number of shots, a summary and each task's."""
    plan = record.plan
    return [
        table
        for model in plan.models
        for shots in plan.shots
        for table in _tables_of(record, model.name, shots)
    ]


def _tables_of(record: Record, model: str, shots: int) -> Iterable[Table]:
    plan, all_tasks = record.plan, tasks(record.plan)
    rows = [row for row in record.rows if (row.model, row.shots) == (model, shots)]
    images = images_per_class(shots)
    names = names_of(record)
    if len(all_tasks) > 1:
        title = f"{find_protocol(plan.protocol).title}: {model}, {images}, all {len(all_tasks)}"
        yield _table(record, title, model, shots, rows, _summary_columns(record, all_tasks))
    for task in all_tasks:
        title = f"{names[task.train]}: {model}, {images}"
        yield _table(record, title, model, shots, rows, _task_columns(record, task, names))


def images_per_class(shots: int) -> str:
    """For people; 0 is all of them."""
    return f"{shots} image{'s' if shots > 1 else ''} per class" if shots else "all images"


def names_of(record: Record) -> dict[str, str]:
    """What tables call each data set."""
    specs = list(dict.fromkeys(spec for task in tasks(record.plan) for spec in task.roles))
    names = distinct_names(specs, [record.names.get(spec, spec) for spec in specs])
    return dict(zip(specs, names, strict=True))


def _task_columns(record: Record, task: Task, names: Mapping[str, str]) -> list[Column]:
    protocol = find_protocol(record.plan.protocol)
    columns = [Column(names[data], ((task.train, data),)) for data in task.roles]
    if protocol.name == "base-to-new":
        base, new = (column.places for column in columns)
        columns = [Column("base", base), Column("new", new), Column(HARMONIC, base, new)]
    others = [data for data, role in task.roles.items() if role == protocol.others]
    if len(others) > 1:
        columns.append(Column(protocol.mean, tuple((task.train, data) for data in others)))
    return columns


HARMONIC = "harmonic mean"

_TITLES = {"in": "in distribution", "shifted": "mean of shifted", "target": "mean of targets"}


def _summary_columns(record: Record, all_tasks: Sequence[Task]) -> list[Column]:
    places: defaultdict[str, list[Place]] = defaultdict(list)
    for task in all_tasks:
        for data, role in task.roles.items():
            places[role].append((task.train, data))
    columns = [Column(_TITLES.get(role, role), tuple(found)) for role, found in places.items()]
    if record.plan.protocol == "base-to-new":
        columns.append(Column(HARMONIC, columns[0].places, columns[1].places))
    return columns


def _table(
    record: Record,
    title: str,
    model: str,
    shots: int,
    rows: Sequence[Row],
    columns: Sequence[Column],
) -> Table:
    found: dict[str, dict[tuple[int, Place], float]] = defaultdict(dict)
    for row in rows:
        if row.alpha is None and row.role != "train":
            found[row.method][row.seed, (row.train, row.data)] = row.top1
    methods = [entry.name for entry in record.plan.methods]
    table = Table(title, [c.title for c in columns], {m: [] for m in methods}, shots, model)
    drawn = {entry.name: find(entry.settings["method"]).trains for entry in record.plan.methods}
    for column in columns:
        values = {name: _value(found[name], column, drawn[name]) for name in methods}
        _mark_best(values)
        if not column.against:
            _compare(record, values, found, column)
        for name in methods:
            table.rows[name].append(values[name])
    return table


def _value(found: Mapping[tuple[int, Place], float], column: Column, drawn: bool) -> Value | None:
    """The mean over seeds; what does not depend on a draw is one value, whatever the seed."""
    per_seed = []
    for seed in sorted({seed for seed, _ in found}):
        mean = _mean(found, seed, column.places)
        if column.against and mean is not None:
            other = _mean(found, seed, column.against)
            mean = None if other is None else harmonic_mean(mean, other)
        if mean is not None:
            per_seed.append(mean)
    return Value(estimate(per_seed if drawn else per_seed[:1])) if per_seed else None


def _mean(
    found: Mapping[tuple[int, Place], float], seed: int, places: Sequence[Place]
) -> float | None:
    values = [found[seed, place] for place in places if (seed, place) in found]
    return sum(values) / len(values) if len(values) == len(places) else None


def _mark_best(values: Mapping[str, Value | None]) -> None:
    known = [value for value in values.values() if value is not None]
    # What is printed alike is marked alike.
    ranked = sorted({round(value.estimate.mean, 4) for value in known}, reverse=True)
    for value in known:
        place = ranked.index(round(value.estimate.mean, 4)) + 1
        value.place = place if place <= 2 else 0


def _compare(
    record: Record,
    values: Mapping[str, Value | None],
    found: Mapping[str, Mapping[tuple[int, Place], float]],
    column: Column,
) -> None:
    """Find what is significantly above or below the references, paired over seeds and data sets."""
    if len(record.plan.seeds) < 2:
        return  # nothing is known of other seeds
    pairs = {
        name: {key: top1 for key, top1 in found[name].items() if key[1] in column.places}
        for name in values
    }
    for reference in REFERENCES:
        theirs = next(
            (e.name for e in record.plan.methods if e.settings["method"] == reference), None
        )
        if theirs is None:
            continue
        raw = {
            name: p
            for name in values
            if name != theirs and (p := p_value(pairs[name], pairs[theirs])) is not None
        }
        for name, p in holm(raw).items():
            value = values[name]
            if value is not None:
                value.p_values[reference] = p
                if p < SIGNIFICANCE:
                    value.signs[reference] = 1 if above(pairs[name], pairs[theirs]) else -1


@dataclass(frozen=True)
class Cost:
    """What a method takes.

    Attributes:
        method: its name in the plan.
        trained: values that it trains.
        share: of the model's parameters.
        step_seconds: median over runs of the median step; None where nothing is trained.
        peak_memory: bytes, median over runs; None where nobody knows.
        artefact: bytes of the file to ship.
    """

    method: str
    trained: int
    share: float
    step_seconds: float | None
    peak_memory: float | None
    artefact: int


def cost_table(record: Record, model: str) -> list[Cost]:
    """One line per method that has run with a model."""
    lines = []
    for entry in record.plan.methods:
        runs = [
            r for r in record.runs if (r.cell.contest[0], r.cell.contest[2]) == (model, entry.name)
        ]
        if not runs:
            continue
        trained = _median(run.results["trained"] for run in runs) or 0
        lines.append(
            Cost(
                entry.name,
                int(trained),
                trained / runs[0].results["parameters"],
                _median(run.results["cost"]["step_seconds"] for run in runs),
                _median(run.results["cost"]["peak_memory_bytes"] for run in runs),
                int(_median(run.results["artefact_bytes"] for run in runs) or 0),
            )
        )
    return lines


def _median(values: Iterable[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def is_known(value: float) -> bool:
    """Whether an error could be estimated."""
    return not math.isnan(value)
