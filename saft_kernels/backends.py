"""Which kernels run: loading the compiled library, choosing a backend, and saying what works here.

A backend is one implementation of the operations in :mod:`saft_kernels.ops`:

========== ==========================================================================
cpu        compiled kernels for CPU tensors, one set per instruction set (see below)
cuda       compiled kernels for NVIDIA GPUs
triton     Triton kernels for NVIDIA and AMD GPUs
reference  plain torch, for any device: the specification itself, slow
========== ==========================================================================

By default the device of the tensors decides: for a GPU ``cuda`` if kernels were compiled for it,
else ``triton``. ``SAFT_BACKEND`` or :func:`use_backend` asks for one by name; a backend that was
asked for and cannot run raises, nothing falls back silently. ``python -m saft_kernels`` says what
would run and why.

Triton's interpreter (``TRITON_INTERPRET=1``) runs ``triton`` on CPU tensors, for debugging.
``SAFT_CPU_ISA`` (or :func:`use_cpu_isa`) forces a lower CPU instruction set: ``baseline``, ``avx2``
or ``avx512``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saft_kernels.errors import BackendUnavailableError

BACKENDS = ("cpu", "cuda", "triton", "reference")
#: Those whose index vectors are checked by :mod:`saft_kernels.index_values`.
GPU = ("cuda", "triton")
LIBRARY = Path(__file__).with_name("libsaft_kernels.so")

_requested: str | None = None
_load_error: str | None = None
_environment_error: BackendUnavailableError | None = None


@dataclass(frozen=True)
class BackendStatus:
    """Whether one backend can run here, and why (not)."""

    name: str
    available: bool
    reason: str


def _load_library() -> None:
    global _load_error
    if not LIBRARY.is_file():
        _load_error = (
            f"the compiled library {LIBRARY} does not exist; build it with `make build` in a "
            "checkout, or reinstall the saft-kernels wheel"
        )
        return
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _load_error = f"the compiled library {LIBRARY} could not be loaded: {error}"


def library_error() -> str | None:
    """Why the compiled library is missing; None if it is loaded."""
    return _load_error


@functools.cache
def build_info() -> dict[str, str]:
    """What was compiled: version, compiler, ABI target, CUDA. Empty without the library."""
    if _load_error is not None:
        return {}
    lines = torch.ops.saft_kernels.build_info().splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def requested_backend() -> str | None:
    """The backend asked for by name; None if the device of the tensors decides."""
    return _requested


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run the operations inside the block on the named backend; None lets the device decide.

    Raises:
        BackendUnavailableError: if that backend cannot run here; the message says why.
    """
    global _requested
    _require(name)
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def require_environment() -> None:
    """Make sure that what the environment variables ask for can be had; every operation does.

    Raises:
        BackendUnavailableError: if not. It is not raised on import, so that the diagnostics run.
    """
    if _environment_error is not None:
        raise _environment_error


def _require(name: str | None) -> None:
    if name is None:
        return
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}"
        )
    obstacle = _obstacle(name)
    if obstacle is not None:
        raise BackendUnavailableError(f"the backend {name!r} was asked for: {obstacle}")


def _obstacle(name: str) -> str | None:
    """Why the named backend can run on no device here; None if it can."""
    if name == "reference":
        return None
    if _load_error is not None:
        return _load_error
    if name == "cpu":
        return None
    if name == "triton" and interpreting():
        return _triton_obstacle()
    return _gpu_obstacle(name, torch.cuda.current_device() if torch.cuda.is_available() else None)


#: (GPU backend, GPU) -> why it cannot run there. No ``functools.cache``: torch.compile would trace
#: what that calls, and break its graph there.
_gpu_obstacles: dict[tuple[str, int | None], str | None] = {}


def _gpu_obstacle(name: str, index: int | None) -> str | None:
    """Why a GPU backend cannot run on GPU ``index`` (None: there is none); None if it can."""
    if (name, index) not in _gpu_obstacles:
        _gpu_obstacles[name, index] = _find_gpu_obstacle(name, index)
    return _gpu_obstacles[name, index]


def _find_gpu_obstacle(name: str, index: int | None) -> str | None:
    obstacle = _triton_obstacle() if name == "triton" else _cuda_build_obstacle()
    if obstacle is not None:
        return obstacle
    if index is None:
        return "torch sees no GPU"
    return _architecture_obstacle(index) if name == "cuda" else None


def _triton_obstacle() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _cuda_build_obstacle() -> str | None:
    built = build_info()["cuda"]
    if built.startswith("off"):
        return (
            f"the library was built without CUDA: {built.removeprefix('off (').removesuffix(')')}"
        )
    if torch.version.cuda is None:
        return "the compiled kernels are for NVIDIA GPUs, and this torch is not"
    return None


