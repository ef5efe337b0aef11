"""A kernel that no test has run is noticed, and named, by a run of all tests and by no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import kernel_coverage
import simulated
from saft_kernels import backends
from saft_kernels.triton import gather_scatter, search
from simulated import triton

pytest_plugins = "pytester"

_CONFTEST = """
import kernel_coverage

def pytest_configure(config):
    compiled = lambda: {"one", "two", "_Z5threeIfEvPT_"}
    config.pluginmanager.register(kernel_coverage.EveryKernelRuns(compiled))
"""

_TEST = """
import os
from kernel_coverage import launched

def test_{kernel}():
    launched.add("{kernel}")
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs tests that launch kernels, one a file; there are the kernels one, two and three."""
    monkeypatch.setenv("PYTHONPATH", str(Path(kernel_coverage.__file__).parent))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(kernels: list[str], *options: str, code: str = "") -> pytest.RunResult:
        (pytester.path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
        tests = pytester.path / "tests"
        tests.mkdir(exist_ok=True)
        (tests / "conftest.py").write_text(_CONFTEST)
        for i, kernel in enumerate(kernels):
            (tests / f"test_{i}.py").write_text(_TEST.format(kernel=kernel) + code)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)

    return run


ALL = ["one", "two", "_Z5threeIfEvPT_"]
WORKERS = pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["one process", "workers"])


@WORKERS
def test_all_kernels_have_run(run: Run, workers: list[str]) -> None:
    done = run(ALL, *workers)
    assert done.ret == pytest.ExitCode.OK
    done.assert_outcomes(passed=3)
    assert "kernels that no test has run" not in done.stdout.str()


def test_kernels_that_have_not_run_are_named(run: Run) -> None:
    done = run(["two"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(
        [
            "*= kernels that no test has run =*",
            "*have not run 2 of the 3 kernels*",
            "  *three*",
            "  one",
            'Write a test that launches them *(*"device")*',
        ]
    )
    assert "  two" not in done.stdout.lines


def test_names_are_as_in_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["sm_80: _Z5threeIfEvPT_", "triton: file.kernel"]
    readable = ["sm_80: void three<float>(float*)", "triton: file.kernel"]
    assert kernel_coverage._readable(names) in (readable, names)
    monkeypatch.setenv("PATH", "")
    assert kernel_coverage._readable(names) == names


def test_a_part_of_the_tests_is_not_checked(run: Run) -> None:
    done = run(["one"], "-k", "one or two")
    assert done.ret == pytest.ExitCode.OK
    assert "kernels that no test has run" not in done.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "all_tests"),
    [
        ("", True),
        ("tests", True),
        ("-x -q -ra", True),
        ("tests/test_one.py", False),
        ("tests/test_one.py::test_one", False),
        ("-k one", False),
        ("-m one", False),
        ("--deselect tests/test_one.py", False),
        ("--ignore tests/test_one.py", False),
        ("--ignore-glob *one*", False),
        ("--lf", False),
        ("--sw", False),
        ("--collect-only", False),
        ("--fixtures", False),
        ("--setup-plan", False),
    ],
)
def test_what_leaves_tests_out(pytester: pytest.Pytester, arguments: str, all_tests: bool) -> None:
    pytester.makeini("[pytest]\ntestpaths = tests\n")
    tests = pytester.mkdir("tests")
    (tests / "test_one.py").write_text("def test_one(): ...")
    config = pytester.parseconfig(*arguments.split())
    assert kernel_coverage._selects_all_tests(config) == all_tests


@WORKERS
def test_a_stopped_run_is_not_checked(run: Run, workers: list[str]) -> None:
    """One in which tests have failed is: others may have run the kernels all the same."""
    failing = "\ndef test_fails():\n    assert False\n"
    for options, checked in (["-x"], False), ([], True):
        done = run(["one"], *options, *workers, code=failing)
        assert done.ret in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
        assert ("kernels that no test has run" in done.stdout.str()) == checked


# Which kernels there are --------------------------------------------------------------------------


def test_kernels_of_triton_are_those_that_the_host_launches(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(
        "import triton\n"
        "@triton.jit\ndef helper(x): ...\n"
        "@triton.jit(do_not_specialize=['n'])\ndef reduced(a, b): ...\n"
        "@triton.jit\ndef kernel(n):\n    helper(tl.reduce(n, 0, reduced))\n"
        "def host():\n    launch(kernel, 1)\n    reduced\n"
    )
    assert triton.kernels(tmp_path) == {"triton: file.kernel"}


def test_every_kernel_is_known_by_the_name_it_is_launched_under() -> None:
    kernels = simulated.kernels()
    assert triton._label(gather_scatter._gather_kernel.fn) in kernels
    assert triton._label(search.lower_bound.fn) not in kernels
    kinds = {kind for kind, _ in (name.split("-") for name in simulated.names())}
    assert {"cuda" if name.startswith("sm_") else "triton" for name in kernels} == kinds


def test_without_cuda_kernels_those_of_triton_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "build_info", lambda: {"cuda": "off: asked for"})
    assert simulated.kernels() == triton.kernels()


@pytest.mark.parametrize("generation", simulated.GENERATIONS)
def test_every_kernel_of_the_source_is_in_the_library(generation: str) -> None:
    if f"cuda-{generation}" not in simulated.names():
        pytest.skip("no CUDA kernels are built")
    source = Path(__file__).parent.parent / "csrc" / "cuda"
    text = "".join(path.read_text() for path in source.glob("*.cu"))
    names = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)
    assert len(names) == text.count("__global__") > 5
    compiled = [k for k in simulated.kernels() if k.startswith(f"sm_{generation[2:]}: ")]
    for name in names:
        assert any(f"{len(name)}{name}" in kernel for kernel in compiled), name
