"""``python -m mutations [NAME ...]`` in ``tests/``: plant faults, run the tests, keep the result.

Works on copies of the last commit, as many at a time as there are processors. Every fault costs a
build of the simulated launchers and the tests up to the first failure, half a minute or so; the
whole list is no part of the usual suite. In the end the tests that noticed a fault run once more
without any, and must pass.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from mutations.faults import FAULTS, ROOT, Fault
from saft_kernels import backends

RESULT = Path(__file__).with_name("result.json")
TOOLS = Path(sys.executable).parent


def run(command: Sequence[str], folder: Path, inside: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command on the copy of the repository in ``folder``, or inside a folder of that."""
    environment = {
        **os.environ,
        "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'python'}",
        "PTXSIM_CACHE": str(ROOT / "build" / "ptxsim"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=folder / inside, env=environment, capture_output=True, text=True, check=False
    )


@contextmanager
def copy_of_repository() -> Iterator[Path]:
    """The last commit in a folder of its own, ready to build the simulated launchers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(folder)], cwd=ROOT, check=True
        )
        try:
            shutil.copy(backends.LIBRARY, folder / "saft_kernels")
            configured = run(
                [
                    "cmake", "-G", "Ninja", "-S", ".", "-B", "build/cmake", "-DSAFT_CUDA=ON",
                    f"-DSAFT_TORCH_ROOT={Path(torch.__file__).parent}",
                ],
                folder,
            )  # fmt: skip
            if configured.returncode:
                sys.exit(f"the copy cannot be built:\n{configured.stdout}{configured.stderr}")
            yield folder
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True
            )


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """Make the fault in the copy, and undo it."""
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        sys.exit(f"{fault.name}: {fault.file} does not hold {fault.right!r} exactly once")
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        yield
    finally:
        path.write_text(text)


def pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    return run([*command, *arguments], folder)


def sanitized(check: str, tests: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy under sanitizers; those fail only by a report."""
    command = [sys.executable, "-m", "sanitized", check, "--jobs", "1", "--tests", tests]
    done = run(command, folder, "tests")
    reported = re.search(r"^SUMMARY: \w+Sanitizer|: runtime error: ", done.stderr, re.MULTILINE)
    return done if reported else subprocess.CompletedProcess(command, 0, done.stdout, done.stderr)


def noticed(fault: Fault, folder: Path) -> dict[str, Any]:
    """Plant a fault; which test notices it."""
    with planted(fault, folder):
        if fault.sanitizer:
            done = sanitized(fault.sanitizer, fault.tests, folder)
        else:
            done = pytest(folder, "-x", fault.tests, "-k", fault.backend)
    # 1: tests failed. Anything else (nothing collected, a crash of pytest) proves nothing.
    failed = re.search(r"^(FAILED|ERROR) (.+?)( - |$)", done.stdout, re.MULTILINE)
    caught = done.returncode == 1 and failed is not None
    return {
        "fault": fault.name,
        "file": fault.file,
        "caught": caught,
        "by": failed.group(2) if failed else done.stdout[-300:],
    }


def keep(outcome: Sequence[dict[str, Any]]) -> None:
    """Bring the result file up to date."""
    known = json.loads(RESULT.read_text()) if RESULT.exists() else []
    entries = {(entry["file"], entry["fault"]): entry for entry in (*known, *outcome)}
    listed = [entries.get((fault.file, fault.name)) for fault in FAULTS]
    RESULT.write_text(json.dumps([entry for entry in listed if entry], indent=1) + "\n")


def main(names: Sequence[str]) -> int:
    """Plant the faults whose names or files hold one of ``names`` (all, if none is given)."""
    chosen = [
        fault
        for fault in FAULTS
        if not names or any(name in fault.name or name in fault.file for name in names)
    ]
    free: SimpleQueue[Path] = SimpleQueue()
    with ExitStack() as copies, ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in range(os.cpu_count() or 1):
            free.put(copies.enter_context(copy_of_repository()))

        def try_out(fault: Fault) -> dict[str, Any]:
            folder = free.get()
            try:
                entry = noticed(fault, folder)
            finally:
                free.put(folder)
            print(f"{'caught' if entry['caught'] else 'NOT CAUGHT'}: {fault.name}", flush=True)
            return entry

        outcome = list(pool.map(try_out, chosen))
        tests = sorted({entry["by"] for entry in outcome if entry["caught"]})
        clean = pytest(free.get(), *tests)
    keep(outcome)
    if clean.returncode:
        sys.exit(f"tests fail without any fault:\n{clean.stdout[-3000:]}")
    return 0 if all(entry["caught"] for entry in outcome) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
