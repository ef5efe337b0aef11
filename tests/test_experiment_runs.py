"""Experiments that run: what fails, what is killed, what goes on, and what comes out."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from clip_helpers import write_folder
from html_page import Page
from saft_clip.cli import main
from saft_clip.errors import CheckpointError, ConfigError, LockedError, MissingExtraError
from saft_clip.experiment import runner
from saft_clip.experiment.cells import final_cells, trial_cells
from saft_clip.experiment.inputs import check_inputs
from saft_clip.experiment.page import write_answers
from saft_clip.experiment.plan import Plan
from saft_clip.experiment.record import failure_file, read_record
from saft_clip.experiment.retrieval import read_retrieval
from saft_clip.experiment.runner import gpus, run_experiment
from saft_clip.run_lock import RunLock
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import SaftError

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {
    "protocol": "shift",
    "models": ["saft-tiny"],
    "methods": ["zero-shot", {"method": "saft", "density": 0.01, "lr": 1e-3}],
    "train": ["builtin:mnist"],
    "evaluate": ["builtin:uci"],
    "shots": [1],
    "seeds": [1],
    "settings": {"precision": "fp32", "gradients": "streamed", "epochs": 1, "eval_images": 20},
}


def quick(**values):
    return Plan.from_dict(QUICK | values)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment with trials, one method that cannot run, and best images."""
    folder = tmp_path_factory.mktemp("experiment")
    plan = quick(
        methods=[
            *QUICK["methods"],
            {"method": "wise-ft", "lr": 1e-4},
            {"name": "full", "method": "full"},
            {"name": "too long", "method": "coop", "context": 16},
        ],
        tuning={"shots": 1, "try": {
            "saft": {"lr": [1e-4, 1e-3]}, "wise-ft": {"lr": [1e-5, 1e-4]},
            "full": {"lr": [1e-5, 1e-4]}, "too long": {"lr": [1e-3, 1e-2]},
        }},
        alphas=[0, 1],
        retrieval=["3"],
    )  # fmt: skip
    run_experiment(plan, folder, processes=2)
    return folder


def test_what_an_experiment_finds(finished):
    record = write_answers(finished)
    assert {run.cell.contest[2] for run in record.runs} == {"zero-shot", "saft", "wise-ft", "full"}
    assert {row.role for row in record.rows} == {"in", "shifted", "train"}
    assert all(row.n == (10 if row.role == "train" else 20) for row in record.rows)
    # What can't run is said, and keeps nothing else from running.
    assert len({failure["cell"] for failure in record.failures}) == 2
    assert all("/too-long-" in failure["cell"] for failure in record.failures)
    assert "--context 16 leaves no room" in record.failures[0]["error"]
    contest = ("saft-tiny", "builtin:mnist", "too long")
    assert [score for _, score in record.trials[contest]] == [None, None]
    assert contest not in record.chosen


def test_trials_choose_by_validation_images(finished):
    record = read_record(finished)
    contest = ("saft-tiny", "builtin:mnist", "saft")
    scores = {trial["lr"]: score for trial, score in record.trials[contest]}
    best = max(scores.values())
    assert record.chosen[contest]["lr"] == min(lr for lr, score in scores.items() if score == best)
    for cell in trial_cells(record.plan, finished):
        if (finished / cell.name / "results.json").exists():
            results = json.loads((finished / cell.name / "results.json").read_text())
            assert {x["spec"] for x in results["evaluations"]} == {"builtin:mnist"}


def test_the_ends_of_the_way_are_the_models_themselves(finished):
    rows = read_record(finished).rows

    def accuracy(method, alpha):
        mine = (r for r in rows if (r.method, r.alpha) == (method, alpha) and r.role != "train")
        return {row.data: row.top1 for row in mine}

    tested = {"builtin:mnist", "builtin:uci"}
    assert accuracy("saft", 0.0) == accuracy("zero-shot", None)
    assert accuracy("saft", 1.0) == accuracy("saft", None)
    assert set(accuracy("wise-ft", 0.0)) == tested
    assert accuracy("full", 0.0) == accuracy("zero-shot", None)
    assert accuracy("full", 1.0) == accuracy("full", None)


