"""Bars by name, and what became of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import check, cli
from bench.bars import BARS, HEADLINES, held_to
from bench.check import Verdict, agreement, bars_of, cases_of, verdicts
from bench.models import SMOKE, Setting
from bench.outcome import Figure, Outcome
from bench.registry import CASES, Case, run_case
from bench.result_file import (
    FORMAT,
    VERSION,
    ResultError,
    outcome_record,
    read_result,
    write_result,
)

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

#: Cases whose bars need no training steps of a real size to be found.
QUICK = ("accumulate_topk", "sparse_adamw", "sampled_grad", "delta", "prompt_step")


def reached(name: str, factor: float = 1.0) -> Figure:
    """A figure at its bar, or beyond it by a factor."""
    limit = BARS[name].limit
    value = limit * factor if BARS[name].at_least else limit / factor
    return held_to(name, Figure(f"what {name} is about", value, "times faster"))


def result_of(figures: list[Figure]) -> dict[str, Any]:
    """The part of a result that a check looks at."""
    return {"cases": {"all": outcome_record(Outcome(figures=figures))}}


def whole(result: dict[str, Any]) -> dict[str, Any]:
    """The same with what every result has."""
    for case in result["cases"].values():
        case |= {"refused": None, "left_out": None, "load": {"others": 0.0}}
    where = ("processor", "threads", "instruction_set", "torch", "saft_kernels")
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": {"date": "2026-11-24", "commit": "0123", **dict.fromkeys(where, "some")},
        "setting": asdict(SMOKE),
        **result,
    }


def test_bars_are_those_of_the_issues() -> None:
    assert len(BARS) == 56
    assert {bar.origin for bar in BARS.values()} == {"foundation", "sampled", "reliability"}
    assert {bar.case for bar in BARS.values()} <= CASES.keys()
    step = BARS["step/fp32/uniform/full"]
    assert (step.limit, step.at_least, step.case) == (0.66, False, "clip_step")
    assert (BARS["adamw/compact/selected"].limit, BARS["prompts/packed"].limit) == (100, 12)


@pytest.mark.parametrize("name", QUICK)
def test_case_measures_its_bars_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "has_bars", property(lambda self: True))
    record = run_case(CASES[name], SMOKE)
    checked = [figure["check"] for figure in record["figures"] if figure["check"]]
    assert sorted(checked) == sorted(bar.name for bar in BARS.values() if bar.case == name)
    barred = [figure for figure in record["figures"] if figure["bar"] is not None]
    assert len(barred) == len(checked)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"threads": 7}, True),
        ({"model": "ViT-B-32"}, False),
        ({"density": 1e-2}, False),
        ({"dtype": "bf16"}, False),
        ({"images": 17}, False),
    ],
)
def test_bars_are_for_one_setting_only(change: dict[str, Any], expected: bool) -> None:
    assert replace(Setting(), **change).has_bars == expected


def test_figures_of_other_settings_have_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("a", "case", lambda setting: Outcome(figures=[reached("adamw/state")]))
    (kept,) = run_case(case, Setting())["figures"]
    (bare,) = run_case(case, SMOKE)["figures"]
    assert (kept["bar"], kept["check"], kept["verdict"]) == (20, "adamw/state", "PASS")
    assert (bare["bar"], bare["check"], bare["verdict"]) == (None, "", "")


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ([], 56),
        (["adamw"], 7),
        (["sparse_adamw"], 7),
        (["adamw/state", "adamw"], 7),
        (["foundation"], 17),
        (["delta/size"], 1),
    ],
)
def test_bars_are_chosen_by_name_family_case_and_origin(names: list[str], count: int) -> None:
    assert len(bars_of(names)) == count


def test_unknown_bar_is_one_sentence() -> None:
    with pytest.raises(ResultError, match="there is no bar 'adam'; name a bar"):
        bars_of(["adam"])


def test_cases_of_bars_run_once() -> None:
    assert cases_of(bars_of(["adamw", "delta"])) == ["sparse_adamw", "delta"]


def test_verdicts_name_what_is_missed_and_what_nobody_measured() -> None:
    near = replace(reached("adamw/dense/uniform"), low=29.0, high=31.0)
    figures = [reached("adamw/state"), reached("adamw/growth/nnz", 0.5), near]
    found = verdicts(result_of(figures), bars_of(["adamw"]))
    assert {v.bar.name: v.text for v in found} == {
        "adamw/dense/uniform": "UNCLEAR",
        "adamw/dense/selected": "NOT MEASURED",
        "adamw/compact/uniform": "NOT MEASURED",
        "adamw/compact/selected": "NOT MEASURED",
        "adamw/state": "PASS",
        "adamw/growth/nnz": "MISS",
        "adamw/growth/D": "NOT MEASURED",
    }
    text = check.markdown(found)
    assert "1 of 7 bars reached; missed: adamw/growth/nnz; not measured: adamw/dense/sel" in text
    assert text.endswith("too close to call: adamw/dense/uniform.\n")
    row = "| adamw/growth/nnz | what adamw/growth/nnz is about | 2.2 times faster | ≤ 1.1 | MISS |"
    assert row in text.splitlines()


def test_checks_agree_unless_one_reached_what_the_other_missed() -> None:
    def found(factor: float, interval: float = 0.0) -> list[Verdict]:
        figure = reached("selection/gradients", factor)
        around = (figure.value - interval, figure.value + interval)
        figure = replace(figure, low=around[0], high=around[1])
        return [Verdict(BARS["selection/gradients"], figure)]

    assert agreement(found(1.1), found(1.2), "a").startswith("No bar that a reached is missed")
    assert agreement(found(1.1), found(0.99, 5), "a").startswith("No bar")
    assert agreement(found(0.9), found(1.1), "a") == "a says otherwise of selection/gradients."


def test_strict_check_fails_if_a_bar_is_too_close_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for low, high, code in ((0.2, 0.3, 1), (0.2, 0.24, 0)):
        figure = replace(reached("delta/size"), low=low, high=high)
        case = Case("delta", "a case", lambda setting, f=figure: Outcome(figures=[f]))  # type: ignore[misc]
        monkeypatch.setitem(CASES, "delta", case)
        assert CliRunner().invoke(cli.app, ["check", "delta/size"]).exit_code == 0
        assert CliRunner().invoke(cli.app, ["check", "delta/size", "--strict"]).exit_code == code


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--output", "o.json"], "--output"), (["--threads", "1"], "--threads")],
)
def test_options_without_effect_are_refused(options: list[str], named: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_result(file, whole(result_of([reached("delta/size", 1.1)])))
    done = CliRunner().invoke(cli.app, ["check", "delta/size", "--result", str(file), *options])
    assert isinstance(done.exception, ResultError)
    assert f"with --result; leave out {named}" in str(done.exception)


@pytest.mark.parametrize("option", ["--result", "--against"])
def test_malformed_result_is_one_sentence(option: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    broken = whole(result_of([reached("delta/size")]))
    del broken["cases"]["all"]["figures"][0]["unit"]
    write_result(file, broken)
    done = CliRunner().invoke(cli.app, ["check", "delta/size", option, str(file)])
    assert isinstance(done.exception, ResultError)
    assert f"{file} is not what this release writes" in str(done.exception)


@pytest.mark.parametrize(("factor", "code"), [(1.1, 0), (0.9, 1)])
def test_command_fails_if_a_bar_is_missed(
    factor: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(figures=[reached("delta/size", factor)])
    monkeypatch.setitem(CASES, "delta", Case("delta", "a case", lambda setting: outcome))
    done = CliRunner().invoke(cli.app, ["check", "delta/size"])
    assert done.exit_code == code, done.output
    assert ("missed: delta/size" in done.output) == bool(code)


def test_command_fails_if_a_bar_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "delta", Case("delta", "a case", lambda setting: Outcome()))
    done = CliRunner().invoke(cli.app, ["check", "delta/size"])
    assert done.exit_code == 1
    assert "not measured: delta/size" in done.output


def test_command_measures_what_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def case(setting: Setting) -> Outcome:
        asked.append(setting)
        return Outcome(figures=[reached("delta/size", 1.1)])

    monkeypatch.setitem(CASES, "delta", Case("delta", "a case", case))
    done = CliRunner().invoke(cli.app, ["check", "delta/size", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert [(each.bars_only, each.threads, each.has_bars) for each in asked] == [(True, 1, True)]


def test_brief_shows_the_headlines_and_names_the_other_bars(tmp_path: Path) -> None:
    assert set(HEADLINES) <= BARS.keys()
    found = [reached("delta/size", 1.1), reached("adamw/state", 0.9), reached("sampled/choice")]
    file = tmp_path / "result.json"
    write_result(file, whole(result_of([*found, Figure("no bar", 1, "")])))
    lines = check.brief(read_result(file)).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| what ")] == [
        "| what",  # the header
        "| what adamw/state is about",
        "| what delta/size is about",
    ]
    assert lines[-1].startswith(f"2 of {len(BARS)} bars reached; missed: adamw/state; not measured")
    assert "delta/size" not in lines[-1]
    assert "sampled/choice" not in lines[-1]
    with pytest.raises(ResultError, match="leave out --brief"):
        check.brief(whole(result_of([Figure("no bar", 1, "")])))


def test_command_looks_at_files(tmp_path: Path) -> None:
    files = []
    for number, factor in enumerate((1.1, 0.9)):
        files.append(tmp_path / f"{number}.json")
        head = {"format": "saft-bench", "version": 2}
        write_result(files[-1], {**head, **result_of([reached("delta/size", factor)])})
    arguments = ["check", "delta/size", "--result", str(files[0]), "--against", str(files[1])]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert f"{files[1]} says otherwise of delta/size." in done.output
