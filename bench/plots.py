"""Plots of a result with a row for each contender: times, memory, ratios, bandwidth reached.

They are inline SVG in the page's colours (:mod:`saft_clip.figures`). Rows are as high as their
labels, and a plot is as high as its rows, so that nothing overlaps however many there are.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from saft_clip.figures import PLACEHOLDERS, figure, inline_svg, shortened

from .outcome import BASELINE, FLOOR, OURS, TIMES_FASTER, Figure, MemoryUse, Timing
from .ratios import format_seconds

#: Of every plot, in inches; the page's column is that wide.
WIDTH = 10.0

# In inches: a line of a label, the space between rows, what axis and legend take, half a bar.
_LINE, _GAP, _FRAME, _HALF = 0.165, 0.13, 0.95, 0.085

#: Characters of a line, and of a whole label.
_COLUMNS, _LONGEST = 52, 156

_SMALL = 9.5

#: What all training steps are called in a result.
TRAINING_STEP = "training step"


def wrapped(text: str, columns: int = _COLUMNS, longest: int = _LONGEST) -> str:
    """The text in lines of so many characters; in its middle it is cut if it has too many."""
    short = shortened(text, longest)
    wide = any(ord(character) > 0x2E7F for character in short)  # East Asian
    return "\n".join(textwrap.wrap(short, columns // 2 if wide else columns)) or " "


# Rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of a plot; a heading has nothing beside it."""

    text: str
    heading: bool = False

    @property
    def label(self) -> str:
        """Its text in lines."""
        return wrapped(self.text, 100, 300) if self.heading else wrapped(self.text)

    @property
    def height(self) -> float:
        """In inches."""
        lines = self.label.count("\n") + 1
        return lines * _LINE + _GAP * (1.6 if self.heading else 1)


def _places(rows: Sequence[Row]) -> list[float]:
    """The middle of each row, in inches from the top."""
    ends = [0.0]
    for row in rows:
        ends.append(ends[-1] + row.height)
    return [(top + bottom) / 2 for top, bottom in pairwise(ends)]


def _height(rows: Sequence[Row]) -> float:
    return sum(row.height for row in rows) + _FRAME


