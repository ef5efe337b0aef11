"""Plots of a result on two logarithmic axes: the roofline, and how times grow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from saft_clip.figures import PLACEHOLDERS, figure, inline_svg

from .outcome import Sweep, Timing
from .plots import WIDTH, show_title, wrapped

_SMALL = 9.5

Point = tuple[float, float]


# Roofline -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbered:
    """A point of a roofline plot and its number there."""

    number: int
    timing: Timing


@dataclass(frozen=True)
class Panel:
    """A roof, and what was measured below it.

    Attributes:
        precision: of the matrix product that sets the rate.
        points: in order of their numbers.
    """

    precision: str
    points: list[Numbered]

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a copy: the median over the groups, each of which has its own."""
        return statistics.median(point.timing.bandwidth or 0 for point in self.points)

    @property
    def rate(self) -> float:
        """Operations per second of a matrix product, likewise."""
        return statistics.median(p.timing.rate for p in self.points if p.timing.rate)


def has_operations(timing: Timing) -> bool:
    """Whether it can be a point of a roofline plot."""
    return bool(timing.flops and timing.moves and timing.bandwidth)


def roofline_panels(timings: Sequence[Timing]) -> list[Panel]:
    """Who counts operations, by precision, numbered through.

    Args:
        timings: of a case. Groups in which nothing is limited by operations have no roof and
            are left out.
    """
    roofed = {timing.group for timing in timings if has_operations(timing) and timing.rate}
    found: dict[str, list[Timing]] = {}
    for timing in timings:
        if timing.group in roofed and has_operations(timing):
            found.setdefault(timing.dtype, []).append(timing)
    panels, number = [], 0
    for precision, those in found.items():
        if any(timing.rate for timing in those):
            panels.append(
                Panel(precision, [Numbered(number + i, t) for i, t in enumerate(those, start=1)])
            )
            number += len(those)
    return panels


def roofline_plot(name: str, panels: Sequence[Panel]) -> str:
    """Operations per second over operations per byte, below the roof of each precision.

    Args:
        name: unique on the page.
        panels: up to two beside one another.
    """
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    most = max(len(panel.points) for panel in panels)
    height = (4.0 if most <= 16 else 5.2) * lines
    width = WIDTH if columns == 2 else 0.74 * WIDTH
    with figure(width, height, nrows=lines, ncols=columns, squeeze=False) as (drawing, grid):
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        used = list(zip(grid.flat, panels, strict=False))
        for axes, panel in used:
            _roof(axes, panel)
        drawing.draw_without_rendering()  # settles where points are, and so where labels may be
        drawing.set_layout_engine("none")
        for axes, panel in used:
            _number(drawing, axes, panel)
        return inline_svg(drawing, name, "Roofline: operations per second over those per byte")


def _roof(axes: Axes, panel: Panel) -> None:
    points = [_position(point.timing) for point in panel.points]
    ridge = panel.rate / panel.bandwidth
    left = min(ridge, *(x for x, _ in points)) / 4
    right = max(ridge, *(x for x, _ in points)) * 4
    axes.loglog(
        [left, ridge, right], [panel.bandwidth * left, panel.rate, panel.rate],
        color=PLACEHOLDERS["s2"], solid_joinstyle="miter",
    )  # fmt: skip
    axes.plot(
        *zip(*points, strict=True), linestyle="none", marker="o", markersize=6,
        color=PLACEHOLDERS["after"], markeredgecolor=PLACEHOLDERS["card"],
    )  # fmt: skip
    axes.set_xlim(left, right)
    lowest = min(panel.bandwidth * left, *(y for _, y in points))
    axes.set_ylim(lowest / 3, 3 * max(panel.rate, *(y for _, y in points)))
    _plain_decades(axes.xaxis, StrMethodFormatter("{x:g}"))
    _plain_decades(axes.yaxis, EngFormatter())
    axes.set(xlabel="operations per byte", ylabel="operations per second")
    axes.set_title(
        f"{panel.precision}: copy {_eng(panel.bandwidth)}B/s, product {_eng(panel.rate)}op/s",
        fontsize=_SMALL,
    )


def _position(timing: Timing) -> Point:
    return timing.flops / (timing.moves or 1), timing.flops / timing.calm


def _eng(value: float) -> str:
    exponent = min(max(math.floor(math.log10(value) / 3), 0), 5)
    return f"{value / 1000**exponent:.3g} {' kMGTP'[exponent].strip()}"


