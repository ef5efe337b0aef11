"""Fine-tuning: the training loop, and a whole run from settings to report."""

from __future__ import annotations

import hashlib
import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from saft_clip.batches import Batch, TrainingBatches, ordered_batches
from saft_clip.checkpoint import (
    find_checkpoints,
    load_latest,
    random_states,
    save_checkpoint,
    set_random_states,
)
from saft_clip.config import FinetuneConfig
from saft_clip.console import output, progress, say, warn
from saft_clip.data import ImageDataset, available_splits, drop_unreadable, few_shot, load_dataset
from saft_clip.errors import CheckpointError
from saft_clip.evaluate import Evaluation, evaluate_zero_shot
from saft_clip.methods import Method, find_method
from saft_clip.metrics import MetricsLog, read_metrics
from saft_clip.models import ClipModel, load_model, train_mode
from saft_clip.prompts import class_prompts
from saft_clip.report import accuracy_rows, accuracy_table, write_report
from saft_clip.results import summarize
from saft_clip.run_folder import RunFolder, describe_data, read_json
from saft_kernels.errors import NonFiniteGradientError
from saft_kernels.fingerprint import fingerprints


@dataclass(frozen=True)
class FinetuneResult:
    """Where the outcome of a run is, and what it is.

    Attributes:
        output: the folder.
        artefact: ``delta.safetensors`` or ``model.safetensors`` in it.
        results: the content of ``results.json``.
    """

    output: Path
    artefact: Path
    results: dict[str, Any]


# The loop ---------------------------------------------------------------------------------------


class Trainer:
    """Takes the optimizer steps of a run.

    Args:
        method: prepared, with its optimizer.
        batches: the training data.
        config: the run's settings.
    """

    def __init__(self, method: Method, batches: TrainingBatches, config: FinetuneConfig) -> None:
        self.method = method
        self.batches = batches
        self.config = config
        self.step = 0

    def steps(self) -> Iterator[dict[str, float]]:
        """Take the remaining steps; each yields ``loss``, ``lr``, ``grad_norm`` and ``images``.

        Raises:
            NonFiniteGradientError: if a loss or gradient is NaN or infinite; the weights are those
                before that step.
        """
        for batches in self.batches.steps_from(self.step):
            train_mode(self.method.model)
            size = self.batches.images_in(self.step)
            loss = self._backward(batches, size)
            norm = self.method.clip_grad_norm_(self.config.grad_clip_norm or math.inf)
            self._check_finite(loss, norm)
            lr = learning_rate(self.step, self.batches.steps, self.config)
            self.method.step(lr)
            self.step += 1
            yield {"loss": float(loss), "lr": lr, "grad_norm": float(norm), "images": size}

    def _backward(self, batches: Iterator[Batch], size: int) -> Tensor:
        """Accumulate the gradient of a step's mean loss over ``size`` images; return the loss."""
        total = torch.zeros((), device=self.method.device)
        for images, labels in batches:
            # A short batch counts for what it holds, so that the gradient is that of one big batch.
            loss = self.method.loss(images, labels) * (len(labels) / size)
            loss.backward()
            total += loss.detach()
        return total

    def _check_finite(self, loss: Tensor, norm: Tensor) -> None:
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise NonFiniteGradientError(
                    f"the {what} is {float(value)} at step {self.step + 1}: lower --lr, set "
                    "--grad-clip-norm, or use --precision fp32"
                )


def learning_rate(step: int, steps: int, config: FinetuneConfig) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov & Hutter 2017), per step.

    Args:
        step: steps taken so far, from 0.
        steps: of the whole run.
        config: for ``lr`` and ``warmup``.
    """
    warmup = steps // 10 if config.warmup is None else config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM ask for a stop instead of stopping at once; a second Ctrl-C does.

    Yields:
        A function that tells whether a stop was asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread can handle signals
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; press Ctrl-C again to stop at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# A whole run ------------------------------------------------------------------------------------


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune a model and write everything about it to ``config.output``.

    Raises:
        SaftError: whatever is wrong with settings, data, model or output folder, in one sentence.
        KeyboardInterrupt: after Ctrl-C; a message has said how to continue.
    """
    make_method = find_method(config.method)
    folder = RunFolder(config.output)
    folder.check(config)
    if config.resume and folder.finished():
        say(f"the run in {folder.path} is finished already")
        return _result(folder, make_method.artefact)
    if config.resume and not folder.started():
        say(f"there is no run in {folder.path} yet: starting from the beginning")
    clip = load_base(config)
    data = RunData(config, clip)
    folder.start(config, {**data.describe(), "the pretrained model": describe_model(clip)})
    tokens = class_prompts(data.train.class_names, data.train.templates, clip.tokenizer)
    run = Run(config, folder, clip, data, make_method(clip, tokens, config))
    try:
        run.prepare()
        run.train()
        run.finish()
    except KeyboardInterrupt:
        command = shlex.join(["saft", "finetune", "--resume", "--output", config.output])
        say(f"interrupted; continue with\n  {command}")
        raise
    finally:
        run.close()
    return _result(folder, make_method.artefact)


