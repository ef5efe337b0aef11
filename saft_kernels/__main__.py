"""``python -m saft_kernels``: what was built, what works here, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from saft_kernels import backends
from saft_kernels.errors import BackendUnavailableError

PACKAGES = ("torch", "triton", "numpy", "safetensors")


def installed(package: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it stands on."""
    return {
        "saft-kernels": installed("saft-kernels"),
        "Python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def build() -> dict[str, str]:
    """What was compiled, or why there is nothing."""
    error = backends.library_error()
    if error is not None:
        return {"compiled library": error}
    info = backends.build_info()
    sanitizers = info.get("sanitizers")  # a library that SAFT_LIBRARY names may be an older one
    return {
        "compiled library": str(backends.LIBRARY),
        **({"SANITIZERS": f"{sanitizers}: slow, for tests only"} if sanitizers else {}),
        "compiler": info["compiler"],
        "torch stable ABI": f"{info['abi_target']} and later",
        "CUDA kernels": info["cuda"],
        "CPU instruction sets here": ", ".join(backends.cpu_isas()),
        "CPU instruction set in use": backends.cpu_isa(),
    }


def backend_lines() -> dict[str, str]:
    """One line per backend: whether it works, and why (not)."""
    found = [backends.backend_status(name) for name in backends.BACKENDS]
    return {s.name: f"{'works' if s.available else 'unavailable'}: {s.reason}" for s in found}


def gpus() -> dict[str, str]:
    """Every GPU that torch sees: its name, its architecture, and the backend that serves it."""
    found = {}
    # With a driver too old for torch there are GPUs, but nothing can be asked of them.
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        architecture = getattr(
            properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"
        )
        try:
            served = f"served by {backends.resolve(torch.device('cuda', index))}"
        except BackendUnavailableError as error:
            served = str(error)
        found[f"cuda:{index}"] = f"{properties.name}, {architecture}; {served}"
    return found or {"none": "torch sees no GPU"}


def environment() -> dict[str, str]:
    """The variables that steer the choice, as they are set."""
    names = ("SAFT_BACKEND", "SAFT_CPU_ISA", "SAFT_LIBRARY", "TRITON_INTERPRET")
    return {name: os.environ.get(name) or "not set" for name in names}


def sections() -> dict[str, dict[str, str]]:
    """The whole report: section -> entry -> text."""
    return {
        "Versions": versions(),
        "Build": build(),
        "Backends": backend_lines(),
        "GPUs": gpus(),
        "Environment": environment(),
    }


def main() -> int:
    """Print the report; 1 if the compiled library is missing or the environment asks too much."""
    for title, entries in sections().items():
        print(title)
        for name, text in entries.items():
            print(f"  {name:27} {text}")
    try:
        backends.require_environment()
        backends.require(backends.requested_backend())
    except BackendUnavailableError as error:
        print(f"Error: {error}")
        return 1
    return 0 if backends.library_error() is None else 1


if __name__ == "__main__":
    sys.exit(main())
