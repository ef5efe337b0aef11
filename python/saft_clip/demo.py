"""``saft demo``: SAFT against full fine-tuning on the built-in tiny CLIP, offline, in minutes.

A few MNIST digits of each class are trained on. What comes out is evaluated on other images of the
same kind, on shifted domains, and on letters, which were not trained. Both methods get the same
number of trials to choose their learning rate (and SAFT its density), on validation images of the
training domain only. Then the choice is run with three seeds. Whatever was measured is shown.

The tiny CLIP reads clean digits so well that there is little to gain; ``--domain noisy`` leaves
more.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saft_clip.batches import TrainingBatches, ordered_batches
from saft_clip.config import FinetuneConfig
from saft_clip.console import console, output, progress, say
from saft_clip.cores import usable_cores
from saft_clip.data import ImageDataset, few_shot, load_dataset
from saft_clip.demo_page import SUMMARY, summary_table, write_demo_page
from saft_clip.domains import DOMAINS, domain_splits
from saft_clip.errors import ConfigError, TrialError
from saft_clip.evaluate import evaluate_zero_shot
from saft_clip.methods import find_method
from saft_clip.methods.base import Method
from saft_clip.models import ClipModel, load_model
from saft_clip.prompts import ClassPrompts
from saft_clip.results import environment
from saft_clip.run_folder import RunFolder, write_json
from saft_clip.run_lock import RunLock
from saft_clip.tiny import TINY_NAME
from saft_clip.trainer import Trainer
from saft_kernels.files import make_folder, remove_leftovers

DIGITS = ("mnist", "uci", "fonts", "inverted", "noisy", "blurred", "sketch", "colour")
NEW_CLASSES = "letters"

ZERO_SHOT = "zero-shot"

_SCRATCH = ".trials-"


@dataclass(frozen=True)
class Plan:
    """What the demo does; the defaults are made for a few minutes on two cores.

    Attributes:
        trained: the domain of the training images.
        shots: training images per class.
        epochs: passes over them; equal for all trials.
        seeds: of the final runs; the first one is also the seed of the trials.
        full_lrs: learning rates that full fine-tuning tries.
        saft_lrs: density -> learning rates that SAFT tries with it; as many in all.
        validation: images of the training domain that trials are compared on.
        test: images of each domain that the final runs are evaluated on.
    """

    trained: str = "mnist"
    shots: int = 16
    epochs: int = 6
    seeds: tuple[int, ...] = (1, 2, 3)
    full_lrs: tuple[float, ...] = tuple(np.geomspace(1e-5, 1e-3, 12).round(7).tolist())
    saft_lrs: tuple[tuple[float, tuple[float, ...]], ...] = (
        (1e-3, (3e-4, 1e-3, 3e-3)),
        (1e-2, (1e-4, 3e-4, 1e-3)),
        (5e-2, (3e-5, 1e-4, 3e-4)),
        (2e-1, (3e-5, 1e-4, 3e-4)),
    )
    validation: int = 500
    test: int = 300

    @property
    def shifted(self) -> tuple[str, ...]:
        """The other domains of the same classes."""
        return tuple(name for name in DIGITS if name != self.trained)

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains, the trained one first."""
        return (self.trained, *self.shifted, NEW_CLASSES)


