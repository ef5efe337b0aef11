"""Faults that the sanitizers of a check must report; run with its library (``sanitized.run``).

Each fault is committed in a child process, by the kernel of ``scatter_`` without the checks before
it (``unchecked.cpp``), once per instruction set, since kernels are compiled for each.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass

import torch

from saft_kernels import backends

ELEMENTS = 100
ENTRIES = 2000


@dataclass(frozen=True)
class Fault:
    """What the kernel is made to do.

    Attributes:
        name: what is wrong then.
        report: what the sanitizer calls it.
        index: of the last entry; the others are those of element 0.
        stride: between elements.
        threads: that share the entries.
    """

    name: str
    report: str
    index: int = 0
    stride: int = 1
    threads: int = 1

    def commit(self) -> None:
        """Scatter so; a sanitizer ends the process."""
        torch.set_num_threads(self.threads)
        indices = torch.zeros(ENTRIES, dtype=torch.int64)
        indices[-1] = self.index
        torch.ops.saft_sanitized.scatter_(
            torch.zeros(ELEMENTS), indices, torch.zeros(ENTRIES), self.stride
        )


FAULTS = {
    "address": (
        Fault("a write behind a tensor", "heap-buffer-overflow", index=ELEMENTS),
        Fault("an overflow", "signed integer overflow", index=4, stride=2**61),
    ),
    "thread": (Fault("two threads that write to one element", "data race", threads=2),),
}


def report_of(fault: Fault, isa: str) -> str:
    """What a child writes to its standard error when it commits the fault."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 2)
            try:
                with backends.use_cpu_isa(isa):
                    fault.commit()
            except Exception as error:
                os.write(2, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        return file.read().decode(errors="replace")


def main(check: str) -> int:
    """Commit every fault; 0 if all were reported, where they were committed."""
    for fault in FAULTS[check]:
        for isa in backends.cpu_isas():
            report = report_of(fault, isa)
            if fault.report not in report or "gather_scatter_kernel.cpp" not in report:
                print(f"the sanitizer did not report {fault.name} on {isa}:\n{report}")
                return 1
        print(f"noticed on every instruction set: {fault.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
