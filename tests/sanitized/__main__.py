"""``python -m sanitized [address] [thread]`` in ``tests/``: build, planted faults, tests.

``--tests`` names other files of tests than the usual ones; ``--jobs`` is pytest-xdist's ``-n``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sanitized import CHECKS, TESTS, Check, build, run


def passes(check: Check, tests: Sequence[str], jobs: str) -> bool:
    """Build the library, and run planted faults and tests with it."""
    print(f"{check.sanitizers}: building {check.library}", flush=True)
    build(check)
    if run(check, TESTS / "sanitized" / "planted.py", check.name):
        return False
    chosen = [*(tests or [str(TESTS / file) for file in check.files]), "-k", check.keyword]
    # What a process writes when it ends is not Python's to capture.
    pytest = ["-m", "pytest", "-q", "-x", "-n", jobs, "--capture=sys", "-p", "no:cacheprovider"]
    return run(check, *pytest, *chosen) == 0


def main(arguments: Sequence[str]) -> int:
    """Run the checks that are named; all, if none is."""
    parser = argparse.ArgumentParser(prog="python -m sanitized")
    parser.add_argument("checks", nargs="*", metavar="check", help=", ".join(CHECKS))
    parser.add_argument("--jobs", default="auto")
    parser.add_argument("--tests", nargs="+", default=[])
    asked = parser.parse_args(arguments)
    for name in asked.checks or CHECKS:
        if name not in CHECKS:
            parser.error(f"there is no check {name!r}; choose from {', '.join(CHECKS)}")
        if not passes(CHECKS[name], asked.tests, asked.jobs):
            print(f"{CHECKS[name].sanitizers}: failed")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
