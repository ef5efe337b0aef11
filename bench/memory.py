"""Peak memory of one piece of work, in a process of its own.

``python -m bench.memory MODULE:FUNCTION ARGUMENTS`` is that process. glibc is told to give every
block above 64 KiB back to the system as soon as it is freed, so that what is resident is what is in
use.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saft_kernels.errors import SaftError

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}

_ROOT = Path(__file__).parent.parent


class MeasurementError(SaftError, RuntimeError):
    """Something could not be measured here."""


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process: when its work was set up, and at the peak after that."""

    before: int
    peak: int


def peak_memory(function: str, **arguments: Any) -> Memory:
    """Set up a piece of work in a fresh process, run it there, and see what it needs.

    Args:
        function: ``module:name`` of a function that sets the work up and returns it, a callable
            without arguments.
        arguments: of that function; JSON.

    Raises:
        MeasurementError: if the process fails.
    """
    command = [sys.executable, "-m", f"{__package__}.memory", function, json.dumps(arguments)]
    done = subprocess.run(
        command, cwd=_ROOT, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MeasurementError(f"the memory of {function} could not be measured: {reason}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def load_work(function: str, arguments: dict[str, Any]) -> Callable[[], object]:
    """Set up the work that ``function`` names."""
    module, _, name = function.partition(":")
    work: Callable[[], object] = getattr(importlib.import_module(module), name)(**arguments)
    return work


def watch(work: Callable[[], object]) -> Memory:
    """Run the work; the memory of this process before it and at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    return Memory(before, _status("VmHWM"))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise MeasurementError(f"/proc/self/status does not tell {key}")


if __name__ == "__main__":
    print(json.dumps(asdict(watch(load_work(sys.argv[1], json.loads(sys.argv[2]))))))
