"""How something is timed on each kind of device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Timer(Protocol):
    """The way to time something on one kind of device."""

    device: torch.device

    def wait(self) -> None:
        """Wait until the device has done all it was asked for."""

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds that ``run`` took, and processor seconds of all threads together."""


class CpuTimer:
    """Wall time."""

    device = torch.device("cpu")

    def wait(self) -> None:
        """Nothing is ever left to do."""

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """See :class:`Timer`."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = run()
        sample = time.perf_counter() - wall, time.process_time() - cpu
        del result  # freeing it is not part of the work
        return sample


class CudaTimer:
    """The time between two events in a GPU's current stream.

    The GPU first spins for a while, in which the host asks for the work, so that what is timed is
    the GPU and not Python. Where the host needs longer than that (after some doubling, or since
    the work waits for the GPU itself), its time is part of the sample, as it is of the work.

    Args:
        device: the GPU.
        head_start: seconds that it spins at first; 0: what is timed is GPU and host together.
    """

    #: The longest head start, in seconds.
    LONGEST = 0.1

    #: Cycles per second of GPUs, roughly: how long one spins need not be exact.
    _CYCLES = 1.5e9

    def __init__(self, device: torch.device, head_start: float = 1e-3) -> None:
        self.device = device
        self.head_start = head_start

    def wait(self) -> None:
        """See :class:`Timer`."""
        torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], Any]) -> tuple[float, float]:
        """See :class:`Timer`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        if self.head_start:
            torch.cuda._sleep(int(self.head_start * self._CYCLES))
        start.record()
        cpu = time.process_time()
        result = run()
        cpu = time.process_time() - cpu
        end.record()
        late = start.query()
        self.wait()
        del result
        if self.head_start and late:
            self.head_start = min(2 * self.head_start, self.LONGEST)
        return start.elapsed_time(end) / 1e3, cpu


CPU = CpuTimer()