def _show_rows(axes: Axes, rows: Sequence[Row]) -> list[float]:
    """Label the rows; where those that are no heading are."""
    places = _places(rows)
    plain = [(y, row.label) for y, row in zip(places, rows, strict=True) if not row.heading]
    axes.set_yticks([y for y, _ in plain], [label for _, label in plain], fontsize=_SMALL)
    axes.tick_params(axis="y", length=0, labelcolor=PLACEHOLDERS["ink"])
    axes.set_ylim(sum(row.height for row in rows), 0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    for y, row in zip(places, rows, strict=True):
        if row.heading:
            text = axes.annotate(
                row.label, (0.004, y), xycoords=("figure fraction", "data"), va="center",
                fontsize=_SMALL, fontweight="bold", annotation_clip=False,
                bbox={"facecolor": PLACEHOLDERS["card"], "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
            text.set_in_layout(False)
    return [y for y, _ in plain]


def _headed(parts: Iterable[tuple[str, Sequence[str]]]) -> list[Row]:
    """Rows below the headings that they have in common, if they have one."""
    rows = []
    for heading, texts in parts:
        rows += [Row(heading, heading=True)] * bool(heading)
        rows += [Row(text) for text in texts]
    return rows


def by_shared_start(texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Split texts into runs that begin with the same words: (these words, where the texts are).

    What shares its beginning with no neighbour comes first: behind a run, it would seem part of it.
    """
    runs: list[list[int]] = []
    for i, text in enumerate(texts):
        if runs and _continues([texts[j] for j in runs[-1]], text):
            runs[-1].append(i)
        else:
            runs.append([i])
    alone = [i for run in runs if len(run) == 1 for i in run]
    shared = [run for run in runs if len(run) > 1]
    starts = [(_shared_start([texts[i] for i in run]), run) for run in shared]
    return [("", alone), *starts] if alone else starts


def _shared_start(texts: Sequence[str]) -> str:
    words = zip(*(text.split(" ")[:-1] for text in texts), strict=False)
    return "".join(f"{each[0]} " for each in takewhile(lambda w: len(set(w)) == 1, words))


def _continues(run: Sequence[str], text: str) -> bool:
    """Whether a heading stays about as long as it was: shorter ones say less and less."""
    start = _shared_start([*run, text])
    return len(start) >= 24 and (len(run) == 1 or len(start) >= 0.75 * len(_shared_start(run)))


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    """A number behind the end of a bar; the grid does not strike it through."""
    axes.annotate(
        text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=_SMALL,
        bbox={"facecolor": PLACEHOLDERS["card"], "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _at_right(axes: Axes, y: float, text: str) -> None:
    """A number in a column of its own, right of the axes."""
    axes.annotate(
        text, (1.015, y), xycoords=("axes fraction", "data"), va="center", fontsize=_SMALL,
        annotation_clip=False,
    )  # fmt: skip


def _legend(drawing: Drawing, handles: Sequence[Patch | Line2D], title: str = "") -> None:
    """Above the axes, or below them where a title is above."""
    if handles:
        drawing.legend(
            handles=handles, ncols=len(handles),
            loc="outside lower left" if title else "outside upper left",
            fontsize=_SMALL, handlelength=1.4, columnspacing=1.4,
        )  # fmt: skip


def show_title(drawing: Drawing, title: str) -> None:
    """At the upper left, if there is one."""
    if title:
        text = wrapped(title, 90, 270)
        drawing.suptitle(text, x=0.004, ha="left", fontsize=11.5, fontweight="bold")


# Times --------------------------------------------------------------------------------------------

#: Role of a contender -> (key in the legend, colour).
_ROLES = {
    OURS: ("this package", "after"),
    BASELINE: ("baselines", "s1"),
    FLOOR: ("the floor", "before"),
}


def contender(measured: Timing | MemoryUse) -> str:
    """Its name, and what it covers if others do not."""
    return f"{measured.name} ({measured.covers})" if measured.covers else measured.name


def time_bars(name: str, timings: Sequence[Timing], title: str = "") -> str:
    """Median times of a group, their quartiles, and the machine's limits.

    Args:
        name: unique on the page.
        timings: of the group.
        title: inside the plot, where there is none around it.
    """
    rows = [Row(contender(timing)) for timing in timings]
    with figure(WIDTH, _height(rows) + 0.3 * bool(title)) as (drawing, axes):
        for y, timing in zip(_show_rows(axes, rows), timings, strict=True):
            _time_bar(axes, y, timing)
        axes.set_xlim(0, 1.14 * max(_end(timing) for timing in timings))
        axes.xaxis.set_major_formatter(EngFormatter("s"))
        show_title(drawing, title)
        roles = {timing.role for timing in timings}
        limited = any(timing.floor is not None for timing in timings)
        _legend(
            drawing,
            [
                *(
                    Patch(color=PLACEHOLDERS[colour], label=label)
                    for role, (label, colour) in _ROLES.items()
                    if role in roles
                ),
                Line2D([], [], color=PLACEHOLDERS["ink"], linewidth=1.2, label="quartiles"),
                *([_tick("the machine's limit", "s2")] if limited else []),
            ],
            title,
        )
        return inline_svg(drawing, name, f"Median times: {timings[0].group}")


def _tick(label: str, colour: str) -> Line2D:
    return Line2D(
        [], [], color=PLACEHOLDERS[colour], marker="|", markersize=10, markeredgewidth=2.5,
        linestyle="none", label=label,
    )  # fmt: skip


def _time_bar(axes: Axes, y: float, timing: Timing) -> None:
    colour = PLACEHOLDERS[_ROLES[timing.role][1]]
    axes.barh(y, timing.median, 2 * _HALF, color=colour)
    low, high = timing.spread
    axes.errorbar(
        timing.median, y, xerr=[[max(timing.median - low, 0)], [max(high - timing.median, 0)]],
        color=PLACEHOLDERS["ink"], linewidth=1.2, capsize=2.5,
    )  # fmt: skip
    if timing.floor is not None:
        axes.plot(
            [timing.floor] * 2, [y - 1.5 * _HALF, y + 1.5 * _HALF], color=PLACEHOLDERS["s2"],
            linewidth=2.5, solid_capstyle="butt", zorder=3,
        )  # fmt: skip
    _beside(axes, _end(timing), y, format_seconds(timing.median))


def _end(timing: Timing) -> float:
    return max(timing.median, timing.spread[1], timing.floor or 0)


# Memory -------------------------------------------------------------------------------------------

#: Attribute of a :class:`MemoryUse` -> (name, colour).
_PARTS = {
    "weights": ("weights", "s1"),
    "state": ("optimizer state", "s2"),
    "gradients": ("gradients", "s3"),
    "activations": ("activations", "s4"),
    "rest": ("the rest", "s5"),
}


def memory_bars(name: str, uses: Sequence[MemoryUse], title: str = "") -> str:
    """Peak memory of a group, divided as far as that is known.

    Args:
        name: unique on the page.
        uses: of the group.
        title: inside the plot, where there is none around it.
    """
    rows = [Row(contender(use)) for use in uses]
    largest = max(use.peak for use in uses)
    unit, size = ("GiB", 2**30) if largest >= 2**31 else ("MiB", 2**20)
    with figure(WIDTH, _height(rows) + 0.3 * bool(title)) as (drawing, axes):
        ends = []
        for y, use in zip(_show_rows(axes, rows), uses, strict=True):
            ends.append(_memory_bar(axes, y, use, size))
            _beside(axes, ends[-1], y, f"{use.peak / 2**20:,.0f} MiB")
        axes.set_xlim(0, 1.16 * max(ends))
        axes.xaxis.set_major_formatter(StrMethodFormatter(f"{{x:,g}} {unit}"))
        show_title(drawing, title)
        _legend(drawing, _memory_legend(uses), title)
        return inline_svg(drawing, name, f"Peak memory: {uses[0].group}")


def _memory_bar(axes: Axes, y: float, use: MemoryUse, size: int) -> float:
    """Draw what is known of it beside one another, and the outline of what is not; its end."""
    end = 0.0
    for part, (_, colour) in _PARTS.items():
        value = (getattr(use, part) or 0) / size
        axes.barh(y, value, 2 * _HALF, left=end, color=PLACEHOLDERS[colour])
        end += value
    whole = use.peak / size
    if whole > end and use.rest is None:
        axes.barh(
            y, whole - end, 2 * _HALF, left=end, facecolor="none", edgecolor=PLACEHOLDERS["muted"]
        )
    return max(end, whole)


def _memory_legend(uses: Sequence[MemoryUse]) -> list[Patch]:
    handles = [
        Patch(color=PLACEHOLDERS[colour], label=label)
        for part, (label, colour) in _PARTS.items()
        if any(getattr(use, part) is not None for use in uses)
    ]
    if any(use.rest is None for use in uses):
        handles.append(
            Patch(facecolor="none", edgecolor=PLACEHOLDERS["muted"], label="not divided")
        )
    return handles


# Ratios -------------------------------------------------------------------------------------------

_VERDICTS = {"PASS": "after", "MISS": "bad", "UNCLEAR": "s2", "": "before"}
_MEANING = {"PASS": "passes", "MISS": "misses", "UNCLEAR": "is too close to call", "": "has no bar"}


def drawable(figure: Figure) -> bool:
    """Whether a ratio can be shown on a logarithmic axis."""
    numbers = (figure.value, figure.low, figure.high, figure.bar)
    return all(n is None or (math.isfinite(n) and n > 0) for n in numbers)


def ratio_plot(name: str, ratios: Sequence[Figure]) -> str:
    """Ratios with their intervals and bars, a row each, on a logarithmic axis.

    Args:
        name: unique on the page.
        ratios: of one unit, all :func:`drawable`.
    """
    runs = by_shared_start([ratio.what for ratio in ratios])
    rows = _headed(
        (
            f"{start.rstrip()}\N{NO-BREAK SPACE}…" if start else "",
            [ratios[i].what[len(start) :] for i in run],
        )
        for start, run in runs
    )
    ordered = [ratios[i] for _, run in runs for i in run]
    with figure(WIDTH, _height(rows) + 0.2) as (drawing, axes):
        axes.set_xscale("log")
        axes.axvline(1, color=PLACEHOLDERS["muted"], linewidth=1.4)
        for y, ratio in zip(_show_rows(axes, rows), ordered, strict=True):
            _ratio(axes, y, ratio)
        _log_axis(axes, [n for r in ratios for n in (r.value, r.low, r.high, r.bar) if n])
        unit = ratios[0].unit
        better = "right" if unit == TIMES_FASTER else "left"
        axes.set_xlabel(f"{unit}, logarithmic; better to the {better}")
        _legend(drawing, _ratio_legend(ratios))
        return inline_svg(drawing, name, f"Ratios with intervals: {unit}")


def _ratio(axes: Axes, y: float, ratio: Figure) -> None:
    colour = PLACEHOLDERS[_VERDICTS[ratio.verdict]]
    interval = ""
    if ratio.low is not None and ratio.high is not None:
        axes.plot([ratio.low, ratio.high], [y, y], color=colour, solid_capstyle="butt")
        interval = f"({ratio.low:.3g} to {ratio.high:.3g})"
    hollow = ratio.inside_noise
    axes.plot(
        ratio.value, y, marker="o", markersize=7, markeredgecolor=colour, markeredgewidth=1.6,
        markerfacecolor=PLACEHOLDERS["card"] if hollow else colour, linestyle="none", zorder=3,
    )  # fmt: skip
    if ratio.bar is not None:
        axes.plot(
            [ratio.bar] * 2, [y - 1.4 * _HALF, y + 1.4 * _HALF], color=PLACEHOLDERS["ink"],
            linewidth=2.2, zorder=4, solid_capstyle="butt",
        )  # fmt: skip
    # What may as well be 1 is not printed as if it were more or less.
    _at_right(axes, y, interval if hollow else f"{ratio.value:.3g} {interval}".rstrip())


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Limits around the values and 1, and ticks with plain numbers."""
    low, high = min(1, *values), max(1, *values)
    margin = max((high / low) ** 0.06, 1.03)
    axes.set_xlim(low / margin, high * margin)
    decades = math.log10(high / low)
    if decades < 0.8:  # powers of ten, their halves and fifths are too few there
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def _ratio_legend(ratios: Sequence[Figure]) -> list[Patch | Line2D]:
    found = {ratio.verdict for ratio in ratios}
    handles = [
        _dot(_MEANING[verdict], colour) for verdict, colour in _VERDICTS.items() if verdict in found
    ]
    if any(ratio.inside_noise for ratio in ratios):
        handles.append(_dot("inside the noise", "muted", hollow=True))
    if any(ratio.bar is not None for ratio in ratios):
        handles.append(_tick("bar", "ink"))
    return [*handles]


def _dot(label: str, colour: str, *, hollow: bool = False) -> Line2D:
    own = PLACEHOLDERS[colour]
    return Line2D(
        [], [], color=own, marker="o", markersize=7, linestyle="none", label=label,
        markerfacecolor=PLACEHOLDERS["card"] if hollow else own, markeredgewidth=1.6,
    )  # fmt: skip


# Bandwidth ----------------------------------------------------------------------------------------


def copy_share(timing: Timing) -> float | None:
    """The bytes that it must move, per second, over those of a copy; None where not known."""
    if not timing.moves or not timing.bandwidth:
        return None
    return timing.moves / timing.calm / timing.bandwidth


def bandwidth_bars(name: str, timings: Sequence[Timing]) -> str:
    """How much of a copy's bandwidth each reached, in groups.

    Args:
        name: unique on the page.
        timings: all with a :func:`copy_share`.
    """
    groups = dict.fromkeys(timing.group for timing in timings)
    members = {group: [t for t in timings if t.group == group] for group in groups}
    rows = _headed((group, [t.name for t in those]) for group, those in members.items())
    ordered = [timing for those in members.values() for timing in those]
    shares = [copy_share(timing) or 0 for timing in ordered]
    with figure(WIDTH, _height(rows)) as (drawing, axes):
        axes.axvline(1, color=PLACEHOLDERS["s2"], linewidth=1.6)
        for y, timing, share in zip(_show_rows(axes, rows), ordered, shares, strict=True):
            axes.barh(y, share, 2 * _HALF, color=PLACEHOLDERS["after"])
            speed = (timing.moves or 0) / timing.calm / 1e9
            _at_right(axes, y, f"{100 * share:.3g}%, {speed:.3g} GB/s")
        axes.set_xlim(0, 1.05 * max(1, *shares))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("bytes that must be moved per second, in % of a copy's")
        return inline_svg(drawing, name, "Bandwidth reached, in percent of a copy's")
