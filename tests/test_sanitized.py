"""What ``make sanitize`` does with what it finds; the checks themselves run there."""

from __future__ import annotations

from pathlib import Path

import pytest

import sanitized
from saft_kernels import backends
from sanitized import CHECKS, TESTS, Check, __main__, compilers_library, planted

ADDRESS = CHECKS["address"]


@pytest.fixture
def fakes(monkeypatch):
    """Runs checks without building or running anything; notes what would have run."""

    def run_checks(arguments, failing=()):
        ran = []

        def run(check: Check, *command: str | Path) -> int:
            kind = "tests" if "pytest" in command else "faults"
            ran.append((check.name, kind, command))
            return int((check.name, kind) in failing)

        monkeypatch.setattr(__main__, "build", lambda check: ran.append((check.name, "build", ())))
        monkeypatch.setattr(__main__, "run", run)
        return __main__.main(arguments), ran

    return run_checks


def test_every_check_is_built_proved_and_used(fakes):
    code, ran = fakes(["--jobs", "2"])
    assert code == 0
    each = ("build", "faults", "tests")
    assert [what[:2] for what in ran] == [(name, kind) for name in CHECKS for kind in each]
    for name, kind, command in ran:
        if kind == "tests":
            assert set(command) > {str(TESTS / file) for file in CHECKS[name].files}
            assert "2" in command


@pytest.mark.parametrize("failing", [("address", "faults"), ("address", "tests")])
def test_the_first_failure_ends_it(fakes, failing):
    code, ran = fakes([], failing={failing})
    assert code == 1
    assert ran[-1][:2] == failing


def test_checks_and_tests_can_be_chosen(fakes):
    _, ran = fakes(["thread", "--tests", "tests/test_topk.py"])
    assert {what[0] for what in ran} == {"thread"}
    assert ran[-1][2][-3:] == ("tests/test_topk.py", "-k", CHECKS["thread"].keyword)


def test_unknown_checks_are_one_sentence(fakes, capsys):
    with pytest.raises(SystemExit):
        fakes(["memory"])
    assert "there is no check 'memory'; choose from address, thread" in capsys.readouterr().err


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_files_of_tests_exist(check):
    assert all((TESTS / file).is_file() for file in check.files)
    assert planted.FAULTS[check.name]


REPORT = "ERROR: AddressSanitizer: {} in csrc/cpu/gather_scatter_kernel.cpp"


def reports(monkeypatch, silent_on=None):
    """Let sanitizers report every fault, but on one instruction set."""

    def report_of(fault, isa):
        return "" if isa == silent_on else REPORT.format(fault.report)

    monkeypatch.setattr(planted, "report_of", report_of)


@pytest.mark.parametrize("check", CHECKS)
def test_faults_must_be_reported_on_every_instruction_set(monkeypatch, capsys, check):
    reports(monkeypatch)
    assert planted.main(check) == 0
    for isa in backends.cpu_isas():
        reports(monkeypatch, silent_on=isa)
        assert planted.main(check) == 1
        assert f"did not report {planted.FAULTS[check][0].name} on {isa}" in capsys.readouterr().out


def test_without_sanitizers_nothing_is_reported(monkeypatch, capfd):
    """In a child as ever, and without the operation that only a build with sanitizers has."""
    fault = planted.FAULTS["thread"][0]
    report = planted.report_of(fault, "baseline")
    assert fault.report not in report
    assert "saft_sanitized" in report


def test_a_failed_build_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitized, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"sanitize-address cannot be built:[^$]*CMakeLists.txt"):
        sanitized.build(ADDRESS)


def test_a_process_has_the_runtime_and_the_library(monkeypatch):
    calls = []

    class Done:
        returncode = 3

    monkeypatch.setattr(sanitized, "compilers_library", lambda name: Path("/gcc", name))
    monkeypatch.setattr(
        sanitized.subprocess, "run", lambda *call, **options: calls.append((call, options)) or Done
    )
    assert sanitized.run(ADDRESS, "-c", "pass") == 3
    environment = calls[-1][1]["env"]
    assert environment["LD_PRELOAD"] == "/gcc/libasan.so /gcc/libstdc++.so.6"
    assert environment["SAFT_LIBRARY"] == str(ADDRESS.library)
    assert "detect_leaks=0" in environment["ASAN_OPTIONS"]


def test_libraries_are_the_compilers():
    assert compilers_library("libstdc++.so.6").is_file()
    with pytest.raises(SystemExit, match=r"has no libmsan.so; install g\+\+ with its sanitizers"):
        compilers_library("libmsan.so")
