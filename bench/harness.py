"""Timing that settles arguments.

Contenders of a group run in one process, interleaved, in an order shuffled anew in every round, so
that whatever else the machine does meets all of them alike. None is timed before its result was
checked. What counts is a ratio of medians with its bootstrap interval; beside every time stands the
physical floor, the bytes that the work must move over the bandwidth of a copy that ran among the
contenders.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from saft_kernels.errors import SaftError

from .display import progress

#: Size of the buffers that are copied and of what evicts the caches, by kind of device: several
#: times any last-level cache.
BUFFER_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
COPY = "copy"

_RESAMPLES = 2000
_LEVEL = 0.95


class WrongResultError(SaftError, AssertionError):
    """A contender gave a wrong result, or none that was looked at: its time would mean nothing."""


def nothing() -> None:
    """What most contenders need before a run."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a group.

    Attributes:
        name: in tables.
        run: what is timed.
        check: calls the function it is given exactly once and raises :class:`WrongResultError`
            unless the outcome is right.
        before: runs before every run, untimed.
        moves: bytes that the work must read and write at least; None where it is not known.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Callable[[], Any]], None]
    before: Callable[[], Any] = nothing
    moves: int | None = None


@dataclass(frozen=True)
class Effort:
    """How often a group is timed: the rounds that fit into ``seconds``, within bounds.

    The checked run is a warm-up; ``warm_up`` more rounds are thrown away.
    """

    seconds: float = 12.0
    least: int = 7
    most: int = 40
    warm_up: int = 1

    def rounds(self, seconds_per_round: float) -> int:
        """How many rounds are kept."""
        return min(max(int(self.seconds / seconds_per_round), self.least), self.most)


