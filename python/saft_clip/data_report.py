"""What ``saft data check`` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from saft_clip.console import output
from saft_clip.data.check import Findings, Match, SpecFacts, SplitFacts, check_data
from saft_clip.data.names import distinct_names
from saft_clip.shortages import explained_shortages
from saft_kernels.files import atomic_write, require_writable
from saft_kernels.untrusted import shown

#: The most characters of a class name or a prompt, and names of one list, that a table shows.
_WIDTH = 40
_NAMES = 10


@explained_shortages()
def check_command(specs: Sequence[str], *, quick: bool, json_file: Path | None) -> int:
    """Look through data, print tables and write JSON; 1 if something is wrong, else 0."""
    if json_file is not None:
        require_writable(json_file)
    found = check_data(specs, decode=not quick)
    if json_file is not None:
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    _show(found)
    return 1 if found.problems else 0


def _show(found: Findings) -> None:
    there = [facts for facts in found.data if facts.splits]
    specs = [facts.spec for facts in there]
    names = dict(zip(specs, distinct_names(specs, [facts.name for facts in there]), strict=True))
    if there:
        output.print(_specs_table(there, names))
        output.print(_splits_table(there, names, found.decoded))
    if found.matches:
        output.print(_matches_table(names[found.data[0].spec], found.matches, names))
    for problem in found.problems:
        output.print(f"wrong: {problem}", markup=False, soft_wrap=True)
    if not found.problems:
        output.print("nothing wrong found")


def _specs_table(data: Sequence[SpecFacts], names: Mapping[str, str]) -> Table:
    table = Table()
    for name in ("data", "kind", "prompts"):
        table.add_column(name, overflow="fold")
    table.add_column("classes", justify="right")
    for facts in data:
        more = f" and {len(facts.templates) - 1} more" if len(facts.templates) > 1 else ""
        prompt = shown(facts.templates[0], _WIDTH) + more if facts.templates else ""
        cells = (names[facts.spec], facts.kind, prompt)
        table.add_row(*map(escape, cells), f"{len(facts.classes):,}")
    return table


def _splits_table(data: Sequence[SpecFacts], names: Mapping[str, str], decoded: bool) -> Table:
    table = Table()
    table.add_column("data", overflow="fold")
    table.add_column("split")
    table.add_column("images", justify="right")
    for name in ("smallest class", "largest class"):
        table.add_column(name, overflow="fold")
    table.add_column("pixels", no_wrap=True)
    for facts in data:
        for split in facts.splits:
            table.add_row(
                escape(names[facts.spec]),
                split.split,
                f"{split.images:,}",
                *map(_class, _extremes(split.per_class)),
                _sizes(split) if decoded else "not decoded",
            )
    return table


def _extremes(per_class: dict[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    """The smallest and the largest class, each with its images."""
    ordered = sorted(per_class.items(), key=lambda item: item[1])
    return ordered[0], ordered[-1]


def _class(item: tuple[str, int]) -> str:
    return escape(f"{shown(item[0], _WIDTH)}: {item[1]:,}")


def _sizes(split: SplitFacts) -> str:
    if split.smallest is None or split.largest is None:
        return "none can be read"
    (width, height), (widest, highest) = split.smallest, split.largest
    if split.smallest == split.largest:
        return f"{width} x {height}"
    return f"{width} to {widest} x {height} to {highest}"


def _matches_table(first: str, matches: Sequence[Match], names: Mapping[str, str]) -> Table:
    table = Table(title=escape(f"classes beside those of {first}"))
    table.add_column("data", overflow="fold")
    table.add_column("shared", justify="right")
    table.add_column("only in the first", overflow="fold")
    table.add_column("only here", overflow="fold")
    for match in matches:
        table.add_row(
            escape(names[match.spec]),
            f"{match.shared:,}",
            escape(_listed(match.only_first)),
            escape(_listed(match.only_other)),
        )
    return table


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"{len(names):,}: " + ", ".join(shown(n, _WIDTH) for n in names[:_NAMES]) + more
