"""Files that are compiled once: written atomically, found again by their content."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import CompileError

_CHECKOUT = Path(__file__).resolve().parents[2]
_RUNTIME = Path(__file__).parent / "runtime"
_FLAGS = (
    "-std=c++20", "-march=native", "-w", "-fPIC", "-ffp-contract=off", "-frounding-math",
    "-fno-strict-aliasing", "-fwrapv", "-fno-gnu-unique", "-fvisibility=hidden",
)  # fmt: skip
_KERNEL_FLAGS = (*_FLAGS, "-O1")
_RUNTIME_FLAGS = (*_FLAGS, "-O2", "-pthread")


def cache_dir() -> Path:
    """Directory of compiled files: $PTXSIM_CACHE, or build/ptxsim in the checkout."""
    path = Path(os.environ.get("PTXSIM_CACHE") or _CHECKOUT / "build" / "ptxsim")
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: str) -> str:
    """A file name's worth of hash."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Keeps other processes from making the same file at the same time."""
    path = cache_dir() / f"{name.replace('/', '-')}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # whoever waits for it finds the file made


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` of the cache; `make(path)` writes it if it is not there.

    `make` gets a path in a directory of its own, and the file appears under its name when it is
    complete.  Several processes may ask for the same file at once: one makes it, the others wait.
    """
    target = cache_dir() / name
    if target.exists():
        return target
    with _locked(name):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
                path = Path(folder) / target.name
                make(path)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    return target


def replace_file(path: Path, text: str) -> None:
    """Writes a file of the cache at once."""
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        new = Path(folder) / path.name
        new.write_text(text)
        new.replace(path)


def run_compiler(command: Sequence[str], cwd: str | None = None) -> None:
    """Runs a compiler; an error carries its output."""
    result = _run(command, cwd)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{(result.stdout + result.stderr)[-4000:]}")


def _run(command: Sequence[str], cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    except FileNotFoundError:
        raise CompileError(f"{command[0]} is needed, and not installed") from None


# ---------------------------------------------------------------- C++
@functools.cache
def _toolchain() -> str:
    """Hash of all that a compiled kernel depends on besides its source."""
    sources = [path.read_text() for path in sorted(_RUNTIME.iterdir()) if path.is_file()]
    version = _run(["g++", "--version"])
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^flags.*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    flags = " ".join((*_KERNEL_FLAGS, *_RUNTIME_FLAGS))
    return digest(*sources, version.stdout, flags, cpu.group() if cpu else "")


def runtime_library() -> Path:
    """The compiled runtime, which all compiled kernels share."""
    name = f"runtime-{_toolchain()}.so"

    def make(path: Path) -> None:
        sources = [str(source) for source in sorted(_RUNTIME.glob("*.cpp"))]
        link = ["-shared", f"-Wl,-soname,{name}", "-o", str(path)]
        run_compiler(["g++", *_RUNTIME_FLAGS, *sources, *link])

    return cached(name, make)


def _precompiled_header() -> Path:
    """Directory with the precompiled kernel.h."""

    def make(path: Path) -> None:
        header = str(_RUNTIME / "kernel.h")
        run_compiler(["g++", *_KERNEL_FLAGS, "-x", "c++-header", header, "-o", str(path)])

    return cached(f"header-{_toolchain()}/kernel.h.gch", make).parent


def kernel_library(source: str) -> Path:
    """Compiled translated kernels; needs the runtime beside it."""
    name = digest(_toolchain(), source)

    def make(path: Path) -> None:
        runtime = str(runtime_library())
        include = ["-I", str(_precompiled_header()), "-I", str(_RUNTIME)]
        cpp = path.with_suffix(".cpp")
        cpp.write_text(source)
        link = ["-shared", str(cpp), runtime, "-Wl,-rpath,$ORIGIN", "-o", str(path)]
        run_compiler(["g++", *_KERNEL_FLAGS, *include, *link])
        cpp.replace(cache_dir() / cpp.name)  # for whoever debugs a kernel

    return cached(f"{name}.so", make)
