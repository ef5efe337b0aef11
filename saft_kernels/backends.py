"""Which kernels run: loading the compiled library, choosing a backend, and saying what works here.

A backend is one implementation of the operations in :mod:`saft_kernels.ops`:

========== ==========================================================================
cpu        compiled kernels for CPU tensors, one set per instruction set (see below)
cuda       compiled kernels for NVIDIA GPUs
triton     Triton kernels for NVIDIA and AMD GPUs
reference  plain torch, for any device: the specification itself, slow
========== ==========================================================================

By default the device of the tensors decides: for a GPU ``cuda`` if kernels were compiled for it
and its driver can run them, else ``triton``. ``SAFT_BACKEND`` or :func:`use_backend` asks for one
by name; a backend that was asked for and cannot run raises, nothing falls back silently.
``python -m saft_kernels`` says what would run and why.

The two differ in their reach. ``SAFT_BACKEND`` is for a whole program, which has tensors on the CPU
too: ``cuda`` or ``triton`` is then the backend of GPU tensors, and CPU tensors keep ``cpu``.
:func:`use_backend` is for a block of code, and raises there for tensors that its backend does not
serve.

Importing this package looks at no GPU: a process that has only imported it may fork children that
use one. The first operation on its tensors asks what it can run.

Triton's interpreter (``TRITON_INTERPRET=1``) runs ``triton`` on CPU tensors, for debugging.
``SAFT_CPU_ISA`` (or :func:`use_cpu_isa`) forces a lower CPU instruction set: ``baseline``, ``avx2``
or ``avx512``.

``SAFT_LIBRARY`` names another build of the compiled library, for tests: one with sanitizers (``make
sanitize``). If that cannot be loaded, none is.
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
LIBRARY = Path(os.environ.get("SAFT_LIBRARY") or Path(__file__).with_name("libsaft_kernels.so"))

_requested: str | None = None
#: Whether ``SAFT_BACKEND`` asked for it, and so for a whole program.
_by_environment = False
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
        remedy = (
            "unset SAFT_LIBRARY, which names it, to use that of saft-kernels"
            if os.environ.get("SAFT_LIBRARY")
            else "build it with `make build` in a checkout, or reinstall the saft-kernels wheel"
        )
        _load_error = f"the compiled library {LIBRARY} does not exist; {remedy}"
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

    Unlike ``SAFT_BACKEND`` it is for all tensors: operations inside the block raise for those that
    the backend does not serve, tensors on the CPU included.

    Raises:
        BackendUnavailableError: if that backend cannot run here; the message says why.
    """
    global _requested, _by_environment
    require(name)
    previous = _requested, _by_environment
    _requested, _by_environment = name, False
    try:
        yield
    finally:
        _requested, _by_environment = previous


def require_environment() -> None:
    """Make sure that what the environment variables ask for can be had; every operation does.

    Of a GPU it makes sure that there is one: whether it fits is asked for tensors that are on it.

    Raises:
        BackendUnavailableError: if not. It is not raised on import, so that the diagnostics run.
    """
    if _environment_error is not None:
        raise _environment_error
    if _by_environment and _requested in GPU and not _is_interpreted(_requested):
        _raise_asked(_requested, _gpu_obstacle(_requested, None))


def require(name: str | None) -> None:
    """Make sure that the named backend can run here, on the current GPU if it is one for GPUs.

    Raises:
        BackendUnavailableError: if it cannot, or if there is none of that name.
    """
    if name is not None:
        _require_name(name)
        _raise_asked(name, _obstacle(name))


def _require_name(name: str) -> None:
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}"
        )


def _raise_asked(name: str, obstacle: str | None) -> None:
    """Say why the backend that was asked for cannot run, if it cannot."""
    if obstacle is not None:
        raise BackendUnavailableError(f"the backend {name!r} was asked for: {obstacle}")


def _obstacle(name: str) -> str | None:
    """Why the named backend can run on no device here; None if it can."""
    obstacle = _build_obstacle(name)
    if obstacle is not None or name not in GPU or _is_interpreted(name):
        return obstacle
    if not torch.cuda.is_available():
        return _gpu_obstacle(name, None) or _NO_GPU
    return _gpu_obstacle(name, torch.cuda.current_device())


def _build_obstacle(name: str) -> str | None:
    """Why what is installed cannot run the named backend on any machine; None if it can."""
    if name == "reference":
        return None
    if _load_error is not None:
        return _load_error
    if name == "triton":
        return _triton_obstacle()
    return _cuda_build_obstacle() if name == "cuda" else None


