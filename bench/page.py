"""A result as one self-contained page: ``python -m bench report``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from saft_clip.report import write_page as write_template

from . import tables
from .curves import THREADS, Line, Numbered, has_operations, roofline_panels, roofline_plot
from .curves import growth_plot as growth_of
from .outcome import TIMES_AS_LONG, TIMES_FASTER, MemoryUse, Outcome, Sweep, Timing
from .plots import (
    TRAINING_STEP,
    bandwidth_bars,
    copy_share,
    drawable,
    memory_bars,
    ratio_plot,
    time_bars,
)
from .result_file import outcome_of

TEMPLATES = Path(__file__).parent / "templates"

_Grouped = TypeVar("_Grouped", Timing, MemoryUse)

VERDICTS = ("PASS", "MISS", "UNCLEAR")


@dataclass(frozen=True)
class Part:
    """What a page shows of one case.

    Attributes:
        name: of the case.
        summary: of what it measures.
        mark: behind what was disturbed; empty otherwise.
        outcome: what it found.
    """

    name: str
    summary: str
    mark: str
    outcome: Outcome

    @property
    def title(self) -> str:
        """For what is shown of it."""
        return f"{self.name}: {self.summary}{self.mark}"


def parts_of(result: dict[str, Any]) -> list[Part]:
    """The cases of a result."""
    return [
        Part(name, case["summary"], tables.mark(case), outcome_of(case))
        for name, case in result["cases"].items()
    ]


def write_page(result: dict[str, Any], path: Path) -> None:
    """Write the page of a result, atomically.

    Raises:
        FileWriteError: if it cannot be written.
    """
    parts = parts_of(result)
    write_template(path, "report.html.j2", page_content(result, parts), TEMPLATES)


def page_content(result: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """What the template shows."""
    cases = result["cases"].items()
    return {
        "conditions": tables.conditions(result),
        "own_sizes": tables.own_sizes(result),
        "disturbed": tables.DISTURBED if any(part.mark for part in parts) else "",
        "tiles": _tiles(parts),
        "misses": _with_verdict(parts, "MISS"),
        "unclear": _with_verdict(parts, "UNCLEAR"),
        "refused": [(name, case["refused"]) for name, case in cases if case["refused"]],
        "left_out": [(name, case["left_out"]) for name, case in cases if case["left_out"]],
        "sections": [section for section in _sections(parts) if section["plots"]],
        "tables": [table for table in _tables(parts) if table["rows"]],
        "markdown": tables.markdown(result),
        "settings": _flat(result["setting"]),
        "environment": _flat(result["environment"]),
        "durations": [(name, f"{case['seconds']:,.0f} s") for name, case in cases],
    }


def _tiles(parts: Sequence[Part]) -> list[dict[str, Any]]:
    figures = [figure for part in parts for figure in part.outcome.figures]
    labels = ("bars passed", "bars missed", "bars too close to call: the interval holds the bar")
    tiles = [
        {
            "value": sum(figure.verdict == verdict for figure in figures),
            "label": label,
            "tone": verdict.lower(),
        }
        for verdict, label in zip(VERDICTS, labels, strict=True)
    ]
    free = sum(figure.bar is None for figure in figures)
    return [*tiles, {"value": free, "label": "figures without a bar", "tone": ""}]


def _with_verdict(parts: Sequence[Part], verdict: str) -> list[tuple[str, str, str]]:
    return [
        (figure.what + part.mark, tables.value(figure), tables.bar(figure))
        for part in parts
        for figure in part.outcome.figures
        if figure.verdict == verdict
    ]


# Plots --------------------------------------------------------------------------------------------

_ABOUT = {
    "times": (
        "Shorter is better. A bar is the median over rounds in which all contenders took turns; "
        "the thin line runs from the first to the third quartile. The tick is what this machine "
        "would need for the bytes that the step must move, or for the operations that it did when "
        "it was checked, at the speed of a copy or of a large matrix product: a bar that ends "
        "there gets shorter only by doing less."
    ),
    "memory": (
        "Shorter is better. Peak memory of a training step, each in a process of its own; the "
        "number is the whole peak. Colours show what its tensors were for at that moment."
    ),
    "ratios": (
        "A dot is a ratio of times within rounds, the line its 95 % interval. The short upright "
        "line is the bar: a ratio passes or misses if its whole interval does, and is too close "
        "to call if the interval holds the bar. A hollow dot is inside the noise: its interval "
        "holds 1, no difference."
    ),
    "roofline": (
        "Higher is better. The slanted part of the roof is the speed of a copy, the level part "
        "that of a large matrix product, both measured among the contenders. A point far below "
        "the roof leaves something to gain; work left of the bend waits for memory. Operations "
        "are those of the contender itself, counted while it was checked or known from its sizes: "
        "one that does more than it has to is not lower for it, but slower."
    ),
    "bandwidth": (
        "Longer is better. For work that only moves bytes: those that it must move, per second of "
        "its time (the first quartile), against those of a copy (the upright line). Work that "
        "reads more than it writes can beat a copy; what fits into a cache can, too."
    ),
    "growth": (
        "Both axes are logarithmic, so that a power of the size is a straight line and its "
        "exponent the slope: 1 doubles the time with the size, 0 does not depend on it. Points are "
        "first quartiles, and whiskers end at the third. Over threads, higher is better, and the "
        "dashed line is what perfect sharing would give."
    ),
}


def _section(key: str, title: str, plots: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"id": key, "title": title, "about": _ABOUT[key], "plots": list(plots)}


def _plot(
    title: str, svg: str, legend: Sequence[tuple[str, list[Numbered]]] = ()
) -> dict[str, Any]:
    return {"title": title, "svg": Markup(svg), "legend": legend}


def _sections(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        _section("times", "Time of a training step", _time_plots(parts)),
        _section("memory", "Peak memory of a training step", _memory_plots(parts)),
        _section("ratios", "Ratios of times", _ratio_plots(parts)),
        _section("roofline", "Roofline", _roofline_plots(parts)),
        _section("bandwidth", "Bandwidth", _bandwidth_plots(parts)),
        _section("growth", "How times grow", _growth_plots(parts)),
    ]


def step_groups(part: Part) -> dict[str, list[Timing]]:
    """The training steps of a case, by group."""
    steps = [t for t in part.outcome.timings if t.group.startswith(TRAINING_STEP)]
    return _by_group(steps)


def memory_groups(part: Part) -> dict[str, list[MemoryUse]]:
    """The memory that a case measured, by group."""
    return _by_group(part.outcome.memory)


def _by_group(items: Iterable[_Grouped]) -> dict[str, list[_Grouped]]:
    groups: dict[str, list[_Grouped]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


def lines_over(parts: Sequence[Part]) -> dict[str, list[Line]]:
    """What grows -> the lines of its plot, threads last; without those that have no timings."""
    found: dict[str, list[Line]] = {}
    for part in parts:
        for sweep in part.outcome.sweeps:
            line = Line.of(sweep, part.outcome.timings)
            if line.points:
                found.setdefault(sweep.over, []).append(line)
    return dict(sorted(found.items(), key=lambda item: item[0] == THREADS))


def _time_plots(parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
    for part in parts:
        for number, (group, timings) in enumerate(step_groups(part).items()):
            yield _plot(group + part.mark, time_bars(f"times-{part.name}-{number}", timings))


def _memory_plots(parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
    for part in parts:
        for number, (group, uses) in enumerate(memory_groups(part).items()):
            yield _plot(group, memory_bars(f"memory-{part.name}-{number}", uses))


def _ratio_plots(parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
    """Each unit has an axis of its own: better is right on one, left on the other."""
    for part in parts:
        title = part.title
        for number, unit in enumerate((TIMES_FASTER, TIMES_AS_LONG)):
            ratios = [f for f in part.outcome.figures if f.unit == unit and drawable(f)]
            if ratios:
                yield _plot(title, ratio_plot(f"ratios-{part.name}-{number}", ratios))
                title = ""


def _outside_sweeps(part: Part) -> list[Timing]:
    """What no plot of growth shows."""
    shown = {(sweep.group, name) for sweep in part.outcome.sweeps for name in sweep.contenders}
    return [t for t in part.outcome.timings if (t.group, t.name) not in shown]


def _roofline_plots(parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
    for part in parts:
        panels = roofline_panels(_outside_sweeps(part))
        if panels:
            points = [point for panel in panels for point in panel.points]
            legend = [(group, list(those)) for group, those in groupby(points, _group)]
            yield _plot(part.title, roofline_plot(f"roofline-{part.name}", panels), legend)


def _group(point: Numbered) -> str:
    return point.timing.group


def _bandwidth_plots(parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
    """Of all that has no place below a roof."""
    for part in parts:
        timings = _outside_sweeps(part)
        roofed = {t.group for t in timings if has_operations(t) and t.rate}
        moving = [
            t
            for t in timings
            if copy_share(t) is not None and not (t.group in roofed and has_operations(t))
        ]
        if moving:
            yield _plot(part.title, bandwidth_bars(f"bandwidth-{part.name}", moving))


def _growth_plots(parts: Sequence[Part]) -> Iterable[dict[str, Any]]:
    marked = {over for part in parts if part.mark for over in _overs(part.outcome.sweeps)}
    for number, (over, lines) in enumerate(lines_over(parts).items()):
        title = f"over {over}{f' {tables.MARK}' * (over in marked)}"
        yield _plot(title, growth_of(f"growth-{number}", lines))


def _overs(sweeps: Iterable[Sweep]) -> set[str]:
    return {sweep.over for sweep in sweeps}


# Tables -------------------------------------------------------------------------------------------


def _tables(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        _table(
            "all-figures", "Figures", "", tables.FIGURES, 3, parts,
            lambda part: part.outcome.figures,
            lambda figure, part: tables.figure_row(figure, part.mark),
        ),
        _table(
            "all-times", "Times", tables.ABOUT_TIMES, tables.TIMES, 3, parts,
            lambda part: part.outcome.timings,
            lambda timing, part: tables.timing_row(timing, part.mark),
        ),
        _table(
            "all-memory", "Memory", tables.ABOUT_MEMORY, tables.MEMORY, 3, parts,
            lambda part: part.outcome.memory, lambda use, _: tables.memory_row(use),
        ),
    ]  # fmt: skip


def _table(
    key: str,
    title: str,
    about: str,
    header: Sequence[str],
    texts: int,
    parts: Sequence[Part],
    items: Callable[[Part], Sequence[Any]],
    cells: Callable[[Any, Part], list[str]],
) -> dict[str, Any]:
    """A table with the rows of each case below its name, without columns that are empty.

    Args:
        key: id of its section.
        title: of its section.
        about: how to read it.
        header: of all columns.
        texts: how many columns at the left are texts, which are wrapped; the others are not.
        parts: of the page.
        items: of a part, that become rows.
        cells: of such a row.
    """
    found = [(part, [cells(item, part) for item in items(part)]) for part in parts]
    rows = [row for _, part_rows in found for row in part_rows]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return {
        "id": key,
        "title": title,
        "about": about,
        "header": [header[i] for i in used],
        "texts": sum(i < texts for i in used),
        "rows": len(rows),
        "parts": [
            {"title": part.title, "rows": [[row[i] for i in used] for row in part_rows]}
            for part, part_rows in found
            if part_rows
        ],
    }


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values, those of a nested record behind its name."""
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, "none" if value is None else str(value)))
    return rows
