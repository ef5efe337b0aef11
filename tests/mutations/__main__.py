"""``python -m mutations [NAME ...]`` in ``tests/``: plant faults, run the tests, keep the result.

Works on a copy of the last commit. Every fault costs a build of the simulated launchers and the
tests up to the first failure, half a minute or so; the whole list is no part of the usual suite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mutations.faults import FAULTS, ROOT, Fault

RESULT = Path(__file__).with_name("result.json")


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command on the copy of the repository in ``folder``."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'python'}",
        "PTXSIM_CACHE": str(ROOT / "build" / "ptxsim"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@contextmanager
def copy_of_repository() -> Iterator[Path]:
    """The last commit in a folder of its own, built."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(folder)], cwd=ROOT, check=True
        )
        try:
            built = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
            if built.returncode:
                sys.exit(f"the copy does not build:\n{built.stdout}{built.stderr}")
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
        sys.exit(
            f"{fault.name}: {fault.file} holds {fault.right!r} {text.count(fault.right)} times"
        )
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        yield
    finally:
        path.write_text(text)


def tests_of(fault: Fault, folder: Path) -> subprocess.CompletedProcess[str]:
    """The fault's tests, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    return run([*command, fault.tests, "-k", fault.backend], folder)


def noticed(fault: Fault, folder: Path) -> dict[str, Any]:
    """Plant a fault; which test notices it."""
    with planted(fault, folder):
        done = tests_of(fault, folder)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # 1: tests failed. Anything else (nothing collected, a crash of pytest) proves nothing.
    caught = done.returncode == 1 and bool(failed)
    return {
        "fault": fault.name,
        "file": fault.file,
        "caught": caught,
        "by": failed[0].split(" ", 1)[1][:200] if failed else done.stdout[-300:],
    }


def main(names: Sequence[str]) -> int:
    """Plant the faults whose names hold one of ``names`` (all, if none is given)."""
    chosen = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    outcome = []
    with copy_of_repository() as folder:
        for tests, backend in sorted({(f.tests, f.backend) for f in chosen}):
            clean = run([sys.executable, "-m", "pytest", "-q", tests, "-k", backend], folder)
            if clean.returncode:
                sys.exit(f"{tests} fails without any fault:\n{clean.stdout[-2000:]}")
        for number, fault in enumerate(chosen, start=1):
            outcome.append(noticed(fault, folder))
            verdict = "caught" if outcome[-1]["caught"] else "NOT CAUGHT"
            print(f"{number}/{len(chosen)} {verdict}: {fault.name}", flush=True)
    if not names:
        RESULT.write_text(json.dumps(outcome, indent=1) + "\n")
    return 0 if all(entry["caught"] for entry in outcome) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