def test_weights_of_whole_models_are_not_kept_and_deltas_are(finished):
    assert list(finished.rglob("model.safetensors")) == []
    (delta,) = finished.glob("cells/*/*/saft/*/*/delta.safetensors")
    assert SparseDelta.load(delta).nnz > 0


def test_best_images_before_and_after(finished):
    cells = {c.contest[2]: c for c in final_cells(read_record(finished).plan, finished, {})}
    found = read_retrieval(finished / cells["zero-shot"].name / "retrieval.json")
    assert [(grid["dataset"], grid["class"]) for grid in found] == [("mnist", "3"), ("uci", "3")]
    assert all(len(grid["before"]) == len(grid["after"]) == 5 for grid in found)
    assert all(grid["before"] == grid["after"] for grid in found)  # nothing was trained
    for name in ("saft", "full", "wise-ft"):
        (file,) = finished.glob(f"cells/*/*/{name}/*/*/retrieval.json")
        assert [grid["before"] for grid in read_retrieval(file)] == [x["before"] for x in found]


def test_the_page_is_whole(finished, tmp_path):
    write_answers(finished, tmp_path / "elsewhere.html")
    found = Page((tmp_path / "elsewhere.html").read_text())
    assert found.open == []
    assert all(link.startswith(("data:", "#")) for link in found.loaded)
    for text in ("Best images", "Runs that failed", "too long", "--context 16", "Generalization"):
        assert text in found.text
    for name in ("tables.md", "tables.tex", "tables.csv", "results.csv"):
        assert (finished / name).stat().st_size > 100


def test_every_trial_is_on_record(finished):
    record = write_answers(finished)
    with (finished / "trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(map(len, record.trials.values())) == 8
    for line in lines:
        contest = (line["model"], line["train"], line["method"])
        tried = json.loads(line["settings"])
        assert (tried, float(line["top1"]) if line["top1"] else None) in record.trials[contest]
        assert (line["chosen"] == "yes") == (record.chosen.get(contest) == tried)


def test_what_is_there_is_not_run_again_and_a_plan_may_grow(finished, capsys):
    before = stamps(finished)
    plan = read_record(finished).plan
    run_experiment(plan, finished)
    assert stamps(finished) == before
    assert "4 of 4 cells are there already" in capsys.readouterr().err
    run_experiment(plan.changed(seeds=(1, 2)), finished, keep=True)
    new = stamps(finished)
    assert {path: stamp for path, stamp in new.items() if path in before} == before
    assert len(new) == len(before) + 3
    assert len(list(finished.rglob("model.safetensors"))) == 1  # full's, with --keep-models


def test_a_cell_with_other_settings_is_not_replaced(tmp_path, capsys):
    run_experiment(quick(), tmp_path)
    plan = quick(methods=["zero-shot", {"method": "saft", "density": 0.02, "lr": 1e-3}])
    before = stamps(tmp_path)
    run_experiment(plan, tmp_path)
    assert stamps(tmp_path) == before
    record = read_record(tmp_path)
    assert [run.cell.contest[2] for run in record.runs] == ["zero-shot"]  # nor is it used
    assert record.missing == 1
    (failure,) = record.failures
    assert "was started with other settings: --density is 0.02, not 0.01" in failure["error"]
    assert f"remove {tmp_path}/cells/" in failure["error"]
    assert failure["traceback"] is None
    assert "1 of 2 runs failed" in capsys.readouterr().err
    run_experiment(quick(), tmp_path)
    assert read_record(tmp_path).failures == []


COMMAND = [sys.executable, "-m", "saft_clip", "experiment", "shift"]


def start(tmp_path, plan, *more):
    plan.save(tmp_path / "in.yaml")
    output = tmp_path / "out"
    command = [*COMMAND, "--config", str(tmp_path / "in.yaml"), "--output", str(output), *more]
    with (tmp_path / "said.txt").open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said), output