_NO_GPU = "torch sees no GPU"

#: (GPU backend, GPU) -> why it cannot run there. No ``functools.cache``: torch.compile would trace
#: what that calls, and break its graph there.
_gpu_obstacles: dict[tuple[str, int | None], str | None] = {}


def _gpu_obstacle(name: str, index: int | None) -> str | None:
    """Why a GPU backend cannot run on GPU ``index``; None if it can.

    Without an index: why it can run on no GPU, as far as can be told without initialising CUDA,
    which would keep children of this process from using it.
    """
    if (name, index) not in _gpu_obstacles:
        _gpu_obstacles[name, index] = _find_gpu_obstacle(name, index)
    return _gpu_obstacles[name, index]


def _find_gpu_obstacle(name: str, index: int | None) -> str | None:
    obstacle = _build_obstacle(name) or (_driver_obstacle() if name == "cuda" else None)
    if obstacle is not None:
        return obstacle
    if index is None:
        return None if torch.cuda.device_count() else _NO_GPU
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


def _driver_obstacle() -> str | None:
    """Why the driver cannot run a library of the CUDA that this one was built with."""
    needed = int(build_info()["cuda"].partition(".")[0])
    major, minor = divmod(torch.ops.saft_kernels.cuda_driver() // 10, 100)
    if major == 0 or major >= needed:  # 0: there is no driver, and so no GPU
        return None
    return (
        f"the NVIDIA driver supports CUDA {major}.{minor}, and the kernels were compiled for CUDA "
        f"{needed}.0 or later; install a newer driver, or set SAFT_BACKEND=triton"
    )


def _architecture_obstacle(index: int) -> str | None:
    built = build_info()["cuda"]
    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(built, major, minor):
        return None
    return f"GPU {index} is sm_{major}{minor}, and the kernels were compiled for {built}"


#: Compute capabilities of Tegra's integrated GPUs (Jetson, DRIVE). They share no machine code with
#: other GPUs, their major version notwithstanding.
_TEGRA = {(7, 2), (8, 7), (10, 1), (11, 0)}


def runs_on(built: str, major: int, minor: int) -> bool:
    """Whether kernels built as :func:`build_info` says run on compute capability major.minor.

    Machine code runs on GPUs of its own major version and its minor version or higher, on Tegra and
    from Tegra on its own version alone; PTX runs on every later GPU.
    """
    gpu = (major, minor)
    own = [divmod(int(sm), 10) for sm in re.findall(r"sm_(\d+)", built)]
    ptx = [divmod(int(sm), 10) for sm in re.findall(r"compute_(\d+)", built)]
    return any(_shares_machine_code(made_for, gpu) for made_for in own) or any(
        gpu >= made_for for made_for in ptx
    )


def _shares_machine_code(made_for: tuple[int, int], gpu: tuple[int, int]) -> bool:
    if made_for in _TEGRA or gpu in _TEGRA:
        return made_for == gpu
    return made_for[0] == gpu[0] and made_for[1] <= gpu[1]


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_interpreted(name: str) -> bool:
    """Whether the named backend, one for GPUs, serves CPU tensors instead."""
    return name == "triton" and interpreting()


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
        if _by_environment and _requested in GPU and device.type == "cpu":
            return "cpu"
        raise BackendUnavailableError(
            f"the backend {_requested!r} was asked for, but the tensors are on {device}"
        )
    _raise_asked(_requested, _device_obstacle(_requested, device))
    return _requested


def _serves(name: str, device: torch.device) -> bool:
    if device.type == "cpu":
        return name == "cpu" or _is_interpreted(name)
    return device.type == "cuda" and name in GPU and not _is_interpreted(name)


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
    """Take over what the environment asks for, as far as can be told without looking at a GPU."""
    global _requested, _by_environment
    backend = os.environ.get("SAFT_BACKEND") or None
    isa = os.environ.get("SAFT_CPU_ISA") or None
    if isa is not None:
        if _load_error is not None:
            raise BackendUnavailableError(f"SAFT_CPU_ISA={isa} was asked for: {_load_error}")
        _set_cpu_isa(isa)
    if backend is not None:
        _require_name(backend)
        _raise_asked(backend, _build_obstacle(backend))
    _requested, _by_environment = backend, backend is not None


_load_library()
try:
    _apply_environment()
except BackendUnavailableError as error:
    _environment_error = error
