"""From a result file to the Markdown that the README includes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.environment import NOTICEABLE_LOAD
from bench.harness import Figure, Timing, format_seconds
from saft_kernels.errors import SaftError
from saft_kernels.files import atomic_write

FORMAT = "saft-bench"
VERSION = 1

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"


class ResultError(SaftError, ValueError):
    """A result file cannot be read, or there is nowhere to put its report."""


# Files --------------------------------------------------------------------------------------------


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """Read what :func:`write_result` wrote.

    Raises:
        ResultError: if the file cannot be read or is no result of this version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(
            f"{path} is no benchmark result ({error}); give a file that `run` wrote"
        ) from error
    if not isinstance(result, dict) or (result.get("format"), result.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise ResultError(
            f"{path} is no result of {FORMAT} version {VERSION}; run `python -m bench` again"
        )
    return result


def update_block(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a Markdown file, atomically.

    Raises:
        ResultError: if the file cannot be read or does not hold both markers, once each, in order.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error.strerror})") from error
    begin, end = content.find(BEGIN), content.find(END)
    if not (0 <= begin < end) or content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ResultError(
            f"{path} has no place for the report; put {BEGIN} and {END} on lines of their own"
        )
    updated = content[: begin + len(BEGIN)] + "\n" + text + content[end:]
    with atomic_write(path) as temporary:
        temporary.write_text(updated, encoding="utf-8")


# Markdown -----------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """All of a result: what it ran on, figures beside their bars, times beside their floors."""
    cases = result["cases"]
    parts = [_conditions(result)]
    parts += [
        f"**{name} was refused:** {case['refused']}"
        for name, case in cases.items()
        if case["refused"]
    ]
    figures = [figure for case in cases.values() for figure in figures_of(case)]
    timings = [timing for case in cases.values() for timing in timings_of(case)]
    if figures:
        parts.append(_figure_table(figures))
    if timings:
        parts.append(_TIMES + "\n\n" + _timing_table(timings))
    return "\n\n".join(parts) + "\n"


_TIMES = (
    "Median times and their quartiles. The floor is the time of a copy, run alongside, of as many "
    "bytes as the work must move. Weights and gradients that are selected entry by entry count as "
    "whole cache lines."
)


def figures_of(case: dict[str, Any]) -> list[Figure]:
    """The figures of a case's record."""
    return [Figure(**{k: v for k, v in f.items() if k != "verdict"}) for f in case["figures"]]


def timings_of(case: dict[str, Any]) -> list[Timing]:
    """The timings of a case's record."""
    return [Timing(**timing) for timing in case["timings"]]


def _conditions(result: dict[str, Any]) -> str:
    where, setting = result["environment"], result["setting"]
    text = (
        f"Measured {where['date'][:10]} on {where['processor']}, {where['threads']} threads, "
        f"{where['instruction_set']}, torch {where['torch']}, "
        f"with {setting['model']} ({setting['images']} images, {setting['prompts']} prompts, "
        f"density {setting['density']:g}); "
        f"saft-kernels {where['saft_kernels']} at commit {where['commit'][:12]}."
    )
    loads = [case["load"]["others"] for case in result["cases"].values()]
    known = [load for load in loads if load is not None]
    if known:
        text += f" Other programs used up to {max(known):.0%} of the processors meanwhile"
        text += ", which disturbs the figures." if max(known) > NOTICEABLE_LOAD else "."
    return text


def _figure_table(figures: list[Figure]) -> str:
    rows = [(f.what, _value(f), f.note, _bar(f), f.verdict) for f in figures]
    return _table(("what", "measured (95 % interval)", "from", "bar", ""), rows)


def _value(figure: Figure) -> str:
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    return f"{figure.value:.3g}{interval} {figure.unit}".strip()


def _bar(figure: Figure) -> str:
    if figure.bar is None:
        return ""
    return f"{'≥' if figure.at_least else '≤'} {figure.bar:g}"


def _timing_table(timings: list[Timing]) -> str:
    header = ("work", "by", "time", "quartiles", "floor", "reached", "peak memory")
    rows = [
        (
            timing.group,
            timing.name,
            format_seconds(timing.median),
            " to ".join(map(format_seconds, timing.spread)),
            "" if timing.floor is None else format_seconds(timing.floor),
            "" if timing.reached is None else f"{timing.reached:.0%}",
            "" if timing.peak is None else f"{timing.peak / 2**20:,.0f} MiB",
        )
        for timing in timings
    ]
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return _table([header[i] for i in used], [[row[i] for i in used] for row in rows])


def _table(header: Any, rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
