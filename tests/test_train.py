"""Fine-tuning: what a step does, and that a run continues bit for bit after whatever stopped it."""

from __future__ import annotations

import copy
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from clip_helpers import SMALL, SMALL_RESNET, cut_short, small_checkpoint, write_folder, write_image
from saft_clip import train
from saft_clip.batches import TrainingBatches
from saft_clip.checkpoint import find_checkpoints
from saft_clip.config import FinetuneConfig
from saft_clip.data import load_dataset
from saft_clip.errors import CheckpointError, ConfigError, DataError, UnreadableImageError
from saft_clip.methods import find_method
from saft_clip.methods.base import FROZEN, prompt_loss
from saft_clip.metrics import MetricsLog, read_metrics
from saft_clip.models import load_model
from saft_clip.prompts import ClassPrompts, class_prompts
from saft_clip.schedule import learning_rate
from saft_clip.train import RunData, finetune, load_base
from saft_clip.trainer import Trainer
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.mask import CooMask
from saft_kernels.selected_grad import SelectedGrad
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread", "no_figures")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors"))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Five training images of each of three classes, two for validation, three for testing."""
    root = tmp_path_factory.mktemp("data") / "pets"
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        write_folder(root / split, {"cat": count, "dog": count, "small_owl": count})
    return root


@pytest.fixture
def config(weights, pets, tmp_path):
    """A run of three epochs of four steps."""
    return FinetuneConfig(
        train_data=str(pets),
        model=SMALL,
        pretrained=weights,
        shots=5,
        batch_size=4,
        epochs=3,
        lr=1e-2,
        density=0.01,
        precision="fp32",
        output=str(tmp_path / "run"),
    )


def prepared(config):
    """A method and its training batches, as a run makes them."""
    clip = load_base(config)
    data = RunData(config, clip)
    prompts = ClassPrompts(data.train.class_names, data.train.templates, clip.tokenizer)
    method = find_method(config.method)(clip, prompts, config)
    batches = TrainingBatches(
        data.train,
        batch_size=config.batch_size,
        accum_freq=config.accum_freq,
        epochs=config.epochs,
        seed=config.seed,
    )
    method.prepare([next(iter(torch.utils.data.DataLoader(data.plain, batch_size=15)))], None)
    return method, batches


# Batches


def test_an_epoch_is_every_image_once_in_a_new_order(config, pets):
    dataset = load_dataset(str(pets), "train", lambda image: image)
    batches = TrainingBatches(dataset, batch_size=4, accum_freq=2, epochs=3, seed=1)
    assert (batches.steps_per_epoch, batches.steps) == (2, 6)
    assert [[len(b) for b in batches.plan(step)] for step in (0, 1)] == [[4, 4], [4, 3]]
    assert [batches.images_in(step) for step in (0, 1)] == [8, 7]
    assert [batches.images_from(step) for step in range(7)] == [45, 37, 30, 22, 15, 7, 0]
    epochs = [
        [image for step in (2 * e, 2 * e + 1) for batch in batches.plan(step) for image in batch]
        for e in range(3)
    ]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, index) for index in range(15)]
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(("min_steps", "epochs"), [(0, 3), (5, 3), (6, 3), (7, 4), (8, 4), (9, 5)])
def test_there_are_as_many_epochs_as_the_steps_take(pets, min_steps, epochs):
    dataset = load_dataset(str(pets), "train", lambda image: image)
    options = {"batch_size": 4, "accum_freq": 2, "epochs": 3, "seed": 1}
    batches = TrainingBatches(dataset, **options, min_steps=min_steps)
    assert (batches.epochs, batches.steps) == (epochs, 2 * epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_past(config, workers):
    """Any start and any number of workers give the same crops, and no global state moves."""
    clip = load_base(config)
    dataset = RunData(config, clip).train
    options = {"batch_size": 4, "accum_freq": 2, "epochs": 2, "seed": 1}
    reference = [list(step) for step in TrainingBatches(dataset, **options).steps_from(0)]
    before = torch.get_rng_state()
    batches = TrainingBatches(dataset, **options, workers=workers)
    again = [list(step) for step in batches.steps_from(1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(again) == 3
    for ours, theirs in zip(again, reference[1:], strict=True):
        for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)
    assert not torch.equal(reference[0][0][0], reference[2][0][0])


def test_image_that_vanishes_during_training(config, tmp_path):
    root = write_folder(tmp_path / "few", {"a": 2, "b": 2})
    dataset = load_dataset(str(root), "train", load_base(config).preprocess_train)
    (root / "a" / "000.png").unlink()
    options = {"batch_size": 4, "accum_freq": 1, "epochs": 1, "seed": 1, "workers": 1}
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*000.png"):
        list(next(TrainingBatches(dataset, **options).steps_from(0)))


# The step


def test_loss_is_the_papers_equation_1(weights):
    clip = load_model(SMALL, weights)
    tokens = class_prompts(["cat", "dog", "owl"], ["a photo of a {}."], clip.tokenizer)
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        image = F.normalize(clip.model.encode_image(images), dim=-1)
        text = F.normalize(clip.model.encode_text(tokens[:, 0]), dim=-1)
        expected = F.cross_entropy(clip.model.logit_scale.exp() * image @ text.T, labels)
        found = prompt_loss(clip.model, images, labels, tokens, "fp32")
        rounded = prompt_loss(clip.model, images, labels, tokens, "amp_bf16")
    torch.testing.assert_close(found, expected)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("method", ["saft", "full"])
def test_accumulation_is_one_big_batch(config, method):
    """Seven images in micro-batches of 4 and 3: the short one counts for what it holds."""
    changed = {"method": method, "augment": False, "shots": 4, "wd": 0.0, "eps": 1.0}
    # With eps = 1 a step is nearly linear in the gradient, so that a wrong weight shows.
    weights = []
    for batch_size, accum_freq in ((12, 1), (5, 3)):
        ours = config.changed(**changed, batch_size=batch_size, accum_freq=accum_freq)
        method_, batches = prepared(ours)
        trainer = Trainer(method_, batches, ours)
        steps = trainer.steps()
        first = [next(steps) for _ in range(2)]
        weights.append((method_.model.state_dict(), first))
    (one, values), (many, other_values) = weights
    assert other_values[0]["loss"] == pytest.approx(values[0]["loss"], rel=1e-5)
    assert other_values[0]["grad_norm"] == pytest.approx(values[0]["grad_norm"], rel=1e-4)
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=1e-6)


def test_warm_up_and_cosine():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 1e-3
    assert learning_rate(0, 100, 1.0, warmup=0) == 1.0
    assert learning_rate(0, 3, 1.0, warmup=10) == 0.1


@pytest.mark.parametrize("gradients", ["dense", "streamed", "sampled"])
def test_saft_changes_the_selected_entries_only(config, gradients):
    method, batches = prepared(config.changed(gradients=gradients))
    base = {name: value.clone() for name, value in method.model.state_dict().items()}
    list(Trainer(method, batches, config).steps())
    changed = 0
    for name, value in method.model.state_dict().items():
        different = (value != base[name]).flatten()
        if name in method.mask:
            changed += int(different[method.mask[name].long()].sum())
            different[method.mask[name].long()] = False
        assert not different.any(), name
    assert changed > 0.9 * method.mask.nnz
    assert not any(name in method.mask for name in FROZEN)


def test_gradient_modes_agree(config):
    results = []
    for gradients in ("dense", "streamed", "sampled"):
        ours = config.changed(gradients=gradients, grad_clip_norm=0.5, accum_freq=2)
        method, batches = prepared(ours)
        list(Trainer(method, batches, ours).steps())
        results.append(method.model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert_close(value, results[2][name], "adamw_trajectory")


def test_full_trains_both_encoders_but_not_the_temperature(config):
    ours = config.changed(method="full")
    method, batches = prepared(ours)
    base = {name: value.clone() for name, value in method.model.state_dict().items()}
    list(Trainer(method, batches, ours).steps())
    for name, value in method.model.state_dict().items():
        assert torch.equal(value, base[name]) == (name in FROZEN), name
    assert sum(method.trained.values()) == sum(p.numel() for p in method.model.parameters()) - 1


def test_batch_norm_statistics_do_not_move(config, tmp_path):
    weights = small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET)
    ours = config.changed(model=SMALL_RESNET, pretrained=str(weights), epochs=1)
    method, batches = prepared(ours)
    base = {name: value.clone() for name, value in method.model.named_buffers()}
    list(Trainer(method, batches, ours).steps())
    assert any("running_mean" in name for name in base)
    for name, value in method.model.named_buffers():
        assert torch.equal(value, base[name]), name


def test_gradient_clipping(config):
    norms = []
    for limit in (None, 0.1):
        ours = config.changed(grad_clip_norm=limit)
        method, batches = prepared(ours)
        norms.append(next(Trainer(method, batches, ours).steps())["grad_norm"])
    assert norms[0] == pytest.approx(norms[1])  # what is reported is the norm before clipping


def test_loss_that_is_not_finite_stops_before_the_step(config):
    method, batches = prepared(config)
    with torch.no_grad():
        method.model.logit_scale.fill_(math.inf)
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    with pytest.raises(NonFiniteGradientError, match=r"the loss is nan at step 1: lower --lr"):
        next(Trainer(method, batches, config).steps())
    for name, value in method.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("gradients", ["dense", "streamed", "sampled"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite_stops_before_the_step(config, monkeypatch, gradients, value):
    """The loss may be fine: a single selected entry is enough."""
    method, batches = prepared(config.changed(gradients=gradients))
    steps = Trainer(method, batches, config).steps()
    next(steps)
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    state = copy.deepcopy(method.optimizer.state_dict()["state"])
    backward = Trainer._backward

    def broken(trainer, *arguments):
        loss = backward(trainer, *arguments)
        name, indices = next(iter(method.mask.items()))
        grad = method.model.get_parameter(name).grad
        if isinstance(grad, SelectedGrad):
            grad.values()[0] = value
        else:
            grad.view(-1)[indices[0]] = value
        return loss

    monkeypatch.setattr(Trainer, "_backward", broken)
    with pytest.raises(NonFiniteGradientError, match=f"the gradient is {value} at step 2: lower"):
        next(steps)
    for name, weight in method.model.state_dict().items():
        assert torch.equal(weight, before[name])
    for key, now in method.optimizer.state_dict()["state"].items():
        assert all(torch.equal(now[name], state[key][name]) for name in now)


def test_a_class_name_that_a_method_cannot_use_is_found_before_anything_is_done(config, tmp_path):
    """Among those of the evaluation data, too; nothing is left of the run."""
    other = write_folder(tmp_path / "other", {"a name of far too many words for it to fit": 1})
    ours = config.changed(method="coop", context=4, eval_data=(str(other),))
    with pytest.raises(ConfigError, match="is too long for 4 learned words in 16 tokens"):
        finetune(ours)
    assert list(Path(config.output).iterdir()) == []


def test_unknown_method():
    with pytest.raises(
        ConfigError, match=r"did you mean 'saft'.*\? the methods are zero-shot, saft,"
    ):
        find_method("saff")


# A run


def test_run_writes_everything(config, pets, capsys):
    shifted = write_folder(Path(config.output).parent / "shifted", {"cat": 3, "dog": 3})
    ours = config.changed(eval_data=(str(pets), str(shifted)), accum_freq=2, val_frequency=2)
    result = finetune(ours)
    names = {path.name for path in result.output.iterdir()}
    assert names == {
        *("config.yaml", "inputs.json", "mask.safetensors", "metrics.jsonl"),
        *("delta.safetensors", "results.json", "report.html"),
    }
    assert FinetuneConfig.load(result.output / "config.yaml") == ours
    lines = read_metrics(result.output / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    validated = [line["epoch"] for line in lines if line["kind"] == "validation"]
    assert validated == [0, 2, 3]
    evaluated = [(e["when"], e["dataset"], e["shifted"]) for e in result.results["evaluations"]]
    assert evaluated == [
        ("before", "pets", False),
        ("before", "shifted", True),
        ("after", "pets", False),
        ("after", "shifted", True),
    ]
    mask = CooMask.load(result.output / "mask.safetensors")
    blocks = result.results["blocks"]
    assert result.results["trained"] == mask.nnz == sum(block["trained"] for block in blocks)
    assert result.results["parameters"] == sum(block["parameters"] for block in blocks)


def test_a_run_goes_on_until_its_steps_are_taken(config):
    """Four epochs of two steps for the seven asked for; the last one is validated, too."""
    result = finetune(config.changed(epochs=1, accum_freq=2, min_steps=7, val_frequency=3))
    lines = read_metrics(result.output / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, 9)]
    assert [line["epoch"] for line in lines if line["kind"] == "validation"] == [0, 3, 4]
    assert "at least 1 epochs and 7 steps" in (result.output / "report.html").read_text()


def test_a_given_mask_is_trained_instead_of_a_selected_one(config, tmp_path):
    selected = finetune(config)
    file = tmp_path / "given.safetensors"
    shutil.copy(selected.output / "mask.safetensors", file)
    same = config.changed(mask=str(file), density=0.5, output=str(tmp_path / "again"))
    again = finetune(same)
    first, second = (list(SparseDelta.load(run.artefact).items()) for run in (selected, again))
    for (name, index, value), (other, other_index, other_value) in zip(first, second, strict=True):
        assert name == other
        assert torch.equal(index, other_index)
        assert torch.equal(value, other_value)


def test_a_mask_for_a_method_that_takes_none(config, tmp_path):
    with pytest.raises(ConfigError, match="--method full takes no --mask"):
        finetune(config.changed(mask=str(tmp_path / "mask.safetensors"), method="full"))
    assert not Path(config.output).exists()


def test_an_input_that_is_not_finite_is_not_selected_from(config, monkeypatch):
    """Nothing is left of the run, so that the data can be mended and the command given again."""

    class Broken(RunData):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            transform = self.plain.transform
            self.plain = replace(self.plain, transform=lambda image: transform(image) * math.nan)

    with monkeypatch.context() as patch:
        patch.setattr(train, "RunData", Broken)
        with pytest.raises(NonFiniteGradientError, match="the loss of batch 1 is nan"):
            finetune(config)
    assert list(Path(config.output).iterdir()) == []


def test_a_run_that_trains_one_entry(config):
    numel = sum(p.numel() for n, p in load_base(config).model.named_parameters() if n not in FROZEN)
    result = finetune(config.changed(density=1 / numel))
    assert result.results["trained"] == 1
    delta, model = SparseDelta.load(result.artefact), load_base(config).model
    assert delta.nnz == 1
    base = {name: value.clone() for name, value in model.state_dict().items()}
    delta.apply_(model)
    differing = [(value != base[name]).sum() for name, value in model.state_dict().items()]
    assert sum(differing) == 1


def test_delta_turns_the_base_into_the_trained_model(config):
    trained = {}

    class Spy(train.Run):
        def finish(self):
            trained.update({k: v.clone() for k, v in self.clip.model.state_dict().items()})
            super().finish()

    original, train.Run = train.Run, Spy
    try:
        result = finetune(config)
    finally:
        train.Run = original
    model = load_base(config).model
    delta = SparseDelta.load(result.artefact)
    delta.apply_(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    assert delta.metadata["train_data"] == config.train_data


def test_full_writes_a_model_that_loads(config):
    result = finetune(config.changed(method="full", epochs=1))
    assert result.artefact.name == "model.safetensors"
    model = load_model(config.model, str(result.artefact)).model
    base = load_base(config).model
    assert not torch.equal(model.visual.proj, base.visual.proj)
    assert torch.equal(model.logit_scale, base.logit_scale)


def test_tensorboard(config):
    result = finetune(config.changed(tensorboard=True, epochs=1))
    assert list((result.output / "tensorboard").glob("events.*"))


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")


# Going on: after a kill, that is what tests/crashes is for


def record(output):
    """The lines of a run's record, without what depends on the clock."""
    lines = read_metrics(Path(output) / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in lines
    ]


