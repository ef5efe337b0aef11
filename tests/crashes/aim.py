"""When to kill, and what was killed so far."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from crashes.watch import PHASES, WRITING, AtCall, AtMoment, InPhase, Kill, Trace


@dataclass
class Counts:
    """What happened so far.

    Attributes:
        kills: phase -> kills in it, by how they were aimed.
        hidden: phase -> kills in it that left something half-written, hidden.
        resumes: attempts to go on after a kill.
        longest: the most kills that one run survived.
        runs: runs that came to their end.
        refused: phase -> file-system calls in it that were refused and stopped a run.
        spared: phase -> those that were refused and without which the run went on.
    """

    kills: dict[str, Counter[str]] = field(default_factory=lambda: {p: Counter() for p in PHASES})
    hidden: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    longest: int = 0
    runs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    spared: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All kills."""
        return sum(sum(counter.values()) for counter in self.kills.values())

    def of(self, phase: str) -> int:
        """Kills in a phase."""
        return sum(self.kills[phase].values())


class Aim:
    """Chooses when to kill next: a third at any moment, the rest where fewest kills were so far.

    Args:
        generator: of the choices.
        counts: of the kills so far.
    """

    def __init__(self, generator: random.Random, counts: Counts) -> None:
        self._random = generator
        self._counts = counts

    def choose(self, trace: Trace, folder: Path) -> Kill:
        """The next kill of a run that does what ``trace`` says, in ``folder``."""
        if self._random.random() < 1 / 3:
            return AtMoment(self._random.uniform(0, trace.seconds))
        phase = min(self._possible(trace, folder), key=self._counts.of)
        if phase in WRITING or phase not in trace.visits:
            number = self._random.randint(1, trace.calls[phase])
            return AtCall(phase, number, self._random.random() < 0.5)
        visits = trace.visits[phase]
        visit = self._random.randrange(len(visits))
        return InPhase(phase, visit + 1, self._random.uniform(0, visits[visit]))

    def _possible(self, trace: Trace, folder: Path) -> list[str]:
        """Phases that this run can still come to, in random order."""
        gone = {"selection", "mask"} if (folder / "mask.safetensors").exists() else set()
        phases = [p for p in PHASES if p not in gone and (trace.calls[p] or p in trace.visits)]
        return self._random.sample(phases, len(phases))
