"""``python -m fuzz`` in ``tests/``: many inputs, and what came of them. The README says more."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from fuzz import guided, report
from fuzz.children import (
    BATCH,
    Batch,
    Outcome,
    make_input,
    run_batches,
    scratch_folder,
    warm_up,
)
from fuzz.oracles import guarded_kernels
from fuzz.targets import Target, all_targets

#: Where a run keeps what it has done, and the inputs that failed.
FOLDER = Path(__file__).parent.parent.parent / "build" / "fuzz"

#: Seconds between two lines of progress.
_INTERVAL = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0 if everything held."""
    options = _parser().parse_args(arguments)
    known = all_targets()
    targets = {name: known[name] for name in options.target or known}
    if options.only or options.file:
        return _one(known, options)
    if options.guided and guided.missing():
        sys.exit(guided.missing())
    start = time.monotonic()
    rows = [("mutations", each) for each in _structured(targets, options)]
    rows += [("atheris", each) for each in _guided(targets, options)]
    print(report.table(rows))
    print(f"{time.monotonic() - start:,.0f} s, seed {options.seed}")
    if options.keep:
        report.keep(options.seed, time.monotonic() - start, rows)
    return 1 if any(outcome.failures for _, outcome in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=0, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--guided", type=float, default=0, help="minutes of atheris per target")
    parser.add_argument("--keep", action="store_true", help="write result.json")
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="run one input of this seed again")
    parser.add_argument("--file", type=Path, help="read a file with the --target")
    return parser


# Mutations ----------------------------------------------------------------------------------------


def _structured(targets: Mapping[str, Target], options: argparse.Namespace) -> list[Outcome]:
    """Run what this seed has not run yet; what came of all inputs, those of before included."""
    record = FOLDER / f"seed-{options.seed}.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    shares = _shares(targets, options.inputs)
    totals = {name: Outcome(name) for name, share in shares.items() if share}
    batches = list[Batch]()
    for name in totals:
        done = [each for each in _recorded(record) if each[0].target == name]
        for _, outcome in done:
            totals[name].merge(outcome)
        gaps = _gaps(shares[name], sorted((b.first, b.last) for b, _ in done))
        batches += [Batch(name, first, last, options.seed) for first, last in gaps]
    progress = _Progress(sum(shares.values()), sum(each.inputs for each in totals.values()))

    def add(batch: Batch, outcome: Outcome) -> None:
        totals[batch.target].merge(outcome)
        with record.open("a") as file:
            file.write(
                json.dumps([batch.target, batch.first, batch.last, outcome.to_json()]) + "\n"
            )
        for failure in outcome.failures:
            content = make_input(targets[batch.target], options.seed, failure.number)
            again = f"--seed {options.seed} --only {failure.target}:{failure.number}"
            _save(targets[batch.target], content, failure.what, again)
        progress.add(outcome.inputs)

    run_batches(targets, batches, options.jobs, add)
    return list(totals.values())


def _shares(targets: Mapping[str, Target], inputs: int) -> dict[str, int]:
    """How many inputs each target gets."""
    weights = sum(target.weight for target in targets.values())
    return {name: -(-inputs * target.weight // weights) for name, target in targets.items()}


def _recorded(record: Path) -> Iterator[tuple[Batch, Outcome]]:
    """What earlier runs of a seed have written down."""
    lines = record.read_text().splitlines() if record.exists() else []
    for name, first, last, outcome in map(json.loads, lines):
        yield Batch(name, first, last, 0), Outcome.from_json(outcome)


def _gaps(end: int, done: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges of at most a batch, that together with those that are done make up 0 to ``end``."""
    at = 0
    for first, last in [*done, (end, end)]:
        while at < first:
            yield at, min(at + BATCH, first)
            at = min(at + BATCH, first)
        at = max(at, last)


class _Progress:
    """A line now and then."""

    def __init__(self, total: int, before: int) -> None:
        self._total, self._before, self._now = total, before, before
        self._start = self._last = time.monotonic()

    def add(self, count: int) -> None:
        self._now += count
        if time.monotonic() - self._last < _INTERVAL and self._now < self._total:
            return
        self._last = time.monotonic()
        rate = (self._now - self._before) / (self._last - self._start)
        left = (self._total - self._now) / rate / 60
        line = f"{self._now:,} of {self._total:,} inputs, {rate:,.0f}/s, {left:.0f} min left"
        print(line, file=sys.stderr, flush=True)


def _save(target: Target, content: bytes, what: str, again: str) -> None:
    """Keep an input that failed, and say how to run it again."""
    name = hashlib.sha256(content).hexdigest()[:12]
    file = FOLDER / "failures" / f"{target.name}-{name}{target.suffix}"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    sentence = f"cd tests && python -m fuzz {again}"
    file.with_suffix(".txt").write_text(f"{what}\nTo see it again: {sentence}\n")
    print(f"{target.name}: {what}\n  {sentence}", file=sys.stderr, flush=True)


# Guided -------------------------------------------------------------------------------------------


def _guided(targets: Mapping[str, Target], options: argparse.Namespace) -> Iterator[Outcome]:
    """Let atheris run for each target in turn."""
    for target in targets.values() if options.guided else ():
        folder = FOLDER / "guided" / target.name
        outcome, failed = guided.run(target, options.seed, 60 * options.guided, folder)
        for failure, content in zip(outcome.failures, failed, strict=True):
            name = f"{target.name}-{hashlib.sha256(content).hexdigest()[:12]}{target.suffix}"
            again = f"--target {target.name} --file ../build/fuzz/failures/{name}"
            _save(target, content, failure.what, again)
        print(f"{target.name}: {outcome.inputs:,} guided inputs", file=sys.stderr, flush=True)
        yield outcome


# One ----------------------------------------------------------------------------------------------


def _one(known: Mapping[str, Target], options: argparse.Namespace) -> int:
    """Read one input in this process, so that a debugger may look at it."""
    if options.only:
        name, _, number = options.only.partition(":")
        content = make_input(known[name], options.seed, int(number))
    else:
        (name,) = options.target
        content = options.file.read_bytes()
    with scratch_folder() as folder:
        warm_up(known[name], folder)
        print(f"{len(content):,} bytes: {content[:300]!r}")
        path = folder / f"input{known[name].suffix}"
        path.write_bytes(content)
        with guarded_kernels():
            print(known[name].read(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
