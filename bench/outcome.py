"""What a case finds: times, figures and the bars they are held to, growth, memory.

All of it is plain numbers and text, so that a result file can hold it and a page can show it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Whose work a contender does: this package's, what it is measured against, or no more than what
#: nobody can do without.
OURS, BASELINE, FLOOR = "ours", "baseline", "floor"

#: Units of figures that are a ratio of two times.
TIMES_FASTER = "times faster"
TIMES_AS_LONG = "times the time"


def first_quartile(seconds: Sequence[float]) -> float:
    """The time below which a quarter of the runs stayed: what a calm machine needs.

    What else a machine does only ever adds time, in bursts. Where steps of 1 to 6 s were drawn from
    a trace of matrix products on a shared host (2026-11-26), 7 to 20 of each kind, ratios of first
    quartiles varied two thirds as much as ratios of medians. Minima vary even less, but their
    bootstrap tells nothing, and one lucky run decides.
    """
    if len(seconds) == 1:
        return seconds[0]
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


@dataclass(frozen=True)
class Timing:
    """The times of one contender, one per round, and what its work could not do without.

    Attributes:
        group: what was done.
        name: by whom.
        seconds: wall time, or the GPU's.
        cpu_seconds: processor time, of all threads together.
        moves: bytes that the work must read and write; None where it is not known.
        flops: floating point operations that it must do.
        bandwidth: bytes per second that a copy, run among the contenders, read and wrote.
        rate: floating point operations per second of a large matrix product, run among them.
        dtype: whose matrix products that was.
        covers: what this contender trains or does, if it is not what the others do.
        role: ``OURS``, ``BASELINE`` or ``FLOOR``.
    """

    group: str
    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    moves: int | None = None
    flops: int = 0
    bandwidth: float | None = None
    rate: float | None = None
    dtype: str = ""
    covers: str = ""
    role: str = OURS

    @property
    def median(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(self.seconds)

    @property
    def calm(self) -> float:
        """First quartile of the wall time in seconds: what a calm machine needs."""
        return first_quartile(self.seconds)

    @property
    def cpu_median(self) -> float:
        """Median processor time in seconds."""
        return statistics.median(self.cpu_seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the wall time in seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def floor(self) -> float | None:
        """Seconds that the machine needs at least: for the bytes or for the operations."""
        limits = []
        if self.moves is not None and self.bandwidth:
            limits.append(self.moves / self.bandwidth)
        if self.flops and self.rate:
            limits.append(self.flops / self.rate)
        return max(limits, default=None)

    @property
    def reached(self) -> float | None:
        """The floor's share of the time on a calm machine; 1 is the limit."""
        return None if self.floor is None else self.floor / self.calm


def one_after_another(name: str, *timings: Timing) -> Timing:
    """The time of several contenders of a group, taken one after another, round by round."""
    walls, cpus = ([t.seconds for t in timings], [t.cpu_seconds for t in timings])
    seconds, cpu_seconds = (
        [sum(times) for times in zip(*each, strict=True)] for each in (walls, cpus)
    )
    return Timing(timings[0].group, name, seconds, cpu_seconds, role=timings[0].role)


@dataclass(frozen=True)
class Figure:
    """One number that a case came for, and the bar it is held to.

    Attributes:
        what: is measured.
        value: of it.
        unit: behind the value.
        low: of its 95 % interval; None where there is none.
        high: of that.
        bar: what it must reach; None if it is only reported.
        at_least: the bar is a lower bound; otherwise an upper one.
        note: where the value comes from.
        check: name of the bar among :mod:`.bars`; empty without one.
    """

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    at_least: bool = True
    note: str = ""
    check: str = ""

    @property
    def verdict(self) -> str:
        """PASS, MISS, UNCLEAR if the interval holds the bar, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        ends = (self.value,) if self.low is None or self.high is None else (self.low, self.high)
        reached = {end >= self.bar if self.at_least else end <= self.bar for end in ends}
        if len(reached) > 1:
            return "UNCLEAR"
        return "PASS" if reached.pop() else "MISS"

    @property
    def inside_noise(self) -> bool:
        """Whether it is a ratio of times that may as well be 1."""
        if self.unit not in (TIMES_FASTER, TIMES_AS_LONG) or self.low is None or self.high is None:
            return False
        return self.low <= 1 <= self.high


@dataclass(frozen=True)
class Sweep:
    """A line of a plot of times over what they grow with.

    Attributes:
        group: of the timings.
        label: of the line.
        over: what grows, for the axis: ``tokens``, ``D``.
        sizes: ascending.
        contenders: names of the timings, one per size.
        exponent: p of time = c size**p.
        fitted: the smallest and the largest size that it was fitted to.
    """

    group: str
    label: str
    over: str
    sizes: list[float]
    contenders: list[str]
    exponent: float
    fitted: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a process needs for a piece of work; what tensors hold if it is a training step.

    On a CPU all of the process counts, libraries too; on a GPU what torch has allocated there.

    Attributes:
        peak: the most, once the work was set up.
        before: when it was.
        allocator: and its settings.
        weights: parameters and buffers, at the peak of what tensors held in one step, as the next
            three; None, as these, for other work.
        state: of the optimizer: moments, indices, exact values of low-precision weights.
        gradients: of weights or of selected entries.
        activations: all other tensors: saved for backward, or temporary.
        allocated: what a step allocated in all, freed again or not.
        allocations: in how many pieces.
        reserved: the most that torch's allocator took of a GPU's memory; None on a CPU.
    """

    peak: int
    before: int = 0
    allocator: str = ""
    weights: int | None = None
    state: int | None = None
    gradients: int | None = None
    activations: int | None = None
    allocated: int | None = None
    allocations: int | None = None
    reserved: int | None = None

    @property
    def rest(self) -> int | None:
        """What no tensor holds: libraries, the allocator's slack, temporaries in operations."""
        parts = (self.weights, self.state, self.gradients, self.activations)
        known = [part for part in parts if part is not None]
        return max(self.peak - sum(known), 0) if len(known) == len(parts) else None


@dataclass(frozen=True)
class MemoryUse(Memory):
    """Peak memory of one contender in a process of its own.

    Attributes:
        group: what was done.
        name: by whom.
        covers: what this contender trains, if it is not what the others do.
        role: as in :class:`Timing`.
    """

    group: str
    name: str
    covers: str = ""
    role: str = OURS


@dataclass
class Outcome:
    """What a case found."""

    timings: list[Timing] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    memory: list[MemoryUse] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        """Append what another part of the case found."""
        self.timings += other.timings
        self.figures += other.figures
        self.sweeps += other.sweeps
        self.memory += other.memory
        return self
