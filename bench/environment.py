"""What a result was measured on, and what else the machine did meanwhile."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import saft_kernels
from saft_kernels import backends

from .memory import MeasurementError

#: Above this share of the processors, other programs disturb what is measured.
NOTICEABLE_LOAD = 0.1

_ROOT = Path(__file__).parent.parent


def environment(*, gpu: bool = False) -> dict[str, str | int | float]:
    """Machine, versions and settings, as they are recorded beside every result.

    Args:
        gpu: whether the GPU is measured, and so belongs to it.
    """
    return {
        **(gpu_environment() if gpu else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "instruction_set": backends.cpu_isa(),
        "backend": backends.requested_backend() or "cpu",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": _blas(),
        "openmp": _openmp(),
        "open_clip": version("open_clip_torch"),
        "timm": version("timm"),
        "peft": _version("peft"),
        "bitsandbytes": _version("bitsandbytes"),
        "saft_kernels": saft_kernels.__version__,
        "compiler": backends.build_info()["compiler"],
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


#: What is asked of ``nvidia-smi``: name in a record -> name there.
_ASKED = {
    "driver": "driver_version",
    "largest_sm_clock": "clocks.max.sm",
    "largest_memory_clock": "clocks.max.mem",
    "power_limit": "power.limit",
}


def current_gpu() -> tuple[torch.device, list[str]]:
    """The GPU to measure on, and the backends that run there.

    Raises:
        MeasurementError: if there is none, or no backend for it.
    """
    if not torch.cuda.is_available():
        raise MeasurementError(
            f"there is no GPU to measure on: torch {torch.__version__} sees none; "
            "`python -m bench` measures the CPU"
        )
    found = [backends.backend_status(name) for name in backends.GPU]
    available = [status.name for status in found if status.available]
    if not available:
        reasons = "; ".join(f"{status.name}: {status.reason}" for status in found)
        raise MeasurementError(f"there are no kernels for this GPU to measure ({reasons})")
    return torch.device("cuda", torch.cuda.current_device()), available


def gpu_environment() -> dict[str, str]:
    """The current GPU, its driver and toolkit, its largest clocks and its power limit.

    Raises:
        MeasurementError: if there is none.
    """
    device, names = current_gpu()
    properties = torch.cuda.get_device_properties(device)
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return {
        "gpu": properties.name,
        "gpu_memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "toolkit": toolkit,
        "gpu_backends": ", ".join(names),
        **dict.fromkeys(_ASKED, "unknown"),
        **_ask_nvidia(str(getattr(properties, "uuid", ""))),
    }


def _ask_nvidia(uuid: str) -> dict[str, str]:
    """What ``nvidia-smi`` says of the GPU; nothing where there is no such program."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*command, f"--id=GPU-{uuid}"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(_ASKED, map(str.strip, done.stdout.split(",")), strict=False))


def _version(package: str) -> str:
    """Of a package that only some baselines need."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _blas() -> str:
    """Who multiplies torch's matrices: what it was built with, and the version of MKL if it is."""
    built = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", built)
    mkl = re.search(r"Math Kernel Library Version (\S+)", built)
    words = [name[1] if name else "unknown", *([mkl[1]] if mkl else [])]
    return " ".join(words)


def _openmp() -> str:
    """The variables of the environment that tell threads how to run."""
    found = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(("OMP_", "KMP_", "GOMP_", "MKL_"))
    )
    return " ".join(found) or "no variables set"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit of this checkout, marked if files differ from it; "unknown" outside one."""
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + (" with changes" if state.stdout else "")


@dataclass
class Load:
    """How busy other programs kept the machine.

    Attributes:
        others: share of all processors that they used, 0 to 1; None where it is not known.
        average: the system's load average over one minute, at the end.
    """

    others: float | None = None
    average: float | None = None


@contextmanager
def watch_load() -> Iterator[Load]:
    """Find out the load during a block; it is filled in when the block ends."""
    load = Load()
    start, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield load
    available = (time.perf_counter() - start) * (os.cpu_count() or 1)
    end = _busy_seconds()
    if busy is not None and end is not None:
        others = (end - busy) - (_own_seconds() - own)
        load.others = min(max(others / available, 0.0), 1.0)
    load.average = os.getloadavg()[0]


def _busy_seconds() -> float | None:
    """Processor time that all programs have used since the machine started."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor time of this process and of those it started and has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
