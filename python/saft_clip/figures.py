"""Figures for report pages: inline SVG that takes its colours from the page.

Matplotlib draws with placeholder colours, which then become CSS variables, so that one figure fits
a light and a dark page. Text stays text, in the page's font.
"""

from __future__ import annotations

import html
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    AutoLocator,
    EngFormatter,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

#: CSS variable of the page -> the colour that stands for it while matplotlib draws.
PLACEHOLDERS = {
    name: f"#{number:02x}fe{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "grid", "card", "before", "after", "s1", "s2", "s3", "s4", "s5", "bad"),
        start=1,
    )
}

#: A curve of fewer points needs markers and a wider axis to be seen.
FEW = 3

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold $
    "font.size": 10.5,
    "text.color": PLACEHOLDERS["ink"],
    "axes.labelcolor": PLACEHOLDERS["muted"],
    "axes.edgecolor": PLACEHOLDERS["grid"],
    "axes.titlecolor": PLACEHOLDERS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PLACEHOLDERS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": PLACEHOLDERS["grid"],
    "ytick.color": PLACEHOLDERS["grid"],
    "xtick.labelcolor": PLACEHOLDERS["muted"],
    "ytick.labelcolor": PLACEHOLDERS["muted"],
    "legend.frameon": False,
    "legend.labelcolor": PLACEHOLDERS["ink"],
    "lines.linewidth": 2.0,
}


