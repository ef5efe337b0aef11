"""What changed between two results, or two revisions: which contender got slower, which size grew.

A time counts as changed only if the whole 95 % interval of its ratio lies beyond a threshold; no
ratio is shown otherwise. Baselines, which are torch's own, run no code of this package: that they
changed says something of the machine or of torch, not of the package.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .outcome import OURS, Figure, MemoryUse, Outcome, Timing
from .ratios import Ratio, format_seconds, ratio_of_runs
from .result_file import EFFORTS, ResultError, differences, outcome_of
from .tables import table

#: Two runs of the same code differ by this much on the same machine: their processes got other
#: pages, and other programs ran meanwhile. The rounds of one run know nothing of that.
RUNS_THRESHOLD = 0.05

#: By how much sizes may differ that should be equal.
SIZE_TOLERANCE = 0.01

#: Percent of a whole by which memory differs that is added to a process: it comes in large pieces.
MEMORY_POINTS = 2.0

#: A common shift of the baselines that makes times of two runs incomparable.
NOTICEABLE_SHIFT = 0.05

SLOWER, FASTER, LARGER, SMALLER = "slower", "faster", "larger", "smaller"
SAME_TIME, SAME_SIZE = "no difference beyond the noise", "no difference"

COLUMNS = ("work", "by", "before", "after", "after over before (95 % interval)", "")

#: What else may differ between two results on the same machine, and should be known.
_VERSIONS = (
    "torch", "blas", "openmp", "python", "open_clip", "timm", "peft", "bitsandbytes",
    "compiler", "system", "driver", "toolkit",
)  # fmt: skip

_MACHINE = (
    "processor", "cores", "threads", "instruction_set", "backend",
    "gpu", "gpu_memory", "gpu_backends", "power_limit",
)  # fmt: skip

#: Figures that are sizes. Peaks, which other figures come from, are compared themselves.
_SIZE = re.compile(r"(?!peak memory)(.*\b(memory|file|state)\b)")

_T = TypeVar("_T")

RatioOf = Callable[[Timing, Timing], Ratio]


@dataclass(frozen=True)
class Change:
    """What became of one contender's time or memory, or of one size.

    Attributes:
        case: that measures it.
        group: what is done.
        name: by whom.
        before: in the base, for people.
        after: in the head.
        ratio: head over base, its value and the ends of its interval; of a size thrice the value.
        verdict: one of those above.
        baseline: whether it runs no code of this package.
    """

    case: str
    group: str
    name: str
    before: str
    after: str
    ratio: Ratio
    verdict: str
    baseline: bool = False

    @property
    def same(self) -> bool:
        """Whether it may as well be what it was."""
        return self.verdict in (SAME_TIME, SAME_SIZE)

    @property
    def worse(self) -> bool:
        """Whether this package got slower or needs more."""
        return self.verdict in (SLOWER, LARGER) and not self.baseline

    @property
    def title(self) -> str:
        """What it is, for a sentence."""
        return f"{self.group}: {self.name}" if self.name else self.group


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        changes: of everything that both sides have.
        shifts: of what runs no code of this package: ratios, copies and matrix products included.
        remarks: what could not be compared, and what else differs.
        failures: what the head cannot do any more.
    """

    changes: list[Change] = field(default_factory=list)
    shifts: list[float] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __iadd__(self, other: Comparison) -> Comparison:
        """Append what another case found."""
        self.changes += other.changes
        self.shifts += other.shifts
        self.remarks += other.remarks
        self.failures += other.failures
        return self

    @property
    def worse(self) -> list[Change]:
        """What got slower or larger."""
        return [change for change in self.changes if change.worse]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing got worse."""
        return bool(self.changes) and not self.worse and not self.failures


# Comparing ----------------------------------------------------------------------------------------


def compare_outcomes(
    case: str,
    before: Outcome,
    after: Outcome,
    ratio_of: RatioOf,
    threshold: float,
    *,
    fewer: bool = False,
) -> Comparison:
    """Compare all that a case found on both sides.

    Args:
        case: its name.
        before: what it found in the base.
        after: in the head.
        ratio_of: ratio of the second's time over the first's, for timings of head and base.
        threshold: a time within 1 +- this did not change.
        fewer: the head was asked for fewer contenders; otherwise none may be missing in it.
    """
    found = Comparison()
    for old, new in _common(before.timings, after.timings, _contender):
        ratio = ratio_of(new, old)
        change = Change(
            case,
            new.group,
            new.name,
            format_seconds(old.calm),
            format_seconds(new.calm),
            ratio,
            _time_verdict(ratio, threshold),
            new.role != OURS,
        )
        found.changes.append(change)
        found.shifts += [ratio[0]] * change.baseline
    found.shifts += _limit_shifts(before, after)
    found.changes += _sizes(case, before, after)
    gone = [f"Only before: {name} ({case})." for name in _only_in(before, after)]
    (found.remarks if fewer else found.failures).extend(gone)
    found.remarks += [f"Only after: {name} ({case})." for name in _only_in(after, before)]
    return found


def _only_in(own: Outcome, other: Outcome) -> list[str]:
    """Contenders that the other side has not."""
    theirs = set(_contenders(other))
    return [": ".join(key) for key in _contenders(own) if key not in theirs]


def settled(first: Change, again: Change) -> Change:
    """What two measurements of the same say together: it changed only if both say so."""
    (value, low, high), (other, least, most) = first.ratio, again.ratio
    ratio = math.sqrt(value * other), min(low, least), max(high, most)
    verdicts = {first.verdict, again.verdict}
    unsure = SAME_SIZE if SAME_SIZE in verdicts else SAME_TIME
    return replace(first, ratio=ratio, verdict=first.verdict if len(verdicts) == 1 else unsure)


def _contender(measured: Timing | MemoryUse) -> tuple[str, str]:
    return measured.group, measured.name


def _contenders(outcome: Outcome) -> list[tuple[str, str]]:
    measured: list[Timing | MemoryUse] = [*outcome.timings, *outcome.memory]
    return list(dict.fromkeys(_contender(each) for each in measured))


def _common(
    before: Iterable[_T], after: Iterable[_T], key: Callable[[_T], Hashable]
) -> Iterator[tuple[_T, _T]]:
    known = {key(each): each for each in before}
    return ((known[key(each)], each) for each in after if key(each) in known)


def _time_verdict(ratio: Ratio, threshold: float) -> str:
    _, low, high = ratio
    if low > 1 + threshold:
        return SLOWER
    return FASTER if high < 1 - threshold else SAME_TIME


def _limit_shifts(before: Outcome, after: Outcome) -> list[float]:
    """How much longer copies and matrix products took, one for each group."""
    shifts = {}
    for old, new in _common(before.timings, after.timings, _contender):
        if old.bandwidth and new.bandwidth:
            shifts[new.group, "copy"] = old.bandwidth / new.bandwidth
        if old.rate and new.rate:
            shifts[new.group, "product"] = old.rate / new.rate
    return list(shifts.values())


def _sizes(case: str, before: Outcome, after: Outcome) -> Iterator[Change]:
    for use, now in _common(before.memory, after.memory, _contender):
        yield Change(
            case,
            now.group,
            now.name,
            *_size_change(use.peak, now.peak, "MiB", 2**20),
            now.role != OURS,
        )
    for old, new in _common(before.figures, after.figures, lambda figure: figure.what):
        if _is_size(old) and _is_size(new):
            slack = MEMORY_POINTS if new.unit == "%" and "memory" in new.what else 0.0
            change = _size_change(old.value, new.value, new.unit, slack=slack)
            yield Change(case, new.what, "", *change)


def _is_size(figure: Figure) -> bool:
    return figure.unit in ("bytes", "%") and _SIZE.match(figure.what) is not None


def _size_change(
    before: float, after: float, unit: str, scale: float = 1.0, slack: float = 0.0
) -> tuple[str, str, Ratio, str]:
    """The last four fields of a :class:`Change`; less is better for every size."""
    old, new = before / scale, after / scale
    tolerance = max(SIZE_TOLERANCE * abs(old), slack)
    verdict = SAME_SIZE if abs(new - old) <= tolerance else LARGER if new > old else SMALLER
    share = new / old if old else 1.0
    return f"{old:,.4g} {unit}", f"{new:,.4g} {unit}", (share, share, share), verdict


# Result files -------------------------------------------------------------------------------------


def compare_results(
    before: dict[str, Any],
    after: dict[str, Any],
    *,
    threshold: float = RUNS_THRESHOLD,
    force: bool = False,
) -> Comparison:
    """Compare two results that ``run`` wrote.

    Args:
        before: the earlier one.
        after: the later one.
        threshold: a time within 1 +- this did not change.
        force: compare what was measured on different machines or settings, too.

    Raises:
        ResultError: if machine, threads or setting differ, or no case is in both.
    """
    found = Comparison()
    obstacles = _obstacles(before, after)
    if obstacles and not force:
        raise ResultError(
            f"the two results do not compare: {', '.join(obstacles)}; measure both alike, or "
            "compare anyway with --force"
        )
    if obstacles:
        found.remarks.append(f"Compared although not measured alike: {', '.join(obstacles)}.")
    environments = before["environment"], after["environment"]
    versions = differences(_VERSIONS, *environments)
    if versions:
        found.remarks.append(f"Not the same in both: {', '.join(versions)}.")
    cases = before["cases"], after["cases"]
    if not cases[0].keys() & cases[1].keys():
        raise ResultError("the two results have no case in common; run the same cases for both")
    found.failures += [f"Only before: the case {n}." for n in cases[0] if n not in cases[1]]
    found.remarks += [f"Only after: the case {n}." for n in cases[1] if n not in cases[0]]
    for name in cases[1]:
        if name in cases[0]:
            records = cases[0][name], cases[1][name]
            bars_only = [_bars_only(*pair) for pair in zip(records, (before, after), strict=True)]
            fewer = bars_only == [False, True]
            found += _compare_records(name, *records, threshold, fewer)
    return found


def _bars_only(record: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a case left out the rivals that no bar is about."""
    return bool(record.get("efforts", result["setting"]).get("bars_only", False))


