"""The CPU's kernels under sanitizers: the library built with them, and processes that can load it.

``make sanitize`` is ``python -m sanitized`` in ``tests/``. A build has a folder of its own beneath
``build/``; ``SAFT_LIBRARY`` names its library to :mod:`saft_kernels`. The runtime of a sanitizer
must be in a process from its start (``LD_PRELOAD``): it takes the place of malloc and of what
starts threads, and so knows every tensor that torch allocates.

Before any test, faults are planted (:mod:`sanitized.planted`): a sanitizer that is silent for
another reason than that nothing is wrong must not pass.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
TOOLS = Path(sys.executable).parent

#: Tests of the operations that threads share. The codes of indices, besides, are one thread's work.
OPERATIONS = (
    "test_accumulate_topk.py",
    "test_gather_scatter.py",
    "test_sampled_grad.py",
    "test_sparse_adamw.py",
    "test_topk.py",
)


@dataclass(frozen=True)
class Check:
    """One build with sanitizers, and what is run under it.

    Attributes:
        name: of the build.
        sanitizers: CMake's ``SAFT_SANITIZE``.
        runtime: the compiler's library that must be loaded first.
        options: variables of the environment that the runtime reads.
        files: of tests.
        keyword: which tests of these files (pytest's ``-k``).
    """

    name: str
    sanitizers: str
    runtime: str
    options: Mapping[str, str]
    files: Sequence[str]
    keyword: str

    @property
    def folder(self) -> Path:
        """Where it is built."""
        return ROOT / "build" / f"sanitize-{self.name}"

    @property
    def library(self) -> Path:
        """What is built."""
        return self.folder / "libsaft_kernels.so"


#: Tests of what was compiled: not of simulated GPUs, the specification or torch's compiler.
_COMPILED = "not (cuda or triton or reference or opcheck or compiles)"

CHECKS = {
    check.name: check
    for check in (
        Check(
            "address",
            "address;undefined",
            "libasan.so",
            {
                # Leaks: of Python and torch there are 43,000 after an import, and one of a kernel
                # would have functions of theirs among its callers, as all of these have.
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
            (*OPERATIONS, "test_index_code.py"),
            _COMPILED,
        ),
        Check(
            "thread",
            "thread",
            "libtsan.so",
            {
                # Python and torch are not compiled for it: what they hand to the C library is left
                # out, since what orders it is not known. Tests start no threads but the kernels'.
                "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:die_after_fork=0",
            },
            OPERATIONS,
            f"threads and {_COMPILED}",
        ),
    )
}


def build(check: Check) -> None:
    """Build the library of a check, or bring it up to date."""
    configure = [
        TOOLS / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={TOOLS / 'ninja'}",
        "-S", ROOT, "-B", check.folder, f"-DSAFT_TORCH_ROOT={Path(torch.__file__).parent}",
        "-DSAFT_CUDA=OFF", f"-DSAFT_SANITIZE={check.sanitizers}",
    ]  # fmt: skip
    for command in (configure, [TOOLS / "cmake", "--build", check.folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{check.folder} cannot be built:\n{done.stdout}{done.stderr}")


def run(check: Check, *arguments: str | Path) -> int:
    """Run Python with the library of a check, in the folder of this repository; the exit code."""
    preloaded = [compilers_library(check.runtime), compilers_library("libstdc++.so.6")]
    environment = {
        **os.environ,
        **check.options,
        "OMP_NUM_THREADS": "1",  # tests that need more ask for them
        "SAFT_LIBRARY": str(check.library),
        # The C++ library, too: without it the runtime could not pass on what is thrown.
        "LD_PRELOAD": " ".join(map(str, preloaded)),
    }
    command = [*_with_fixed_addresses(), sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def compilers_library(name: str) -> Path:
    """A shared library of the C++ compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not found.is_absolute():  # then it is the name again
        sys.exit(f"{shlex.join(compiler)} has no {name}; install g++ with its sanitizers")
    return found


def _with_fixed_addresses() -> list[str]:
    """Start a program so, where that is allowed: the runtimes have fixed places of their own.

    On systems that scatter addresses over more than 28 bits, those may be taken.
    """
    command = ["setarch", "--addr-no-randomize"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return [] if allowed.returncode else command
