"""What this package does for one model, batch and machine, in a few minutes.

Full fine-tuning, LoRA and SAFT take training steps side by side with one and with two images, which
give the step time to expect at the asked batch, and then at that batch itself, or at the largest
part of it that the time allows. Each one's peak memory is that of a process of its own, with one
image and with the batch that was measured, and grows along a line. The mask is a uniform one, the
worst case there is.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from saft_clip.report import file_size
from saft_kernels import SparseDelta

from .baselines import lora
from .baselines.dense_selection import accumulated
from .baselines.peft_adapters import pretrained as without_adapters
from .baselines.peft_adapters import require_trained
from .cases import clip_step
from .cases.clip_step import WAYS
from .cases.delta import perturb
from .cases.gpu import full_precision
from .correctness import reference_step, require_loss, require_stepped, require_untouched
from .flops import Flops
from .harness import Contender, Effort, measure
from .memory import MeasurementError, peak_memory
from .models import Setting, Task, candidates, has_text_tower, make_task, uniform_mask
from .outcome import TIMES_AS_LONG, Memory, Timing
from .ratios import format_seconds, ratio
from .tables import mebibytes, table
from .timers import CPU, CudaTimer, Timer

#: What is compared: name in the table -> contender of :mod:`.cases.clip_step`. Of the two LoRAs it
#: is the one with the shorter step.
METHODS = {
    "full fine-tuning": clip_step.FULL,
    "LoRA": clip_step.LORA_OF_MLPS,
    "SAFT": clip_step.SAMPLED,
}
FULL, LORA, SAFT = METHODS

#: Batches that every prediction rests on; whatever the asked one is, these are affordable.
SMALL = (1, 2)

#: Of each of them: a checked run is a warm-up, and a huge model takes no more rounds than it must.
SMALL_EFFORT = Effort(15.0, 2, 3, warm_up=0)

#: Steps of every method that a batch costs, those for its memory and a reference loss included.
STEPS_PER_BATCH = 11

#: At the asked batch: of fewer rounds the interval is too long to say which step is shorter.
EFFORT = Effort(0.0, 6, 6, warm_up=0)


@dataclass(frozen=True)
class Question:
    """A model, a batch and a machine.

    Attributes:
        setting: model, weights, batch, prompts and density; the rest of it does not count.
        precision: ``fp32`` or ``amp_bf16``.
        device: ``cpu`` or ``cuda``.
        memory: bytes that there are for training.
        seconds: that the answer may take, roughly; with one and two images it takes what it must.
    """

    setting: Setting
    precision: str = "fp32"
    device: str = "cpu"
    memory: int = 0
    seconds: float = 270.0


@dataclass(frozen=True)
class Method:
    """What one method would take.

    Attributes:
        predicted: seconds of a step at the asked batch, from two small ones.
        measured: seconds of a step at the measured batch.
        limit: seconds that the machine needs at least for that.
        memory: at the measured batch.
        file: bytes of what is shipped: the model, the adapters or the delta.
        largest: batch that fits into the asked memory; 0 if not even one image does; None if the
            peak did not grow with the batch.
    """

    predicted: float
    measured: float
    limit: float | None
    memory: Memory
    file: int
    largest: int | None


@dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
        question: that was asked.
        batch: that was measured; smaller than the asked one where that takes too long.
        methods: by name.
        ratios: time of a step over full fine-tuning's, with its interval, by name.
        left_out: why a method is missing, by name.
        numel: number of candidate parameters, D.
    """

    question: Question
    batch: int
    methods: dict[str, Method]
    ratios: dict[str, tuple[float, float, float]]
    left_out: dict[str, str]
    numel: int


