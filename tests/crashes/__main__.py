"""``python -m crashes`` in ``tests/``: kill runs, resume them, compare; then do so on a full disk.

Every kill and every refusal takes about a second.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a copy of a process that has seen a GPU cannot use it

import torch

from crashes.aim import Aim, Counts
from crashes.attempt import RunFailedError
from crashes.outcome import WrongError
from crashes.subject import SETTINGS, Subject, warmed_up
from crashes.watch import PHASES, AtCall, AtMoment, InPhase, Refusal
from saft_clip.results import environment

RESULT = Path(__file__).with_name("result.json")

#: Kills of one run, at most.
LONGEST = 12


def kill_at_random(
    subjects: Sequence[Subject], kills: int, counts: Counts, generator: random.Random
) -> None:
    """Kill runs of all subjects in turn, one after the other, until there were so many kills."""
    aim, wanted = Aim(generator, counts), counts.total + kills
    while counts.total < wanted:
        subject = subjects[counts.runs % len(subjects)]
        limit = min(generator.randint(1, LONGEST), wanted - counts.total)
        subject.run(subject.at_random(aim, f"run-{counts.runs}", limit), counts, generator)
        _say(counts)


def kill_at_every_call(subject: Subject, counts: Counts, generator: random.Random) -> None:
    """Kill a run at each file-system call once: before it, and another halfway through."""
    for call in subject.every_call():
        subject.run(iter([AtCall(*call)]), counts, generator)
        _say(counts)


def refuse(subject: Subject, number: int | None, counts: Counts, generator: random.Random) -> None:
    """Let the disk be full at file-system calls: at so many drawn ones, or at all of them."""
    calls = list(subject.every_call())
    for call in calls if number is None else generator.sample(calls, number):
        subject.refuse(Refusal(*call, errno.ENOSPC), counts)
        _say(counts)


def _say(counts: Counts) -> None:
    refusals = counts.refused.total() + counts.spared.total()
    print(
        f"{counts.total} kills, {refusals} refusals, {counts.runs} runs that came out the same",
        flush=True,
    )


def table(counts: Counts) -> str:
    """What happened, in Markdown."""
    rows = [
        (
            phase,
            counts.of(phase),
            *(counts.kills[phase][kind.__name__] for kind in (AtMoment, InPhase, AtCall)),
            counts.hidden[phase],
            counts.refused[phase],
            counts.spared[phase],
        )
        for phase in PHASES
    ]
    sums = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    lines = [
        "| phase | kills | at any moment | at a moment of the phase | at a file-system call "
        "| with something half-written left | disk full, run stopped | disk full, run went on |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "| **all** | " + " | ".join(map(str, sums)) + " |",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options, do it, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m crashes", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random [200]")
    parser.add_argument("--refusals", type=int, default=20, help="of a full disk, at random [20]")
    parser.add_argument(
        "--every-call",
        action="store_true",
        help="kill and refuse at every file-system call of the first setting, too",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all choices [0]")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--keep", action="store_true", help="write result.json")
    options = parser.parse_args(arguments)
    generator, counts = random.Random(options.seed), Counts()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            go_through(options, Path(folder), counts, generator)
        except (WrongError, RunFailedError) as error:
            print(error, file=sys.stderr)
            return 1
    seconds = time.perf_counter() - start
    print(table(counts))
    print(
        f"{counts.total} kills, {counts.resumes} resumes after a kill, {counts.runs} runs, up to "
        f"{counts.longest} kills of one run; every run came out the same; {seconds:.0f} s"
    )
    if options.keep:
        keep(counts, options, seconds)
    return 0


def go_through(
    options: argparse.Namespace, folder: Path, counts: Counts, generator: random.Random
) -> None:
    """Do all that the options ask for."""
    config = warmed_up(folder)
    names = options.settings
    subjects = [Subject(config.changed(**SETTINGS[name]), folder / name) for name in names]
    kill_at_random(subjects, options.kills, counts, generator)
    for subject in subjects:
        refuse(subject, options.refusals // len(subjects), counts, generator)
    if options.every_call:
        kill_at_every_call(subjects[0], counts, generator)
        refuse(subjects[0], None, counts, generator)


def keep(counts: Counts, options: argparse.Namespace, seconds: float) -> None:
    """Write down what came out."""
    result = {
        "kills": counts.total,
        "phases": {phase: counts.of(phase) for phase in PHASES},
        "refusals": counts.refused.total() + counts.spared.total(),
        "resumes": counts.resumes,
        "runs": counts.runs,
        "longest": counts.longest,
        "seed": options.seed,
        "settings": options.settings,
        "seconds": round(seconds),
        "environment": environment(torch.device("cpu")),
        "table": table(counts).split("\n"),
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
