"""The CUDA backend under a simulated CUDA runtime."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import kernel_coverage
import ptxsim
import simulated
from saft_kernels import ops

BUILD = Path(__file__).parent.parent.parent / "build" / "cmake"

_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint,
)


class _Range(ctypes.Structure):
    _fields_ = [("address", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


@functools.cache
def library() -> Path:
    """The launchers with the simulated runtime, built if anything changed."""
    tools = Path(sys.executable).parent
    environment = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    command = [str(tools / "cmake"), "--build", str(BUILD), "--target", "saft_simulated"]
    with (BUILD / "saft_simulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run side by side
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return BUILD / "libsaft_simulated.so"


@functools.cache
def _loaded() -> tuple[ctypes.CDLL, torch.library.Library]:
    torch.ops.load_library(str(library()))
    return ctypes.CDLL(str(library())), ops.define("saft_simulated")


@functools.cache
def _texts(sm: int) -> list[str]:
    """The PTX of every kernel file for one GPU generation."""
    return [t for t in ptxsim.extract_ptx(library()).values() if f".target sm_{sm}\n" in t]


def kernels() -> set[str]:
    """Every kernel of the library, by the generation it is compiled for and its name."""
    generations = [sm for sm, _ in simulated.GENERATIONS.values()]
    return {
        _label(sm, kernel)
        for sm in generations
        for text in _texts(sm)
        for kernel in re.findall(r"\.entry ([\w$]+)\(", text)
    }


def _label(sm: int, kernel: str) -> str:
    return f"sm_{sm}: {kernel}"


@functools.cache
def _module(sm: int, kernel: str) -> ptxsim.Module:
    """The translated kernel file that holds ``kernel``."""
    (text,) = (text for text in _texts(sm) if f".entry {kernel}(" in text)
    return _translated(text)


@functools.cache
def _translated(ptx: str) -> ptxsim.Module:
    return ptxsim.Module(ptx)


class SimulatedCuda:
    """Runs the operations of ``csrc/cuda`` on the PTX of GPU generation ``sm``.

    Args:
        sm: 80 or 90.
        order: in which threads and blocks run: ``fwd``, ``rev`` or ``random``.
        seed: of ``random``.

    Attributes:
        launches: names of the kernels that ran, in order.
    """

    def __init__(self, sm: int, order: str = "fwd", seed: int = 1) -> None:
        self.options = {"order": order, "seed": seed, **simulated.CHECKS}
        self.sm = sm
        self.launches: list[str] = []
        self._library, _ = _loaded()
        self._launch = _Launch(self._run)  # must live as long as it may be called
        self._error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        """The operation of that name, as ``torch.ops.saft_kernels`` has it."""
        return _Operation(self, getattr(torch.ops.saft_simulated, name))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run operations on CPU tensors here."""
        self._library.saft_simulated_launch_with(self._launch)
        yield
        self._library.saft_simulated_launch_with(_Launch())

    def call(self, operation: Any, arguments: Sequence[Any]) -> Any:
        """Call an operation; errors of the simulator come out as they are."""
        self._error = None
        try:
            return operation(*arguments)
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def _run(self, kernel: bytes, grid: Any, block: Any, arguments: Any, shared: int) -> int:
        try:
            name = kernel.decode()
            module = _module(self.sm, name)
            block_of_parameters = bytearray(module.kernel(name).param_bytes)
            for i, param in enumerate(module.parameters(name)):
                end = param.offset + param.size
                block_of_parameters[param.offset : end] = ctypes.string_at(arguments[i], param.size)
            module.launch_raw(
                name, grid[:3], block[:3], bytes(block_of_parameters), shared, self._memory(),
                **self.options,
            )  # fmt: skip
            self.launches.append(name)
            kernel_coverage.launched.add(_label(self.sm, name))
        except Exception as error:
            self._error = error
            return 1
        return 0

    def _memory(self) -> list[tuple[int, int]]:
        """Addresses and sizes of what the call under way may touch."""
        first = ctypes.POINTER(_Range)()
        count = self._library.saft_simulated_ranges(ctypes.byref(first))
        return [(r.address, r.nbytes) for r in first[:count]]


class _Operation:
    """One operation, whose errors are the simulator's."""

    def __init__(self, gpu: SimulatedCuda, packet: Any) -> None:
        self._gpu = gpu
        self._packet = packet
        self.default = packet.default

    def __call__(self, *arguments: Any) -> Any:
        return self._gpu.call(self._packet, arguments)
