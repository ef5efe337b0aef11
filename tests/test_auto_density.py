"""``--density auto``: what is tried, what is chosen, and that the run is that of the choice."""

from __future__ import annotations

import json
import math
import shlex
import weakref

import pytest
import torch

from clip_helpers import SMALL, small_checkpoint, write_folder
from html_page import Page
from saft_clip import auto_density, train
from saft_clip.auto_density import DENSITIES, DensityTrial, best, lr_for, to_dicts
from saft_clip.config import AUTO, FinetuneConfig
from saft_clip.errors import ConfigError
from saft_clip.report import write_report
from saft_clip.results import read_results
from saft_clip.run_folder import RunFolder
from saft_clip.train import finetune
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import NonFiniteGradientError
from saft_kernels.mask import CooMask

pytestmark = pytest.mark.usefixtures("one_thread", "no_figures")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and images of three classes in train, val and test splits."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 3), ("val", 4), ("test", 2)):
        write_folder(root / "pets" / split, {"cat": count, "dog": count, "owl": count})
    return root / "pets", small_checkpoint(root / "small.safetensors")


@pytest.fixture
def config(inputs, tmp_path):
    pets, weights = inputs
    return FinetuneConfig(
        **{"train_data": str(pets), "output": str(tmp_path / "run")},
        **{"model": SMALL, "pretrained": str(weights), "precision": "fp32"},
        **{"shots": 3, "batch_size": 5, "epochs": 2, "lr": 1e-3, "density": AUTO},
    )


def assert_same(file, other):
    """The same entries with the same values, bit for bit."""
    ours, theirs = list(SparseDelta.load(file).items()), list(SparseDelta.load(other).items())
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs]
    for (_, *mine), (_, *its) in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def trial(density, right, images=100):
    top1 = right / images
    error = math.sqrt(top1 * (1 - top1) / images)
    return DensityTrial(density=density, lr=1e-3, top1=top1, top1_stderr=error, images=images)


# The choice


@pytest.mark.parametrize(
    ("right", "chosen"),
    [
        ((90, 91, 92), 1e-1),
        ((89, 92, 91), 1e-2),
        ((92, 90, 50), 1e-3),
        ((50, 92, 92), 1e-2),
        ((0, 0, 0), 1e-3),
    ],
)
def test_the_best_is_chosen_and_of_equals_the_sparsest(right, chosen):
    trials = [trial(density, count) for density, count in zip(DENSITIES, right, strict=True)]
    assert best(trials).density == chosen
    assert best(trials[::-1]).density == chosen
    assert [line["density"] for line in to_dicts(trials) if line["chosen"]] == [chosen]


def test_one_that_diverged_is_not_chosen():
    diverged = DensityTrial(density=1e-3, lr=1.0, error="diverged")
    assert best([diverged, trial(1e-2, 10)]).density == 1e-2


def test_every_density_moves_the_model_equally_far():
    """AdamW's first step moves each of d entries by the learning rate: sqrt(d) of it in all."""
    assert lr_for(1e-3, 5e-6) == 5e-6
    distances = [lr_for(density, 5e-6) * math.sqrt(density) for density in DENSITIES]
    assert distances == pytest.approx([distances[0]] * len(DENSITIES))


# The run


@pytest.fixture
def tried(monkeypatch):
    """The densities that runs were made with, one after another."""
    made = []
    original = train.Run.finish

    def finish(run):
        made.append(run.config.density)
        original(run)

    monkeypatch.setattr(train.Run, "finish", finish)
    return made


@pytest.mark.parametrize("place", range(len(DENSITIES)))
def test_the_result_is_that_of_a_run_with_the_chosen_density(
    config, tmp_path, tried, monkeypatch, place
):
    monkeypatch.setattr(auto_density, "best", lambda trials: trials[place])
    result = finetune(config)
    lines = result.results["density_trials"]
    assert [line["density"] for line in lines] == list(DENSITIES)
    assert [line["lr"] for line in lines] == [lr_for(d, config.lr) for d in DENSITIES]
    assert all(line["images"] == 12 for line in lines)
    (chosen,) = (line for line in lines if line["chosen"])
    assert chosen == lines[place]
    assert tried == [*DENSITIES, chosen["density"]]

    settings = {"density": chosen["density"], "lr": chosen["lr"]}
    direct = finetune(config.changed(output=str(tmp_path / "direct"), **settings))
    assert_same(result.artefact, direct.artefact)
    # What is on record with the delta repeats it without trials.
    training = json.loads(SparseDelta.load(result.artefact).metadata["training"])
    assert (training["density"], training["lr"]) == (chosen["density"], chosen["lr"])
    assert FinetuneConfig.load(result.output / "config.yaml").density == AUTO
    assert direct.results["density_trials"] == []


def test_trials_see_validation_images_only(config):
    result = finetune(config)
    for density in DENSITIES:
        found = read_results(result.output / "density" / f"{density:g}" / "results.json")
        assert {line["n"] for line in found["evaluations"]} == {12}
    assert {line["n"] for line in result.results["evaluations"]} == {6}


def test_the_chosen_mask_is_not_selected_again(config, monkeypatch):
    selected = []
    original = train.find_method("saft")._select

    def select(method, batches):
        selected.append(method.config.density)
        return original(method, batches)

    monkeypatch.setattr(train.find_method("saft"), "_select", select)
    output = finetune(config).output
    assert selected == list(DENSITIES)
    (chosen,) = (t for t in read_results(output / "results.json")["density_trials"] if t["chosen"])
    mask = CooMask.load(output / "mask.safetensors")
    assert mask.nnz == int(chosen["density"] * mask.numel)


