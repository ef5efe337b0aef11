"""``python -m soak [--minutes 60] [--seed 0]`` in ``tests/``: cycles for so long, and the figures.

A line a minute; the figures go to ``soak/result.json``. The process ends with 1 at the first wrong
result, naming the seed that repeats it (``--only SEED``), or if its memory has grown.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

# oneDNN and torch's layer above it each keep what they have compiled for the last thousand shapes
# of half-precision products, half a megabyte a shape: here, where shapes change all the time, that
# would take hours to fill up, and look like a leak until then. (0 is no capacity of the layer's.)
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"  # before torch is imported
os.environ["LRU_CACHE_CAPACITY"] = "1"

import torch
import typer

from saft_kernels.delta.sparse_delta import release
from soak.cycle import Setting, run_cycle

RESULT = Path(__file__).with_name("result.json")

#: Cycles between two looks at the memory.
EVERY = 20

#: How much more the last tenth of the looks may show than the second one, in MB: what the allocator
#: keeps of small pieces.
SLACK = 8.0


_C = ctypes.CDLL("libc.so.6")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h


def settle_malloc() -> None:
    """Let what is freed go back to the system, rather than stay as holes that look like a leak.

    From 64 KiB on, an allocation is a mapping of its own, and all threads share one heap.
    """
    _C.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    _C.mallopt(_M_ARENA_MAX, 1)


def resident() -> float:
    """MB of this process that are its own, after everything unused was given back."""
    # safetensors makes a ctypes type for each size of tensor, and ctypes keeps them all.
    ctypes._reset_cache()  # type: ignore[attr-defined]
    gc.collect()
    _C.malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_C.mallinfo2.restype = _MallInfo


def in_use() -> float:
    """MB that malloc has handed out and not got back."""
    found = _C.mallinfo2()
    return (found.uordblks + found.hblkhd) / (1 << 20)


def grown(looks: list[float]) -> float:
    """By how much the last tenth lies above the second one, in MB."""
    tenth = max(1, len(looks) // 10)
    return statistics.median(looks[-tenth:]) - statistics.median(looks[tenth : 2 * tenth] or looks)


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the first cycle.")] = 0,
    only: Annotated[int | None, typer.Option(help="Run the cycle of this seed alone.")] = None,
) -> None:
    """Train for so long, with interruptions, and compare."""
    done: Counter[str] = Counter()
    looks: list[float] = []
    used: list[float] = []
    settle_malloc()
    start = said = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        number = seed if only is None else only
        while True:
            setting = Setting.drawn(number)
            try:
                run_cycle(setting, Path(folder), done)
            except BaseException:
                print(f"seed {number}: {setting}", flush=True)
                raise
            done["cycles"] += 1
            done[str(setting.dtype).removeprefix("torch.")] += 1
            done[setting.mode] += 1
            number += 1
            if done["cycles"] % EVERY == 0:
                looks.append(resident())
                used.append(in_use())
            now = time.monotonic()
            if only is not None or now - start > 60 * minutes:
                break
            if now - said > 60:
                said = now
                print(f"{(now - start) / 60:.0f} min: {done['cycles']:,} cycles, "
                      f"{looks[-1] if looks else 0:.0f} MB resident, "
                      f"{used[-1] if used else 0:.0f} MB in use", flush=True)  # fmt: skip
    growth = grown(looks) if len(looks) >= 10 else 0.0
    figures = {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "seeds": [seed, number - 1],
        **done,
        "memory_MB": {"least": min(looks, default=0), "most": max(looks, default=0)},
        "memory_grown_MB": round(growth, 1),
        "in_use_grown_MB": round(grown(used), 1) if len(used) >= 10 else 0.0,
        "created_by": release(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(figures, indent=2))
    if only is None:
        RESULT.write_text(json.dumps(figures, indent=2) + "\n")
    if growth > SLACK:
        sys.exit(f"memory has grown by {growth:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
