"""Which kernels run: loading the compiled library, choosing a backend, and saying what works here.

A backend is one implementation of the operations in :mod:`saft_kernels.ops`:

========== ==========================================================================
cpu        compiled kernels for CPU tensors, one set per instruction set (see below)
cuda       compiled kernels for CUDA tensors
triton     Triton kernels for GPU tensors
reference  plain torch, for any device: the specification itself, slow
========== ==========================================================================

By default the device of the tensors decides. ``SAFT_BACKEND`` or :func:`use_backend` asks for one
by name; a backend that was asked for and cannot run raises, nothing falls back silently.
``SAFT_CPU_ISA`` (or :func:`use_cpu_isa`) forces a lower CPU instruction set: ``baseline``, ``avx2``
or ``avx512``.
"""

from __future__ import annotations

import os
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
    """Why the named backend cannot run here; None if it can. Cheap: every operation asks."""
    if name == "reference":
        return None
    if name == "triton":
        return "this release has no Triton kernels"
    if _load_error is not None:
        return _load_error
    if name == "cuda":
        return _cuda_obstacle()
    return None


def _cuda_obstacle() -> str | None:
    built = build_info()["cuda"]
    if built.startswith("off"):
        return built.removeprefix("off (").removesuffix(")")
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def backend_status(name: str) -> BackendStatus:
    """Whether the named backend can run here, and why (not)."""
    obstacle = _obstacle(name)
    if obstacle is not None:
        return BackendStatus(name, False, obstacle)
    if name == "cpu":
        return BackendStatus(name, True, f"compiled; instruction set {cpu_isa()}")
    return BackendStatus(name, True, "plain torch" if name == "reference" else "compiled")


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
    if _requested != "reference" and (_requested == "cpu") != (device.type == "cpu"):
        raise BackendUnavailableError(
            f"the backend {_requested!r} was asked for, but the tensors are on {device}"
        )
    _require(_requested)
    return _requested


def _default_backend(device: torch.device) -> str:
    known = device.type in BACKENDS
    obstacle = _obstacle(device.type) if known else "this release knows no such device"
    if obstacle is not None:
        raise BackendUnavailableError(
            f"there are no kernels for tensors on {device} ({obstacle}); "
            "SAFT_BACKEND=reference runs plain torch there"
        )
    return device.type


def kernels(backend: str) -> Any:
    """The namespace of a backend's operations."""
    if backend == "triton":
        from saft_kernels.triton import library  # triton is slow to import, and may be missing

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