@dataclass(frozen=True)
class Timing:
    """The times of one contender, one per round.

    Attributes:
        group: what was done.
        name: by whom.
        seconds: wall time, or the GPU's.
        cpu_seconds: processor time, of all threads together.
        moves: bytes that the work must move.
        floor: seconds that a copy of as many bytes took.
        peak: bytes of memory at the peak, in a process of its own.
    """

    group: str
    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    moves: int | None = None
    floor: float | None = None
    peak: int | None = None

    @property
    def median(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the wall time in seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def reached(self) -> float | None:
        """The floor's share of the median time; 1 is the limit of a copy."""
        return None if self.floor is None else self.floor / self.median


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
    """

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    at_least: bool = True
    note: str = ""

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


@dataclass
class Outcome:
    """What a case found."""

    timings: list[Timing] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        """Append what another part of the case found."""
        self.timings += other.timings
        self.figures += other.figures
        return self


# Timers -------------------------------------------------------------------------------------------


class Timer(Protocol):
    """The way to time something on one kind of device."""

    device: torch.device

    def wait(self) -> None:
        """Wait until the device has done all it was asked for."""

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds that ``run`` took, and processor seconds of all threads together."""


class CpuTimer:
    """Wall time."""

    device = torch.device("cpu")

    def wait(self) -> None:
        """Nothing is ever left to do."""

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """See :class:`Timer`."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = run()
        sample = time.perf_counter() - wall, time.process_time() - cpu
        del result  # freeing it is not part of the work
        return sample


class CudaTimer:
    """The time between two events in a GPU's current stream.

    The GPU first spins for a while, in which the host asks for the work, so that what is timed is
    the GPU and not Python. Where the host needs longer than that (after some doubling, or since
    the work waits for the GPU itself), its time is part of the sample, as it is of the work.

    Args:
        device: the GPU.
        head_start: seconds that it spins at first; 0: what is timed is GPU and host together.
    """

    #: The longest head start, in seconds.
    LONGEST = 0.1

    #: Cycles per second of GPUs, roughly: how long one spins need not be exact.
    _CYCLES = 1.5e9

    def __init__(self, device: torch.device, head_start: float = 1e-3) -> None:
        self.device = device
        self.head_start = head_start

    def wait(self) -> None:
        """See :class:`Timer`."""
        torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """See :class:`Timer`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        if self.head_start:
            torch.cuda._sleep(int(self.head_start * self._CYCLES))
        start.record()
        cpu = time.process_time()
        result = run()
        cpu = time.process_time() - cpu
        end.record()
        late = start.query()
        self.wait()
        del result
        if self.head_start and late:
            self.head_start = min(2 * self.head_start, self.LONGEST)
        return start.elapsed_time(end) / 1e3, cpu


CPU = CpuTimer()


# Measuring ----------------------------------------------------------------------------------------


def measure(
    group: str,
    contenders: Sequence[Contender],
    effort: Effort,
    *,
    seed: int = 0,
    timer: Timer = CPU,
) -> dict[str, Timing]:
    """Check every contender, then time all of them in interleaved rounds.

    A copy joins them if one says what it moves, and gives the bandwidth for the floors.

    Args:
        group: what they do.
        contenders: with names of their own.
        effort: how often.
        seed: of the order within the rounds.
        timer: the way to time them.

    Returns:
        Timings by name, in the order of ``contenders``.

    Raises:
        WrongResultError: if a result is wrong or was not checked; nothing is timed then.
    """
    runners = list(contenders)
    if any(contender.moves is not None for contender in contenders):
        runners.append(_copy(timer.device))
    if len({runner.name for runner in runners}) != len(runners):
        raise ValueError(f"{group}: two contenders have the same name")
    rounds = effort.rounds(sum(_checked(group, runner, timer) for runner in runners))
    samples: dict[str, list[tuple[float, float]]] = {runner.name: [] for runner in runners}
    shuffle = random.Random(seed).shuffle
    with progress(group, rounds * len(runners)) as advance, _no_garbage_collection():
        for number in range(-effort.warm_up, rounds):
            shuffle(runners)
            for runner in runners:
                runner.before()
                sample = timer.time(runner.run)
                if number >= 0:
                    samples[runner.name].append(sample)
                    advance()
    bandwidth = _bandwidth(samples.get(COPY), timer.device)
    return {c.name: _timing(group, c, samples[c.name], bandwidth) for c in contenders}


def _checked(group: str, contender: Contender, timer: Timer) -> float:
    """Run the contender under its check; the seconds that one run and its preparation took."""
    calls: list[float] = []

    def run() -> Any:
        start = time.perf_counter()
        result = contender.run()
        timer.wait()
        calls.append(time.perf_counter() - start)
        return result

    start = time.perf_counter()
    contender.before()
    timer.wait()
    preparation = time.perf_counter() - start
    try:
        contender.check(run)
    except WrongResultError as error:
        raise WrongResultError(f"{group}: {contender.name} is not timed: {error}") from error
    if len(calls) != 1:
        raise WrongResultError(
            f"{group}: {contender.name} is not timed: its check ran it {len(calls)} times, not once"
        )
    return preparation + calls[0]


def _timing(
    group: str, contender: Contender, samples: list[tuple[float, float]], bandwidth: float | None
) -> Timing:
    wall, cpu = (list(times) for times in zip(*samples, strict=True))
    moves = contender.moves
    floor = None if moves is None or bandwidth is None else moves / bandwidth
    return Timing(group, contender.name, wall, cpu, moves, floor)


@contextmanager
def _no_garbage_collection() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# The machine's limit ------------------------------------------------------------------------------

_buffers: dict[torch.device, list[torch.Tensor]] = {}


def _buffer_pair(device: torch.device) -> list[torch.Tensor]:
    if device not in _buffers:
        elements = BUFFER_BYTES[device.type] // 4
        _buffers[device] = [torch.full((elements,), float(i), device=device) for i in range(2)]
    return _buffers[device]


def _copy(device: torch.device) -> Contender:
    source, target = _buffer_pair(device)

    def check(run: Callable[[], Any]) -> None:
        run()
        require(torch.equal(source, target), "the copy differs from its source")

    moves = 2 * BUFFER_BYTES[device.type]
    return Contender(COPY, lambda: target.copy_(source), check, moves=moves)


def _bandwidth(samples: list[tuple[float, float]] | None, device: torch.device) -> float | None:
    """Bytes read and written per second by a copy."""
    if samples is None:
        return None
    seconds = statistics.median(seconds for seconds, _ in samples)
    return 2 * BUFFER_BYTES[device.type] / seconds


def evict_caches(device: torch.device = CPU.device) -> None:
    """Fill every cache with something else, so that the next run starts cold."""
    _buffer_pair(device)[0].add_(0)


# Checks and figures -------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """Raise a :class:`WrongResultError` unless the condition holds."""
    if not condition:
        raise WrongResultError(message)


def ratio(numerator: Timing, denominator: Timing, *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the median times, and its 95 % bootstrap interval.

    Rounds are resampled, not single times: what disturbed a round disturbed both contenders
    (percentile bootstrap; Efron & Tibshirani 1993, chapter 13).

    Returns:
        (ratio, low, high).
    """
    pairs = list(zip(numerator.seconds, denominator.seconds, strict=True))
    draw = random.Random(seed).choices
    resampled = sorted(_ratio_of_medians(draw(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    tail = (1 - _LEVEL) / 2
    low = resampled[math.floor(tail * (_RESAMPLES - 1))]
    high = resampled[math.ceil((1 - tail) * (_RESAMPLES - 1))]
    return _ratio_of_medians(pairs), low, high


def _ratio_of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    over, under = zip(*pairs, strict=True)
    return statistics.median(over) / statistics.median(under)


def times_faster(what: str, slow: Timing, fast: Timing, bar: float | None = None) -> Figure:
    """How many times faster one contender is than another."""
    value, low, high = ratio(slow, fast)
    note = f"{format_seconds(slow.median)} against {format_seconds(fast.median)}"
    return Figure(what, value, "times faster", low, high, bar, note=note)


def times_as_long(what: str, timing: Timing, other: Timing, bar: float | None = None) -> Figure:
    """The time of one contender in units of another's; less is better."""
    value, low, high = ratio(timing, other)
    note = f"{format_seconds(timing.median)} against {format_seconds(other.median)}"
    return Figure(what, value, "times the time", low, high, bar, at_least=False, note=note)


def fitted_exponent(sizes: Sequence[float], timings: Sequence[Timing]) -> float:
    """The p of time = c size**p, by least squares on logarithms of size and median time."""
    x = [math.log(size) for size in sizes]
    y = [math.log(timing.median) for timing in timings]
    return statistics.linear_regression(x, y).slope


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:#.3g}".rstrip(".") + f" {unit}"
    raise AssertionError