def load_base(config: FinetuneConfig) -> ClipModel:
    """The pretrained model; the same bits each time, random weights included."""
    torch.manual_seed(config.seed)
    return load_model(
        config.model,
        config.weights,
        device=config.device,
        precision=config.precision,
        force_quick_gelu=config.force_quick_gelu,
    )


def describe_model(clip: ClipModel) -> dict[str, str]:
    """What tells a model from one with other weights."""
    found = fingerprints(clip.model.state_dict().values())
    return {"fingerprint": hashlib.sha256("".join(found).encode()).hexdigest()[:16]}


class RunData:
    """The data sets of a run.

    Attributes:
        train: what is trained on, augmented if the settings say so.
        plain: the same images without augmentation, for selection.
        validation: for the learning curve; None if there is no such data.
        evaluation: spec -> test split.
    """

    def __init__(self, config: FinetuneConfig, clip: ClipModel) -> None:
        self._templates = config.template or None
        self._transform = clip.preprocess_val
        self.plain = self._training_images(config)
        self.train = self.plain
        if config.augment:
            self.train = replace(self.plain, transform=clip.preprocess_train)
        own = available_splits(config.train_data)
        spec = config.val_data or (config.train_data if "val" in own else None)
        self.validation = self._load(spec, "val") if spec else None
        specs = config.eval_data or ((config.train_data,) if "test" in own else ())
        if config.train_data in config.eval_data and not own:
            warn(
                f"{config.train_data} has no test split: evaluating on all of it, the training "
                "images included"
            )
        self.evaluation = {spec: self._load(spec, "test") for spec in specs}

    def _training_images(self, config: FinetuneConfig) -> ImageDataset:
        everything = self._load(config.train_data, "train")
        if config.shots:
            return few_shot(everything, config.shots, config.seed)
        return drop_unreadable(everything)

    def _load(self, spec: str, split: str) -> ImageDataset:
        return load_dataset(spec, split, self._transform, templates=self._templates)

    def describe(self) -> dict[str, dict[str, Any]]:
        """What tells these data sets from changed ones."""
        found = {"the training data": describe_data(self.plain, content=True)}
        if self.validation is not None:
            found["the validation data"] = describe_data(self.validation, content=False)
        for spec, dataset in self.evaluation.items():
            found[f"the evaluation data {spec}"] = describe_data(dataset, content=False)
        return found


