"""Figures of an experiment, as inline SVG for its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saft_clip.config import AUTO
from saft_clip.experiment.bound import Gap
from saft_clip.experiment.cells import tasks
from saft_clip.experiment.protocols import OTHERS, OWN
from saft_clip.experiment.record import Record, Row
from saft_clip.experiment.statistics import Estimate, estimate
from saft_clip.figures import PLACEHOLDERS, figure, inline_svg, shortened, show_percent

#: What a method looks like in every figure; methods beyond those share colours, not markers.
_FIXED = {"saft": ("after", "o"), "full": ("s2", "s"), "zero-shot": ("before", "D")}
_COLOURS = ("s1", "s3", "s4", "s5", "bad")
_MARKERS = ("^", "v", "P", "X", "<", ">", "p", "h", "*", "d")


def looks(record: Record) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method of the plan."""
    found: dict[str, dict[str, Any]] = {}
    used, number = set[str](), 0
    for entry in record.plan.methods:
        kind = entry.settings["method"]
        if kind in _FIXED and kind not in used:
            colour, marker = _FIXED[kind]
            used.add(kind)
        else:
            # The markers go on by one each time around, so that no pair comes twice.
            turn = number + number // len(_MARKERS)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[turn % len(_MARKERS)]
            number += 1
        found[entry.name] = {"color": PLACEHOLDERS[colour], "marker": marker}
    return found


def shots_figure(record: Record, model: str) -> str:
    """Accuracy over the number of training images (SAFT, Fig. 1); a panel for each role."""
    panels = _panels(record)
    shots = sorted(record.plan.shots, key=lambda k: k or math.inf)  # 0 is all images
    with figure(8.9, 3.7, ncols=len(panels), squeeze=False) as (drawing, grid):
        for axes, (title, roles) in zip(grid.flat, panels, strict=True):
            for name, look in looks(record).items():
                points = [(k, _over_seeds(record, model, name, k, roles)) for k in shots]
                known = [(k, point) for k, point in points if point is not None]
                if known:
                    axes.errorbar(
                        [shots.index(k) for k, _ in known],
                        [point.mean for _, point in known],
                        [_error(point) for _, point in known],
                        label=_labelled(name), markersize=4.5, capsize=2.5, linewidth=1.5,
                        **look,
                    )  # fmt: skip
            axes.set_xticks(range(len(shots)), [str(k) if k else "all" for k in shots])
            axes.set(title=title, xlabel="training images per class")
            show_percent(axes.yaxis)
        _legend(drawing, grid.flat[0])
        return inline_svg(drawing, f"shots-{model}", "Accuracy over training images per class")


def tradeoff_figure(record: Record, model: str, shots: int) -> str:
    """Accuracy in distribution against accuracy elsewhere, with the way between the weights.

    Each method is a point, with standard errors over seeds; a line is one method's averages with
    the pretrained weights (WiSE-FT, Wortsman et al. 2022, Fig. 1).
    """
    with figure(8.9, 4.6) as (drawing, axes):
        for name, look in looks(record).items():
            own = _over_seeds(record, model, name, shots, OWN)
            other = _over_seeds(record, model, name, shots, OTHERS)
            _draw_way(axes, record, model, name, shots, look)
            if own is not None and other is not None:
                axes.errorbar(
                    own.mean, other.mean, _error(other), _error(own), label=_labelled(name),
                    markersize=7, linestyle="none", elinewidth=1, zorder=3, **look,
                )  # fmt: skip
        names = {role for row in record.rows if (role := row.role) in OTHERS}
        axes.set(xlabel="accuracy in distribution", ylabel=f"accuracy, {_elsewhere(names)}")
        show_percent(axes.xaxis)
        show_percent(axes.yaxis)
        _legend(drawing, axes)
        return inline_svg(drawing, f"tradeoff-{model}-{shots}", "Accuracy here against elsewhere")


def _draw_way(
    axes: Axes, record: Record, model: str, name: str, shots: int, look: Mapping[str, Any]
) -> None:
    rows = [row for row in _rows(record, model, name, shots) if row.alpha is not None]
    alphas = sorted({row.alpha for row in rows if row.alpha is not None})
    points = []
    for alpha in alphas:
        here = [row for row in rows if row.alpha == alpha]
        own, other = (_mean_over_seeds(record, here, roles) for roles in (OWN, OTHERS))
        if own is not None and other is not None:
            points.append((own.mean, other.mean))
    if points:
        axes.plot(
            *zip(*points, strict=True), color=look["color"], marker=".", markersize=4,
            linewidth=1.2, alpha=0.7, zorder=2,
        )  # fmt: skip


