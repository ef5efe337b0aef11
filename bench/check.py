"""Every bar by name: reached, missed, too close to call, or not measured at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bars import BARS, HEADLINES, Bar
from .outcome import Figure
from .result_file import ResultError, outcome_of
from .tables import FIGURES, figure_row, preamble, table, value
from .tables import bar as bar_text

#: In the order in which they are told.
VERDICTS = ("MISS", "NOT MEASURED", "UNCLEAR", "PASS")

#: What fails a check.
FAILED = ("MISS", "NOT MEASURED")


@dataclass(frozen=True)
class Verdict:
    """What became of one bar.

    Attributes:
        bar: by name.
        figure: that was held to it; None if none was measured.
    """

    bar: Bar
    figure: Figure | None

    @property
    def text(self) -> str:
        """One of ``VERDICTS``."""
        return "NOT MEASURED" if self.figure is None else self.figure.verdict

    @property
    def failed(self) -> bool:
        """Whether it fails the check."""
        return self.text in FAILED

    @property
    def reached(self) -> bool:
        """Whether the whole interval of its figure is on the right side of the bar."""
        return self.text == "PASS"


def bars_of(names: Sequence[str]) -> list[Bar]:
    """The bars of these names, of these cases, or of these origins; all if there are none.

    Raises:
        ResultError: if a name is none of these.
    """
    if not names:
        return list(BARS.values())
    chosen = []
    for name in names:
        found = [b for b in BARS.values() if name in (b.name, b.case, b.origin, _family(b))]
        if not found:
            families = sorted({_family(bar) for bar in BARS.values()})
            raise ResultError(
                f"there is no bar {name!r}; name a bar, a case that has some, or one of "
                f"foundation, sampled, {', '.join(families)}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def _family(bar: Bar) -> str:
    return bar.name.partition("/")[0]


def cases_of(bars: Collection[Bar]) -> list[str]:
    """The cases that measure these bars."""
    return list(dict.fromkeys(bar.case for bar in bars))


def verdicts(result: Mapping[str, Any], bars: Collection[Bar]) -> list[Verdict]:
    """What became of the bars in a result."""
    figures = {
        figure.check: figure
        for case in result["cases"].values()
        for figure in outcome_of(case).figures
        if figure.check
    }
    return [Verdict(bar, figures.get(bar.name)) for bar in bars]


def agreement(found: Sequence[Verdict], before: Sequence[Verdict], name: str) -> str:
    """Whether an earlier check says the same, in a sentence."""
    differing = contradictions(found, before)
    if not differing:
        return f"No bar that {name} reached is missed here, and none the other way round."
    return f"{name} says otherwise of {', '.join(differing)}."


def contradictions(one: Sequence[Verdict], other: Sequence[Verdict]) -> list[str]:
    """Names of the bars that one check reached and another missed."""
    theirs = {verdict.bar.name: verdict.text for verdict in other}
    return [
        verdict.bar.name
        for verdict in one
        if {verdict.text, theirs.get(verdict.bar.name)} == {"PASS", "MISS"}
    ]


def markdown(found: Sequence[Verdict]) -> str:
    """A table of all bars, those that fail first, and a sentence that names these."""
    rows = [_row(verdict) for text in VERDICTS for verdict in found if verdict.text == text]
    header = ("bar", "what", "measured (95 % interval)", "bar", "")
    return f"{table(header, rows)}\n\n{summary(found)}\n"


def summary(found: Sequence[Verdict]) -> str:
    """How many bars are reached, and the names of the others, in a sentence."""
    counts = {text: [v.bar.name for v in found if v.text == text] for text in VERDICTS}
    parts = [f"{len(counts['PASS'])} of {len(found)} bars reached"]
    parts += [f"missed: {', '.join(counts['MISS'])}"] * bool(counts["MISS"])
    parts += [f"not measured: {', '.join(counts['NOT MEASURED'])}"] * bool(counts["NOT MEASURED"])
    parts += [f"too close to call: {', '.join(counts['UNCLEAR'])}"] * bool(counts["UNCLEAR"])
    return f"{'; '.join(parts)}."


def brief(result: dict[str, Any]) -> str:
    """What says most in a result, as Markdown: a table of the headlines, and the others by name.

    Raises:
        ResultError: if no bar was measured.
    """
    found = verdicts(result, BARS.values())
    figures = {v.bar.name: v.figure for v in found if v.figure is not None}
    if not figures:
        raise ResultError("no bar was measured in this result; leave out --brief to see the rest")
    headlines = [figure_row(figures[name]) for name in HEADLINES if name in figures]
    parts = [*preamble(result), *([table(FIGURES, headlines)] if headlines else []), summary(found)]
    return "\n\n".join(parts) + "\n"


def _row(verdict: Verdict) -> list[str]:
    figure = verdict.figure
    if figure is None:
        limit = f"{'≥' if verdict.bar.at_least else '≤'} {verdict.bar.limit:g}"
        return [verdict.bar.name, f"by {verdict.bar.case}", "", limit, verdict.text]
    return [verdict.bar.name, figure.what, value(figure), bar_text(figure), verdict.text]
