"""Fine-tuning: a whole run, from settings to report."""

from __future__ import annotations

import functools
import gc
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saft_clip.auto_density import (
    DensityTrial,
    chosen_config,
    no_validation_images,
    to_dicts,
    try_densities,
)
from saft_clip.batches import TrainingBatches, ordered_batches
from saft_clip.checkpoint import find_checkpoints, load_latest, save_checkpoint
from saft_clip.config import AUTO, FinetuneConfig
from saft_clip.console import progress, say, warn
from saft_clip.data import (
    ImageDataset,
    available_splits,
    divided,
    drop_unreadable,
    few_shot,
    load_dataset,
    parse_spec,
    require_classes,
    resolved,
)
from saft_clip.errors import CheckpointError, OutOfMemoryError, WorkerError
from saft_clip.evaluate import Evaluation, evaluate, evaluate_zero_shot
from saft_clip.methods import find, find_method
from saft_clip.methods.base import Method
from saft_clip.metrics import MetricsLog, read_metrics
from saft_clip.models import ClipModel, fingerprint_of, load_model
from saft_clip.peak_memory import PeakMemory
from saft_clip.prompts import ClassPrompts
from saft_clip.random_states import random_states
from saft_clip.report import write_report
from saft_clip.results import read_results, summarize
from saft_clip.run_folder import RunFolder, describe_data, read_json
from saft_clip.run_state import RunState
from saft_clip.shortages import explained_shortages
from saft_clip.text_tower import padding_reason
from saft_clip.trainer import Trainer, stop_requests
from saft_kernels.errors import FileWriteError, SaftError


@dataclass(frozen=True)
class FinetuneResult:
    """Where the outcome of a run is, and what it is.

    Attributes:
        output: the folder.
        artefact: ``delta.safetensors``, ``model.safetensors`` or ``adapter.safetensors`` in it.
        results: the content of ``results.json``.
    """

    output: Path
    artefact: Path
    results: dict[str, Any]


#: Evaluations of pretrained models by what they depend on.
Known = MutableMapping[str, Evaluation]


def finetune(config: FinetuneConfig, known: Known | None = None) -> FinetuneResult:
    """Fine-tune a model and write everything about it to ``config.output``.

    Args:
        config: the settings.
        known: evaluations of pretrained models that need not be made again; new ones are added. One
            dictionary for many runs saves each of them the evaluation before training.

    Raises:
        SaftError: whatever is wrong with settings, data, model or output folder, in one sentence.
        KeyboardInterrupt: after Ctrl-C; a message has said how to continue.
    """
    artefact = find_method(config.method).artefact
    folder = RunFolder(config.output)
    with _saying_how_to_go_on(folder):
        results = _carry_out(config, {} if known is None else known)
    return FinetuneResult(folder.path, folder.path / artefact, results)