def stop_at(monkeypatch, step, action):
    original = Trainer.steps

    def steps(self):
        for taken in original(self):
            if self.step == step:
                action()
            yield taken

    monkeypatch.setattr(Trainer, "steps", steps)


@pytest.mark.parametrize(("method", "step"), [("saft", 1), ("full", 4), ("saft", 6), ("saft", 12)])
def test_interrupt_saves_and_says_how_to_go_on(config, monkeypatch, capsys, method, step):
    """In the middle and at the end of an epoch, whose validation is made up for, and at the end."""
    ours = config.changed(method=method, epochs=3)
    other = ours.changed(output=ours.output + " 2")
    expected = finetune(other)
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            finetune(ours)
    assert f"saft finetune --resume --output {ours.output}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(find_checkpoints(Path(ours.output) / "checkpoints")) > 0
    result = finetune(ours.changed(resume=True))
    assert f"continuing from step {step} of 12" in capsys.readouterr().err
    assert result.artefact.read_bytes() == expected.artefact.read_bytes()
    assert record(ours.output) == record(other.output)


def test_second_interrupt_stops_at_once(config, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    assert not find_checkpoints(Path(config.output) / "checkpoints")


@pytest.fixture
def stopped(config, monkeypatch):
    """A run that was interrupted after its sixth step; its settings, to resume it."""
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    return config.changed(resume=True)


def test_resume_with_other_settings(stopped):
    with pytest.raises(ConfigError, match=r"other settings: --epochs is 5, not 3; --lr is"):
        finetune(stopped.changed(epochs=5, lr=1.0))


def test_resume_with_other_data(stopped, pets, tmp_path):
    image = pets / "train" / "cat" / "002.png"
    content = image.read_bytes()
    try:
        write_image(image, (0, 0, 255))
        with pytest.raises(ConfigError, match=r"the training data changed .*sha256 \w+, now \w+"):
            finetune(stopped)
    finally:
        image.write_bytes(content)


def test_resume_with_other_weights(stopped, weights):
    content = Path(weights).read_bytes()
    try:
        small_checkpoint(Path(weights), seed=5)
        with pytest.raises(ConfigError, match="the pretrained model changed since"):
            finetune(stopped)
    finally:
        Path(weights).write_bytes(content)


def test_resume_from_a_broken_checkpoint_falls_back_only_when_told(stopped, capsys):
    older, newest = find_checkpoints(Path(stopped.output) / "checkpoints")
    cut_short(newest)
    with pytest.raises(CheckpointError, match=f"delete it to continue from .* {older.name}"):
        finetune(stopped)
    newest.unlink()
    finetune(stopped)
    assert "continuing from step 4 of 12" in capsys.readouterr().err


def test_resume_with_a_checkpoint_of_another_run(stopped, monkeypatch):
    other = stopped.changed(resume=False, output=stopped.output + " 2", seed=2)
    stop_at(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        finetune(other)
    foreign = find_checkpoints(Path(other.output) / "checkpoints")[-1]
    shutil.copy(foreign, Path(stopped.output) / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"step-00000007\S* belongs to another run: --seed is 2"
    ):
        finetune(stopped)


def test_resume_where_nothing_was_started(config, capsys):
    result = finetune(config.changed(resume=True, epochs=1))
    assert result.artefact.exists()
    assert "starting from the beginning" in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(config, capsys):
    first = finetune(config.changed(epochs=1))
    files = {path: path.stat().st_mtime_ns for path in first.output.iterdir()}
    again = finetune(config.changed(epochs=1, resume=True))
    assert again == first
    assert files == {path: path.stat().st_mtime_ns for path in first.output.iterdir()}
    assert "is finished already" in capsys.readouterr().err


def test_finished_run_is_not_overwritten(config):
    finetune(config.changed(epochs=1))
    with pytest.raises(ConfigError, match=r"already holds a finished run .* another --output"):
        finetune(config.changed(epochs=1))


def test_shortened_record_is_noticed(stopped):
    metrics = Path(stopped.output) / "metrics.jsonl"
    cut_short(metrics)
    before = metrics.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is shorter"):
        finetune(stopped)
    assert metrics.read_bytes() == before


# Folders


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "mask.safetensors", "report.html"])
def test_files_of_somebody_else_are_not_overwritten(config, name, resume):
    """Not even with --resume; nor is a mask that lies there trained without being asked for."""
    folder = Path(config.output)
    folder.mkdir()
    (folder / name).write_text("precious")
    with pytest.raises(ConfigError, match=rf"holds {name}, which is not of a run"):
        finetune(config.changed(resume=resume))
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "precious"


