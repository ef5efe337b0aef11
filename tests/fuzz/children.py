"""Inputs in batches, each batch in a process of its own, which may crash, hang and eat memory."""

from __future__ import annotations

import faulthandler
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fuzz.choices import Seeded
from fuzz.limits import PEAK, SECONDS_PER_BYTE, Spent, measured
from fuzz.oracles import guard_kernels, guard_process, violations
from fuzz.targets import Target

BATCH = 1000

#: Where files are written: memory if possible, since nothing here is about disks.
_FAST = Path("/dev/shm")


@dataclass
class Failure:
    """An input with which something did not hold."""

    target: str
    number: int
    what: str


@dataclass
class Outcome:
    """What came of some inputs of one target.

    Attributes:
        target: its name.
        outcomes: accepted, or the error that refused it -> how many.
        seconds: of the processor, all together.
        slowest: (seconds, number) of the slowest input.
        largest: (bytes of memory, number) of the one that took most.
        multiple: (bytes of memory for each byte of the file, number), of files above 64 kB.
        failures: what did not hold.
    """

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)
    multiple: tuple[float, int] = (0.0, -1)
    failures: list[Failure] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many there were."""
        return sum(self.outcomes.values())

    def add(self, number: int, label: str, spent: Spent, size: int) -> None:
        """Count one input."""
        self.outcomes[label] += 1
        self.seconds += spent.seconds
        self.slowest = max(self.slowest, (spent.seconds, number))
        self.largest = max(self.largest, (spent.memory, number))
        if size >= 1 << 16:
            self.multiple = max(self.multiple, (round(spent.memory / size, 2), number))

    def merge(self, other: Outcome) -> None:
        """Count what another holds."""
        self.outcomes += other.outcomes
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        self.largest = max(self.largest, other.largest)
        self.multiple = max(self.multiple, other.multiple)
        self.failures += other.failures

    def to_json(self) -> str:
        """Everything, as text."""
        failures = [asdict(failure) for failure in self.failures]
        values = {**vars(self), "outcomes": dict(self.outcomes), "failures": failures}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        for name in ("slowest", "largest", "multiple"):
            values[name] = tuple(values[name])
        values["outcomes"] = Counter(values["outcomes"])
        values["failures"] = [Failure(**failure) for failure in values["failures"]]
        return cls(**values)


@dataclass(frozen=True)
class Batch:
    """Inputs ``first`` to ``last - 1`` of a target, of a run with this seed."""

    target: str
    first: int
    last: int
    seed: int


def make_input(target: Target, seed: int, number: int) -> bytes:
    """The input of that number: always the same one."""
    return target.generate(Seeded(f"{seed} {target.name} {number}"))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the files that are read."""
    where = _FAST if _FAST.is_dir() and os.access(_FAST, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=where) as folder:
        yield Path(folder)


def warm_up(target: Target, folder: Path) -> None:
    """Read what is valid, so that no later input pays for what is made or imported once.

    Raises:
        RuntimeError: if a valid file is refused.
    """
    for seed in target.seeds:
        path = folder / f"input{target.suffix}"
        path.write_bytes(seed)
        label = target.read(path)
        if not label.startswith("accepted"):
            raise RuntimeError(f"a valid file of target {target.name} is refused: {label}")


def run_input(target: Target, content: bytes, folder: Path) -> tuple[str, Spent]:
    """Read one input.

    Returns:
        What came of it: the label of :meth:`Target.read`, or ``failed: `` and what did not hold.
    """
    path = folder / f"input{target.suffix}"
    path.write_bytes(content)
    spent = Spent()
    violations.clear()
    try:
        with measured(*_most(target, len(content)), len(content)) as spent:
            label = target.read(path)
    except (Exception, SystemExit) as error:
        label = f"failed: {describe(error)}"
    # A loader may have taken the error of a guard for one of the file.
    return f"failed: {violations.pop()}" if violations else label, spent


def _most(target: Target, size: int) -> tuple[float, int]:
    """The seconds and the memory that a file of this size may take."""
    return target.seconds + size * SECONDS_PER_BYTE, target.memory + size * target.per_byte


