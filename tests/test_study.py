"""The page of the study says what its results say."""

from __future__ import annotations

import csv
import json
import re
import runpy
from itertools import product
from pathlib import Path

import pytest

from saft_clip.experiment.cells import tasks
from saft_clip.experiment.plan import Plan
from saft_clip.experiment.record import read_plan
from saft_clip.methods import find

STUDY = Path(__file__).parent.parent / "docs" / "study"
PAGE = (STUDY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def summary():
    return runpy.run_path(str(STUDY / "summary.py"))


def plain(text):
    """Without what depends on the random signs that SciPy draws."""
    return re.sub(r" \(p = [^)]*\)| [↑↓]", "", text)


def test_the_tables_are_those_of_the_results(summary):
    blocks = summary["blocks"]()
    assert set(re.findall(r"<!-- ([\w-]+):begin -->", PAGE)) == blocks.keys()
    for name, text in blocks.items():
        begin, end = summary["markers"](name)
        assert plain(f"{begin}\n{text}{end}") in plain(PAGE), "run python docs/study/summary.py"


def test_every_figure_is_there_and_shown(summary):
    for picture in summary["pictures"]():
        for theme in ("light", "dark"):
            name = f"figures/{picture.name}-{theme}.svg"
            assert (STUDY / name).stat().st_size > 1000
            assert name in PAGE


def test_every_plan_has_its_results():
    """Every cell that it asks for: none has failed, none is missing."""
    for file in STUDY.glob("*.yaml"):
        plan = Plan.load(file)
        assert read_plan(STUDY / file.stem) == plan, f"{file.name} is not what was run"
        models, methods = ([entry.name for entry in part] for part in (plan.models, plan.methods))
        data = [(task.train, spec) for task in tasks(plan) for spec in task.roles]
        asked = {
            (model, method, train, str(shots), str(seed), spec)
            for model, method, shots, seed in product(models, methods, plan.shots, plan.seeds)
            for train, spec in data
        }
        with (STUDY / file.stem / "results.csv").open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["role"] != "train"]
        heads = ("model", "method", "train", "shots", "seed", "data")
        found = [tuple(row[head] for head in heads) for row in rows if not row["alpha"]]
        assert len(found) == len(asked)
        assert set(found) == asked


def test_the_settings_for_all_shots_are_those_that_trials_chose(summary):
    chosen = {
        trial["method"]: json.loads(trial["settings"])
        for trial in summary["Study"].load("shift").trials
        if trial["chosen"] and trial["train"] == "builtin:noisy"
    }
    plan = Plan.load(STUDY / "shots.yaml")
    assert len(plan.methods) > 4
    for entry in plan.methods:
        if find(entry.settings["method"]).trains:
            ours = {key: value for key, value in entry.settings.items() if key != "method"}
            assert ours == chosen[entry.name]


@pytest.mark.parametrize("name", ["shots", "cross-dataset"])
def test_the_same_runs_come_out_the_same_in_both_plans(summary, name):
    """They have the settings that the trials of shift.yaml have chosen."""

    def found(name):
        return {
            (row["method"], row["seed"], row["data"], row["alpha"]): row["top1"]
            for row in summary["Study"].load(name).rows
            if (row["train"], row["shots"]) == ("builtin:noisy", "16")
        }

    ours, others = found(name), found("shift")
    both = ours.keys() & others.keys()
    assert len(both) >= 300
    assert {key: ours[key] for key in both} == {key: others[key] for key in both}