def test_a_run_that_fails_before_it_has_done_anything_can_be_corrected(config):
    with pytest.raises(SelectionError, match="selects no entry"):
        finetune(config.changed(density=1e-9))
    assert list(Path(config.output).iterdir()) == []
    assert finetune(config.changed(epochs=1)).artefact.exists()


def test_a_run_that_fails_after_the_selection_keeps_it(config, monkeypatch):
    def fail():
        raise NonFiniteGradientError("no")

    stop_at(monkeypatch, 1, fail)
    with pytest.raises(NonFiniteGradientError):
        finetune(config)
    kept = {path.name for path in Path(config.output).iterdir()}
    assert {"config.yaml", "mask.safetensors"} <= kept


def test_a_run_that_fails_after_a_step_keeps_its_record(config, monkeypatch):
    """Full fine-tuning has no mask, and no checkpoint before the first epoch ends."""

    def fail():
        raise NonFiniteGradientError("no")

    stop_at(monkeypatch, 2, fail)
    with pytest.raises(NonFiniteGradientError):
        finetune(config.changed(method="full"))
    assert [line["step"] for line in read_metrics(Path(config.output) / "metrics.jsonl")][-1] == 1


def test_a_missing_report_of_a_finished_run_is_made_up_for(config):
    result = finetune(config.changed(epochs=1))
    (result.output / "report.html").unlink()
    finetune(config.changed(epochs=1, resume=True))
    assert (result.output / "report.html").exists()


