"""What came of a run: a table, and the record of the last one that was kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fuzz.children import Outcome

#: What the last run with ``--keep`` gave.
RESULT = Path(__file__).with_name("result.json")

_HEAD = ("target", "engine", "inputs", "accepted", "refused", "failed", "slowest", "most memory")


def table(rows: Iterable[tuple[str, Outcome]]) -> str:
    """A table in Markdown: a row for each engine and target, and one for all together.

    Args:
        rows: engine, and what came of its inputs to a target.
    """
    rows = list(rows)
    total = Outcome("all")
    for _, outcome in rows:
        total.merge(outcome)
    cells = [_cells(outcome.target, engine, outcome) for engine, outcome in rows]
    lines = [_HEAD, ("---",) * len(_HEAD), *cells, _cells("all", "", total)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Iterable[tuple[str, Outcome]]) -> str:
    """What docs/reliability.md shows of a run: a row for each target, and one for all together."""
    rows = list(rows)
    names = list(dict.fromkeys(outcome.target for _, outcome in rows))
    lines = [
        "| what is read | mutations | atheris | accepted | wrong | slowest | most memory |",
        "|---|---|---|---|---|---|---|",
        *(_summed(name, [row for row in rows if row[1].target == name]) for name in names),
        _summed("**all**", rows),
    ]
    return "\n".join(lines)


def _summed(name: str, rows: Iterable[tuple[str, Outcome]]) -> str:
    total, inputs = Outcome(name), dict.fromkeys(("mutations", "atheris"), 0)
    for engine, outcome in rows:
        total.merge(outcome)
        inputs[engine] += outcome.inputs
    accepted = sum(n for label, n in total.outcomes.items() if label.startswith("accepted"))
    counts = (*inputs.values(), accepted, total.outcomes["failed"])
    most = f"{total.slowest[0]:.2f} s | {total.largest[0] / 1e6:.1f} MB"
    return f"| {name} | {' | '.join(f'{n:,}' for n in counts)} | {most} |"


def _cells(target: str, engine: str, outcome: Outcome) -> Sequence[str]:
    counts = outcome.outcomes
    accepted = sum(count for label, count in counts.items() if label.startswith("accepted"))
    refused = {
        label: count
        for label, count in counts.most_common()
        if not label.startswith("accepted") and label != "failed"
    }
    return (
        target,
        engine,
        f"{outcome.inputs:,}",
        f"{accepted:,}",
        ", ".join(f"{label} {count:,}" for label, count in refused.items()),
        f"{counts['failed']:,}",
        f"{outcome.slowest[0]:.2f} s",
        f"{outcome.largest[0] / 1e6:.1f} MB" + _multiple(outcome),
    )


def _multiple(outcome: Outcome) -> str:
    return f", {outcome.multiple[0]:.0f} times the file" if outcome.multiple[1] >= 0 else ""


def keep(seed: int, wall: float, rows: Iterable[tuple[str, Outcome]]) -> None:
    """Write the record of a run; what is known of other targets stays."""
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {"outcomes": [], "seconds": 0}
    new = [{"engine": engine, "seed": seed, **json.loads(each.to_json())} for engine, each in rows]
    done = {(each["engine"], each["target"]) for each in new}
    others = [each for each in known["outcomes"] if (each["engine"], each["target"]) not in done]
    record = {
        "seconds": round(wall) + (known["seconds"] if others else 0),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "outcomes": others + new,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


def kept() -> tuple[dict[str, Any], list[tuple[str, Outcome]]]:
    """The record of the last run that was kept, and its rows."""
    record = json.loads(RESULT.read_text())
    rows = []
    for each in record["outcomes"]:
        own = {name: value for name, value in each.items() if name not in ("engine", "seed")}
        rows.append((each["engine"], Outcome.from_json(json.dumps(own))))
    return record, rows
