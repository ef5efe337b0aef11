"""Timing that settles arguments.

Contenders of a group run in one process, interleaved, in an order shuffled anew in every round, so
that whatever else the machine does meets all of them alike. None is timed before its result was
checked. What counts is a ratio of times with its bootstrap interval (:mod:`.ratios`); beside
every time stands the physical floor (:mod:`.limits`), from a copy and a matrix product that ran
among the contenders.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from saft_kernels.errors import SaftError

from . import limits
from .display import progress
from .limits import COPY, Needs, dtype_name, product_name
from .outcome import OURS, Timing
from .timers import CPU, Timer


class WrongResultError(SaftError, AssertionError):
    """A contender gave a wrong result, or none that was looked at: its time would mean nothing."""


def require(condition: bool, message: str) -> None:
    """Raise a :class:`WrongResultError` unless the condition holds."""
    if not condition:
        raise WrongResultError(message)


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
        needs: what the work cannot do without; a function if that is known after the check only.
        covers: what it trains or does, if it is not what the others do.
        role: ``OURS``, ``BASELINE`` or ``FLOOR``.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Callable[[], Any]], None]
    before: Callable[[], Any] = nothing
    needs: Needs | Callable[[], Needs] | None = None
    covers: str = ""
    role: str = OURS

    def known_needs(self) -> Needs | None:
        """What the work cannot do without, once it was checked."""
        return self.needs() if callable(self.needs) else self.needs


@dataclass(frozen=True)
class Effort:
    """How often a group is timed: the rounds that fit into ``seconds``, within bounds.

    The checked run is a warm-up; ``warm_up`` more rounds are thrown away. The last of these says
    how long a round takes, as a checked run, which is counted and looked at, takes longer.
    """

    seconds: float = 20.0
    least: int = 7
    most: int = 40
    warm_up: int = 1

    def rounds(self, seconds_per_round: float) -> int:
        """How many rounds are kept."""
        return min(max(int(self.seconds / seconds_per_round), self.least), self.most)


# Pace ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """Who says when the next round begins.

    Attributes:
        rounds: how many are kept of a group, whatever its effort; None: as many as that says.
        turn: a round runs within what this returns.
    """

    rounds: int | None = None
    turn: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def rounds_of(self, effort: Effort, seconds_per_round: float) -> int:
        """How many rounds of a group are kept."""
        return effort.rounds(seconds_per_round) if self.rounds is None else self.rounds


_pace = Pace()


@contextmanager
def paced(pace: Pace) -> Iterator[None]:
    """Let another process say, within this block, when each round begins."""
    global _pace
    before, _pace = _pace, pace
    try:
        yield
    finally:
        _pace = before


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

    A copy joins them if one says what it needs, and a matrix product if operations may be its
    limit; they give the floors.

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
    seconds = sum(_checked(group, contender, timer) for contender in contenders)
    needs = {contender.name: contender.known_needs() for contender in contenders}
    measures = _limits([each for each in needs.values() if each is not None], timer.device)
    seconds += sum(_checked(group, each, timer) for each in measures)
    runners = [*contenders, *measures]
    if len({runner.name for runner in runners}) != len(runners):
        raise ValueError(f"{group}: two contenders have the same name")
    samples = _rounds(group, runners, effort, seconds, seed, timer)
    walls = {name: [wall for wall, _ in times] for name, times in samples.items()}
    return {
        c.name: Timing(
            group,
            c.name,
            walls[c.name],
            [cpu for _, cpu in samples[c.name]],
            **_floor(needs[c.name], walls, timer.device),
            covers=c.covers,
            role=c.role,
        )
        for c in contenders
    }


def _rounds(
    group: str, runners: list[Contender], effort: Effort, seconds: float, seed: int, timer: Timer
) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds by name; ``seconds`` is what all of them took when checked."""
    samples: dict[str, list[tuple[float, float]]] = {runner.name: [] for runner in runners}
    shuffle = random.Random(seed).shuffle

    def one_round(advance: Callable[[], None] = nothing) -> None:
        shuffle(runners)
        with _pace.turn(group):
            for runner in runners:
                runner.before()
                samples[runner.name].append(timer.time(runner.run))
                advance()

    with _no_garbage_collection():
        for _ in range(effort.warm_up):
            start = time.perf_counter()
            one_round()
            seconds = time.perf_counter() - start
        for times in samples.values():
            times.clear()
        rounds = _pace.rounds_of(effort, seconds)
        with progress(group, rounds * len(runners)) as advance:
            for _ in range(rounds):
                one_round(advance)
    return samples


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


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# The machine's limits -----------------------------------------------------------------------------


def _limits(needs: Sequence[Needs], device: torch.device) -> list[Contender]:
    """What runs among the contenders to tell how fast any work could be."""
    if not needs:
        return []
    dtypes = dict.fromkeys(each.dtype for each in needs if each.arithmetic)
    return [_copy(device), *(_product(device, dtype) for dtype in dtypes)]


def _copy(device: torch.device) -> Contender:
    def check(run: Callable[[], Any]) -> None:
        run()
        require(limits.copied(device), "the copy differs from its source")

    return Contender(COPY, limits.copy_once(device), check)


def _product(device: torch.device, dtype: torch.dtype) -> Contender:
    def check(run: Callable[[], Any]) -> None:
        require(limits.multiplied(run()), "the product is wrong")

    return Contender(product_name(dtype), limits.multiply_once(device, dtype), check)


def _floor(
    needs: Needs | None, walls: dict[str, list[float]], device: torch.device
) -> dict[str, Any]:
    """What a timing says of the machine's limits."""
    if needs is None:
        return {}
    products = walls.get(product_name(needs.dtype)) if needs.arithmetic else None
    return {
        "moves": needs.moves,
        "flops": needs.flops,
        "bandwidth": limits.bandwidth(walls[COPY], device),
        "rate": None if products is None else limits.rate(products, device),
        "dtype": dtype_name(needs.dtype),
    }