def test_interrupt_during_a_validation(config, monkeypatch, capsys):
    """The run stops after it, and goes on as if it had not been stopped."""
    other = config.changed(output=config.output + " 2")
    expected = finetune(other)
    validate = train.Run._validate

    def interrupted(run):
        validate(run)
        if run.trainer.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    result = finetune(config.changed(resume=True))
    assert "continuing from step 8 of 12" in capsys.readouterr().err
    assert result.artefact.read_bytes() == expected.artefact.read_bytes()
    assert record(config.output) == record(other.output)


class Interrupted:
    """A transform that interrupts the process that loads images, as Ctrl-C in a terminal does."""

    def __init__(self, transform):
        self.transform, self.main = transform, os.getpid()

    def __call__(self, image):
        if os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGINT)
        return self.transform(image)


def test_interrupts_do_not_stop_processes_that_load_images(config, monkeypatch):
    """For selection, training and evaluation; the main process decides when to stop."""

    class Data(RunData):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for which in ("plain", "train", "validation"):
                dataset = getattr(self, which)
                setattr(self, which, replace(dataset, transform=Interrupted(dataset.transform)))

    monkeypatch.setattr(train, "RunData", Data)
    assert finetune(config.changed(workers=1, epochs=1)).artefact.exists()


def test_weights_that_are_not_finite_are_no_result(config, monkeypatch):
    def diverge(run):
        with torch.no_grad():
            next(run.clip.model.parameters()).fill_(math.inf)

    monkeypatch.setattr(train.Run, "train", diverge)
    with pytest.raises(NonFiniteGradientError, match="training has diverged"):
        finetune(config)
    assert not (Path(config.output) / "delta.safetensors").exists()