@pytest.mark.parametrize("stopped", range(4))
def test_an_interrupted_run_goes_on(config, tmp_path, monkeypatch, tried, capsys, stopped):
    """In a trial or after all of them: what is there is not made again, the result is the same."""
    whole = finetune(config.changed(output=str(tmp_path / "whole")))
    made, original = [], train.Run.train

    def train_until_stopped(run):
        original(run)
        made.append(run)
        if len(made) == stopped + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "train", train_until_stopped)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    # One command, and that of the run, not of the trial.
    command = shlex.join(["saft", "finetune", "--resume", "--output", config.output])
    said = capsys.readouterr().err.replace("\n", "")  # lines are broken anywhere
    assert said.count("saft finetune --resume") == 1
    assert said.endswith(command)
    tried.clear()
    again = finetune(FinetuneConfig.load(f"{config.output}/config.yaml").changed(resume=True))
    assert len(tried) == 4 - stopped
    assert again.results["density_trials"] == whole.results["density_trials"]
    assert_same(again.artefact, whole.artefact)
    tried.clear()
    finetune(config.changed(resume=True))
    assert tried == []


def test_a_density_that_diverges_is_told(config, monkeypatch, capsys):
    original = train.Run.train

    def diverge(run):
        if run.config.density == DENSITIES[0]:
            raise NonFiniteGradientError("training has diverged: 'x' holds NaN", "x")
        original(run)

    monkeypatch.setattr(train.Run, "train", diverge)
    result = finetune(config)
    first, *others = result.results["density_trials"]
    assert (first["top1"], first["chosen"]) == (None, False)
    assert "diverged" in first["error"]
    assert sum(line["chosen"] for line in others) == 1
    assert "density 0.001: training has diverged" in capsys.readouterr().err
    page = (result.output / "report.html").read_text()
    assert "How the density was chosen" in page
    assert first["error"].replace("'", "&#39;") in page


def test_training_that_always_diverges(config, monkeypatch):
    def diverge(run):
        raise NonFiniteGradientError("training has diverged: 'x' holds NaN", "x")

    monkeypatch.setattr(train.Run, "train", diverge)
    with pytest.raises(NonFiniteGradientError, match="'x' holds NaN"):
        finetune(config)


def test_the_page_shows_every_trial(config):
    output = finetune(config).output
    page = (output / "report.html").read_text()
    assert Page(page).open == []
    for density in DENSITIES:
        assert f'href="density/{density:g}/report.html"' in page
        assert (output / "density" / f"{density:g}" / "report.html").exists()
    assert page.count(">chosen<") == 1
    assert "(chosen by auto)" in page
    assert "--density auto" in page


def test_results_of_releases_that_had_no_trials(config):
    output = finetune(config.changed(density=0.01)).output
    results = json.loads((output / "results.json").read_text())
    del results["density_trials"]
    (output / "results.json").write_text(json.dumps(results))
    assert read_results(output / "results.json")["density_trials"] == []
    write_report(output)


# Bad input


def test_without_validation_images(config, tmp_path):
    root = write_folder(tmp_path / "plain", {"a": 3, "b": 3})
    with pytest.raises(ConfigError, match=r"chooses on validation images, and .*plain has no val"):
        finetune(config.changed(train_data=str(root)))
    assert not RunFolder(config.output).path.exists()


def test_validation_images_from_elsewhere(config, inputs, tmp_path):
    pets, _ = inputs
    root = write_folder(tmp_path / "plain", {"cat": 3, "dog": 3})
    ours = config.changed(train_data=str(root), val_data=str(pets))
    assert [t["images"] for t in finetune(ours).results["density_trials"]] == [12, 12, 12]


def test_what_a_trial_refuses_can_be_put_right_in_the_same_folder(config):
    with pytest.raises(ConfigError, match="AdamW only"):
        finetune(config.changed(optimizer="sgd"))
    finetune(config)


def test_a_failure_before_the_first_trial_leaves_nothing(config, monkeypatch):
    def refuse(*arguments):
        raise ConfigError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "prepare", refuse)
        with pytest.raises(ConfigError, match="refused"):
            finetune(config)
    assert list(RunFolder(config.output).path.iterdir()) == []
    finetune(config.changed(lr=2e-3))


def test_the_trials_of_another_run_are_not_used(config, tmp_path):
    (tmp_path / "run" / "density").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds density, which is not of a run"):
        finetune(config)


def test_trials_are_listed_sparsest_first():
    assert list(auto_density.DENSITIES) == sorted(auto_density.DENSITIES)


@pytest.mark.parametrize("gradients", ["sampled", "streamed"])
def test_models_of_trials_are_not_kept(config, monkeypatch, gradients):
    """Where one is loaded there is one other at most, which it is compared with.

    The first trial diverges: an exception, too, may keep a model.
    """
    original, loaded, alive = train.load_base, [], []
    way = train.Run.train

    def watched(settings):
        clip = original(settings)
        alive.append(sum(model() is not None for model in loaded))
        loaded.append(weakref.ref(clip.model))
        return clip

    def diverge(run):
        if run.config.density == DENSITIES[0]:
            raise NonFiniteGradientError("training has diverged: 'x' holds NaN", "x")
        way(run)

    monkeypatch.setattr(train, "load_base", watched)
    monkeypatch.setattr(train.Run, "train", diverge)
    finetune(config.changed(epochs=1, gradients=gradients))
    assert alive == [0, 0, 0, 1, 0, 1, 0, 1]
