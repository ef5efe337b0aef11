"""Ratios of times with their intervals, and how times grow.

What counts is a ratio of first quartiles (:func:`.outcome.first_quartile` says why) with its
bootstrap interval; one that may as well be 1 is not printed (:attr:`.outcome.Figure.inside_noise`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

from .outcome import TIMES_AS_LONG, TIMES_FASTER, Figure, Timing, first_quartile

_RESAMPLES = 2000
_LEVEL = 0.95

Ratio = tuple[float, float, float]


def ratio(numerator: Timing, denominator: Timing, *, seed: int = 0) -> Ratio:
    """Ratio of the times of two contenders of a group, and its 95 % bootstrap interval.

    Rounds are resampled, not single times: what disturbed a round disturbed both contenders
    (percentile bootstrap; Efron & Tibshirani 1993, chapter 13).

    Returns:
        (ratio, low, high).
    """
    pairs = list(zip(numerator.seconds, denominator.seconds, strict=True))
    draw = random.Random(seed).choices
    return _ratio(pairs), *_interval(lambda: _ratio(draw(pairs, k=len(pairs))))


def ratio_of_runs(numerator: Timing, denominator: Timing, *, seed: int = 0) -> Ratio:
    """The same for times from different runs, whose rounds have nothing in common."""
    over, under = numerator.seconds, denominator.seconds
    draw = random.Random(seed).choices

    def resampled() -> float:
        drawn = (first_quartile(draw(times, k=len(times))) for times in (over, under))
        return next(drawn) / next(drawn)

    return numerator.calm / denominator.calm, *_interval(resampled)


def _interval(resampled: Callable[[], float]) -> tuple[float, float]:
    values = sorted(resampled() for _ in range(_RESAMPLES))
    tail = (1 - _LEVEL) / 2
    low = values[math.floor(tail * (_RESAMPLES - 1))]
    return low, values[math.ceil((1 - tail) * (_RESAMPLES - 1))]


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    over, under = zip(*pairs, strict=True)
    return first_quartile(over) / first_quartile(under)


def times_faster(what: str, slow: Timing, fast: Timing) -> Figure:
    """How many times faster one contender is than another."""
    note = f"{format_seconds(slow.calm)} against {format_seconds(fast.calm)}"
    return Figure(what, *_ordered(ratio(slow, fast), TIMES_FASTER), note=note)


def times_as_long(what: str, timing: Timing, other: Timing) -> Figure:
    """The time of one contender in units of another's; less is better."""
    note = f"{format_seconds(timing.calm)} against {format_seconds(other.calm)}"
    return Figure(what, *_ordered(ratio(timing, other), TIMES_AS_LONG), note=note)


def _ordered(found: Ratio, unit: str) -> tuple[float, str, float, float]:
    value, low, high = found
    return value, unit, low, high


def fitted_exponent(sizes: Sequence[float], timings: Sequence[Timing]) -> float:
    """The p of time = c size**p, by least squares on logarithms of size and time."""
    x = [math.log(size) for size in sizes]
    y = [math.log(timing.calm) for timing in timings]
    return statistics.linear_regression(x, y).slope


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:#.3g}".rstrip(".") + f" {unit}"
    raise AssertionError