# What is evaluated


def test_the_same_data_by_another_path_are_not_shifted(config, tmp_path, capsys):
    pets = write_folder(tmp_path / "flat", {"cat": 5, "dog": 5})
    ours = config.changed(train_data=f"{pets}/", eval_data=(str(pets),), epochs=1)
    evaluations = finetune(ours).results["evaluations"]
    assert [(e["shifted"], e["includes_training"]) for e in evaluations] == [(False, True)] * 2
    assert "training images included" in capsys.readouterr().err


def test_a_test_split_is_free_of_training_images(config):
    evaluations = finetune(config.changed(epochs=1)).results["evaluations"]
    assert [(e["shifted"], e["includes_training"]) for e in evaluations] == [(False, False)] * 2


def test_nothing_to_evaluate_is_said(config, tmp_path, capsys):
    pets = write_folder(tmp_path / "flat", {"cat": 5, "dog": 5})
    finetune(config.changed(train_data=str(pets), epochs=1))
    assert "nothing to evaluate" in capsys.readouterr().err


def test_one_class_cannot_be_trained_on(config, tmp_path):
    cats = write_folder(tmp_path / "cats", {"cat": 5})
    with pytest.raises(DataError, match="at least two classes"):
        finetune(config.changed(train_data=str(cats)))


