"""What this package does for one model, batch and machine, in a few minutes.

Full fine-tuning, LoRA and SAFT take training steps side by side at two small batches, which give
the step time to expect at the asked one, and then at that batch itself, or at the largest part of
it that the time allows. Each one's peak memory is that of a process of its own, and grows with the
batch by what its activations take per image. The mask is a uniform one, the worst case there is.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from saft_clip.report import file_size
from saft_kernels import CooMask, SparseDelta

from .baselines.peft_adapters import pretrained as without_adapters
from .cases import clip_step
from .cases.clip_step import WAYS
from .cases.delta import perturb
from .correctness import require_loss, require_untouched
from .flops import Flops
from .harness import Contender, Effort, measure
from .memory import MeasurementError, peak_memory
from .models import Setting, Task, candidates, has_text_tower, make_task, uniform_mask, workload
from .outcome import TIMES_AS_LONG, Memory, Timing
from .ratios import format_seconds, ratio
from .tables import mebibytes, table
from .timers import CPU, CudaTimer, Timer

#: What is compared: name in the table -> contender of :mod:`.cases.clip_step`.
METHODS = {
    "full fine-tuning": clip_step.FULL,
    "LoRA": clip_step.LORA,
    "SAFT": clip_step.SAMPLED,
}
FULL, SAFT = "full fine-tuning", "SAFT"

#: Rounds at each of the small batches that the prediction rests on.
SMALL_ROUNDS = 3

#: Steps of every method that a batch costs, those for its memory and a reference loss included.
STEPS_PER_BATCH = 9

#: Rounds at the asked batch.
ROUNDS = 3


@dataclass(frozen=True)
class Question:
    """A model, a batch and a machine.

    Attributes:
        setting: model, batch, density; how often its efforts say does not count.
        precision: ``fp32`` or ``amp_bf16``.
        device: ``cpu`` or ``cuda``.
        memory: bytes that there are for training.
        seconds: that the answer may take, roughly.
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
        largest: batch that fits into the asked memory; 0 if not even one image does.
    """

    predicted: float
    measured: float
    limit: float | None
    memory: Memory
    file: int
    largest: int


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
    device, timer = _place(question.device)
    images = question.setting.images
    first, second = small_batches(images)
    times, left_out = _checked_steps(question, first, timer)
    series = {first: times}
    own = _Own(question, device, list(times))
    if second != first:
        series[second] = own.steps(second, Effort(0.0, SMALL_ROUNDS, SMALL_ROUNDS, 1), timer)
    batch = _affordable(series, images, question.seconds - (time.perf_counter() - start))
    measured = series.get(batch) or own.steps(batch, Effort(0.0, ROUNDS, ROUNDS, 1), timer)
    memory = {name: own.memory(name, batch) for name in times}
    slope = {name: _bytes_per_image(memory, name, batch) for name in memory}
    methods = {
        name: Method(
            _predicted(series, {batch: measured}, name, images),
            timing.calm,
            timing.floor,
            memory[name],
            own.file(name),
            _largest(memory[name].peak, slope[name], batch, question.memory),
        )
        for name, timing in measured.items()
    }
    ratios = {n: ratio(timing, measured[FULL]) for n, timing in measured.items() if n != FULL}
    return Answer(question, batch, methods, ratios, left_out, own.numel)


def _place(device: str) -> tuple[torch.device, Timer]:
    if device == "cpu":
        return CPU.device, CPU
    if device == "cuda" and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
        return where, CudaTimer(where, head_start=0)
    raise MeasurementError(f"there is no device {device!r} here; use --device cpu")


def total_memory(device: str) -> int:
    """Bytes of memory of this machine, or of its GPU."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Steps --------------------------------------------------------------------------------------------


