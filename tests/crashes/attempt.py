"""Starting a run in a process of its own, and killing it."""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from crashes.watch import PHASES, AtMoment, InPhase, Kill, Refusal, Trace, Watch
from saft_clip.config import FinetuneConfig
from saft_clip.train import finetune
from saft_kernels.errors import FileWriteError


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: well, if neither is known.

    Attributes:
        killed_in: the phase in which it was killed.
        error: the sentence with which it stopped because a file-system call was refused.
    """

    killed_in: str | None = None
    error: str | None = None


class RunFailedError(Exception):
    """A run ended neither well nor as it was meant to."""


#: The exit status of a run that was stopped by a refusal.
_REFUSED = 3


def attempt(config: FinetuneConfig, event: Kill | Refusal | None, log: Path) -> Ending:
    """Start a run or go on with it, and kill it unless it ends first.

    It runs in a copy of this process, which has imported everything: that saves most of the time.

    Args:
        config: of the run.
        event: what happens to it; None lets it end.
        log: file for what it prints.

    Raises:
        RunFailedError: if it failed by itself.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    told, telling = os.pipe()
    process = os.fork()
    if process == 0:
        _run(config, event, log, memory, telling)
    os.close(telling)
    try:
        _kill_in_time(process, told, event)
        _, status = os.waitpid(process, 0)
    finally:
        os.close(told)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return Ending(killed_in=PHASES[memory[0]])
    if os.waitstatus_to_exitcode(status) == _REFUSED and isinstance(event, Refusal):
        return Ending(error=log.with_suffix(".error").read_text())
    if status != 0:
        said = log.read_text(errors="replace")
        raise RunFailedError(f"{config.output} failed ({event}):\n{said}")
    return Ending()


def trace_of(config: FinetuneConfig, log: Path) -> Trace:
    """Let a run go from beginning to end; what it did."""
    attempt(config, None, log)
    found = json.loads(log.with_suffix(".json").read_text())
    return Trace(found["seconds"], found["visits"], Counter(found["calls"]))


def _run(
    config: FinetuneConfig, event: Kill | Refusal | None, log: Path, memory: mmap.mmap, pipe: int
) -> None:
    """All that the new process does; it does not return."""
    code = 1
    try:
        descriptor = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        random.seed(0)  # or else its state in checkpoints, which nothing depends on, would differ
        watch = Watch(memory, pipe, event)
        start = time.perf_counter()
        finetune(config)
        watch.trace.seconds = time.perf_counter() - start
        with open(log.with_suffix(".json"), "w") as file:
            json.dump(vars(watch.trace), file)
        code = 0
    except FileWriteError as error:
        log.with_suffix(".error").write_text(str(error))
        code = _REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill_in_time(process: int, told: int, kill: Kill | Refusal | None) -> None:
    """Wait for the moment, kill the process, or find that it has ended."""
    deadline = time.monotonic() + kill.seconds if isinstance(kill, AtMoment) else None
    visits = 0
    ended = os.pidfd_open(process)
    try:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([told, ended], [], [], left)
            if not ready:
                os.kill(process, signal.SIGKILL)
            if not ready or ended in ready:
                return
            entered = os.read(told, 4096)
            if isinstance(kill, InPhase) and deadline is None:
                visits += entered.count(PHASES.index(kill.phase))
                if visits >= kill.visit:
                    deadline = time.monotonic() + kill.seconds
    finally:
        os.close(ended)
