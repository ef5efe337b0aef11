"""Every compiled GPU kernel is run by some test: a run of all tests fails if one was not.

The simulated GPUs (``tests/simulated``) note each kernel that they have run in :data:`launched`;
pytest-xdist's workers, which are processes of their own, hand theirs over when they end. What ran
is compared with what was compiled once, at the end of the run.

A part of the tests runs a part of the kernels, so nothing is checked where tests were left out, by
their path, by an option, or because the run was stopped.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import pytest

#: Names of the kernels that ran in this process.
launched: set[str] = set()

#: Options of pytest, and of its plugins, that leave tests out.
_SELECTING = (
    "keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "benchmark_only",
    "benchmark_skip", "collectonly", "setuponly", "setupplan", "showfixtures",
    "show_fixtures_per_test",
)  # fmt: skip

_ADVICE = """\
All tests together have not run {count} of the {total} kernels that were compiled:

  {names}

Write a test that launches them (tests of operations do, with the fixture "device"), or remove
them. If tests have failed, see to these first: they may be the ones that run them."""


class EveryKernelRuns:
    """A plugin of pytest that fails a run of all tests in which a kernel never ran.

    Args:
        compiled: the names of all kernels; asked for at the end, in one process only.
    """

    def __init__(self, compiled: Callable[[], Iterable[str]]) -> None:
        self._compiled = compiled
        self._ran_elsewhere: set[str] = set()
        self._message: str | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker has ended; one that crashed has nothing to tell."""
        self._ran_elsewhere |= set(getattr(node, "workeroutput", {}).get("launched", ()))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launched"] = sorted(launched)
        elif _has_run_all_tests(session, exitstatus):
            compiled = set(self._compiled())
            if missing := compiled - launched - self._ran_elsewhere:
                names = "\n  ".join(_readable(sorted(missing)))
                self._message = _ADVICE.format(count=len(missing), total=len(compiled), names=names)
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._message is not None:
            terminalreporter.section("kernels that no test has run", red=True)
            terminalreporter.write_line(self._message, red=True)


def _has_run_all_tests(session: pytest.Session, exitstatus: int) -> bool:
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    stopped = session.shouldfail or session.shouldstop
    return ended and not stopped and _selects_all_tests(session.config)


def _selects_all_tests(config: pytest.Config) -> bool:
    selected = any(config.getoption(option, default=None) for option in _SELECTING)
    at_root = config.invocation_params.dir == config.rootpath
    return not selected and at_root and list(config.args) == config.getini("testpaths")


def _readable(names: list[str]) -> list[str]:
    """C++ names as they are in the source, where there is a tool for that."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return names if done.returncode else done.stdout.splitlines()
