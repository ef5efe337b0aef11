"""Figures for README and docs: standalone SVG files, in light and dark, from a result.

GitHub shows the one that fits the reader's theme if a ``<picture>`` names both.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saft_clip.figures import PLACEHOLDERS
from saft_clip.report import TEMPLATES
from saft_kernels.files import atomic_write

from .curves import growth_plot
from .page import Part, lines_over, memory_groups, parts_of, step_groups
from .plots import TRAINING_STEP, memory_bars, time_bars
from .result_file import ResultError

#: What is swept in the figure of growth: the first of these that a result has.
_OVER = ("nnz", "D", "tokens", "density", "threads")

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"

#: Around a figure, in typographic points.
_ROOM = 9

#: Between these lines of a page, the figures are shown.
MARKERS = ("<!-- bench-figures:begin -->", "<!-- bench-figures:end -->")


@dataclass(frozen=True)
class Picture:
    """A figure that is written once for each theme.

    Attributes:
        name: of its files, without theme and suffix.
        about: for those who cannot see it.
        svg: in the page's colours.
    """

    name: str
    about: str
    svg: str


def write_figures(result: dict[str, Any], folder: Path, page: Path | None = None) -> str:
    """Write the figures that a result has anything for.

    Args:
        result: of a run.
        folder: created if there is none.
        page: a Markdown file that will show them; None: one in the current folder.

    Returns:
        What shows them there.

    Raises:
        ResultError: if the result has nothing to draw, or the folder cannot be made.
        FileWriteError: if a file cannot be written.
    """
    pictures = readme_pictures(parts_of(result))
    if not pictures:
        raise ResultError("the result has no training steps, memory or sweeps to draw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"{folder} cannot be made a folder ({error.strerror})") from error
    for picture in pictures:
        for theme, colours in themes().items():
            with atomic_write(_file(folder, picture, theme)) as temporary:
                temporary.write_text(standalone(picture.svg, colours), encoding="utf-8")
    there = Path(os.path.relpath(folder, Path.cwd() if page is None else page.parent))
    return "\n\n".join(_markdown(there, picture) for picture in pictures) + "\n"


def readme_pictures(parts: Sequence[Part]) -> list[Picture]:
    """Bars of training steps' time and peak memory, a figure per group, and one sweep."""
    pictures = []
    for part in parts:
        for number, (group, timings) in enumerate(step_groups(part).items(), start=1):
            name = f"time-{part.name}-{number}"
            svg = time_bars(name, timings, title=group + part.mark)
            pictures.append(Picture(name, f"Median times: {group}", svg))
        for number, (group, uses) in enumerate(memory_groups(part).items(), start=1):
            if not group.startswith(TRAINING_STEP):  # whole runs, whose peaks are not divided
                continue
            name = f"memory-{part.name}-{number}"
            svg = memory_bars(name, uses, title=f"peak memory, {group}")
            pictures.append(Picture(name, f"Peak memory: {group}", svg))
    lines = lines_over(parts)
    for over in [over for over in _OVER if over in lines][:1]:
        name = f"growth-{over}"
        svg = growth_plot(name, lines[over], title=f"time over {over}")
        pictures.append(Picture(name, f"Time over {over}", svg))
    return pictures


def themes() -> dict[str, dict[str, str]]:
    """The page's colours in light and in dark: its style sheet is the one place that has them."""
    style = (TEMPLATES / "page.html.j2").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    return {
        theme: dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for theme, block in zip(("light", "dark"), blocks, strict=True)
    }


def standalone(svg: str, colours: dict[str, str]) -> str:
    """Inline SVG as a file of its own, with colours in place of the page's variables.

    Args:
        svg: of :func:`saft_clip.figures.inline_svg`.
        colours: by the name of the variable.
    """
    for name in PLACEHOLDERS:
        svg = svg.replace(f"var(--{name})", colours[name])
    opening, rest = svg.split(">", 1)
    # On a page that is not ours the figure brings its card along, with some room around.
    width, height = (float(n) + 2 * _ROOM for n in re.findall(r"[\d.]+", _view_box(opening))[2:])
    box = f'x="-{_ROOM}" y="-{_ROOM}" width="{width:g}" height="{height:g}"'
    card = f'<rect {box} rx="8" fill="{colours["card"]}"/>'
    opening = opening.replace(_view_box(opening), f"-{_ROOM} -{_ROOM} {width:g} {height:g}")
    opening = re.sub(r' style="[^"]*"', "", opening)
    opening += f' width="{width:g}pt" height="{height:g}pt" style="font-family: {_FONT}"'
    return f"{opening}>{card}{rest.rstrip()}\n"


def _view_box(opening: str) -> str:
    return opening.partition('viewBox="')[2].partition('"')[0]


def _file(folder: Path, picture: Picture, theme: str) -> Path:
    return folder / f"{picture.name}-{theme}.svg"


def _markdown(folder: Path, picture: Picture) -> str:
    light, dark = (_file(folder, picture, theme).as_posix() for theme in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{html.escape(dark)}">'
        f'<img alt="{html.escape(picture.about)}" src="{html.escape(light)}"></picture>'
    )