def _plain_decades(axis: Axis, formatter: Any) -> None:
    """Ticks at powers of ten, or more: matplotlib's own text is mathematics, which is off here."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=9))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _number(drawing: Drawing, axes: Axes, panel: Panel) -> None:
    scale = 72 / drawing.dpi  # display units to points
    positions = [_position(point.timing) for point in panel.points]
    shown = [(float(x) * scale, float(y) * scale) for x, y in axes.transData.transform(positions)]
    box = axes.get_window_extent()
    bounds = (box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale)
    texts = [str(point.number) for point in panel.points]
    offsets = place_labels(shown, [5.6 * len(text) + 2 for text in texts], bounds)
    for text, position, offset in zip(texts, positions, offsets, strict=True):
        axes.annotate(
            text, position, xytext=offset, textcoords="offset points", ha="center", va="center",
            fontsize=8.5, bbox={"facecolor": PLACEHOLDERS["card"], "edgecolor": "none", "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": PLACEHOLDERS["muted"], "linewidth": 0.6,
                        "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


Box = tuple[float, float, float, float]

_LABEL_HEIGHT = 10.0
_MARKER = 4.0
_RADII = (11, 17, 24, 32, 41, 51, 62, 74, 88, 104, 122)
_ANGLES = [math.radians(angle) for angle in (0, 180, 90, 270, *range(15, 360, 15))]


def place_labels(points: Sequence[Point], widths: Sequence[float], bounds: Box) -> list[Point]:
    """Where labels can stand beside their points, on none of the points and not on one another.

    Each takes the nearest free place in turn; where there is none it takes the last one tried.

    Args:
        points: in typographic points, as all lengths here.
        widths: of the labels.
        bounds: left, bottom, right and top that labels stay within.

    Returns:
        The middle of each label, from its point.
    """
    taken: list[Box] = [_box(point, 2 * _MARKER, 2 * _MARKER) for point in points]
    offsets = []
    for (x, y), width in zip(points, widths, strict=True):
        for dx, dy in _candidates(width):
            box = _box((x + dx, y + dy), width, _LABEL_HEIGHT)
            if _within(box, bounds) and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        offsets.append((dx, dy))
    return offsets


def _candidates(width: float) -> list[Point]:
    return [
        ((radius + width / 2 - 5) * math.cos(angle), radius * math.sin(angle))
        for radius in _RADII
        for angle in _ANGLES
    ]


def _box(middle: Point, width: float, height: float) -> Box:
    x, y = middle
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _within(box: Box, bounds: Box) -> bool:
    return all(a >= b for a, b in zip(box[:2], bounds[:2], strict=True)) and all(
        a <= b for a, b in zip(box[2:], bounds[2:], strict=True)
    )


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# Growth -------------------------------------------------------------------------------------------

THREADS = "threads"

_COLOURS = ("after", "s1", "s2", "s3", "bad", "ink")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")

_LABEL_COLUMNS = 36
_LABEL_LINE = 0.165


@dataclass(frozen=True)
class Line:
    """A sweep and its timings, as far as both are there and positive."""

    sweep: Sweep
    points: list[tuple[float, Timing]]

    @classmethod
    def of(cls, sweep: Sweep, timings: Sequence[Timing]) -> Line:
        """With the timings that the sweep names."""
        known = {(timing.group, timing.name): timing for timing in timings}
        found = (
            (size, known.get((sweep.group, name)))
            for size, name in zip(sweep.sizes, sweep.contenders, strict=True)
        )
        return cls(sweep, [(s, t) for s, t in found if t is not None and s > 0 and t.calm > 0])

    @property
    def label(self) -> str:
        """Its name, and the exponent with what that was fitted to, if not to all."""
        low, high = self.sweep.fitted
        text = f"exponent {self.sweep.exponent:.2f}"
        if (low, high) != (self.sweep.sizes[0], self.sweep.sizes[-1]):
            text += f" from {_size(low)} to {_size(high)}"
        parts = (wrapped(self.sweep.label, _LABEL_COLUMNS, 100), wrapped(text, _LABEL_COLUMNS))
        return "\n".join(parts).replace("exponent -", "exponent \N{MINUS SIGN}")


def _size(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def growth_plot(name: str, lines: Sequence[Line], title: str = "") -> str:
    """Times, up to their third quartiles, over what grows; over threads, how many times faster.

    Args:
        name: unique on the page.
        lines: over the same, each with points.
        title: inside the plot, where there is none around it.
    """
    over = lines[0].sweep.over
    labels = [line.label for line in lines]
    room = sum(label.count("\n") + 1.6 for label in labels) * _LABEL_LINE
    with figure(WIDTH, max(3.6, room + 1.0) + 0.3 * bool(title)) as (drawing, axes):
        axes.set(xscale="log", yscale="log", xlabel=over)
        if over == THREADS:
            _ideal(axes, lines)
        ends = [
            _line(axes, line, colour, marker)
            for line, colour, marker in zip(lines, cycle(_COLOURS), cycle(_MARKERS), strict=False)
        ]
        sizes = sorted({size for line in lines for size, _ in line.points})
        _growth_axes(axes, over, sizes)
        show_title(drawing, title)
        _label_lines(drawing, axes, labels, ends)
        return inline_svg(drawing, name, f"Growth of time with {over}")


def _line(axes: Axes, line: Line, colour: str, marker: str) -> Point:
    """Draw it; where it ends."""
    sizes = [size for size, _ in line.points]
    first = line.points[0][1].calm
    if line.sweep.over == THREADS:
        values = [first / timing.calm for _, timing in line.points]
        spreads = [(first / t.spread[1], first / t.spread[0]) for _, t in line.points]
    else:
        values = [timing.calm for _, timing in line.points]
        spreads = [timing.spread for _, timing in line.points]
    below = [max(v - low, 0) for v, (low, _) in zip(values, spreads, strict=True)]
    above = [max(high - v, 0) for v, (_, high) in zip(values, spreads, strict=True)]
    axes.errorbar(
        sizes, values, yerr=[below, above], color=PLACEHOLDERS[colour], marker=marker,
        markersize=5, linewidth=1.8, elinewidth=1.1, capsize=2.5,
    )  # fmt: skip
    return sizes[-1], values[-1]


def _ideal(axes: Axes, lines: Sequence[Line]) -> None:
    most = max(line.points[-1][0] / line.points[0][0] for line in lines)
    least = min(line.points[0][0] for line in lines)
    axes.plot(
        [least, least * most], [1, most], color=PLACEHOLDERS["muted"], linestyle="--",
        linewidth=1.4, label="ideal",
    )  # fmt: skip
    axes.legend(loc="upper left", fontsize=_SMALL)


def _growth_axes(axes: Axes, over: str, sizes: Sequence[float]) -> None:
    margin = max((sizes[-1] / sizes[0]) ** 0.04, 1.02)
    axes.set_xlim(sizes[0] / margin, sizes[-1] * margin)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    if over == THREADS:
        axes.set_ylabel(f"speed-up over {sizes[0]:g} thread{'s' * (sizes[0] != 1)}")
        axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.set_ylabel("time (first quartile)")
        small = sizes[-1] < 1
        axes.xaxis.set_major_locator(LogLocator(subs=_subs(sizes[0], sizes[-1])))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}") if small else EngFormatter())
        axes.yaxis.set_major_formatter(EngFormatter("s"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=_subs(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())


def _subs(low: float, high: float) -> tuple[float, ...]:
    """More ticks within a decade where there are few decades."""
    decades = math.log10(high / low)
    return (1, 1.5, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 3 else (1,)


def _label_lines(
    drawing: Drawing, axes: Axes, labels: Sequence[str], ends: Sequence[Point]
) -> None:
    """Beside the end of each line, moved apart where they would overlap."""
    widest = max(len(part) for label in labels for part in label.split("\n"))
    room = (widest * 5.9 + 34) / 72 / WIDTH
    drawing.set_layout_engine("constrained", rect=(0, 0, 1 - room, 1))
    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")
    scale = 72 / drawing.dpi
    box = axes.get_window_extent()
    middles = [float(y) * scale for _, y in axes.transData.transform(ends)]
    heights = [(label.count("\n") + 1.6) * _LABEL_LINE * 72 for label in labels]
    places = moved_apart(middles, heights, box.y0 * scale, box.y1 * scale)
    for label, (x, y), place, colour in zip(labels, ends, places, cycle(_COLOURS), strict=False):
        axes.annotate(
            label, (x, y), xycoords="data", va="center", fontsize=_SMALL,
            xytext=(box.x1 * scale + 16, place), textcoords="figure points",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": PLACEHOLDERS[colour], "linewidth": 0.8,
                        "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def moved_apart(
    middles: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Middles of intervals of these heights, in the same order, near where they were wanted.

    They are pushed up from below and then down from the upper end, so that none overlap; if there
    is not room for all between the ends, the lowest go below.
    """
    order = sorted(range(len(middles)), key=lambda i: middles[i])
    places = list(middles)
    floor = low
    for i in order:
        places[i] = max(places[i], floor + heights[i] / 2)
        floor = places[i] + heights[i] / 2
    ceiling = high
    for i in reversed(order):
        places[i] = min(places[i], ceiling - heights[i] / 2)
        ceiling = places[i] - heights[i] / 2
    return places
