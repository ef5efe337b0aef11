"""Result files: writing, reading, and putting a report of one between the markers of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saft_kernels.errors import SaftError
from saft_kernels.files import atomic_write

from .outcome import Figure, MemoryUse, Outcome, Sweep, Timing

FORMAT = "saft-bench"
VERSION = 2

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"


class ResultError(SaftError, ValueError):
    """A result file cannot be read or used, or there is nowhere to put its report."""


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """What a case found, as JSON can hold it."""
    figures = [{**asdict(figure), "verdict": figure.verdict} for figure in outcome.figures]
    # Through JSON at once: a record is then equal to what is read of it again.
    record: dict[str, Any] = json.loads(json.dumps({**asdict(outcome), "figures": figures}))
    return record


def outcome_of(record: Mapping[str, Any]) -> Outcome:
    """What a case found, from its record."""
    figures = [{k: v for k, v in each.items() if k != "verdict"} for each in record["figures"]]
    return Outcome(
        [Timing(**each) for each in record["timings"]],
        [Figure(**each) for each in figures],
        [Sweep(**{**each, "fitted": tuple(each["fitted"])}) for each in record["sweeps"]],
        [MemoryUse(**each) for each in record["memory"]],
    )


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result, atomically."""
    write_json(path, result)


def write_json(path: Path, content: Any) -> None:
    """Write anything that JSON can hold, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
