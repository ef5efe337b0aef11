"""The GPU backends on a machine without a GPU: their compiled PTX, run on the CPU.

:class:`~simulated.cuda.SimulatedCuda` runs ``csrc/cuda``: the argument checks and launchers are the
compiled ones (CMake's target ``saft_simulated``), under a CUDA runtime that hands every launch to
``ptxsim`` together with the PTX that nvcc made for the GPU generation asked for.
:class:`~simulated.triton.SimulatedTriton` runs ``saft_kernels/triton`` in the same way, on the PTX
that Triton made.

Every launch is checked: accesses must stay within the tensors of the call, and blocks and threads
must not race for memory. Tensors are on the CPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from saft_kernels import backends

#: GPU generation -> the order in which its threads and blocks run.
GENERATIONS = {"sm80": (80, "rev"), "sm90": (90, "random")}

#: What the simulator looks for beside accesses out of bounds: races between blocks, between the
#: threads of a block, and in shared memory.
CHECKS = {"races": True, "block_races": True, "shared_races": True}


def _kinds() -> list[str]:
    built = not backends.build_info().get("cuda", "off").startswith("off")
    return (["cuda"] if built else []) + ["triton"]


def names() -> list[str]:
    """The implementations that can be simulated here."""
    return [f"{kind}-{generation}" for kind in _kinds() for generation in GENERATIONS]


def kernels() -> set[str]:
    """All kernels that can be simulated here, by the names in ``kernel_coverage.launched``."""
    modules = [importlib.import_module(f"simulated.{kind}") for kind in _kinds()]
    return set().union(*(module.kernels() for module in modules))


@functools.cache
def gpu(kind: str, generation: str) -> Any:
    """The simulated GPU for a backend; its attributes are the operations."""
    if kind == "cuda":
        from simulated.cuda import SimulatedCuda

        return SimulatedCuda(*GENERATIONS[generation])
    from simulated.triton import SimulatedTriton

    return SimulatedTriton(*GENERATIONS[generation])


@contextmanager
def use(kind: str, generation: str) -> Iterator[Any]:
    """Let CPU tensors stand for GPU tensors, and run the operations on a simulated GPU."""
    simulator = gpu(kind, generation)

    def resolve(_: torch.device) -> str:
        return backends.requested_backend() or kind

    with (
        simulator.active(),
        mock.patch.object(backends, "resolve", resolve),
        mock.patch.object(backends, "kernels", return_value=simulator),
    ):
        yield simulator