@contextmanager
def _saying_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Say so if a run is stopped inside, by the user or for want of something.

    It is said out here because torch may raise more than once while it notices a dead process.
    """
    try:
        yield
    except (KeyboardInterrupt, FileWriteError, WorkerError, OutOfMemoryError) as error:
        if folder.started():
            command = ["saft", "finetune", "--resume", "--output", str(folder.path)]
            wanted = isinstance(error, KeyboardInterrupt)
            when = "interrupted;" if wanted else "once that is put right,"
            say(f"{when} continue with\n  {shlex.join(command)}")
        raise


def _carry_out(config: FinetuneConfig, known: Known) -> dict[str, Any]:
    """Start a run, or go on with it, to its end; its results."""
    folder = RunFolder(config.output)
    if config.resume and folder.complete():  # maybe on a disk that is read-only by now
        folder.check(config)
        say(f"the run in {folder.path} is finished already")
        folder.tidy()
    else:
        with explained_shortages(), folder.lock:
            _work_in(folder, config, known)
    return read_results(folder.results)


def _work_in(folder: RunFolder, config: FinetuneConfig, known: Known) -> None:
    if folder.path.exists():
        folder.lock.acquire()
    folder.check(config)
    if config.resume and folder.finished():  # it was stopped just before its last file
        say(f"the run in {folder.path} is finished already")
        folder.settle()
        write_report(folder.path)
        return
    if config.resume and not folder.started():
        say(f"there is no run in {folder.path} yet: starting from the beginning")
    clip = load_base(config)
    data = RunData(config, clip)
    reason = padding_reason(clip.model)
    if reason is not None:
        say(f"the class prompts are encoded with their padding: {reason}")
    method = _method(config, clip, data)
    if config.density == AUTO and data.validation is None:
        raise no_validation_images(config)
    fresh = not folder.started()
    folder.start(
        config,
        {**data.describe(), "the pretrained model": {"fingerprint": fingerprint_of(clip.model)}},
    )
    run: Run | None = None
    try:
        trials = []
        if config.density == AUTO:
            del clip, method  # a trial has its own
            trials = try_densities(config, lambda trial: _carry_out(trial, known))
            config = chosen_config(config, trials)
            clip = load_base(config)
            method = _method(config, clip, data)
        run = Run(config, folder, clip, data, method, known, trials)
        run.prepare()
        run.train()
        run.finish()
    except SaftError:
        if fresh and (run is None or run.trainer.step == 0):
            folder.abandon()  # so that the command can be corrected and given again
        raise
    finally:
        if run is not None:
            run.close()


def _method(config: FinetuneConfig, clip: ClipModel, data: RunData) -> Method:
    prompts = ClassPrompts(data.train.class_names, data.train.templates, clip.tokenizer)
    return find_method(config.method)(clip, prompts, config)


def load_base(config: FinetuneConfig) -> ClipModel:
    """The pretrained model; the same bits each time, random weights included."""
    gc.collect()  # an attached model is in a reference cycle: what is done with goes first
    torch.manual_seed(config.seed)
    return load_model(
        config.model,
        config.weights,
        device=config.device,
        precision=config.precision,
        force_quick_gelu=config.force_quick_gelu,
    )


class RunData:
    """The data sets of a run.

    Attributes:
        train: what is trained on, augmented if the settings say so.
        plain: the same images without augmentation, for selection.
        validation: for the learning curve; None if there is no such data.
        evaluation: spec -> its images of the split that is evaluated.
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
        split = config.eval_split
        specs = config.eval_data or ((config.train_data,) if split in own else ())
        self.evaluation = {spec: self._load(spec, split) for spec in specs}
        if config.eval_images is not None:
            self.evaluation = {k: v.evenly(config.eval_images) for k, v in self.evaluation.items()}
        self._train_data = config.train_data
        self._has_test_images = bool(own)
        self._warn()

    def all(self) -> Iterator[ImageDataset]:
        """What is trained on, validated on and evaluated on."""
        yield self.train
        if self.validation is not None:
            yield self.validation
        yield from self.evaluation.values()

    def _warn(self) -> None:
        for spec in self.evaluation:
            if self.includes_training(spec):
                warn(f"{spec} has no test split: evaluating on all of it, training images included")
        if not self.evaluation:
            warn("nothing to evaluate: the training data have no test split; see --eval-data")

    def is_shifted(self, spec: str) -> bool:
        """Whether these are other data than the training data, however their paths are written."""
        parts, trained = parse_spec(spec), parse_spec(self._train_data)
        same = resolved(parts.source) == resolved(trained.source)
        return not same or (parts.corruption, parts.half) != (trained.corruption, trained.half)

    def includes_training(self, spec: str) -> bool:
        """Whether images that were trained on are evaluated, for want of a test split."""
        parts, trained = parse_spec(spec), parse_spec(self._train_data)
        same = resolved(parts.source) == resolved(trained.source)
        both = parts.half == trained.half or not parts.half or not trained.half
        return same and both and not self._has_test_images

    def _training_images(self, config: FinetuneConfig) -> ImageDataset:
        whole, half = divided(config.train_data)
        everything = self._load(whole, "train")
        if config.shots:
            # Before the classes are divided, as in CoOp: so the base half's images are the same.
            needed = everything.half_of_classes(half) if half else None
            chosen = few_shot(everything, config.shots, config.seed, needed)
            chosen = chosen.half(half) if half else chosen
        else:
            chosen = drop_unreadable(everything.half(half) if half else everything)
        require_classes(chosen)
        return chosen

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
        known: Known,
        trials: Sequence[DensityTrial] = (),
    ) -> None:
        self.known = known
        self.trials = trials
        self.config = config
        self.folder = folder
        self.clip = clip
        self.data = data
        self.method = method
        self.seconds = {"preparation": 0.0, "training": 0.0}
        self._found: dict[tuple[float | None, str], Evaluation] = {}
        batches = TrainingBatches(
            data.train,
            batch_size=config.batch_size,
            accum_freq=config.accum_freq,
            epochs=config.epochs,
            min_steps=config.min_steps,
            seed=config.seed,
            workers=config.workers,
        )
        self.trainer = Trainer(method, batches, config)
        self._saved = self._load_checkpoint()
        self.log = MetricsLog(
            folder.metrics,
            tensorboard=folder.tensorboard if config.tensorboard else None,
            keep=self._saved.metrics if self._saved else 0,
            step=self._saved.step if self._saved else 0,
        )

    def _load_checkpoint(self) -> RunState | None:
        state = load_latest(self.folder.checkpoints)
        if state is None:
            return None
        newest = f"the checkpoint {find_checkpoints(self.folder.checkpoints)[-1]}"
        saved = RunState.of(state, newest)
        differences = saved.config.differences(self.config)
        if differences or saved.inputs != read_json(self.folder.inputs):
            why = "; ".join(differences) or "its data or pretrained model differ"
            raise CheckpointError(f"{newest} belongs to another run: {why}")
        if saved.step > self.trainer.batches.steps:
            raise CheckpointError(f"{newest} is broken: its step is beyond the run's last")
        return saved

    def prepare(self) -> None:
        """Let the method decide what to train, then go to the last checkpoint, if there is one."""
        start = time.perf_counter()
        self.peak_memory = PeakMemory(self.method.device)
        batches = ordered_batches(self.data.plain, self.config.batch_size, self.config.workers)
        for dataset in self.data.all():
            self.method.check_classes(dataset.class_names)
        self.method.prepare(batches, self.folder.path)
        self.seconds["preparation"] = time.perf_counter() - start
        if self._saved is not None:
            self._restore(self._saved)
            self._saved = None

    def _restore(self, saved: RunState) -> None:
        saved.restore(self.method)
        self.trainer.step = saved.step
        self.seconds = saved.seconds
        say(f"continuing from step {saved.step} of {self.trainer.batches.steps}")

    def _save(self, logged: int | None = None) -> None:
        """Make a checkpoint; only the first ``logged`` bytes of the record belong to it."""
        state = {
            "step": self.trainer.step,
            "metrics": self.log.size() if logged is None else logged,
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
            self._evaluate("before", self._zero_shot)
        if not find(self.config.method).trains:
            return
        total, per_epoch = trainer.batches.steps, trainer.batches.steps_per_epoch
        if trainer.step % per_epoch == 0:
            self._validate()
        with (
            progress("training", trainer.batches.images_from(trainer.step)) as advance,
            stop_requests() as stop,
        ):
            clock = time.perf_counter()
            for taken in trainer.steps():
                size, step = taken.pop("images"), trainer.step
                epoch_ends = step % per_epoch == 0
                save = epoch_ends and (self._epoch % config.save_frequency == 0 or step == total)
                now = time.perf_counter()
                self.seconds["training"] += now - clock
                self._log_step(taken, size, now - clock)
                advance(int(size), note=f"epoch {self._epoch} loss {taken['loss']:.3f}")
                if save or stop():
                    self._save()
                if stop():
                    raise KeyboardInterrupt
                if epoch_ends:
                    logged = self.log.size()
                    self._validate()
                    if stop():
                        self._save(logged)  # the resumed run validates again
                        raise KeyboardInterrupt
                clock = time.perf_counter()

    @property
    def _epoch(self) -> int:
        """The epoch that the last step belonged to, from 1; 0 before the first."""
        return math.ceil(self.trainer.step / self.trainer.batches.steps_per_epoch)

    def _log_step(self, values: dict[str, float], images: float, seconds: float) -> None:
        step = self.trainer.step
        if step % self.config.log_every_n_steps == 0:
            times = {"seconds": round(seconds, 6), "images_per_s": round(images / seconds, 1)}
            self.log.write("train", step, epoch=self._epoch, **values, **times)

    def _validate(self) -> None:
        every, epoch = self.config.val_frequency, self._epoch
        if self.data.validation is None or every == 0:
            return
        if epoch % every == 0 or epoch == self.trainer.batches.epochs:
            found = self._evaluate_on(self.data.validation, show_progress=epoch == 0)
            self.log.write("validation", self.trainer.step, epoch=epoch, **_brief(found))

    def _evaluate(
        self, when: str, find: Callable[[str, ImageDataset], Evaluation], **more: Any
    ) -> None:
        for spec, dataset in self.data.evaluation.items():
            self._log_evaluation(
                find(spec, dataset),
                when=when,
                spec=spec,
                shifted=self.data.is_shifted(spec),
                includes_training=self.data.includes_training(spec),
                **more,
            )

    def _log_evaluation(self, found: Evaluation, **about: Any) -> None:
        self.log.write("evaluation", self.trainer.step, **about, **found.to_dict())

    def _evaluate_training_images(self) -> None:
        found = self._evaluate_on(self.data.plain)
        self._log_evaluation(
            found, when="train", spec=self.config.train_data, shifted=False, includes_training=True
        )

    def _evaluate_on(self, dataset: ImageDataset, show_progress: bool = True) -> Evaluation:
        return evaluate(
            self.clip,
            dataset,
            lambda prompts: self.method.scores(prompts, show_progress=show_progress),
            device=self.config.device,
            precision=self.config.precision,
            workers=self.config.workers,
            show_progress=show_progress,
        )

    def _zero_shot(self, spec: str, dataset: ImageDataset) -> Evaluation:
        """By the class prompts, however the method classifies; made once of what is the same."""
        inputs = read_json(self.folder.inputs)
        facts = (inputs["the pretrained model"], inputs[f"the evaluation data {spec}"])
        config = self.config
        how = [config.model, config.force_quick_gelu, config.precision, config.device]
        key = json.dumps([facts, dataset.name, how])
        if key not in self.known:
            self.known[key] = evaluate_zero_shot(
                self.clip,
                dataset,
                device=self.config.device,
                precision=self.config.precision,
                workers=self.config.workers,
            )
        return self.known[key]

    def _evaluate_along(self, base: Callable[[], nn.Module]) -> None:
        go = self.method.way(base)
        for alpha in self.config.alphas:
            go(alpha)
            # The way begins at the pretrained model, which has been evaluated.
            find = functools.partial(self._at, alpha) if alpha else self._zero_shot
            self._evaluate("along", find, alpha=alpha)
        go(1.0)

    def _at(self, alpha: float | None, spec: str, dataset: ImageDataset) -> Evaluation:
        """At a share of the way, where the model is; the result's own share is met twice."""
        if (alpha, spec) not in self._found:
            self._found[alpha, spec] = self._evaluate_on(dataset)
        return self._found[alpha, spec]

    def finish(self) -> None:
        """Write the result, evaluate it, and write the report."""
        peak = self.peak_memory.bytes()  # before the pretrained model is loaded once more
        base = functools.cache(lambda: load_base(self.config).model)
        if self.config.alphas:
            self._evaluate_along(base)
        self.method.finish(base)
        self.method.require_finite()
        artefact = self.method.export(self.folder.path, base)
        self._evaluate("after", functools.partial(self._at, self.config.alpha))
        if self.config.eval_train:
            self._evaluate_training_images()
        lines = read_metrics(self.folder.metrics)
        results = summarize(self.method, artefact, lines, self.seconds, peak)
        self.folder.finish(results | {"density_trials": list(to_dicts(self.trials))})
        write_report(self.folder.path)
        say(f"wrote {artefact} and {self.folder.report}")

    def close(self) -> None:
        """Close the record."""
        self.log.close()


def _brief(found: Evaluation) -> dict[str, Any]:
    """An evaluation without what is told per class."""
    return {k: v for k, v in found.to_dict().items() if not k.startswith("per_class")}