@contextmanager
def figure(width: float, height: float, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A new figure in the page's style, in inches, and its axes."""
    with mpl.rc_context(_STYLE):
        drawing = Figure(figsize=(width, height), layout="constrained")
        drawing.patch.set_alpha(0)
        axes = drawing.subplots(**subplots)
        for one in axes.flat if hasattr(axes, "flat") else [axes]:
            one.patch.set_alpha(0)
        yield drawing, axes


def inline_svg(drawing: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        drawing: made by :func:`figure`.
        name: unique on the page: SVG ids are derived from it.
        description: for those who cannot see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text: the page's reader has the font that is missing here.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font(-family)?: ([\d.]+px)?[^;\"]*DejaVu[^;\"]*", _font_size, svg)
    # Ids such as axes_1 come from a counter and would repeat in the page's next figure.
    svg = re.sub(r'<g id="(?!m[0-9a-f]{10})[^"]*"(/?)>', r"<g\1>", svg)
    for variable, colour in PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    width = re.search(r'viewBox="0 0 ([\d.]+)', opening)
    style = f"max-width:{float(width.group(1)) * 4 / 3:.0f}px" if width else ""
    return f'{opening} role="img" aria-label="{html.escape(description)}" style="{style}">{rest}'


def _font_size(match: re.Match[str]) -> str:
    return f"font-size: {match.group(2)}" if match.group(2) else "font-family: inherit"


def shortened(name: str, width: int = 30) -> str:
    """The name with an ellipsis in its middle, if it takes more columns than ``width``.

    A folder's path is told from another by its end, a name by its beginning: both are kept.
    """
    if _columns(name) <= width:
        return name
    head, tail = "", ""
    while _columns(head) + _columns(tail) < width - 2:
        if _columns(head) <= _columns(tail):
            head = name[: len(head) + 1]
        else:
            tail = name[-len(tail) - 1 :]
    return f"{head}…{tail}"


def _columns(text: str) -> int:
    """East Asian characters are about twice as wide as others."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


class _WithinOne(AutoLocator):
    """The usual ticks, but none below 0 or above 1, whatever the margins."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        ticks: Any = super().tick_values(vmin, vmax)
        return ticks[(ticks > -1e-9) & (ticks < 1 + 1e-9)]


def show_percent(axis: Axis) -> None:
    """Label an axis of accuracies."""
    axis.set_major_locator(_WithinOne())
    axis.set_major_formatter(PercentFormatter(1.0))


def accuracy_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy before and after, a line per data set.

    Args:
        rows: ``name``, ``before``, ``after`` (fractions of 1), ``shifted``.
    """
    with figure(8.9, 0.9 + 0.42 * len(rows)) as (drawing, axes):
        for position, row in enumerate(rows):
            y = len(rows) - 1 - position
            axes.plot(
                [row["before"], row["after"]], [y, y], color=PLACEHOLDERS["grid"], linewidth=5,
                solid_capstyle="round", zorder=2,
            )  # fmt: skip
        y_positions = range(len(rows) - 1, -1, -1)
        for when, label in (("before", "before (zero-shot)"), ("after", "after fine-tuning")):
            axes.scatter(
                [row[when] for row in rows], y_positions, s=62, label=label, zorder=3,
                color=PLACEHOLDERS[when], edgecolors=PLACEHOLDERS["card"], linewidths=1.2,
            )  # fmt: skip
        _label_ends(axes, rows)
        axes.set_yticks(list(y_positions), [shortened(row["name"]) for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=PLACEHOLDERS["ink"])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        show_percent(axes.xaxis)
        axes.margins(x=0.12)
        drawing.legend(loc="outside upper right", ncols=2)
        return inline_svg(drawing, "accuracy", "Accuracy before and after, by data set")


def _label_ends(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for position, row in enumerate(rows):
        up = row["after"] >= row["before"]
        axes.annotate(
            f"{100 * (row['after'] - row['before']):+.1f}",
            (row["after"], len(rows) - 1 - position),
            xytext=(9 if up else -9, 0), textcoords="offset points", va="center",
            ha="left" if up else "right", color=PLACEHOLDERS["ink"], fontsize=9.5,
        )  # fmt: skip


def curves_figure(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Training loss and validation accuracy over the steps; the latter only if there is any."""
    training = [line for line in metrics if line["kind"] == "train"]
    validation = [line for line in metrics if line["kind"] == "validation"]
    columns = 2 if validation else 1
    with figure(8.9, 2.7, ncols=columns, squeeze=False) as (drawing, axes):
        loss = axes[0, 0]
        steps, losses = [t["step"] for t in training], [t["loss"] for t in training]
        marker = "o" if len(steps) < FEW else None  # a line of one point would be invisible
        loss.plot(steps, losses, color=PLACEHOLDERS["before"], linewidth=1, alpha=0.7)
        loss.plot(steps, smoothed(losses), color=PLACEHOLDERS["after"], marker=marker, markersize=4)
        loss.set(title="training loss", ylim=(0, None))
        _count_steps(loss, steps)
        if validation:
            accuracy, steps = axes[0, 1], [v["step"] for v in validation]
            accuracy.plot(
                steps, [v["top1"] for v in validation],
                color=PLACEHOLDERS["after"], marker="o", markersize=4, clip_on=False,
            )  # fmt: skip
            low, high = accuracy.get_ylim()
            accuracy.set(title="validation accuracy (top-1)", ylim=(max(low, 0), min(high, 1)))
            show_percent(accuracy.yaxis)
            _count_steps(accuracy, steps)
        return inline_svg(drawing, "curves", "Learning curves")


def _count_steps(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(steps) < FEW:
        axes.set_xlim(max(0, steps[0] - 1), steps[-1] + 1)


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over a window of a tenth of the points; shorter at the ends."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def blocks_figure(blocks: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """Trained values per block of each encoder, by kind."""
    encoders = [name for name in ("image", "text") if any(b["encoder"] == name for b in blocks)]
    with figure(8.9, 3.1, ncols=len(encoders), sharey=True, squeeze=False) as (drawing, grid):
        for axes, encoder in zip(grid.flat, encoders, strict=True):
            mine = [b for b in blocks if b["encoder"] == encoder]
            names = list(dict.fromkeys(b["block"] for b in mine))
            bottom = dict.fromkeys(names, 0)
            for number, kind in enumerate(kinds, start=1):
                counts = {b["block"]: b["trained"] for b in mine if b["kind"] == kind}
                heights = [counts.get(name, 0) for name in names]
                axes.bar(
                    names, heights, bottom=[bottom[name] for name in names], width=0.72,
                    color=PLACEHOLDERS[f"s{number}"], label=kind,
                )  # fmt: skip
                bottom = {name: bottom[name] + counts.get(name, 0) for name in names}
            axes.set(title=f"{encoder} encoder", xlabel="block")
            axes.grid(axis="x", visible=False)
            axes.tick_params(axis="x", length=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        handles, labels = grid.flat[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper right", ncols=len(kinds))
        return inline_svg(drawing, "blocks", "Trained parameters per block of each encoder")


def contenders_figure(groups: Sequence[Mapping[str, Any]]) -> str:
    """Bars of accuracy with error bars, a group of bars for each role of domains.

    Args:
        groups: ``name`` and ``statistics``: contender -> (mean, standard error).
    """
    names = list(groups[0]["statistics"])
    width = 0.8 / len(names)
    with figure(8.9, 3.3) as (drawing, axes):
        for number, (name, colour) in enumerate(zip(names, ("before", "s2", "after"), strict=True)):
            places = [i + (number - (len(names) - 1) / 2) * width for i in range(len(groups))]
            statistics = [group["statistics"][name] for group in groups]
            axes.bar(
                places, [mean for mean, _ in statistics], width * 0.9,
                color=PLACEHOLDERS[colour], label=name,
            )  # fmt: skip
            for place, (mean, error) in zip(places, statistics, strict=True):
                axes.errorbar(
                    place, mean, error, color=PLACEHOLDERS["ink"], linewidth=1.2, capsize=3
                )
                axes.annotate(
                    f"{100 * mean:.1f}", (place, mean + (0 if error != error else error)),
                    xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9.5,
                    # The grid line of 100% would strike the text through.
                    bbox={"facecolor": PLACEHOLDERS["card"], "edgecolor": "none", "pad": 0.8},
                )  # fmt: skip
        axes.set_xticks(range(len(groups)), [group["name"] for group in groups])
        axes.tick_params(axis="x", length=0, labelcolor=PLACEHOLDERS["ink"])
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.08)
        show_percent(axes.yaxis)
        drawing.legend(loc="outside upper right", ncols=len(names))
        return inline_svg(drawing, "contenders", "Accuracy by role of domain and method")


def sweep_figure(densities: Sequence[float], panels: Sequence[Mapping[str, Any]]) -> str:
    """SAFT's accuracy over the density, a panel for each role of domains.

    Args:
        densities: shares of trained parameters.
        panels: ``title``, ``saft``: (mean, standard error) per density, ``full``, ``zero-shot``.
    """
    with figure(8.9, 3.0, ncols=len(panels), squeeze=False) as (drawing, grid):
        for axes, panel in zip(grid.flat, panels, strict=True):
            mean, error = panel["full"]
            axes.axhspan(mean - error, mean + error, color=PLACEHOLDERS["s2"], alpha=0.18, lw=0)
            axes.axhline(mean, color=PLACEHOLDERS["s2"], linewidth=1.6, label="full fine-tuning")
            axes.axhline(
                panel["zero-shot"][0], color=PLACEHOLDERS["before"], linewidth=1.6,
                linestyle="--", label="zero-shot",
            )  # fmt: skip
            axes.errorbar(
                densities, *zip(*panel["saft"], strict=True),
                color=PLACEHOLDERS["after"], marker="o", markersize=5, capsize=3, label="SAFT",
            )  # fmt: skip
            axes.set_xscale("log")
            axes.set_xticks(densities, [f"{100 * density:g}%" for density in densities])
            axes.minorticks_off()
            axes.set(title=panel["title"], xlabel="density")
            show_percent(axes.yaxis)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside upper right", ncols=3)
        return inline_svg(drawing, "sweep", "Accuracy over SAFT's density")


def tuning_figure(lines: Sequence[Mapping[str, Any]]) -> str:
    """Validation accuracy of every trial over its learning rate.

    Args:
        lines: ``name``, ``full`` (or SAFT), ``lr`` and ``accuracy`` of each trial.
    """
    with figure(8.9, 3.0) as (drawing, axes):
        saft = [line for line in lines if not line["full"]]
        for line in lines:
            strength = 1.0 if line["full"] else 0.35 + 0.65 * (saft.index(line) + 1) / len(saft)
            axes.plot(
                line["lr"], line["accuracy"], label=line["name"], marker="o", markersize=4,
                color=PLACEHOLDERS["s2" if line["full"] else "after"], alpha=strength,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # no math, see _STYLE
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="learning rate", ylabel="validation accuracy")
        show_percent(axes.yaxis)
        drawing.legend(loc="outside right center")
        return inline_svg(drawing, "tuning", "Validation accuracy of every trial")
