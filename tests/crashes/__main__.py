"""``python -m crashes [--kills N] [--seed N]`` in ``tests/``: kill runs, resume them, compare.

It takes two seconds for a kill, or so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a copy of a process that has seen a GPU cannot use it

import open_clip
import torch

from clip_helpers import SMALL, small_checkpoint, write_folder
from crashes.attempt import RunFailedError, attempt, trace_of
from crashes.outcome import Undisturbed, WrongError
from crashes.watch import PHASES, WRITING, AtCall, AtMoment, InPhase, Kill, Trace
from saft_clip import checkpoint, train
from saft_clip.config import FinetuneConfig
from saft_clip.results import environment

RESULT = Path(__file__).with_name("result.json")

#: What is trained: gradients, precisions, accumulation and methods all go on in their own ways.
SETTINGS: dict[str, dict[str, object]] = {
    "sampled": {"gradients": "sampled", "grad_clip_norm": 1.0},
    "streamed": {"gradients": "streamed", "precision": "amp_bf16", "accum_freq": 2},
    "dense": {"gradients": "dense", "workers": 1, "batch_size": 8},
    "full": {"method": "full"},
}

#: Kills of one run, at most.
LONGEST = 12


@dataclass
class Counts:
    """What happened so far.

    Attributes:
        kills: phase -> kills in it, by how they were aimed.
        hidden: phase -> kills in it that left something half-written, hidden.
        resumes: attempts to go on after a kill.
        longest: the most kills that one run survived.
        runs: runs that came to their end.
    """

    kills: dict[str, Counter[str]] = field(default_factory=lambda: {p: Counter() for p in PHASES})
    hidden: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    longest: int = 0
    runs: int = 0

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


# One run ------------------------------------------------------------------------------------------


class Subject:
    """One setting: its undisturbed run, and others that are killed.

    Args:
        config: without a folder.
        folder: for everything.
    """

    def __init__(self, config: FinetuneConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        folder.mkdir()
        kept = folder / "checkpoints"
        kept.mkdir()
        with keeping_checkpoints(kept):
            self.trace = trace_of(self._named("undisturbed"), folder / "undisturbed.log")
        self.undisturbed = Undisturbed(folder / "undisturbed", kept)
        resumed = self._named("resumed", resume=True)
        attempt(resumed, InPhase("checkpoint", 2, 0.0), folder / "resumed.log")
        self.resumed_trace = trace_of(resumed, folder / "resumed.log")
        self.undisturbed.compare(folder / "resumed")

    def _named(self, name: str, **changes: Any) -> FinetuneConfig:
        return self._config.changed(output=str(self._folder / name), **changes)

    def run(self, kills: Iterator[Kill | None], counts: Counts, loaders: random.Random) -> None:
        """Kill a run again and again, let it end, and compare.

        Args:
            kills: when to kill each attempt; None, and the end, let it end by itself.
            counts: are brought up to date.
            loaders: draws how many processes load images, in each attempt anew.

        Raises:
            WrongError: if something is wrong with a file.
            RunFailedError: if the run cannot go on.
        """
        name = f"run-{counts.runs}"
        folder = self._folder / name
        for attempts in itertools.count():
            config = self._named(name, resume=True, workers=loaders.choice((0, 0, 1)))
            kill = next(kills, None)
            killed_in = attempt(config, kill, self._folder / f"{name}.log")
            counts.resumes += attempts > 0
            if killed_in is None:
                break
            counts.kills[killed_in][type(kill).__name__] += 1
            counts.hidden[killed_in] += self.undisturbed.check(folder) > 0
        self.undisturbed.compare(folder)
        counts.runs += 1
        counts.longest = max(counts.longest, attempts)
        shutil.rmtree(folder)

    def every_call(self) -> Iterator[Kill]:
        """A kill before each file-system call of the undisturbed run, and one halfway through."""
        for phase, calls in self.trace.calls.items():
            for number in range(1, calls + 1):
                yield from (AtCall(phase, number, halfway) for halfway in (False, True))

    def at_random(self, aim: Aim, name: str, limit: int) -> Iterator[Kill]:
        """Up to ``limit`` kills of the run of that name."""
        folder = self._folder / name
        for _ in range(limit):
            saved = any((folder / "checkpoints").glob("step-*"))
            yield aim.choose(self.resumed_trace if saved else self.trace, folder)


@contextmanager
def keeping_checkpoints(folder: Path) -> Iterator[None]:
    """Inside, every checkpoint is also copied to a folder."""

    def save(*arguments: Any) -> Path:
        return Path(shutil.copy(checkpoint.save_checkpoint(*arguments), folder))

    original, train.save_checkpoint = train.save_checkpoint, save  # type: ignore[assignment]
    try:
        yield
    finally:
        train.save_checkpoint = original  # type: ignore[assignment]


# All of them --------------------------------------------------------------------------------------


def warmed_up(folder: Path) -> FinetuneConfig:
    """Make data and a model, and let this process import and prepare all that a run needs."""
    torch.set_num_threads(1)
    # The same each time, and longer in the making than the whole run.
    open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        write_folder(folder / "pets" / split, {"cat": count, "dog": count})
    config = FinetuneConfig(
        train_data=str(folder / "pets"),
        model=SMALL,
        pretrained=str(small_checkpoint(folder / "small.safetensors")),
        shots=6,
        batch_size=4,
        epochs=3,
        lr=1e-2,
        density=0.01,
        precision="fp32",
        output=str(folder / "warming-up"),
    )
    with contextlib.redirect_stderr(io.StringIO()):
        train.finetune(config)
    return config


def kill_until(
    kills: int, seed: int, settings: Sequence[str], every_call: bool, folder: Path
) -> Counts:
    """Kill runs, one after the other, until there were so many kills at random.

    Args:
        kills: at random moments and in chosen phases.
        seed: of all choices.
        settings: that take turns.
        every_call: first kill a run of each setting at every single file-system call.
        folder: for everything.
    """
    config = warmed_up(folder)
    subjects = {n: Subject(config.changed(**SETTINGS[n]), folder / n) for n in settings}
    generator, counts = random.Random(seed), Counts()
    for subject in subjects.values() if every_call else ():
        for kill in subject.every_call():
            subject.run(iter([kill]), counts, generator)
    aim, at_calls = Aim(generator, counts), counts.total
    while counts.total < at_calls + kills:
        subject = subjects[settings[counts.runs % len(settings)]]
        limit = min(generator.randint(1, LONGEST), at_calls + kills - counts.total)
        subject.run(subject.at_random(aim, f"run-{counts.runs}", limit), counts, generator)
        print(f"{counts.total} kills, {counts.runs} runs that came out the same", flush=True)
    return counts


def table(counts: Counts) -> str:
    """What happened, in Markdown."""
    rows = [
        (
            phase,
            counts.of(phase),
            *(counts.kills[phase][kind.__name__] for kind in (AtMoment, InPhase, AtCall)),
            counts.hidden[phase],
        )
        for phase in PHASES
    ]
    sums = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    lines = [
        "| killed in | kills | at any moment | at a moment of the phase | in a file-system call "
        "| of these with something half-written |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows if row[1]),
        "| **all** | " + " | ".join(map(str, sums)) + " |",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options, do it, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m crashes", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in all [200]")
    parser.add_argument("--seed", type=int, default=0, help="of all choices [0]")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--every-call", action="store_true", help="first kill at every file-system call, too"
    )
    parser.add_argument("--keep", action="store_true", help="write result.json")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            counts = kill_until(
                options.kills, options.seed, options.settings, options.every_call, Path(folder)
            )
        except (WrongError, RunFailedError) as error:
            print(error, file=sys.stderr)
            return 1
    seconds = time.perf_counter() - start
    print(table(counts))
    print(
        f"{counts.total} kills, {counts.resumes} resumes, {counts.runs} runs, the longest chain "
        f"{counts.longest} kills; every run came out the same; {seconds:.0f} s"
    )
    if options.keep:
        keep(counts, options, seconds)
    return 0


def keep(counts: Counts, options: argparse.Namespace, seconds: float) -> None:
    """Write down what came out."""
    result = {
        "kills": counts.total,
        "seed": options.seed,
        "settings": options.settings,
        "phases": {phase: counts.of(phase) for phase in PHASES},
        "resumes": counts.resumes,
        "runs": counts.runs,
        "longest": counts.longest,
        "seconds": round(seconds),
        "environment": environment(torch.device("cpu")),
        "table": table(counts).split("\n"),
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
