"""Result files: writing, reading, and putting a report of one between the markers of a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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

#: What of a setting says how often and beside which rivals something was timed, not on what.
EFFORTS = ("kernels", "steps", "bars_only")

#: What of an environment is another one every time.
_MOMENT = ("date", "commit", "load_average")


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


@contextmanager
def understood(name: str | Path) -> Iterator[None]:
    """Say of a file that it lacks something, in a block that looks into it.

    Raises:
        ResultError: if the block misses what every result has.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(
            f"{name} is not what this release writes ({error!r}); run `python -m bench` again"
        ) from error


def kept_cases(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The cases that a file holds, beside which new ones can be written into it.

    Efforts may differ: how often a case was timed, and whether rivals without a bar were left out,
    is true of that case alone and says nothing of the others. A case keeps its own
    (:func:`circumstances`).

    Args:
        path: of the file; if there is none, there are no cases.
        result: that is to be written: its machine, versions and setting.

    Raises:
        ResultError: if the file holds anything else than cases of the same machine, versions and
            setting, which writing would destroy.
    """
    if not path.exists():
        return {}
    advice = "name another file with --output, or remove that one"
    try:
        other = read_result(path)
    except ResultError as error:
        raise ResultError(
            f"{path} exists and is no result of {FORMAT} version {VERSION}; {advice}"
        ) from error
    with understood(path):
        found = _obstacles(other, result)
        if found:
            raise ResultError(f"{path} holds a result with other {', '.join(found)}; {advice}")
        return {n: {**circumstances(other), **case} for n, case in other["cases"].items()}


def _obstacles(kept: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What was not the same when a kept result was measured."""
    parts = (("environment", _MOMENT), ("setting", EFFORTS))
    return [
        difference
        for part, varying in parts
        for difference in differences(
            [key for key in {**kept[part], **new[part]} if key not in varying],
            kept[part],
            new[part],
        )
    ]


def circumstances(result: dict[str, Any]) -> dict[str, Any]:
    """When, at which commit and with which efforts the cases of a result were measured."""
    where, setting = result["environment"], result["setting"]
    efforts = {key: setting[key] for key in EFFORTS if key in setting}
    return {"date": where["date"], "commit": where["commit"], "efforts": efforts}


def differences(
    keys: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[str]:
    """What differs, each as "threads (2 against 1)"."""
    pairs = ((key, *(each.get(key, "not recorded") for each in (before, after))) for key in keys)
    return [f"{key.replace('_', ' ')} ({a} against {b})" for key, a, b in pairs if a != b]


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