def describe(error: BaseException) -> str:
    """What went wrong, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-6:]]
    return f"{type(error).__name__}: {str(error)[:500]!r} ({' > '.join(where)})"


class _Child:
    """A process that runs a batch, and what it last said about itself."""

    def __init__(self, target: Target, batch: Batch, folder: Path) -> None:
        self.batch = batch
        self._target = target
        self._folder = folder / f"{batch.target}-{batch.first}"
        self._folder.mkdir()
        self._result = self._folder / "outcome.json"
        self._at = mmap.mmap(-1, 8)  # shared: the input under way, for when the process is gone
        self._process = multiprocessing.get_context("fork").Process(target=self._run)
        self._process.start()

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return self._process.sentinel

    def _run(self) -> None:
        prepare_child(self._folder)
        warm_up(self._target, self._folder)  # its pages are its own from then on
        outcome = Outcome(self.batch.target)
        for number in range(self.batch.first, self.batch.last):
            self._at[:] = struct.pack("<q", number)
            content = make_input(self._target, self.batch.seed, number)
            label, spent = run_input(self._target, content, self._folder)
            if label.startswith("failed: "):
                outcome.failures.append(Failure(self.batch.target, number, label))
                label = "failed"
            outcome.add(number, label, spent, len(content))
            self._result.write_text(outcome.to_json())

    def end(self) -> tuple[Batch, list[Batch], Outcome]:
        """What was run, what is left if the process has died, and what came of the former."""
        self._process.join()
        outcome = Outcome(self.batch.target)
        if self._result.exists():
            outcome = Outcome.from_json(self._result.read_text())
        shutil.rmtree(self._folder)
        code = self._process.exitcode or 0
        if code > 0:
            raise RuntimeError(f"the fuzzer itself has failed in {self.batch}")
        if code == 0:
            return self.batch, [], outcome
        number = struct.unpack("<q", self._at[:])[0]
        outcome.failures.append(Failure(self.batch.target, number, f"failed: {_death(code)}"))
        outcome.add(number, "failed", Spent(), 0)
        ran, left = (replace(self.batch, last=number + 1), replace(self.batch, first=number + 1))
        return ran, [left] if left.first < left.last else [], outcome


def prepare_child(folder: Path) -> None:
    """Set up a process in which nothing that a file brings about can do harm."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)  # a fork has no other threads to wait for
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    guard_kernels()
    guard_process(folder, PEAK)


class Reader:
    """A process that reads one input after the other; if one kills it, there is another process.

    Args:
        target: what reads them.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._process: Any = None

    def __enter__(self) -> Reader:
        """Make the folder for its files."""
        self._scratch = scratch_folder()
        self._folder = self._scratch.__enter__()
        warm_up(self._target, self._folder)
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._scratch.__exit__(*error)

    def read(self, content: bytes) -> str:
        """What came of an input, as :func:`run_input` says it."""
        if self._process is None:
            context = multiprocessing.get_context("fork")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=self._serve, args=(other,))
            self._process.start()
            other.close()
        self._pipe.send_bytes(content)
        try:
            return self._pipe.recv_bytes().decode()
        except EOFError:
            self._process.join()
            code, self._process = self._process.exitcode, None
            return f"failed: {_death(code)}"

    def _serve(self, pipe: Any) -> None:
        self._pipe.close()  # the other end, which this process has too
        prepare_child(self._folder)
        warm_up(self._target, self._folder)
        with suppress(EOFError):  # when nobody asks any more
            while True:
                label, _ = run_input(self._target, pipe.recv_bytes(), self._folder)
                pipe.send_bytes(label.encode("utf-8", "backslashreplace"))


def _death(code: int) -> str:
    return "it hangs" if code == -signal.SIGALRM else f"it died with signal {-code}"


def run_batches(
    targets: Mapping[str, Target],
    batches: Iterable[Batch],
    jobs: int,
    done: Callable[[Batch, Outcome], None],
) -> None:
    """Run batches, several at a time.

    Args:
        targets: by name.
        batches: what to run.
        jobs: how many processes at a time.
        done: called with every batch and what came of it; if a process died, with the part of the
            batch that it had come to, and later with the rest.
    """
    waiting, running = deque(batches), list[_Child]()
    with scratch_folder() as folder:
        for name in {batch.target: None for batch in waiting}:
            warm_up(targets[name], folder)
        while waiting or running:
            while waiting and len(running) < jobs:
                batch = waiting.popleft()
                running.append(_Child(targets[batch.target], batch, folder))
            ready = connection.wait([child.sentinel for child in running])
            for child in [child for child in running if child.sentinel in ready]:
                running.remove(child)
                ran, left, outcome = child.end()
                done(ran, outcome)
                waiting.extendleft(left)