# What is evaluated


def counts(results):
    """(when, alpha) -> number of images, one entry for each evaluation."""
    found = results["evaluations"]
    return {(line["when"], line.get("alpha")): line["n"] for line in found}


def test_so_many_images_the_training_images_and_the_way(config):
    ours = config.changed(epochs=1, eval_images=4, eval_train=True, alphas=(0.0, 0.5, 1.0))
    results = finetune(ours).results
    assert counts(results) == {
        **{("before", None): 4, ("along", 0.0): 4, ("along", 0.5): 4, ("along", 1.0): 4},
        **{("after", None): 4, ("train", None): 15},
    }
    lines = {(x["when"], x.get("alpha")): x["per_class"] for x in results["evaluations"]}
    assert lines["along", 0.0] == lines["before", None]
    assert lines["along", 1.0] == lines["after", None]


def test_the_ends_of_the_way_are_evaluated_once(config, monkeypatch):
    made, original = [], train.evaluate

    def numbered(*arguments, **options):
        made.append(original(*arguments, **options))
        return replace(made[-1], top1=len(made) / 100)

    monkeypatch.setattr(train, "evaluate", numbered)
    ours = config.changed(epochs=1, val_frequency=0, alphas=(0.0, 0.25, 0.5, 1.0))
    lines = finetune(ours).results["evaluations"]
    found = {(line["when"], line.get("alpha")): line["top1"] for line in lines}
    assert len(made) == 3
    assert [found["along", alpha] for alpha in (0.25, 0.5, 1.0)] == [0.01, 0.02, 0.03]
    assert found["along", 0.0] == found["before", None]
    assert found["after", None] == found["along", 1.0]


