"""Inputs that atheris makes, guided by which lines of the loaders they reach.

``python -m fuzz.guided TARGET SECONDS FOLDER`` is a process of its own: libFuzzer never returns.
Half of its mutations are libFuzzer's, of bytes, after most of which checksums are put right; half
are ours. An input with which something does not hold is written to the folder, and it goes on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: What is instrumented; libraries in C and Rust are not.
_WATCHED = ["saft_kernels", "saft_clip"]

_LARGEST = 1 << 16


def missing() -> str | None:
    """Why there are no guided runs here; None if there are."""
    if importlib.util.find_spec("atheris") is None:
        return "guided runs need atheris, which is not installed here: pip install atheris"
    return None


def run(target: Any, seed: int, seconds: float, folder: Path) -> tuple[Any, list[bytes]]:
    """Let atheris make inputs for some time; what crashes or hangs its process is told as well.

    Args:
        target: what reads them.
        seed: of libFuzzer.
        seconds: how long.
        folder: for its files; it is emptied first.

    Returns:
        What came of the inputs, and those that failed, in the order of the failures.
    """
    from fuzz.children import Failure, Outcome
    from fuzz.limits import Spent

    shutil.rmtree(folder, ignore_errors=True)
    total, failed = Outcome(target.name), list[bytes]()
    end = time.monotonic() + seconds
    for part in range(1000):
        left = end - time.monotonic()
        if left < 1:
            break
        own = folder / str(part)
        own.mkdir(parents=True)
        code = _process(target.name, seed + part, left, own)
        if (own / "outcome.json").exists():
            total.merge(Outcome.from_json((own / "outcome.json").read_text()))
        failed += [path.read_bytes() for path in sorted(own.glob("failed-*"), key=_number)]
        if code:
            what = "it hangs" if code == -signal.SIGALRM else f"it died with code {code}"
            total.failures.append(Failure(target.name, -1, f"failed: {what}"))
            total.add(-1, "failed", Spent(), 0)
            failed.append((own / f"input{target.suffix}").read_bytes())
    return total, failed


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _process(name: str, seed: int, seconds: float, folder: Path) -> int:
    command = [sys.executable, "-m", "fuzz.guided", name, str(seed), str(int(seconds)), str(folder)]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, cwd=Path(__file__).parent.parent, check=False
        )
    return done.returncode


def main(name: str, seed: int, seconds: int, folder: Path) -> None:
    """Be that process."""
    import atheris

    with atheris.instrument_imports(include=_WATCHED):
        from fuzz.targets import all_targets

        target = all_targets()[name]
    from fuzz.children import Failure, Outcome, prepare_child, run_input, warm_up
    from fuzz.choices import Seeded

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(content)
    warm_up(target, folder)
    prepare_child(folder)
    outcome = Outcome(name)

    def one_input(content: bytes) -> None:
        number = outcome.inputs
        label, spent = run_input(target, content, folder)
        if label.startswith("failed: "):
            outcome.failures.append(Failure(name, -1, label))
            (folder / f"failed-{len(outcome.failures)}").write_bytes(content)
            label = "failed"
        outcome.add(number, label, spent, len(content))
        if number % 100 == 0:
            (folder / "outcome.json").write_text(outcome.to_json())

    def mutate(content: bytes, most: int, number: int) -> bytes:
        choices = Seeded(str(number))
        if choices.one_in(2):
            try:
                return target.mutate(choices, content)[:most]
            except Exception:  # what libFuzzer has made of it is no file any more
                pass
        changed = atheris.Mutate(content, most)
        return changed if choices.one_in(4) else target.repair(changed)[:most]

    options = [
        *(f"-seed={seed}", f"-max_total_time={seconds}", f"-max_len={_LARGEST}"),
        *("-timeout=0", "-rss_limit_mb=0", "-mutate_depth=2", f"-artifact_prefix={folder}/"),
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