class Run:
    """One run in its folder: selection, training with checkpoints, evaluations, results."""

    def __init__(
        self,
        config: FinetuneConfig,
        folder: RunFolder,
        clip: ClipModel,
        data: RunData,
        method: Method,
    ) -> None:
        self.config = config
        self.folder = folder
        self.clip = clip
        self.data = data
        self.method = method
        self.seconds = {"preparation": 0.0, "training": 0.0}
        batches = TrainingBatches(
            data.train,
            batch_size=config.batch_size,
            accum_freq=config.accum_freq,
            epochs=config.epochs,
            seed=config.seed,
            workers=config.workers,
        )
        self.trainer = Trainer(method, batches, config)
        self._saved = self._load_checkpoint()
        self.log = MetricsLog(
            folder.metrics,
            tensorboard=folder.tensorboard if config.tensorboard else None,
            keep=self._saved["metrics"] if self._saved else 0,
            step=self._saved["step"] if self._saved else 0,
        )

    def _load_checkpoint(self) -> dict[str, Any] | None:
        state: dict[str, Any] | None = load_latest(self.folder.checkpoints)
        if state is None:
            return None
        differences = FinetuneConfig.from_dict(state["config"]).differences(self.config)
        if differences or state["inputs"] != read_json(self.folder.inputs):
            newest = find_checkpoints(self.folder.checkpoints)[-1]
            why = "; ".join(differences) or "its data or pretrained model differ"
            raise CheckpointError(f"the checkpoint {newest} belongs to another run: {why}")
        return state

    def prepare(self) -> None:
        """Let the method decide what to train, then go to the last checkpoint, if there is one."""
        start = time.perf_counter()
        batches = ordered_batches(self.data.plain, self.config.batch_size, self.config.workers)
        self.method.prepare(batches, self.folder.path)
        self.seconds["preparation"] = time.perf_counter() - start
        if self._saved is not None:
            self._restore(self._saved)
            self._saved = None

    def _restore(self, state: dict[str, Any]) -> None:
        step = state["step"]
        self.method.load_state_dict(state["method"])
        self.trainer.step = step
        self.seconds = state["seconds"]
        set_random_states(state["random"], self.method.device)
        say(f"continuing from step {step} of {self.trainer.batches.steps}")

    def _save(self) -> None:
        state = {
            "step": self.trainer.step,
            "metrics": self.log.size(),
            "method": self.method.state_dict(),
            "random": random_states(self.method.device),
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "inputs": read_json(self.folder.inputs),
        }
        save_checkpoint(self.folder.checkpoints, self.trainer.step, state)

    def train(self) -> None:
        """Take the remaining steps.

        A checkpoint is made at the end of an epoch *before* its validation, so that a run that is
        stopped during the validation makes up for it.
        """
        trainer, config = self.trainer, self.config
        if trainer.step == 0:
            self._evaluate("before")
        total, per_epoch = trainer.batches.steps, trainer.batches.steps_per_epoch
        images = sum(trainer.batches.images_in(step) for step in range(trainer.step, total))
        if trainer.step % per_epoch == 0:
            self._validate()
        with progress("training", images) as advance, stop_requests() as stop:
            clock = time.perf_counter()
            for taken in trainer.steps():
                size, step = taken.pop("images"), trainer.step
                epoch_ends = step % per_epoch == 0
                save = epoch_ends and (self._epoch % config.save_frequency == 0 or step == total)
                now = time.perf_counter()
                self.seconds["training"] += now - clock
                self._log_step(taken, size / (now - clock))
                advance(int(size), note=f"epoch {self._epoch} loss {taken['loss']:.3f}")
                if save or stop():
                    self._save()
                if stop():
                    raise KeyboardInterrupt
                if epoch_ends:
                    self._validate()
                clock = time.perf_counter()

    @property
    def _epoch(self) -> int:
        """The epoch that the last step belonged to, from 1; 0 before the first."""
        return math.ceil(self.trainer.step / self.trainer.batches.steps_per_epoch)

    def _log_step(self, values: dict[str, float], rate: float) -> None:
        step = self.trainer.step
        if step % self.config.log_every_n_steps == 0:
            self.log.write("train", step, epoch=self._epoch, **values, images_per_s=round(rate, 1))

    def _validate(self) -> None:
        every, epoch = self.config.val_frequency, self._epoch
        if self.data.validation is None or every == 0:
            return
        if epoch % every == 0 or epoch == self.config.epochs:
            found = self._evaluate_on(self.data.validation, show_progress=epoch == 0)
            self.log.write("validation", self.trainer.step, epoch=epoch, **_brief(found))

    def _evaluate(self, when: str) -> None:
        for spec, dataset in self.data.evaluation.items():
            found = self._evaluate_on(dataset)
            shifted = spec != self.config.train_data
            self.log.write(
                "evaluation",
                self.trainer.step,
                when=when,
                spec=spec,
                shifted=shifted,
                **found.to_dict(),
            )

    def _evaluate_on(self, dataset: ImageDataset, show_progress: bool = True) -> Evaluation:
        return evaluate_zero_shot(
            self.clip,
            dataset,
            device=self.config.device,
            precision=self.config.precision,
            workers=self.config.workers,
            show_progress=show_progress,
        )

    def finish(self) -> None:
        """Write the result, evaluate it, and write the report."""
        artefact = self.method.export(self.folder.path, lambda: load_base(self.config).model)
        self._evaluate("after")
        lines = read_metrics(self.folder.metrics)
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        self.folder.finish(summarize(self.method, artefact, evaluations, self.seconds))
        write_report(self.folder.path)
        if evaluations:
            output.print(accuracy_table(accuracy_rows(evaluations)))
        say(f"wrote {artefact} and {self.folder.report}")

    def close(self) -> None:
        """Close the record."""
        self.log.close()


def _brief(found: Evaluation) -> dict[str, Any]:
    """An evaluation without what is told per class."""
    return {k: v for k, v in found.to_dict().items() if not k.startswith("per_class")}


def _result(folder: RunFolder, artefact: str) -> FinetuneResult:
    return FinetuneResult(folder.path, folder.path / artefact, read_json(folder.results))