def _compare_records(
    case: str, before: dict[str, Any], after: dict[str, Any], threshold: float, fewer: bool
) -> Comparison:
    none_before, none_after = _why_none(before, "before"), _why_none(after, "after")
    if none_after and (after["refused"] or not none_before):
        return Comparison(failures=[f"{case} {none_after}"])
    if none_before or none_after:
        return Comparison(remarks=[f"{case} {none_before or none_after}"])
    outcomes = outcome_of(before), outcome_of(after)
    return compare_outcomes(case, *outcomes, ratio_of_runs, threshold, fewer=fewer)


def _why_none(record: dict[str, Any], side: str) -> str:
    """Why a case has no outcome; nothing if it has one."""
    if record["refused"]:
        return f"was refused {side}: {record['refused']}."
    return f"was left out {side}: {record['left_out']}." if record["left_out"] else ""


def _obstacles(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What was not measured alike; how often it was is no obstacle."""
    settings = before["setting"], after["setting"]
    asked = dict.fromkeys(key for each in settings for key in each if key not in EFFORTS)
    machine = differences(_MACHINE, before["environment"], after["environment"])
    return list(dict.fromkeys([*machine, *differences(asked, *settings)]))


# Showing ------------------------------------------------------------------------------------------


def markdown(title: str, found: Comparison, threshold: float) -> str:
    """A summary, what makes the comparison doubtful, and a table of everything."""
    parts = [title, f"**{summary(found)}**"]
    parts += [f"**{failure}**" for failure in found.failures]
    parts += warnings(found)
    parts += found.remarks
    if found.changes:
        parts += [_about(threshold), table(COLUMNS, [_row(change) for change in found.changes])]
    return "\n\n".join(parts) + "\n"


def summary(found: Comparison) -> str:
    """One sentence."""
    if not found.changes:
        return "Nothing could be compared."
    worse = [f"{change.title} ({change.verdict})" for change in found.worse]
    better = [c for c in found.changes if c.verdict in (FASTER, SMALLER) and not c.baseline]
    same = [change for change in found.changes if change.same]
    baselines = len(found.changes) - len(worse) - len(better) - len(same)
    parts = [
        f"Worse: {len(worse)} of {len(found.changes)}, {'; '.join(worse)}"
        if worse
        else f"Nothing of {len(found.changes)} got slower or larger",
        f"{len(better)} got faster or smaller",
        f"{len(same)} show no difference beyond the noise",
    ]
    if baselines:
        parts.append(f"{baselines} changed that run no code of this package")
    return "; ".join(parts) + "."


def warnings(found: Comparison) -> list[str]:
    """What the baselines say of the machine."""
    shift = machine_shift(found)
    if abs(shift - 1) <= NOTICEABLE_SHIFT:
        return []
    return [
        f"Warning: copies and baselines, which run no code of this package, took {shift:.3g} times "
        "as long after as before (median): machine or torch changed, and the times do not compare."
    ]


def machine_shift(found: Comparison) -> float:
    """How many times as long it took what did not change; 1 if there is nothing like that."""
    return statistics.median(found.shifts) if found.shifts else 1.0


def _about(threshold: float) -> str:
    return (
        "First quartiles of the times; ratios are those within rounds where both sides took turns. "
        f"Slower and faster are those whose interval lies beyond 1 ± {threshold:g} as a whole; "
        f"sizes count beyond 1 ± {SIZE_TOLERANCE:g}."
    )


def _row(change: Change) -> Sequence[str]:
    value, low, high = change.ratio
    interval = "" if low == high else f" ({low:.3g} to {high:.3g})"
    said = interval.strip() if change.same else f"{value:.3g}{interval}"
    verdict = f"**{change.verdict}**" if change.worse else change.verdict
    note = " (baseline)" if change.baseline and not change.same else ""
    return change.group, change.name, change.before, change.after, said, verdict + note
