"""How much time and memory one input takes, and what it may take at most.

Memory is measured twice. The kernel keeps the peak of the resident set (``VmHWM``), which is set
back before each input: what an input takes is how far the peak rises above what was resident
before. And the address space is limited (``RLIMIT_AS``), so that a request for far too much fails
at once, as an error of a kind that no loader may let out, instead of taking the machine down.
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fuzz.oracles import require

#: Seconds after which an input is a hang: the process is killed, whatever it is doing.
HANG = 60

#: Processor time that an input may take for each of its bytes.
SECONDS_PER_BYTE = 2e-6

#: Address space is given out in larger pieces than memory: stacks of threads, arenas.
_ADDRESSES = 256 << 20

_STATUS = Path("/proc/self/status")
#: Writing 5 to it sets the peak back.
PEAK = Path("/proc/self/clear_refs")


@dataclass
class Spent:
    """What an input took: seconds of the processor, bytes at the peak."""

    seconds: float = 0.0
    memory: int = 0


@contextmanager
def measured(seconds: float, memory: int, size: int) -> Iterator[Spent]:
    """Measure and limit what happens inside the block.

    Args:
        seconds: of the processor, that it may take.
        memory: bytes that it may take.
        size: of the input.

    Raises:
        Finding: if it took more time or memory than it may.
    """
    spent = Spent()
    sets_back = _set_peak_back()
    sizes = _sizes()
    before, addresses = sizes["VmHWM"], sizes["VmSize"] + memory + _ADDRESSES
    start = time.process_time()
    signal.alarm(HANG)
    usual = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (addresses, usual[1]))
    try:
        yield spent
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)
        signal.alarm(0)
        spent.seconds = time.process_time() - start
        spent.memory = _sizes()["VmHWM"] - before if sets_back else 0
    require(spent.seconds <= seconds, f"it took {spent.seconds:.1f} s for {size:,} bytes")
    require(spent.memory <= memory, f"it took {spent.memory:,} bytes of memory for {size:,}")


def _set_peak_back() -> bool:
    """Let the peak be what is resident now; False on kernels that cannot, which limit only."""
    try:
        PEAK.write_text("5")
    except OSError:
        return False
    return True


def _sizes() -> dict[str, int]:
    """The sizes of this process that end in kB, in bytes."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {key[0].rstrip(":"): int(key[1]) << 10 for key in lines if key[-1] == "kB"}
