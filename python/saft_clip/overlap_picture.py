"""A picture of what several deltas share: between which, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from saft_clip.errors import ConfigError
from saft_clip.figures import shortened
from saft_kernels.delta import Overlap
from saft_kernels.files import atomic_write

#: What a picture may be, by its suffix.
KINDS = (".png", ".svg", ".pdf")

#: Parameters that are shown, those with most collisions.
MOST = 24

_INK, _MUTED, _GRID = "#1b1f24", "#57606a", "#d8dee4"
_AGREE, _CONFLICT = "#2f6f9f", "#d1603d"

_STYLE: Any = {
    "font.size": 10,
    "text.parse_math": False,  # a name may hold $
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "overlap",
}


def check_picture(path: Path) -> None:
    """Find out beforehand whether a picture can have this name.

    Raises:
        ConfigError: if its suffix says of no kind of picture.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"{path} is no picture: its name must end in {', '.join(KINDS)}")


def save_overlap(overlap: Overlap, names: Sequence[str], path: Path) -> None:
    """Draw it, atomically.

    Left, of each pair of deltas: the share of the row's entries that the column's has too, and how
    many of them both change in one direction. Right, for the parameters with most collisions:
    entries that two deltas or more change, and how many of these in opposite directions.

    Args:
        overlap: of two deltas or more.
        names: of the deltas, in its order.
        path: ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ConfigError: if it is none of these.
        FileWriteError: if it cannot be written.
    """
    check_picture(path)
    shown = sorted(overlap.parameters, key=lambda each: -each.shared)[:MOST]
    shown = [each for each in shown if each.shared]
    height = max(3.4, 1.6 + 0.24 * len(shown), 1.6 + 0.6 * len(names))
    with mpl.rc_context(_STYLE):
        drawing = Figure(figsize=(12.5, height), layout="constrained")
        pairs, layers = drawing.subplots(1, 2, width_ratios=(1, 1.1))
        _draw_pairs(pairs, overlap, [shortened(name, 22) for name in names])
        _draw_layers(layers, shown, sum(1 for each in overlap.parameters if each.shared))
        with atomic_write(path) as temporary:
            kind = path.suffix.lower().removeprefix(".")
            dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            drawing.savefig(temporary, format=kind, dpi=160, metadata=dateless)


def _draw_pairs(axes: Any, overlap: Overlap, names: Sequence[str]) -> None:
    shares = [
        [shared / nnz if nnz else 0.0 for shared in row]
        for row, nnz in zip(overlap.shared, overlap.nnz, strict=True)
    ]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            text = f"{overlap.shared[i][j]:,}"
            if i != j:
                shared, agree = overlap.shared[i][j], overlap.agree[i][j]
                text = f"{share:.1%}\n{agree / shared:.0%} agree" if shared else "none"
            axes.text(j, i, text, ha="center", va="center", size=8.5,
                      color="white" if share > 0.55 else _INK)  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_anchor("N")
    axes.set_title("What they share, of the row's entries")
    axes.spines[:].set_visible(False)


def _draw_layers(axes: Any, shown: Sequence[Any], several: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if not shown:
        axes.set_title("No entry is changed by two deltas")
        axes.set_axis_off()
        return
    places = range(len(shown))
    agree = [each.shared - each.conflicts for each in shown]
    axes.barh(places, agree, color=_AGREE, label="one direction")
    axes.barh(places, [each.conflicts for each in shown], left=agree, color=_CONFLICT,
              label="opposite directions")  # fmt: skip
    axes.set_yticks(places, [shortened(each.name, 56) for each in shown], size=8.5)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel("entries that two deltas or more change")
    which = f"{len(shown)} of {several}" if several > len(shown) else f"{several}"
    axes.set_title(f"Where they meet ({which} parameters)")
    axes.legend(frameon=False, loc="lower right")