@dataclass(frozen=True)
class Trial:
    """One training with one evaluation.

    Attributes:
        method: ``saft``, ``full`` or ``zero-shot``.
        lr: learning rate; 0 for zero-shot.
        density: of SAFT; 1 for full fine-tuning, 0 for zero-shot.
        seed: of the few-shot sample and the order.
        final: evaluate on the test images of all domains; else on the validation images.
    """

    method: str
    lr: float = 0.0
    density: float = 0.0
    seed: int = 0
    final: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a trial gave.

    Attributes:
        trial: which one.
        accuracy: domain -> top-1, a fraction of 1.
        trained: number of trained parameters.
        seconds: for selection and training.
    """

    trial: Trial
    accuracy: dict[str, float]
    trained: int
    seconds: float


def run_demo(folder: Path, plan: Plan | None = None) -> dict[str, Any]:
    """Run the demo, print its table, and write its page and the delta.

    Args:
        folder: for everything it writes; made if it is missing. An earlier demo's files in it are
            replaced.
        plan: what to do.

    Returns:
        What ``demo.json`` holds.

    Raises:
        ConfigError: if the domain cannot be trained on, or the folder holds a fine-tuning run.
        LockedError: if another process is at work in the folder.
        FileWriteError: if the folder cannot be written to.
        MissingExtraError: if the packages with the images are not installed.
    """
    plan = plan or Plan()
    trainable = [name for name in DIGITS if "train" in domain_splits(name)]
    if plan.trained not in trainable:
        raise ConfigError(f"the demo trains on {' or '.join(trainable)}, not on {plan.trained!r}")
    if RunFolder(folder).started():
        raise ConfigError(f"{folder} holds a run of saft finetune: give another --output")
    make_folder(folder / "samples")
    with RunLock(folder) as lock:
        lock.acquire()
        return _compare(folder, plan)


def _compare(folder: Path, plan: Plan) -> dict[str, Any]:
    start = time.perf_counter()
    for left in folder.glob(f"{_SCRATCH}*"):  # by a demo that was killed
        shutil.rmtree(left, ignore_errors=True)
    remove_leftovers(folder, [SUMMARY, "report.html"])
    say("comparing SAFT with full fine-tuning on the built-in tiny CLIP")
    clip = load_model(TINY_NAME)
    data = load_domains(plan, clip)
    with (
        TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch,
        _workers(Path(scratch), plan, data) as pool,
        progress("trials", number_of_trials(plan), unit="trials") as advance,
    ):
        tuning = _run_all(pool, tuning_trials(plan), advance)
        finals = _run_all(pool, final_trials(plan, tuning), advance)
        artefacts = _keep(Path(scratch), folder, plan, tuning)
    summary = {
        "plan": asdict(plan),
        "domains": {name: DOMAINS[name] for name in plan.domains},
        "roles": {"trained": plan.trained, "shifted": plan.shifted, "new_classes": NEW_CLASSES},
        "images": {name: len(dataset) for name, dataset in data.items()},
        "tuning": [asdict(outcome) for outcome in tuning],
        "finals": [asdict(outcome) for outcome in finals],
        "chosen": {name: asdict(best_trial(tuning, name)) for name in ("full", "saft")},
        "artefacts": artefacts,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(torch.device("cpu")),
    }
    for name, dataset in data.items():
        save_samples(dataset, folder / "samples" / f"{name}.png")
    write_json(folder / SUMMARY, summary)
    page = write_demo_page(folder)
    output.print(summary_table(summary))
    say(f"wrote {page} and {folder / 'delta.safetensors'}")
    return summary


# Data -------------------------------------------------------------------------------------------


class PreparedImages(ImageDataset):
    """Images that went through the model's preprocessing: float32 arrays [3, H, W]."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image and its label."""
        return self.transform(self.images[index]), int(self.labels[index])


def load_domains(plan: Plan, clip: ClipModel) -> dict[str, PreparedImages]:
    """All images of the demo: each domain's test images, and training and validation ones."""
    data = {name: _prepare(f"builtin:{name}", "test", plan.test, clip) for name in plan.domains}
    data["train"] = _prepare(f"builtin:{plan.trained}", "train", None, clip)
    data["val"] = _prepare(f"builtin:{plan.trained}", "val", plan.validation, clip)
    return data


def _prepare(spec: str, split: str, limit: int | None, clip: ClipModel) -> PreparedImages:
    dataset = load_dataset(spec, split, clip.preprocess_val)
    if limit is not None:
        dataset = dataset.evenly(limit)
    return PreparedImages(
        dataset.name,
        [dataset[index][0].numpy() for index in range(len(dataset))],
        dataset.labels,
        dataset.class_names,
        dataset.templates,
        torch.from_numpy,
    )


