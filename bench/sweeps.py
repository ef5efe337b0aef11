"""How times grow: over sizes, and over threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .harness import Contender, Effort, measure
from .outcome import Figure, Outcome, Sweep, Timing
from .ratios import fitted_exponent


def growth(
    label: str,
    over: str,
    sizes: Sequence[float],
    timings: Sequence[Timing],
    fitted: tuple[float, float] | None = None,
) -> tuple[Figure, Sweep]:
    """The exponent of time over what grows, as a figure and as a line of a plot.

    Args:
        label: of the line: whose time.
        over: what grows.
        sizes: ascending.
        timings: of one group, one per size.
        fitted: smallest and largest size that the exponent is fitted to; None: all.
    """
    low, high = fitted or (sizes[0], sizes[-1])
    pairs = [(s, t) for s, t in zip(sizes, timings, strict=True) if low <= s <= high]
    exponent, least, most = fitted_exponent(*zip(*pairs, strict=True))
    what = f"growth of time with {over}, {label}: exponent ({low:,.4g} to {high:,.4g})"
    names = [timing.name for timing in timings]
    line = Sweep(timings[0].group, label, over, list(sizes), names, exponent, (low, high))
    return Figure(what, exponent, "", least, most), line


def thread_counts(most: int | None = None) -> list[int]:
    """1, 2, 4, ... threads, and as many as there are."""
    most = most or torch.get_num_threads()
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*powers, most]


def over_threads(label: str, contender: Contender, effort: Effort) -> Outcome:
    """One contender with more and more threads; with a single one there is nothing to compare."""
    counts = thread_counts()
    if len(counts) < 2:
        return Outcome()
    contenders = [with_threads(contender, count) for count in counts]
    timings = list(measure(f"{label} over threads", contenders, effort).values())
    figure, line = growth(label, "threads", counts, timings)
    return Outcome(timings, [figure], [line])


def with_threads(contender: Contender, count: int) -> Contender:
    """The contender with a number of threads; what runs after it has as many as before."""
    usual = torch.get_num_threads()

    def before() -> None:
        contender.before()
        torch.set_num_threads(count)

    def run() -> Any:
        try:
            return contender.run()
        finally:
            torch.set_num_threads(usual)

    return replace(contender, name=f"{contender.name}, {count} threads", before=before, run=run)