def test_the_way_changes_no_result(config, tmp_path):
    plain = SparseDelta.load(finetune(config.changed(epochs=1)).artefact)
    other = config.changed(epochs=1, alphas=(0.3,), output=str(tmp_path / "other"))
    along = SparseDelta.load(finetune(other).artefact)
    assert plain.nnz
    for (name, indices, values), (same, others, found) in zip(
        plain.items(), along.items(), strict=True
    ):
        assert name == same
        assert torch.equal(indices, others)
        assert torch.equal(values, found)


def test_validation_images_in_place_of_test_images(config):
    results = finetune(config.changed(epochs=1, eval_split="val")).results
    assert counts(results) == {("before", None): 6, ("after", None): 6}


def test_methods_without_a_way_have_no_alphas(config):
    with pytest.raises(ConfigError, match="--method lora has no --alpha"):
        config.changed(method="lora", alphas=(0.5,))
    with pytest.raises(ConfigError, match="--alphas must be at least 0 and at most 1, not 2"):
        config.changed(alphas=(0.5, 2.0))
    with pytest.raises(ConfigError, match=r"--alphas cannot be .*: it must be a list of numbers"):
        config.changed(alphas=("much",))


def test_what_is_known_of_the_pretrained_model_is_not_found_again(config, monkeypatch, tmp_path):
    known = {}
    made = []

    def counted(*arguments, **options):
        made.append(arguments[1].name)
        return original(*arguments, **options)

    original = train.evaluate_zero_shot
    monkeypatch.setattr(train, "evaluate_zero_shot", counted)
    first = finetune(config.changed(epochs=1), known).results
    assert len(made) == len(known) == 1
    other = config.changed(epochs=1, seed=2, method="full", output=str(tmp_path / "b"))
    second = finetune(other, known).results
    assert len(made) == 1
    assert [x for x in first["evaluations"] if x["when"] == "before"] == [
        x for x in second["evaluations"] if x["when"] == "before"
    ]
    fewer = config.changed(epochs=1, eval_images=4, output=str(tmp_path / "c"))
    assert counts(finetune(fewer, known).results)["before", None] == 4
    template = config.changed(epochs=1, template=("one {}",), output=str(tmp_path / "d"))
    finetune(template, known)
    assert len(made) == len(known) == 3
