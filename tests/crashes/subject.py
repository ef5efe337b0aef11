"""Runs of a tiny model: one that nobody disturbs, and others like it."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch

from clip_helpers import SMALL, small_checkpoint, write_folder
from crashes.aim import Aim, Counts
from crashes.attempt import attempt, trace_of
from crashes.outcome import Undisturbed, WrongError
from crashes.watch import InPhase, Kill, Refusal
from saft_clip import checkpoint, figures, train
from saft_clip.config import FinetuneConfig

#: What is trained: gradients, precisions, accumulation and methods all go on in their own ways.
SETTINGS: dict[str, dict[str, Any]] = {
    "sampled": {"gradients": "sampled", "grad_clip_norm": 1.0},
    "streamed": {"gradients": "streamed", "precision": "amp_bf16", "accum_freq": 2},
    "dense": {"gradients": "dense", "workers": 1, "batch_size": 8},
    "full": {"method": "full"},
}


class Subject:
    """One setting: its undisturbed run, and others that are killed.

    Args:
        config: without a folder.
        folder: for everything.
    """

    def __init__(self, config: FinetuneConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        folder.mkdir()
        kept = folder / "checkpoints"
        kept.mkdir()
        with keeping_checkpoints(kept):
            self.trace = trace_of(self._named("undisturbed"), folder / "undisturbed.log")
        self.undisturbed = Undisturbed(folder / "undisturbed", kept)
        resumed = self._named("resumed", resume=True)
        attempt(resumed, InPhase("checkpoint", 2, 0.0), folder / "resumed.log")
        self.resumed_trace = trace_of(resumed, folder / "resumed.log")
        self.undisturbed.compare(folder / "resumed")

    def _named(self, name: str, **changes: Any) -> FinetuneConfig:
        return self._config.changed(output=str(self._folder / name), **changes)

    def run(self, kills: Iterator[Kill | None], counts: Counts, loaders: random.Random) -> None:
        """Kill a run again and again, let it end, and compare.

        Args:
            kills: when to kill each attempt; None, and the end, let it end by itself.
            counts: are brought up to date.
            loaders: draws how many processes load images, in each attempt anew.

        Raises:
            WrongError: if something is wrong with a file.
            RunFailedError: if the run cannot go on.
        """
        name = f"run-{counts.runs}"
        folder = self._folder / name
        for attempts in itertools.count():
            config = self._named(name, resume=True, workers=loaders.choice((0, 0, 1)))
            kill = next(kills, None)
            ending = attempt(config, kill, self._folder / f"{name}.log")
            counts.resumes += attempts > 0
            if ending.killed_in is None:
                break
            counts.kills[ending.killed_in][type(kill).__name__] += 1
            counts.hidden[ending.killed_in] += self.undisturbed.check(folder) > 0
        self.undisturbed.compare(folder)
        counts.runs += 1
        counts.longest = max(counts.longest, attempts)
        shutil.rmtree(folder)

    def refuse(self, refusal: Refusal, counts: Counts) -> None:
        """Refuse one file-system call to a run, resume it, and compare.

        Raises:
            WrongError: if something is wrong with a file, or with what the run said.
            RunFailedError: if the run cannot go on.
        """
        name = f"run-{counts.runs}"
        folder, log = self._folder / name, self._folder / f"{name}.log"
        ending = attempt(self._named(name), refusal, log)
        if ending.error is not None:
            _check_sentence(ending.error, folder, refusal)
        (counts.refused if ending.error else counts.spared)[refusal.phase] += 1
        self.undisturbed.check(folder)
        # Even where the run did without what was refused: to tidy up.
        attempt(self._named(name, resume=True), None, log)
        self.undisturbed.compare(folder)
        counts.runs += 1
        shutil.rmtree(folder)

    def every_call(self) -> Iterator[tuple[str, int, bool]]:
        """Each file-system call of the undisturbed run twice: phase, number, whether halfway."""
        for phase, calls in self.trace.calls.items():
            yield from itertools.product((phase,), range(1, calls + 1), (False, True))

    def at_random(self, aim: Aim, name: str, limit: int) -> Iterator[Kill]:
        """Up to ``limit`` kills of the run of that name."""
        folder = self._folder / name
        for _ in range(limit):
            saved = any((folder / "checkpoints").glob("step-*"))
            yield aim.choose(self.resumed_trace if saved else self.trace, folder)


def _check_sentence(said: str, folder: Path, refusal: Refusal) -> None:
    """It must be one sentence that names the file, the reason, and what to do."""
    reason = f"could not be written ({os.strerror(refusal.error)}): "
    if "\n" in said or not said.startswith(str(folder)) or reason not in said:
        raise WrongError(f"{refusal}: {said!r} is not the sentence it should be")


@contextmanager
def keeping_checkpoints(folder: Path) -> Iterator[None]:
    """Inside, every checkpoint is also copied to a folder."""

    def save(*arguments: Any) -> Path:
        return Path(shutil.copy(checkpoint.save_checkpoint(*arguments), folder))

    original, train.save_checkpoint = train.save_checkpoint, save  # type: ignore[assignment]
    try:
        yield
    finally:
        train.save_checkpoint = original  # type: ignore[assignment]


def warmed_up(folder: Path) -> FinetuneConfig:
    """Make data and a model, and let this process import and prepare all that a run needs."""
    torch.set_num_threads(1)
    # The same each time, and longer in the making than the whole run.
    open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)
    for name in ("accuracy_figure", "curves_figure", "blocks_figure"):
        setattr(figures, name, lambda *_: "<svg></svg>")  # no file, and half of the time otherwise
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        write_folder(folder / "pets" / split, {"cat": count, "dog": count})
    config = FinetuneConfig(
        train_data=str(folder / "pets"),
        model=SMALL,
        pretrained=str(small_checkpoint(folder / "small.safetensors")),
        shots=6,
        batch_size=4,
        epochs=3,
        lr=1e-2,
        density=0.01,
        precision="fp32",
        output=str(folder / "warming-up"),
    )
    with contextlib.redirect_stderr(io.StringIO()):
        train.finetune(config)
    return config