def answer(question: Question) -> Answer:
    """Measure.

    Raises:
        SettingError: if there is no such model.
        MeasurementError: if there is no such device.
        WrongResultError: if a method's first step is not what it should be.
    """
    start = time.perf_counter()
    timer = _timer(question.device)
    images = question.setting.images
    with full_precision():
        own = _Own(question, timer)
        series = {1: own.checked_steps(), 2: own.steps(2, SMALL_EFFORT)}
        files = {name: own.file(name) for name in own.names}
        began = time.perf_counter()
        memory = {1: own.memory(1)}
        processes = time.perf_counter() - began  # as many have to start for the measured batch
        spent = time.perf_counter() - start
        batch = _affordable(series, images, question.seconds - spent - processes)
        measured = series.get(batch) or own.steps(batch, EFFORT)
        largest = _fitted(batch)[1]
        memory[largest] = own.memory(largest)
    methods = {
        name: Method(
            _predicted(series, {batch: measured}, name, images),
            timing.calm,
            timing.floor,
            memory[batch][name],
            files[name],
            _largest(memory, name, question.memory),
        )
        for name, timing in measured.items()
    }
    ratios = {n: ratio(timing, measured[FULL]) for n, timing in measured.items() if n != FULL}
    return Answer(question, batch, methods, ratios, own.left_out, own.numel)


def _timer(device: str) -> Timer:
    if device == "cpu":
        return CPU
    if device == "cuda" and torch.cuda.is_available():
        return CudaTimer(torch.device("cuda", torch.cuda.current_device()), head_start=0)
    raise MeasurementError(f"there is no device {device!r} here; use --device cpu")


def total_memory(device: str) -> int:
    """Bytes of memory of this machine, or of its GPU."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Steps --------------------------------------------------------------------------------------------


class _Own:
    """The asked model, its mask, and steps of the methods on parts of its batch.

    Attributes:
        names: of the methods that can be measured here.
        left_out: why the others cannot, by name; known once :meth:`checked_steps` ran.
        numel: number of candidate parameters, D.
    """

    def __init__(self, question: Question, timer: Timer) -> None:
        setting = question.setting
        self.question, self.timer = question, timer
        images = max(setting.images, *SMALL)
        self.base = make_task(setting.model, images, setting.prompts, setting.pretrained)
        self.mask = uniform_mask(self.base.model, setting.density)
        self.numel = sum(param.numel() for param in candidates(self.base.model).values())
        task = replace(self.base, precision=question.precision)
        self.task = task if timer is CPU else task.to(timer.device)
        self.names = list(METHODS)
        self.left_out: dict[str, str] = {}

    def checked_steps(self) -> dict[str, Timing]:
        """Times with one image, every first step held to the specification."""
        base = _images(self.base, 1)
        gradients = accumulated(base.model, [base.loss])
        return self.steps(1, SMALL_EFFORT, gradients)

    def steps(
        self, batch: int, effort: Effort, gradients: Mapping[str, Tensor] | None = None
    ) -> dict[str, Timing]:
        """Times of every method, side by side, from the pretrained weights.

        Args:
            batch: how many images.
            effort: how often.
            gradients: what first steps are held to, and then to the loss, in fp32 on the CPU;
                None: their loss must be that of the model where it is.
        """
        task = _images(self.task, batch)
        reference = task if gradients is None else _images(self.base, batch)
        with torch.no_grad():
            loss = reference.loss(reference.model).item()
        contenders = []
        for name in self.names:
            try:
                contenders.append(self._contender(name, task, loss, gradients))
            except MeasurementError as reason:
                self.left_out[name] = str(reason)
        self.names = [contender.name for contender in contenders]
        question = self.question
        group = f"{question.setting.model}, {batch} images, {question.precision}"
        return measure(group, contenders, effort, timer=self.timer)

    def _contender(
        self, name: str, task: Task, loss: float, gradients: Mapping[str, Tensor] | None
    ) -> Contender:
        way, model = WAYS[METHODS[name]], copy.deepcopy(task.model)
        flops, weights = Flops(), sum(p.nbytes for p in candidates(model).values())
        needs = flops.needs(2 * weights, clip_step.PRODUCTS[task.precision])
        step = way.method(model, self.mask, task.loss)
        check = flops.checked(self._check(name, model, loss, gradients))
        return Contender(name, step, check, needs=needs, covers=way.covers, role=way.role)

    def _check(
        self,
        name: str,
        model: nn.Module,
        loss: float,
        gradients: Mapping[str, Tensor] | None,
    ) -> Callable[[Callable[[], Any]], None]:
        """The first step's loss; in fp32 where it leads; the bits of all that must stay."""
        base, precision = candidates(self.base.model), self.question.precision

        def check(run: Callable[[], Any]) -> None:
            require_loss(run().item(), loss, precision)
            params = _on_cpu(without_adapters(model))
            if name == LORA:
                require_trained(model)
            elif gradients is not None and precision == "fp32":
                expected = reference_step(base, gradients, self.mask)
                require_stepped(params, expected, self.mask, other_sums_than=gradients)
            if name != FULL:
                require_untouched(params, base, self.mask if name == SAFT else None)

        return check

    def memory(self, batch: int) -> dict[str, Memory]:
        """Of processes that take such steps, by method."""
        return {name: self._memory(name, batch) for name in self.names}

    def _memory(self, name: str, batch: int) -> Memory:
        setting = self.question.setting
        with TemporaryDirectory() as folder:
            file = Path(folder, "mask.safetensors")
            self.mask.save(file)
            return peak_memory(
                f"{clip_step.__name__}:steps",
                name=METHODS[name],
                mask=str(file),
                model=setting.model,
                images=batch,
                prompts=setting.prompts,
                precision=self.question.precision,
                device=self.question.device,
                pretrained=setting.pretrained,
            )

    def file(self, name: str) -> int:
        """Bytes of what a user of the method ships."""
        model = self.base.model
        if name == FULL:
            return sum(tensor.nbytes for tensor in model.state_dict().values())
        tuned = copy.deepcopy(model)
        if name == SAFT:
            perturb(tuned, self.mask)
            with TemporaryDirectory() as folder:
                file = Path(folder, "delta.safetensors")
                SparseDelta.capture(tuned, self.mask, model).save(file)
                return file.stat().st_size
        WAYS[METHODS[name]].method(tuned, self.mask, self.base.loss)
        return sum(param.nbytes for param in tuned.parameters() if param.requires_grad)