def save_samples(dataset: ImageDataset, path: Path, count: int = 8) -> None:
    """Save a strip of a data set's images, one beside the other, as the model sees them."""
    chosen = dataset.evenly(count)
    strip = np.concatenate([np.asarray(image) for image in chosen.images], axis=2)
    low, high = strip.min(), strip.max()
    pixels = ((strip - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


# Trials -----------------------------------------------------------------------------------------


def tuning_trials(plan: Plan) -> list[Trial]:
    """The trials that learning rates and density are chosen with: as many for each method."""
    seed = plan.seeds[0]
    saft = [Trial("saft", lr, density, seed) for density, lrs in plan.saft_lrs for lr in lrs]
    return saft + [Trial("full", lr, 1.0, seed) for lr in plan.full_lrs]


def final_trials(plan: Plan, tuning: Sequence[Outcome]) -> list[Trial]:
    """The chosen learning rate of full fine-tuning and of SAFT at each density, with each seed."""
    chosen = [best_trial(tuning, "full")]
    chosen += [best_trial(tuning, "saft", density) for density, _ in plan.saft_lrs]
    finals = [replace(trial, seed=seed, final=True) for trial in chosen for seed in plan.seeds]
    return [Trial(ZERO_SHOT, final=True), *finals]


def number_of_trials(plan: Plan) -> int:
    """How many trials there are in all."""
    return len(tuning_trials(plan)) + 1 + len(plan.seeds) * (1 + len(plan.saft_lrs))


def best_trial(tuning: Sequence[Outcome], method: str, density: float | None = None) -> Trial:
    """The trial with the best validation accuracy; the first one of equals."""
    candidates = [
        outcome
        for outcome in tuning
        if outcome.trial.method == method and density in (None, outcome.trial.density)
    ]
    return max(candidates, key=lambda outcome: outcome.accuracy["val"]).trial


def run_trial(
    trial: Trial, plan: Plan, clip: ClipModel, data: dict[str, PreparedImages], folder: Path
) -> Outcome:
    """Train a copy of the model and evaluate it.

    Args:
        trial: what to do.
        plan: for everything else.
        clip: the pretrained model; it is not changed.
        data: from :func:`load_domains`.
        folder: where masks are kept, by seed and density, and final results are written.
    """
    start = time.perf_counter()
    tuned = replace(clip, model=copy.deepcopy(clip.model))
    trained = 0
    if trial.method != ZERO_SHOT:
        method = _train(trial, plan, tuned, data["train"], folder / _name(trial))
        trained = sum(method.trained.values())
        if trial.final and trial.seed == plan.seeds[0]:
            method.export(folder / _name(trial), lambda: clip.model)
    seconds = time.perf_counter() - start
    names = plan.domains if trial.final else ("val",)
    found = {
        name: evaluate_zero_shot(tuned, data[name], batch_size=100, show_progress=False).top1
        for name in names
    }
    return Outcome(trial, found, trained, round(seconds, 2))


def _name(trial: Trial) -> str:
    return f"{trial.method}-{trial.density:g}-seed{trial.seed}"


def _train(trial: Trial, plan: Plan, clip: ClipModel, images: ImageDataset, folder: Path) -> Method:
    """Fine-tune ``clip`` in place."""
    config = FinetuneConfig(
        train_data=f"builtin:{plan.trained}",
        model=TINY_NAME,
        method=trial.method,
        density=trial.density,
        shots=plan.shots,
        epochs=plan.epochs,
        lr=trial.lr,
        seed=trial.seed,
        precision="fp32",
        gradients="streamed",  # the faster way for a model as small as this
        augment=False,
    )
    make_folder(folder)
    sample = few_shot(images, config.shots, config.seed)
    prompts = ClassPrompts(sample.class_names, sample.templates, clip.tokenizer)
    method = find_method(config.method)(clip, prompts, config)
    method.prepare(ordered_batches(sample, config.batch_size), folder)
    batches = TrainingBatches(
        sample,
        batch_size=config.batch_size,
        accum_freq=config.accum_freq,
        epochs=config.epochs,
        seed=config.seed,
    )
    for _ in Trainer(method, batches, config).steps():
        pass
    return method


def _keep(scratch: Path, folder: Path, plan: Plan, tuning: Sequence[Outcome]) -> dict[str, int]:
    """Move the chosen trials' results of the first seed to the folder; file name -> bytes."""
    sizes = {}
    for name in ("saft", "full"):
        trial = replace(best_trial(tuning, name), seed=plan.seeds[0])
        artefact = find_method(name).artefact
        os.replace(scratch / _name(trial) / artefact, folder / artefact)
        sizes[artefact] = (folder / artefact).stat().st_size
    return sizes


# Processes --------------------------------------------------------------------------------------

#: What every trial of a worker process needs: plan, model, data, folder.
_context: tuple[Plan, ClipModel, dict[str, PreparedImages], Path]


@contextmanager
def _workers(
    folder: Path, plan: Plan, data: dict[str, PreparedImages]
) -> Iterator[ProcessPoolExecutor]:
    """One process per core with one thread each: a model this small gains nothing from threads."""
    pool = ProcessPoolExecutor(
        min(usable_cores(), number_of_trials(plan)),
        multiprocessing.get_context("spawn"),
        _start_worker,
        (folder, plan, data),
    )
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BrokenProcessPool:
        raise TrialError(
            "a worker process of the demo was killed, as happens when memory runs out; close other "
            "programs and run it again"
        ) from None
    except KeyboardInterrupt:
        say("interrupted; nothing was kept")
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_for_parent_only() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _start_worker(folder: Path, plan: Plan, data: dict[str, PreparedImages]) -> None:
    global _context
    torch.set_num_threads(1)
    console.quiet = True  # only the main process talks
    _context = (plan, load_model(TINY_NAME), data, folder)


def _work(trial: Trial) -> Outcome:
    plan, clip, data, folder = _context
    return run_trial(trial, plan, clip, data, folder)


def _run_all(pool: ProcessPoolExecutor, trials: Sequence[Trial], advance: Any) -> list[Outcome]:
    with _interrupts_for_parent_only():
        futures = {pool.submit(_work, trial): trial for trial in trials}
    outcomes = {}
    for future in as_completed(futures):
        trial = futures[future]
        outcomes[trial] = future.result()
        advance(note=f"{trial.method} lr {trial.lr:g}")
    return [outcomes[trial] for trial in trials]