def _checked_steps(
    question: Question, batch: int, timer: Timer
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times at the smallest batch, every first step held to the specification; what is left out."""
    work = workload(replace(question.setting, images=batch))
    task = replace(work.task, precision=question.precision)
    if timer is not CPU:
        task = task.to(timer.device)
    contenders, left_out = [], {}
    for name, way in METHODS.items():
        try:
            contenders.append(replace(clip_step.contender(way, work, task), name=name))
        except MeasurementError as reason:
            left_out[name] = str(reason)
    effort = Effort(0.0, SMALL_ROUNDS, SMALL_ROUNDS, 1)
    return measure(_group(question, batch), contenders, effort, timer=timer), left_out


def _group(question: Question, batch: int) -> str:
    return f"{question.setting.model}, {batch} images, {question.precision}"


class _Own:
    """The asked model, its mask, and steps of the methods on parts of its batch."""

    def __init__(self, question: Question, device: torch.device, names: Sequence[str]) -> None:
        setting = question.setting
        self.question, self.device, self.names = question, device, names
        task = make_task(setting.model, setting.images, setting.prompts, setting.pretrained)
        task.model.to(setting.torch_dtype)
        self.mask = uniform_mask(task.model, setting.density)
        self.numel = sum(param.numel() for param in candidates(task.model).values())
        self.task = replace(task, precision=question.precision)
        if device.type != "cpu":
            self.task = self.task.to(device)

    def steps(self, batch: int, effort: Effort, timer: Timer) -> dict[str, Timing]:
        """Times of every method, side by side, from the pretrained weights."""
        task = replace(self.task, images=self.task.images[:batch], labels=self.task.labels[:batch])
        with torch.no_grad():
            loss = task.loss(task.model).item()
        contenders = [self._contender(name, task, loss) for name in self.names]
        return measure(_group(self.question, batch), contenders, effort, timer=timer)

    def _contender(self, name: str, task: Task, loss: float) -> Contender:
        way, model = WAYS[METHODS[name]], copy.deepcopy(task.model)
        flops, weights = Flops(), sum(p.nbytes for p in candidates(model).values())
        needs = flops.needs(2 * weights, clip_step.PRODUCTS[task.precision])
        step = way.method(model, self.mask, task.loss)
        check = flops.checked(_check(name, model, task, self.mask, loss))
        return Contender(name, step, check, needs=needs, covers=way.covers, role=way.role)

    def memory(self, name: str, batch: int) -> Memory:
        """Of a process that takes such steps."""
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
                dtype=setting.dtype,
                precision=self.question.precision,
                device=self.question.device,
                pretrained=setting.pretrained,
            )

    def file(self, name: str) -> int:
        """Bytes of what a user of the method ships."""
        model = self.task.model
        if name == FULL:
            return sum(tensor.nbytes for tensor in model.state_dict().values())
        tuned = copy.deepcopy(model)
        if name == SAFT:
            perturb(tuned, self.mask)
            with TemporaryDirectory() as folder:
                file = Path(folder, "delta.safetensors")
                SparseDelta.capture(tuned, self.mask, model).save(file)
                return file.stat().st_size
        WAYS[METHODS[name]].method(tuned, self.mask, self.task.loss)
        return sum(param.nbytes for param in tuned.parameters() if param.requires_grad)


def _check(
    name: str, model: nn.Module, task: Task, mask: CooMask, loss: float
) -> Callable[[Callable[[], Any]], None]:
    """The first step's loss; the bits of all that must stay."""

    def check(run: Callable[[], Any]) -> None:
        require_loss(run().item(), loss, task.precision)
        if name != FULL:
            trained = mask if name == SAFT else None
            require_untouched(without_adapters(model), candidates(task.model), trained)

    return check


# Predicting ---------------------------------------------------------------------------------------


def small_batches(images: int) -> tuple[int, int]:
    """An eighth and a quarter of the asked batch, but one and two images where it is small."""
    first = max(images // 8, 1)
    return first, min(max(images // 4, 2), images)


def _affordable(series: Mapping[int, Mapping[str, Timing]], images: int, seconds: float) -> int:
    """The asked batch, or half of it, and so on: the first one for which there is time."""
    batch = images
    while batch > max(series):
        total = sum(_on_line(series, name, batch) for name in next(iter(series.values())))
        if STEPS_PER_BATCH * total <= seconds:
            return batch
        batch //= 2
    return max(series)


def _on_line(series: Mapping[int, Mapping[str, Timing]], name: str, batch: int) -> float:
    """Seconds of a step, on the line through two batches; in proportion to one."""
    low, high = min(series), max(series)
    first, second = series[low][name].calm, series[high][name].calm
    if low == high:
        return first * batch / low
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


def _bytes_per_image(memory: Mapping[str, Memory], name: str, batch: int) -> float:
    """What an image more takes.

    With few images the peak may lie where activations are few, in full fine-tuning above all; they
    are never fewer than those of SAFT, which keeps part of the inputs of each layer.
    """
    activations = [memory[each].activations or 0 for each in {name, SAFT}]
    return max(activations) / batch


def _largest(peak: int, slope: float, batch: int, memory: int) -> int:
    """The batch whose peak is what there is; more images than these need more."""
    if slope == 0:
        return 0
    return max(int(batch + (memory - peak) / slope), 0)


# Telling ------------------------------------------------------------------------------------------


def markdown(found: Answer) -> str:
    """The answer as a table, with a sentence for those who read no tables."""
    question, setting = found.question, found.question.setting
    prompts = f" and {setting.prompts} prompts" if has_text_tower(setting.model) else ""
    title = (
        f"{setting.model}, {found.numel:,} parameters, {setting.images} images{prompts}, "
        f"{question.precision}, on {question.device}; "
        f"SAFT trains {int(setting.density * found.numel):,} of them, spread uniformly."
    )
    names = list(found.methods)
    rows = [[title, *map(cell, found.methods.values())] for title, cell in _lines(found)]
    left_out = [f"{name} is left out: {reason}." for name, reason in found.left_out.items()]
    return "\n\n".join([title, table(["", *names], rows), *left_out, _sentence(found)]) + "\n"


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
        (f"largest batch in {room}, predicted", lambda m: f"{m.largest:,} images"),
        ("file to ship", lambda m: file_size(m.file)),
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else format_seconds(value)


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
