"""Whole runs of ``saft finetune`` on the built-in tiny CLIP: select, train, evaluate, write.

The data is an image folder of real digits, as a user has one. Everything a user waits for is in
these times: reading the images, selecting, training, evaluating before and after, the delta or
model file, and the report page. The tiny model's layers are so small that full fine-tuning has
little to save here; what a step of a real model takes is ``clip_step``'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from saft_clip.config import FinetuneConfig
from saft_clip.console import console
from saft_clip.data import load_dataset
from saft_clip.domains import MissingExtraError
from saft_clip.models import load_model
from saft_clip.tiny import TINY_NAME
from saft_clip.train import FinetuneResult, finetune
from saft_kernels import SparseDelta

from ..flops import Flops
from ..harness import Contender, measure, require
from ..limits import Needs
from ..memory import MeasurementError, peak_memory
from ..models import Setting
from ..outcome import Figure, MemoryUse, Outcome, Timing
from ..ratios import times_as_long

DATA = "builtin:mnist"

#: Images per class that are evaluated, before and after.
TESTED = 10

FULL = "full fine-tuning"

#: Options of every method: name -> what differs from the defaults, and what it covers.
METHODS: dict[str, dict[str, Any]] = {
    FULL: {"method": "full"},
    "SAFT, sampled gradients": {"gradients": "sampled"},
    "SAFT, streamed gradients": {"gradients": "streamed"},
    "SAFT, dense gradients": {"gradients": "dense"},
}
COVERS = {FULL: "every parameter"}

#: Points of accuracy that a run may lose; the tiny model knows these digits before.
MAY_LOSE = 0.03


def run(setting: Setting) -> Outcome:
    """Every method, in time and in memory."""
    shots = 1 if setting.small else 16
    group = f"saft finetune of {TINY_NAME}, {shots} images per class, one epoch"
    with TemporaryDirectory() as folder, _quiet():
        digits = write_digits(Path(folder), shots)
        runs = {name: Run(name, digits) for name in METHODS}
        timings = measure(group, [each.contender() for each in runs.values()], setting.steps)
    memory = [_memory(group, name, shots) for name in METHODS]
    figures = [*_figures(timings), *(each.size() for each in runs.values())]
    return Outcome(list(timings.values()), figures, memory=memory)


def _figures(timings: dict[str, Timing]) -> list[Figure]:
    return [
        times_as_long(f"whole run of saft finetune: {name} against {FULL}", timing, timings[FULL])
        for name, timing in timings.items()
        if name != FULL
    ]


@dataclass(frozen=True)
class Digits:
    """An image folder with ``train`` and ``test``, and room for runs beside it.

    Attributes:
        folder: that holds both.
        shots: training images per class.
        templates: of the prompts.
    """

    folder: Path
    shots: int
    templates: tuple[str, ...]

    @property
    def images(self) -> Path:
        """The image folder."""
        return self.folder / "digits"


def write_digits(folder: Path, shots: int) -> Digits:
    """Write some of the built-in MNIST digits as files.

    Raises:
        MeasurementError: if the package that brings them is not installed.
    """
    for split, count in (("train", shots), ("test", TESTED)):
        try:
            data = load_dataset(DATA, split, _as_it_is)
        except MissingExtraError as error:
            raise MeasurementError(str(error)) from error
        for label, name in enumerate(data.class_names):
            of_class = folder / "digits" / split / name
            of_class.mkdir(parents=True)
            for index in (data.labels == label).nonzero().flatten()[:count].tolist():
                data.open(index).save(of_class / f"{index}.png")
    return Digits(folder, shots, data.templates)


def _as_it_is(image: Any) -> Any:
    return image


class Run:
    """``saft finetune`` by one method, again and again.

    Args:
        name: of the method.
        digits: to train on and to evaluate with; folders of runs are made beside them.
    """

    def __init__(self, name: str, digits: Digits) -> None:
        self.name = name
        self.config = FinetuneConfig(
            train_data=str(digits.images),
            template=digits.templates,
            model=TINY_NAME,
            shots=digits.shots,
            epochs=1,
            **METHODS[name],
        )
        self.folder = digits.folder
        self.last: FinetuneResult | None = None

    def __call__(self) -> FinetuneResult:
        """Run it into a new folder."""
        output = mkdtemp(dir=self.folder)
        self.last = finetune(self.config.changed(output=output))
        return self.last

    def clear(self) -> None:
        """Remove the folder of the last run, which no user would wait for."""
        if self.last is not None:
            shutil.rmtree(self.last.output)

    def contender(self) -> Contender:
        """It reads the weights forward and backward in every step."""
        flops = Flops()

        def needs() -> Needs:
            assert self.last is not None
            steps = -(-10 * self.config.shots // self.config.batch_size)
            return Needs(2 * steps * self.last.results["model_bytes"], flops.total)

        check, covers = flops.checked(self._check), COVERS.get(self.name, "")
        return Contender(self.name, self, check, self.clear, needs, covers)

    def size(self) -> Figure:
        """Of the file that the run is for."""
        assert self.last is not None
        size = self.last.results["artefact_bytes"]
        return Figure(f"file of a run of saft finetune: {self.name}", size, "bytes")

    def _check(self, run: Callable[[], Any]) -> None:
        """It has learnt something, not unlearnt what it knew, and its file is of this model."""
        result: FinetuneResult = run()
        accuracy = {line["when"]: line["top1"] for line in result.results["evaluations"]}
        kept = accuracy["after"] >= accuracy["before"] - MAY_LOSE
        require(kept, f"its accuracy fell from {accuracy['before']} to {accuracy['after']}")
        before, after = _weights(), self._tuned(result.artefact)
        changed = any(not torch.equal(after[name], weight) for name, weight in before.items())
        require(changed, "it has changed no weight")

    def _tuned(self, artefact: Path) -> dict[str, Tensor]:
        """The weights that a run's file stands for."""
        if self.name == FULL:
            return load_file(artefact)
        model = load_model(TINY_NAME).model
        SparseDelta.load(artefact).apply_(model)
        return model.state_dict()


def _weights() -> dict[str, Tensor]:
    """Those that every run starts from."""
    return load_model(TINY_NAME).model.state_dict()


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages of the runs: they would come between those of the benchmark."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _memory(group: str, name: str, shots: int) -> MemoryUse:
    found = peak_memory(f"{__name__}:finetuning", name=name, shots=shots)
    return MemoryUse(group, name, COVERS.get(name, ""), **asdict(found))


def finetuning(name: str, shots: int) -> Callable[[], object]:
    """The work whose memory is measured."""

    def work() -> object:
        with TemporaryDirectory() as folder, _quiet():
            return Run(name, write_digits(Path(folder), shots))()

    return work