def density_figure(record: Record, model: str, shots: int) -> str:
    """Accuracy over the share of trained parameters (SAFT, Fig. 5); a panel for each role.

    Sparse methods are lines, one for each way to select; all others are horizontal.
    """
    panels = _panels(record)
    kinds: dict[str, list[tuple[float, str]]] = {}
    for entry in record.plan.methods:
        if entry.settings.get("density", AUTO) != AUTO:
            kinds.setdefault(entry.settings["method"], []).append(
                (entry.settings["density"], entry.name)
            )
    look = looks(record)
    with figure(8.9, 3.6, ncols=len(panels), squeeze=False) as (drawing, grid):
        for axes, (title, roles) in zip(grid.flat, panels, strict=True):
            of = _estimates(record, model, shots, roles)
            for kind, entries in kinds.items():
                line = [(d, of[name]) for d, name in sorted(entries) if name in of]
                if line:
                    axes.errorbar(
                        [d for d, _ in line], [e.mean for _, e in line],
                        [_error(e) for _, e in line], label=kind, markersize=5, capsize=3,
                        **look[entries[0][1]],
                    )  # fmt: skip
            listed = {name for entries in kinds.values() for _, name in entries}
            for name, value in of.items():
                if name not in listed:
                    axes.axhline(
                        value.mean, label=_labelled(name), color=look[name]["color"],
                        linewidth=1.5, linestyle="--" if name == "zero-shot" else "-",
                    )  # fmt: skip
            axes.set_xscale("log")
            axes.set(title=title, xlabel="density")
            show_percent(axes.yaxis)
        _legend(drawing, grid.flat[0])
        return inline_svg(drawing, f"density-{model}-{shots}", "Accuracy over density")


def bound_figure(gaps: Sequence[Gap], record: Record) -> str:
    """The generalization bound and the measured gap over the number of trained values."""
    look = looks(record)
    with figure(8.9, 3.9) as (drawing, axes):
        for name in dict.fromkeys(gap.method for gap in gaps):
            mine = [gap for gap in gaps if gap.method == name]
            trained = [gap.trained for gap in mine]
            axes.plot(
                trained, [gap.bound for gap in mine], linestyle="none", markersize=7,
                label=_labelled(name), **look[name],
            )  # fmt: skip
            axes.plot(
                trained, [max(gap.measured.mean, _LEAST) for gap in mine], linestyle="none",
                markersize=7, markerfacecolor="none", **look[name],
            )  # fmt: skip
        axes.axhline(1, color=PLACEHOLDERS["bad"], linewidth=1.2, linestyle=":")
        axes.annotate(
            "above this line a bound says nothing", (1, 1), xycoords=("axes fraction", "data"),
            xytext=(-4, 4), textcoords="offset points", ha="right", color=PLACEHOLDERS["bad"],
            fontsize=9.5,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlabel="trained values", ylabel="gap: bound (filled), measured (hollow)")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
        _legend(drawing, axes)
        return inline_svg(drawing, "bound", "Generalization bound and measured gap")


#: Where a gap of nothing, or below, is drawn.
_LEAST = 1e-3


def _panels(record: Record) -> list[tuple[str, tuple[str, ...]]]:
    roles = {row.role for row in record.rows}
    panels = [("in distribution", OWN), (_elsewhere(roles), OTHERS)]
    return [(title, which) for title, which in panels if roles & set(which)]


def _elsewhere(roles: set[str]) -> str:
    names = {"shifted": "mean of shifted", "target": "mean of targets", "new": "new classes"}
    return next((title for role, title in names.items() if role in roles), "elsewhere")


def _rows(record: Record, model: str, method: str, shots: int) -> list[Row]:
    wanted = (model, method, shots)
    return [row for row in record.rows if (row.model, row.method, row.shots) == wanted]


def _estimates(record: Record, model: str, shots: int, roles: Sequence[str]) -> dict[str, Estimate]:
    found = {
        entry.name: _over_seeds(record, model, entry.name, shots, roles)
        for entry in record.plan.methods
    }
    return {name: value for name, value in found.items() if value is not None}


def _over_seeds(
    record: Record, model: str, method: str, shots: int, roles: Sequence[str]
) -> Estimate | None:
    rows = _rows(record, model, method, shots)
    return _mean_over_seeds(record, [row for row in rows if row.alpha is None], roles)


def _mean_over_seeds(record: Record, rows: Sequence[Row], roles: Sequence[str]) -> Estimate | None:
    """Over seeds, of the mean over data sets; of seeds that have all of them, as in the tables."""
    wanted = sum(role in roles for task in tasks(record.plan) for role in task.roles.values())
    per_seed: dict[int, list[float]] = {}
    for row in rows:
        if row.role in roles:
            per_seed.setdefault(row.seed, []).append(row.top1)
    values = [sum(v) / len(v) for v in per_seed.values() if len(v) == wanted]
    return estimate(values) if values else None


def _error(value: Estimate) -> float:
    return 0.0 if math.isnan(value.error) else value.error


def _labelled(name: str) -> str:
    """The name for a legend, which leaves out what begins with an underscore."""
    short = shortened(name, 24)
    return f"\u2060{short}" if short.startswith("_") else short


def _legend(drawing: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right upper", fontsize=9)