def _architecture_obstacle(index: int) -> str | None:
    built = build_info()["cuda"]
    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(built, major, minor):
        return None
    return f"GPU {index} is sm_{major}{minor}, and the kernels were compiled for {built}"


def runs_on(built: str, major: int, minor: int) -> bool:
    """Whether kernels built as :func:`build_info` says run on compute capability major.minor.

    Machine code runs on GPUs of its own major version and its minor version or higher; PTX runs on
    every later GPU.
    """
    own = [divmod(int(sm), 10) for sm in re.findall(r"sm_(\d+)", built)]
    ptx = [divmod(int(sm), 10) for sm in re.findall(r"compute_(\d+)", built)]
    return any(major == m and minor >= n for m, n in own) or any((major, minor) >= p for p in ptx)


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend_status(name: str) -> BackendStatus:
    """Whether the named backend can run here, and why (not)."""
    obstacle = _obstacle(name)
    if obstacle is not None:
        return BackendStatus(name, False, obstacle)
    reasons = {
        "cpu": lambda: f"compiled; instruction set {cpu_isa()}",
        "cuda": lambda: f"compiled, {build_info()['cuda']}; on {torch.cuda.get_device_name()}",
        "triton": lambda: (
            "interpreted, on the CPU"
            if interpreting()
            else f"compiled when first used; on {torch.cuda.get_device_name()}"
        ),
        "reference": lambda: "plain torch",
    }
    return BackendStatus(name, True, reasons[name]())


def resolve(device: torch.device) -> str:
    """The backend that serves tensors of ``device`` now.

    Raises:
        BackendUnavailableError: if none does, or if the one asked for does not serve that device.
    """
    if device.type == "cpu" and not (_requested or _environment_error or _load_error):
        return "cpu"  # the usual case at once: every operation asks
    require_environment()
    if _requested is None:
        return _default_backend(device)
    if _requested != "reference" and not _serves(_requested, device):
        raise BackendUnavailableError(
            f"the backend {_requested!r} was asked for, but the tensors are on {device}"
        )
    obstacle = _device_obstacle(_requested, device)
    if obstacle is not None:
        raise BackendUnavailableError(f"the backend {_requested!r} was asked for: {obstacle}")
    return _requested


def _serves(name: str, device: torch.device) -> bool:
    if device.type == "cpu":
        return name == "cpu" or (name == "triton" and interpreting())
    return device.type == "cuda" and name in GPU and not (name == "triton" and interpreting())


def _device_obstacle(name: str, device: torch.device) -> str | None:
    if name in GPU and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _load_error or _gpu_obstacle(name, index)
    return _obstacle(name)


def _default_backend(device: torch.device) -> str:
    obstacles = []
    for name in ("cpu", *GPU):
        if not _serves(name, device):
            continue
        obstacle = _device_obstacle(name, device)
        if obstacle is None:
            return name
        obstacles.append(f"{name}: {obstacle}")
    raise BackendUnavailableError(
        f"there are no kernels for tensors on {device} "
        f"({'; '.join(obstacles) or 'this release knows no such device'}); "
        "SAFT_BACKEND=reference runs plain torch there"
    )


def kernels(backend: str) -> Any:
    """The namespace of a backend's operations."""
    if backend == "triton":
        from saft_kernels.triton import library  # imports triton, which may be missing

        return library.operations()
    return torch.ops.saft_kernels


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that were compiled and that this CPU can run, slowest first."""
    return tuple(torch.ops.saft_kernels.cpu_isas().split(","))


def cpu_isa() -> str:
    """The instruction set in use."""
    return str(torch.ops.saft_kernels.cpu_isa())


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels inside the block with the named instruction set.

    Raises:
        BackendUnavailableError: if it was not compiled or this CPU cannot run it.
    """
    previous = cpu_isa()
    _set_cpu_isa(name)
    try:
        yield
    finally:
        _set_cpu_isa(previous)


def _set_cpu_isa(name: str) -> None:
    if name not in cpu_isas():
        raise BackendUnavailableError(
            f"CPU instruction set {name!r} was asked for, but this build on this CPU can run only "
            f"{', '.join(cpu_isas())}"
        )
    torch.ops.saft_kernels.set_cpu_isa(name)


def _apply_environment() -> None:
    global _requested
    backend = os.environ.get("SAFT_BACKEND") or None
    isa = os.environ.get("SAFT_CPU_ISA") or None
    if isa is not None:
        if _load_error is not None:
            raise BackendUnavailableError(f"SAFT_CPU_ISA={isa} was asked for: {_load_error}")
        _set_cpu_isa(isa)
    _require(backend)
    _requested = backend


_load_library()
try:
    _apply_environment()
except BackendUnavailableError as error:
    _environment_error = error