def at_work(output, name):
    """Wait until a cell is at work; the number of its process."""
    for _ in range(6000):  # a busy machine takes minutes to start
        for lock in output.glob(f"cells/*/*/{name}/*/*/.saft-lock"):
            found = re.match(r"process (\d+)", lock.read_text())
            if found and (lock.parent / "config.yaml").exists():
                return int(found.group(1))
        time.sleep(0.05)
    raise AssertionError("nothing has begun")


SLOW = {"method": "saft", "name": "slow", "density": 0.01, "lr": 1e-3, "epochs": 300}


def test_a_process_that_is_killed_takes_its_cell_only(tmp_path):
    plan = quick(methods=[SLOW, *QUICK["methods"]])
    process, output = start(tmp_path, plan, "--processes", "2")
    os.kill(at_work(output, "slow"), signal.SIGKILL)
    assert process.wait(300) == 1
    record = read_record(output)
    (failure,) = record.failures
    assert "/slow/" in failure["cell"]
    assert "its process was killed (SIGKILL), as happens when memory" in failure["error"]
    assert {run.cell.contest[2] for run in record.runs} == {"zero-shot", "saft"}
    assert "1 of 3 runs failed" in (tmp_path / "said.txt").read_text()


LONGER = quick(methods=[{**SLOW, "epochs": 10, "save_frequency": 2}, "zero-shot"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The delta of an experiment that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_experiment(LONGER, folder)
    return delta_of(folder)


def delta_of(folder):
    (file,) = folder.glob("cells/*/*/slow/*/*/delta.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_experiment_goes_on(tmp_path, number, undisturbed):
    process, output = start(tmp_path, LONGER)
    worker = at_work(output, "slow")
    while not list(output.glob("cells/*/*/slow/*/*/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert "the same command goes on" in (tmp_path / "said.txt").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    run_experiment(LONGER, output)
    (log,) = output.glob("logs/cells/*/*/slow/*/*.txt")
    assert "continuing from step" in log.read_text()
    assert read_record(output).failures == []
    assert delta_of(output) == undisturbed


def test_a_broken_cell_is_said_and_the_others_are_shown(tmp_path, capsys):
    plan = quick(methods=["zero-shot", *QUICK["methods"][1:], {**SLOW, "epochs": 1}])
    run_experiment(plan, tmp_path)
    (results,) = tmp_path.glob("cells/*/*/slow/*/*/results.json")
    results.write_text("{")
    (config,) = tmp_path.glob("cells/*/*/saft/*/*/config.yaml")
    config.unlink()
    record = write_answers(tmp_path)
    assert {run.cell.contest[2] for run in record.runs} == {"zero-shot"}
    assert record.missing == 2
    assert "results.json is broken" in str(record.failures)
    assert run_experiment(record.plan, tmp_path) == 2
    assert "remove" in capsys.readouterr().err


def test_an_error_of_any_length_is_kept_and_shown(tmp_path):
    quick().save(tmp_path / "plan.yaml")
    cell = next(iter(final_cells(quick(), tmp_path, {})))
    runner._record_failure(failure_file(tmp_path, cell.name), cell, ValueError("x" * 100_000))
    (failure,) = read_record(tmp_path).failures
    assert failure["error"].startswith("ValueError: xxx")
    assert "xxx" in failure["traceback"]


def test_processes_take_turns_with_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8f")
    assert gpus() == ["2", "GPU-8f"]
    counter = multiprocessing.Value("i", 0)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    threads = torch.get_num_threads()
    seen = []
    for _ in range(3):
        runner._start_worker(threads, ["2", "GPU-8f"], counter, os.getppid())
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "GPU-8f", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


@pytest.mark.parametrize(("asked", "share", "used"), [(1, 2, 1), (2, 1, 1), (3, 2, 2)])
def test_a_process_takes_no_more_threads_than_asked_for(monkeypatch, asked, share, used):
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    runner._start_worker(share, [], multiprocessing.Value("i", 0), os.getppid())
    assert taken == [used]


def test_a_worker_ends_with_its_parent(tmp_path):
    process, output = start(tmp_path, quick(methods=[{**SLOW, "epochs": 2000}]))
    worker = at_work(output, "slow")
    process.kill()
    process.wait()
    for _ in range(600):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it goes on")


def test_two_experiments_in_one_folder_and_other_folders(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(LockedError, match="is in use"):
        run_experiment(quick(), tmp_path)
    lock.release()
    (tmp_path / "config.yaml").write_text("train_data: x")
    with pytest.raises(ConfigError, match="holds a run of saft finetune"):
        run_experiment(quick(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no experiment \(there is no plan.yaml\)"):
        write_answers(tmp_path)
    monkeypatch.setitem(sys.modules, "pebble", None)
    with pytest.raises(MissingExtraError, match=r"experiments need the package pebble.*lab extra"):
        run_experiment(quick(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_data_are_looked_at_before_anything_runs(tmp_path, capsys):
    pets, flat = tmp_path / "pets", tmp_path / "flat"
    for root in (pets / "train", pets / "test", flat):
        write_folder(root, {"cat": 3, "dog": 3, "red_fox": 3})
    other = write_folder(tmp_path / "other", {"Dog": 1, "red fox": 1, "owl": 1})
    wrong = {
        "there is no folder nowhere": {"evaluate": ["nowhere"]},
        "'cat' of pets has 3 images, fewer than the 4": {"train": [str(pets)], "shots": [1, 4]},
        "has no validation images": {
            "train": [str(pets)],
            "tuning": {"shots": 1, "try": {"saft": {"lr": [1e-4]}}},
        },
        "leave tuning and the density auto out of the plan": {
            "train": [str(pets)],
            "methods": [{"method": "saft", "density": "auto"}],
        },
        "fine-tuning needs at least two classes": {
            "train": [str(write_folder(tmp_path / "one", {"cat": 3}))]
        },
        "flat has no test images": {"train": [str(flat)]},
        "there is no model 'ViT-B-16X' in open_clip": {"models": ["ViT-B-16X"]},
        "no weights were named for RN50": {"models": ["RN50"]},
        "no file has that name": {"models": [{"model": "RN50", "pretrained": "nowhere.pt"}]},
        "the class 'no such class'": {"retrieval": ["no such class"]},
        "fewer than the 5 shots": {
            "train": [str(pets)],
            "tuning": {"shots": 5, "try": {"saft": {"lr": [1e-4]}}},
        },
    }  # fmt: skip
    for message, values in wrong.items():
        with pytest.raises(SaftError, match=message):
            run_experiment(quick(**values), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    check_inputs(quick(train=[str(pets)], evaluate=[str(other)]))
    said = capsys.readouterr().err
    assert "other lacks 1 of the 3 trained classes: cat" in said
    assert "warning: 1 of the 3 classes of other are not trained: owl" in said


def test_the_command_line(tmp_path, capsys):
    assert main(["experiment", "shift", "--plan-only", "--seed", "9"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "plan.yaml").write_text(printed)
    assert Plan.load(tmp_path / "plan.yaml").seeds == (9,)
    quick().save(tmp_path / "plan.yaml")
    out = tmp_path / "out"
    page = tmp_path / "page.html"
    plan = ["--config", str(tmp_path / "plan.yaml")]
    assert main(["experiment", "shift", *plan, "--output", str(out), "--report", str(page)]) == 0
    assert "mean of shifted" not in capsys.readouterr().out  # there is one only
    assert page.exists()
    page.unlink()
    assert main(["experiment", "shift", "--report-only", "--output", str(out)]) == 0
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shifts"], "did you mean 'shift'"),
        (["shift", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["shift", "--model", "ViT-B-16"], "nothing to train ViT-B-16 on"),
        (["shift", "--report-only", "--output", "nowhere"], "holds no experiment"),
        (["base-to-new", "--eval-data", "builtin:uci"], "leave out builtin:uci"),
        (["shift", "--method", "none"], "there is no --method 'none'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.count("\n") == 0
    assert list(Path.cwd().iterdir()) == []
