"""The demo: a fair plan, numbers that add up, and a page that shows them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from io import StringIO
from math import isnan, sqrt

import pytest
import torch
from rich.console import Console

from saft_clip.data import load_dataset
from saft_clip.demo import (
    ZERO_SHOT,
    Outcome,
    Plan,
    Trial,
    best_trial,
    final_trials,
    load_domains,
    number_of_trials,
    run_demo,
    run_trial,
    tuning_trials,
)
from saft_clip.demo_page import accuracy, contender_outcomes, summary_table, written
from saft_clip.domains import DOMAINS
from saft_clip.errors import CheckpointError, ConfigError, TrialError
from saft_clip.models import load_model
from saft_clip.report import write_report
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import FileWriteError
from test_report import Page

SMALL_PLAN = Plan(
    shots=2,
    epochs=1,
    seeds=(1, 2),
    full_lrs=(1e-4, 1e-3),
    saft_lrs=((1e-2, (1e-3,)), (1e-1, (1e-3,))),
    validation=20,
    test=20,
)


def outcome(trial, **accuracies):
    return Outcome(trial, accuracies, trained=10, seconds=1.0)


# The plan


def test_both_methods_get_the_same_number_of_trials():
    methods = [trial.method for trial in tuning_trials(Plan())]
    assert methods.count("saft") == methods.count("full") == 12
    assert len(set(tuning_trials(Plan()))) == 24


def test_trials_are_compared_on_validation_images_of_the_training_domain():
    assert not any(trial.final for trial in tuning_trials(Plan()))
    plan = Plan()
    assert plan.trained not in plan.shifted
    assert set(plan.domains) == set(DOMAINS)
    assert len(plan.shifted) >= 4


def test_the_best_trials_are_run_with_every_seed():
    plan = SMALL_PLAN
    scores = [0.5, 0.7, 0.9, 0.9]
    trials = tuning_trials(plan)
    tuning = [outcome(t, val=score) for t, score in zip(trials, scores, strict=True)]
    assert best_trial(tuning, "saft") == Trial("saft", 1e-3, 1e-1, 1)
    assert best_trial(tuning, "full").lr == 1e-4  # the first of equals
    finals = final_trials(plan, tuning)
    assert all(trial.final for trial in finals)
    assert [(t.method, t.density, t.lr, t.seed) for t in finals] == [
        (ZERO_SHOT, 0.0, 0.0, 0),
        *[("full", 1.0, 1e-4, seed) for seed in (1, 2)],
        *[("saft", 1e-2, 1e-3, seed) for seed in (1, 2)],
        *[("saft", 1e-1, 1e-3, seed) for seed in (1, 2)],
    ]
    assert number_of_trials(plan) == len(tuning) + len(finals)


def test_evenly_takes_the_same_number_of_every_class():
    dataset = load_dataset("builtin:mnist", "val", torch.from_numpy)
    part = dataset.evenly(50)
    assert torch.bincount(part.labels).tolist() == [5] * 10
    assert len(dataset.evenly(10**6)) == len(dataset)


# Numbers


def test_statistics_by_hand():
    outcomes = [{"accuracy": {"a": a, "b": b}} for a, b in ((0.5, 0.7), (0.7, 0.9), (0.6, 0.5))]
    mean, error = accuracy(outcomes, ["a", "b"])
    values = [0.6, 0.8, 0.55]
    assert mean == pytest.approx(sum(values) / 3)
    spread = sum((value - mean) ** 2 for value in values) / 2
    assert error == pytest.approx(sqrt(spread / 3))
    assert written((0.912, 0.0041)) == "91.2 ± 0.4"


def test_one_value_has_no_error():
    mean, error = accuracy([{"accuracy": {"a": 0.5}}], ["a"])
    assert mean == 0.5
    assert isnan(error)
    assert written((mean, error)) == "50.0"


@pytest.mark.usefixtures("one_thread")
def test_a_trial_depends_on_nothing_but_itself(tmp_path):
    clip = load_model("saft-tiny")
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    data = load_domains(SMALL_PLAN, clip)
    trial = Trial("saft", 1e-3, 1e-2, seed=2)
    first = run_trial(trial, SMALL_PLAN, clip, data, tmp_path / "a")
    run_trial(Trial("full", 1e-3, 1.0, seed=1), SMALL_PLAN, clip, data, tmp_path / "a")
    again = run_trial(trial, SMALL_PLAN, clip, data, tmp_path / "b")
    assert (first.accuracy, first.trained) == (again.accuracy, again.trained)
    for name, value in clip.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# All of it


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, SMALL_PLAN)


def test_files(demo):
    folder, summary = demo
    assert {path.name for path in folder.iterdir()} == {
        *("demo.json", "report.html", "delta.safetensors", "model.safetensors", "samples"),
    }
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(summary))
    for name, size in summary["artefacts"].items():
        assert (folder / name).stat().st_size == size
    assert summary["plan"] == asdict(SMALL_PLAN)


def test_delta_is_the_chosen_one(demo):
    folder, summary = demo
    delta = SparseDelta.load(folder / "delta.safetensors")
    chosen = contender_outcomes(summary)
    assert delta.nnz == list(chosen.values())[-1][0]["trained"]
    assert delta.metadata["seed"] == "1"
    delta.apply_(load_model("saft-tiny").model)


def test_table_shows_every_domain(demo):
    _, summary = demo
    console = Console(width=100, record=True, file=StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    for name in DOMAINS:
        assert name in text
    zero_shot = summary["finals"][0]
    assert zero_shot["trial"]["method"] == ZERO_SHOT
    assert f"{100 * zero_shot['accuracy']['letters']:.1f}" in text


def test_page(demo):
    folder, summary = demo
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.loaded)
    assert len(page.ids) == len(set(page.ids))
    for outcomes in contender_outcomes(summary).values():
        assert written(accuracy(outcomes, ["mnist"])) in page.text


def test_page_is_built_again_from_the_folder(demo):
    folder, _ = demo
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert write_report(folder).read_text() == before


BAD_SUMMARIES = {
    "no plan": lambda summary: summary.pop("plan"),
    "finals are texts": lambda summary: summary.update(finals=["x"]),
    "no finals": lambda summary: summary.update(finals=[]),
    "a number without end": lambda summary: summary.update(seconds=float("inf")),
    "more than all": lambda summary: summary["finals"][0]["accuracy"].update(mnist=2.0),
    "a domain is unknown": lambda summary: summary["images"].pop("uci"),
    "no domain is shifted": lambda summary: summary["roles"].update(shifted=[]),
    "an outcome lacks a domain": lambda summary: summary["finals"][0]["accuracy"].pop("uci"),
    # Of which the page would show the picture.
    "a domain elsewhere": lambda summary: summary["domains"].update({"../secret": "x"}),
}


@pytest.mark.parametrize("case", BAD_SUMMARIES)
def test_page_of_a_summary_that_no_release_writes(demo, tmp_path, case):
    folder, summary = demo
    shutil.copytree(folder / "samples", tmp_path / "samples")
    (tmp_path / "secret.png").write_bytes(b"not for the page")
    changed = json.loads(json.dumps(summary))
    BAD_SUMMARIES[case](changed)
    (tmp_path / "demo.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'demo.json'} is not what") as caught:
        write_report(tmp_path)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "report.html").exists()


def test_page_of_a_broken_folder(demo, tmp_path):
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not what this release writes"):
        write_report(tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError, match="choose a path whose parents are folders"):
        run_demo(tmp_path / "file" / "demo", SMALL_PLAN)


@pytest.mark.parametrize("domain", ["uci", "letters", "nonsense"])
def test_domain_that_cannot_be_trained_on(tmp_path, domain):
    with pytest.raises(ConfigError, match="trains on mnist or inverted or noisy or blurred"):
        run_demo(tmp_path / "demo", replace(SMALL_PLAN, trained=domain))
    assert not (tmp_path / "demo").exists()


def test_a_fine_tuning_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("precious")
    with pytest.raises(ConfigError, match="holds a run of saft finetune"):
        run_demo(tmp_path, SMALL_PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_killed_worker_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("saft_clip.demo._work", kill_this_process)
    with pytest.raises(TrialError, match="a worker process of the demo was killed"):
        run_demo(tmp_path, SMALL_PLAN)
    assert not list(tmp_path.glob(".trials-*"))


def kill_this_process(trial):
    os.kill(os.getpid(), signal.SIGKILL)
