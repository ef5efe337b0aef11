"""Peak memory of one piece of work, in a process of its own, and what a training step's is for.

``python -m bench.memory MODULE:FUNCTION ARGUMENTS THREADS`` is that process. glibc is told to give
every block above 64 KiB back to the system as soon as it is freed, so that what is resident is what
is in use. Whether a training step's tensors are weights, optimizer state, gradients or activations
is found in more steps, so that looking (:mod:`bench.allocations`) does not disturb the peak.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from saft_kernels import backends
from saft_kernels.errors import SaftError

from .allocations import TrainingWork  # in this module, `-m` would make another class of it
from .outcome import Memory

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}

_ROOT = Path(__file__).parent.parent


class MeasurementError(SaftError, RuntimeError):
    """Something could not be measured here."""


def peak_memory(function: str, **arguments: Any) -> Memory:
    """Set up a piece of work in a fresh process, run it there, and see what it needs.

    Backend and number of threads are those of this process now, however they were chosen.

    Args:
        function: ``module:name`` of a function that sets the work up and returns it, a callable
            without arguments.
        arguments: of that function; JSON.

    Raises:
        MeasurementError: if the process fails.
    """
    gc.collect()  # models whose hooks refer to them
    torch.cuda.empty_cache()  # the process may need the same GPU
    module, threads = f"{__package__}.memory", str(torch.get_num_threads())
    command = [sys.executable, "-m", module, function, json.dumps(arguments), threads]
    backend = {"SAFT_BACKEND": backends.requested_backend() or ""}
    environment = {**os.environ, **ALLOCATOR, **backend}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
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
    """Run the work; the memory before it and at its peak, and what that of training is for."""
    if not isinstance(work, TrainingWork):
        return _watch_process(work)
    memory = (_watch_gpu if work.device.type == "cuda" else _watch_process)(work)
    return replace(memory, **asdict(work.split()), **asdict(work.allocated()))


def _watch_process(work: Callable[[], object]) -> Memory:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    settings = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    allocator = ", ".join(["malloc", *settings])
    return Memory(peak=_status("VmHWM"), before=before, allocator=allocator)


def _watch_gpu(work: Callable[[], object]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default settings")
    return Memory(
        peak=torch.cuda.max_memory_allocated(),
        before=before,
        allocator=f"torch.cuda {torch.cuda.get_allocator_backend()}, {settings}",
        reserved=torch.cuda.max_memory_reserved(),
    )


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise MeasurementError(f"/proc/self/status does not tell {key}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(asdict(watch(load_work(sys.argv[1], json.loads(sys.argv[2]))))))