def _images(task: Task, count: int) -> Task:
    """The first images of a batch, with all prompts."""
    return replace(task, images=task.images[:count], labels=task.labels[:count])


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the specification is."""
    return {name: tensor.detach().to(CPU.device) for name, tensor in tensors.items()}


# Predicting ---------------------------------------------------------------------------------------


def _affordable(series: Mapping[int, Mapping[str, Timing]], images: int, seconds: float) -> int:
    """The asked batch, or half of it, and so on: the first one for which there is time."""
    batch = images
    while batch > max(series):
        total = sum(_on_line(series, name, batch) for name in series[max(series)])
        if STEPS_PER_BATCH * total <= seconds:
            return batch
        batch //= 2
    return min(images, max(series))


def _on_line(series: Mapping[int, Mapping[str, Timing]], name: str, batch: int) -> float:
    """Seconds of a step, on the line through two batches."""
    low, high = min(series), max(series)
    first, second = series[low][name].calm, series[high][name].calm
    slope = max((second - first) / (high - low), 0.0)
    return first + slope * (batch - low)


def _predicted(
    small: Mapping[int, Mapping[str, Timing]],
    measured: Mapping[int, Mapping[str, Timing]],
    name: str,
    images: int,
) -> float:
    """Seconds of a step at the asked batch.

    From the small batches where that batch is measured, so that the two can be compared; else from
    the smallest and the measured one.
    """
    if images in measured:
        return _on_line(small, name, images)
    return _on_line({min(small): small[min(small)], **measured}, name, images)


def _fitted(batch: int) -> tuple[int, int]:
    """The batches whose peaks the line goes through that the largest batch lies on."""
    return 1, max(batch, 2)


def _bytes_per_image(memory: Mapping[int, Mapping[str, Memory]], name: str) -> float:
    """By how much the peak grows with an image, between the smallest and the largest batch.

    With few images the peak of full fine-tuning lies in the optimizer's step, where it grows with
    none of them. Its activations are all of SAFT's and more, so that it grows as SAFT's at least.
    """
    low, high = min(memory), max(memory)
    names = {name, SAFT} if name == FULL else {name}
    return max(0, *((memory[high][n].peak - memory[low][n].peak) / (high - low) for n in names))


def _largest(memory: Mapping[int, Mapping[str, Memory]], name: str, room: int) -> int | None:
    """The batch whose peak is all the memory there is, on a line through two peaks."""
    slope, batch = _bytes_per_image(memory, name), max(memory)
    if slope == 0:
        return None
    return max(int(batch + (room - memory[batch][name].peak) / slope), 0)


# Telling ------------------------------------------------------------------------------------------


def markdown(found: Answer) -> str:
    """The answer as a table, with a sentence for those who read no tables."""
    question, setting = found.question, found.question.setting
    names = list(found.methods)
    prompts = f" and {setting.prompts} prompts" if has_text_tower(setting.model) else ""
    adapters = f"; LoRA has rank {lora.OPTIONS['r']} and is on the MLPs" if LORA in names else ""
    title = (
        f"{setting.model}, {found.numel:,} parameters, {setting.images} images{prompts}, "
        f"{question.precision}, on {question.device}; "
        f"SAFT trains {int(setting.density * found.numel):,} of them, spread uniformly{adapters}."
    )
    rows = [[line, *map(cell, found.methods.values())] for line, cell in _lines(found)]
    left_out = [f"{name} is left out: {reason}." for name, reason in found.left_out.items()]
    low, high = _fitted(found.batch)
    estimate = f"The largest batch is an estimate from the peaks with {low} and {high} images."
    parts = [title, table(["", *names], rows), *left_out, estimate, _sentence(found)]
    return "\n\n".join(parts) + "\n"


def _lines(found: Answer) -> list[tuple[str, Callable[[Method], str]]]:
    images, batch = found.question.setting.images, found.batch
    room = file_size(found.question.memory)
    return [
        (f"step with {images} images, predicted", lambda m: format_seconds(m.predicted)),
        (f"step with {batch} images, measured", lambda m: format_seconds(m.measured)),
        ("what this machine needs for it at least", lambda m: _seconds(m.limit)),
        (f"peak memory with {batch} images", lambda m: mebibytes(m.memory.peak)),
        ("of that weights", lambda m: mebibytes(m.memory.weights)),
        ("optimizer state", lambda m: mebibytes(m.memory.state)),
        ("gradients", lambda m: mebibytes(m.memory.gradients)),
        ("activations", lambda m: mebibytes(m.memory.activations)),
        ("libraries and temporaries", lambda m: mebibytes(m.memory.rest)),
        (f"largest batch in {room}, predicted", lambda m: _batch(m.largest)),
        ("file to ship", lambda m: file_size(m.file)),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else format_seconds(value)


def _batch(largest: int | None) -> str:
    return "unknown: its peak did not grow" if largest is None else f"{largest:,} images"


def _sentence(found: Answer) -> str:
    value, low, high = found.ratios[SAFT]
    full, saft = found.methods[FULL], found.methods[SAFT]
    if low <= 1 <= high:
        speed = "as long as one of full fine-tuning, as far as the noise lets one see"
    else:
        speed = f"{value:.2f} ({low:.2f} to {high:.2f}) times as long as one of full fine-tuning"
    less = mebibytes(full.memory.peak - saft.memory.peak)
    return (
        f"A step of SAFT took {speed}, needed {less} less memory, and its file is "
        f"{full.file / saft.file:,.0f} times smaller."
    )


def record(found: Answer) -> dict[str, Any]:
    """The answer as JSON can hold it."""
    return {"format": "saft-bench-answer", "unit of ratios": TIMES_AS_LONG, **asdict(found)}
