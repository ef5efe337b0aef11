"""From a result file to the Markdown that the README includes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saft_kernels.errors import SaftError
from saft_kernels.files import atomic_write

from .environment import NOTICEABLE_LOAD
from .harness import Figure, Timing, format_seconds

FORMAT = "saft-bench"
VERSION = 1

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"

MARK = "†"


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


def comparable_cases(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The cases in a file, if they were measured on the same machine with the same setting.

    Args:
        path: of the file; without a result of this version there are none.
        result: to compare with.
    """
    try:
        other = read_result(path)
    except ResultError:  # there is none, or of another version
        return {}
    if other["setting"] != result["setting"] or _machine(other) != _machine(result):
        return {}
    when = {key: other["environment"][key] for key in ("date", "commit")}
    return {name: {**when, **case} for name, case in other["cases"].items()}


def _machine(result: dict[str, Any]) -> dict[str, Any]:
    varying = ("date", "commit", "load_average")
    return {key: value for key, value in result["environment"].items() if key not in varying}


def update_block(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace what stands between the two markers of a Markdown file, atomically.

    Args:
        path: of the file.
        text: what comes there.
        markers: the first and the last line of the block, which stay.

    Raises:
        ResultError: if the file cannot be read or does not hold both markers, once each, in order.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error.strerror})") from error
    first, last = markers
    begin, end = content.find(first), content.find(last)
    if not (0 <= begin < end) or content.count(first) != 1 or content.count(last) != 1:
        raise ResultError(
            f"{path} has no place for the report; put {first} and {last} on lines of their own"
        )
    updated = content[: begin + len(first)] + "\n" + text + content[end:]
    with atomic_write(path) as temporary:
        temporary.write_text(updated, encoding="utf-8")


# Markdown -----------------------------------------------------------------------------------------


def markdown(result: dict[str, Any], *, brief: bool = False) -> str:
    """What a result was measured on, figures beside their bars, times beside their floors.

    Args:
        result: of a run.
        brief: only the figures that have a bar, and no times.
    """
    cases = result["cases"].values()
    parts = [_conditions(result)]
    if any(_mark(case) for case in cases):
        parts.append(_DISTURBED)
    for name, case in result["cases"].items():
        if case["refused"]:
            parts.append(f"**{name} was refused:** {case['refused']}")
    figures = [
        _figure_row(figure, _mark(case))
        for case in cases
        for figure in figures_of(case)
        if figure.bar is not None or not brief
    ]
    timings = [_timing_row(timing, _mark(case)) for case in cases for timing in timings_of(case)]
    if figures:
        parts.append(table(("what", "measured (95 % interval)", "from", "bar", ""), figures))
    if timings and not brief:
        header = ("work", "by", "time", "quartiles", "floor", "reached", "peak memory")
        parts += [_TIMES, table(header, timings)]
    return "\n\n".join(parts) + "\n"


_DISTURBED = (
    f"{MARK} Measured while other programs used more than {NOTICEABLE_LOAD:.0%} of the processors, "
    "so that times and their ratios mean little."
)
_TIMES = (
    "Median times and their quartiles. The floor is the time of a copy, run alongside, of as many "
    "bytes as the work must move. Weights and gradients that are selected entry by entry count as "
    "whole cache lines (on a GPU: sectors). Work that reads more than it writes can beat a copy."
)


def _mark(case: dict[str, Any]) -> str:
    """What marks the rows of a case that was disturbed."""
    others = case["load"]["others"]
    return f" {MARK}" if others is not None and others > NOTICEABLE_LOAD else ""


def figures_of(case: dict[str, Any]) -> list[Figure]:
    """The figures of a case's record."""
    return [Figure(**{k: v for k, v in f.items() if k != "verdict"}) for f in case["figures"]]


def timings_of(case: dict[str, Any]) -> list[Timing]:
    """The timings of a case's record."""
    return [Timing(**timing) for timing in case["timings"]]


def _hardware(where: dict[str, Any]) -> str:
    host = f"{where['processor']}, {where['threads']} threads, {where['instruction_set']}"
    if "gpu" not in where:
        return host
    return f"{where['gpu']} (driver {where['driver']}, {where['toolkit']}; host {host})"


def _conditions(result: dict[str, Any]) -> str:
    where, setting = result["environment"], result["setting"]
    cases = [{**where, **case} for case in result["cases"].values()]
    dates = " and ".join(dict.fromkeys(case["date"][:10] for case in cases))
    commits = " and ".join(dict.fromkeys(case["commit"][:12] for case in cases))
    text = (
        f"Measured {dates} on {_hardware(where)}, torch {where['torch']}, "
        f"with {setting['model']} ({setting['images']} images, {setting['prompts']} prompts, "
        f"density {setting['density']:g}); "
        f"saft-kernels {where['saft_kernels']} at commit {commits}."
    )
    loads = [case["load"]["others"] for case in result["cases"].values()]
    known = [load for load in loads if load is not None]
    if known:
        text += f" Other programs used up to {max(known):.0%} of the processors meanwhile."
    return text


def _figure_row(figure: Figure, mark: str) -> list[str]:
    return [figure.what + mark, _value(figure), figure.note, _bar(figure), figure.verdict]


def _value(figure: Figure) -> str:
    interval = "" if figure.low is None else f" ({figure.low:.3g} to {figure.high:.3g})"
    return f"{figure.value:.3g}{interval} {figure.unit}".strip()


def _bar(figure: Figure) -> str:
    if figure.bar is None:
        return ""
    return f"{'≥' if figure.at_least else '≤'} {figure.bar:g}"


def _timing_row(timing: Timing, mark: str) -> list[str]:
    return [
        timing.group + mark,
        timing.name,
        format_seconds(timing.median),
        " to ".join(map(format_seconds, timing.spread)),
        "" if timing.floor is None else format_seconds(timing.floor),
        "" if timing.reached is None else f"{timing.reached:.0%}",
        "" if timing.peak is None else f"{timing.peak / 2**20:,.0f} MiB",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns in which every row is empty are left out."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in used)} |" for line in lines)
