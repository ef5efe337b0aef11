"""Inside a run that is to be killed: which phase it is in, and death in a file-system call."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from saft_clip import checkpoint, metrics, train
from saft_clip.methods import dense, saft
from saft_clip.run_folder import RunFolder
from saft_clip.trainer import Trainer
from saft_kernels import mask
from saft_kernels.delta import file as delta_file

#: What a run is doing, in the order in which it does so; ``between``: anything else, such as
#: writing a line of the record.
PHASES = (
    *("loading", "starting", "selection", "mask", "restoring", "evaluation", "step"),
    *("checkpoint", "result", "finishing", "report", "between"),
)

#: The phases that only write files: they are short, so that a kill is aimed at a call in them.
WRITING = ("starting", "mask", "checkpoint", "result", "finishing", "report")


@dataclass(frozen=True)
class AtMoment:
    """Kill so many seconds after the start."""

    seconds: float


@dataclass(frozen=True)
class InPhase:
    """Kill so many seconds after a phase is entered for the ``visit``-th time."""

    phase: str
    visit: int
    seconds: float


@dataclass(frozen=True)
class AtCall:
    """Kill in the ``number``-th file-system call of a phase: before it, or halfway through."""

    phase: str
    number: int
    halfway: bool


@dataclass(frozen=True)
class Refusal:
    """Refuse the ``number``-th file-system call of a phase, at once or halfway through."""

    phase: str
    number: int
    halfway: bool
    error: int


Kill = AtMoment | InPhase | AtCall


@dataclass
class Trace:
    """What a run did that nobody killed.

    Attributes:
        seconds: of the whole run.
        visits: phase -> the seconds of each visit to it.
        calls: phase -> file-system calls.
    """

    seconds: float = 0.0
    visits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    calls: Counter[str] = field(default_factory=Counter)


class Watch:
    """Follows the run of this process; make it in a process that is there for this run alone.

    Args:
        memory: shared with whoever looks on; its first byte is the number of the phase.
        pipe: to whom every new phase is told, as one byte.
        event: what shall happen to this process; kills at moments are not its own affair.
    """

    def __init__(self, memory: mmap.mmap, pipe: int, event: Kill | Refusal | None) -> None:
        self.trace = Trace()
        self._memory = memory
        self._pipe = pipe
        self._event = event if isinstance(event, AtCall | Refusal) else None
        self._phase = "loading"
        self._watch_phases()
        self._watch_calls()

    # Phases -------------------------------------------------------------------------------------

    @contextmanager
    def _within(self, phase: str) -> Iterator[None]:
        outer = self._phase
        self._enter(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.trace.visits[phase].append(time.perf_counter() - start)
            self._enter("between" if outer == "loading" else outer)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._memory[0] = PHASES.index(phase)
        os.write(self._pipe, bytes([self._memory[0]]))

    def _watch_phases(self) -> None:
        self._enter("loading")
        for owner, name, phase in (
            (RunFolder, "start", "starting"),
            (saft.Saft, "_select", "selection"),
            (mask.CooMask, "save", "mask"),
            (train.Run, "_load_checkpoint", "restoring"),
            (train.Run, "_restore", "restoring"),
            (train.Run, "_evaluate", "evaluation"),
            (train.Run, "_validate", "evaluation"),
            (train, "save_checkpoint", "checkpoint"),
            (saft.Saft, "export", "result"),
            (dense.Dense, "export", "result"),
            (RunFolder, "finish", "finishing"),
            (RunFolder, "settle", "finishing"),
            (train, "write_report", "report"),
        ):
            setattr(owner, name, self._in_phase(getattr(owner, name), phase))
        Trainer.steps = self._each_in_phase(Trainer.steps, "step")  # type: ignore[method-assign]

    def _in_phase(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._within(phase):
                return function(*args, **kwargs)

        return watched

    def _each_in_phase(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def watched(*args: Any) -> Iterator[Any]:
            items = function(*args)
            while True:
                with self._within(phase):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return watched

    # File-system calls --------------------------------------------------------------------------

    def _watch_calls(self) -> None:
        for name in ("replace", "unlink", "mkdir", "rmdir", "open"):
            self._watch_call(os, name)
        for owner in (checkpoint, delta_file, dense, safetensors.numpy):
            self._watch_call(owner, "save_file", _save_half)
        for owner in (checkpoint, delta_file, mask):
            self._watch_call(owner, "sort_metadata")
        for name in ("write_text", "write_bytes"):
            self._watch_call(Path, name, _write_half)
        self._watch_call(metrics.MetricsLog, "_append", _append_half)
        self._watch_call(metrics.MetricsLog, "_cut")

    def _watch_call(self, owner: Any, name: str, half: Callable[..., None] | None = None) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & os.O_CREAT:
                self._count(function, half, args, kwargs)
            return function(*args, **kwargs)

        setattr(owner, name, watched)

    def _count(self, function: Any, half: Any, args: Any, kwargs: Any) -> None:
        self.trace.calls[self._phase] += 1
        place = self._phase, self.trace.calls[self._phase]
        event = self._event
        if event is None or (event.phase, event.number) != place:
            return
        if event.halfway and half is not None:
            half(function, *args, **kwargs)
        elif event.halfway and isinstance(event, AtCall):
            function(*args, **kwargs)
        if isinstance(event, AtCall):
            os.kill(os.getpid(), signal.SIGKILL)
        elif half is _save_half:
            raise SafetensorError(f"I/O error: {os.strerror(event.error)} (os error {event.error})")
        else:
            raise OSError(event.error, os.strerror(event.error))


def _save_half(save_file: Any, tensors: Any, path: Path, metadata: Any = None) -> None:
    """As safetensors does: to a file beside the one it was told, which is then renamed."""
    beside = path.with_name(".tmpAb3dE6")
    save_file(tensors, beside, metadata)
    os.truncate(beside, beside.stat().st_size // 2)


def _write_half(write: Any, path: Path, content: Any, **options: Any) -> None:
    write(path, content[: len(content) // 2], **options)


def _append_half(append: Any, log: metrics.MetricsLog, line: bytes) -> None:
    append(log, line[: len(line) // 2])
