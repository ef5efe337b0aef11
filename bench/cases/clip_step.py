"""A whole training step on one batch: forward, backward, optimizer; time and peak memory.

The uniform mask is the worst case: it has entries in nearly every row and column of every tensor.
The concentrated one has them in every tensor too, but in few rows and columns, as masks of trained
models do. The selected one, chosen with random weights, leaves nearly all of the image tower out.
Memory is that of the whole process: some of LoRA's are libraries that ``peft`` loads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from saft_kernels import CooMask, SparseAdamW

from ..allocations import TrainingWork
from ..baselines import Loss, Method, Step, step_of
from ..baselines.frozen import frozen
from ..baselines.full_adamw import full_adamw
from ..baselines.index_and_hook import index_and_hook
from ..baselines.lora import lora, pretrained, require_trained
from ..checks import reference_step, require_loss, require_stepped, require_untouched
from ..harness import Contender, Figure, Outcome, Timing, measure, times_as_long
from ..memory import Memory, peak_memory
from ..models import (
    ADAMW,
    Setting,
    Task,
    Workload,
    candidates,
    make_task,
    with_concentrated_mask,
    workload,
)

FULL = "full fine-tuning, fused AdamW"
INDEX_AND_HOOK = "index and hook in plain torch, uniform mask"
STREAMED = "SparseAdamW, streamed gradients, uniform mask"
STREAMED_SELECTED = "SparseAdamW, streamed gradients, selected mask"
SAMPLED = "SparseAdamW, sampled gradients, uniform mask"
SAMPLED_CONCENTRATED = "SparseAdamW, sampled gradients, concentrated mask"
SAMPLED_SELECTED = "SparseAdamW, sampled gradients, selected mask"
LORA = "PEFT LoRA r=8 on c_fc, c_proj and attn"
FLOOR = "floor: every weight frozen"

ALL_SAMPLED = (SAMPLED, SAMPLED_CONCENTRATED, SAMPLED_SELECTED)

#: Largest time of a step with sampled gradients over the floor's and over full fine-tuning's.
OVER_FLOOR = {"fp32": 1.05, "amp_bf16": 1.06}
OVER_FULL = {"fp32": 0.66, "amp_bf16": 0.72}


def streamed(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients gathered and freed as they come."""
    return step_of(SparseAdamW(model, mask, gradients="streamed", **ADAMW), model, loss)


def sampled(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients computed at the selected entries only."""
    return step_of(SparseAdamW(model, mask, gradients="sampled", **ADAMW), model, loss)


@dataclass(frozen=True)
class Way:
    """A method, and the mask it trains: ``uniform``, ``concentrated`` or ``selected``."""

    method: Method
    mask: str = "uniform"


WAYS: dict[str, Way] = {
    FULL: Way(full_adamw),
    INDEX_AND_HOOK: Way(index_and_hook),
    STREAMED: Way(streamed),
    STREAMED_SELECTED: Way(streamed, "selected"),
    SAMPLED: Way(sampled),
    SAMPLED_CONCENTRATED: Way(sampled, "concentrated"),
    SAMPLED_SELECTED: Way(sampled, "selected"),
    LORA: Way(lora),
    FLOOR: Way(frozen),
}


def run(setting: Setting) -> Outcome:
    """Every method on its own copy of the model, in fp32 and bf16; then each one's memory."""
    work = with_concentrated_mask(workload(setting), setting.density)
    fp32 = _times(work, "fp32", list(WAYS), setting)
    bf16 = _times(work, "amp_bf16", [n for n in WAYS if n != STREAMED_SELECTED], setting)
    memory = _memories(work, setting)
    timings = [replace(timing, peak=memory[name].peak) for name, timing in fp32.items()]
    figures = [
        *_streamed_figures(fp32),
        *_sampled_figures(fp32, "fp32"),
        *_sampled_figures(bf16, "amp_bf16"),
        *_memory_figures(memory, work.numel),
    ]
    return Outcome([*timings, *bf16.values()], figures)


def _times(work: Workload, precision: str, names: list[str], setting: Setting) -> dict[str, Timing]:
    group = f"training step in {precision}, {setting.images} images and {setting.prompts} prompts"
    task = replace(work.task, precision=precision)
    effort = replace(setting.steps, warm_up=1)  # a first round is up to a tenth slower
    # Their copies of the model are freed before others, and other processes, need the memory.
    return measure(group, [_contender(name, work, task) for name in names], effort)


def _streamed_figures(times: dict[str, Timing]) -> list[Figure]:
    return [
        times_as_long(
            f"training step against full fine-tuning's: {name}", times[name], times[FULL], bar
        )
        for name, bar in ((STREAMED, 1.0), (STREAMED_SELECTED, 1.0), (FLOOR, None))
    ]


def _sampled_figures(times: dict[str, Timing], precision: str) -> list[Figure]:
    figures = []
    for name in ALL_SAMPLED:
        for other, bar in (
            (FLOOR, OVER_FLOOR[precision]),
            (FULL, OVER_FULL[precision]),
            (INDEX_AND_HOOK, 1.0),
            (LORA, 1.0),
        ):
            what = f"training step in {precision}: {name} against {other}"
            figures.append(times_as_long(what, times[name], times[other], bar))
    return figures


def _memory_figures(memory: dict[str, Memory], numel: int) -> list[Figure]:
    full, floor = memory[FULL].peak, memory[FLOOR].peak
    figures = []
    for name, bar in ((STREAMED, 7.5), (STREAMED_SELECTED, 7.5), (FLOOR, None)):
        what = f"peak memory below full fine-tuning's, per parameter: {name}"
        figures.append(Figure(what, (full - memory[name].peak) / numel, "bytes", bar=bar))
    for name, bar in ((SAMPLED, None), (SAMPLED_CONCENTRATED, 6), (SAMPLED_SELECTED, 6)):
        what = f"peak memory above the floor's, in percent of what full fine-tuning adds: {name}"
        share = 100 * (memory[name].peak - floor) / max(full - floor, 1)
        figures.append(Figure(what, share, "%", bar=bar, at_least=False))
    return figures


def _contender(name: str, work: Workload, task: Task) -> Contender:
    model = copy.deepcopy(task.model)
    way = WAYS[name]
    step = way.method(model, work.masks[way.mask], task.loss)
    return Contender(name, step, _check(name, model, work, task.precision))


def _check(
    name: str, model: nn.Module, work: Workload, precision: str
) -> Callable[[Callable[[], Any]], None]:
    """The first step's loss, then the weights."""

    def check(run: Callable[[], Any]) -> None:
        require_loss(run().item(), work.loss, precision)
        if name == LORA:
            require_trained(model)
            require_untouched(pretrained(model), candidates(work.task.model), None)
        else:
            _check_weights(name, candidates(model), work, precision)

    return check


def _check_weights(
    name: str, params: dict[str, nn.Parameter], work: Workload, precision: str
) -> None:
    """The first step against the specification at the mask, and the bits of what must stay.

    In bf16 the gradients differ from the fp32 ones that the specification has, and the first AdamW
    step is little more than their sign: there only the bits are checked.
    """
    base, mask = candidates(work.task.model), work.masks[WAYS[name].mask]
    if name != FLOOR and precision == "fp32":
        sums = work.gradients if name in ALL_SAMPLED else None
        require_stepped(params, reference_step(base, work.gradients, mask), mask, sums)
    if name != FULL:
        require_untouched(params, base, None if name == FLOOR else mask)


def _memories(work: Workload, setting: Setting) -> dict[str, Memory]:
    with TemporaryDirectory() as folder:
        files = {kind: str(Path(folder, f"{kind}.safetensors")) for kind in work.masks}
        for kind, mask in work.masks.items():
            mask.save(files[kind])
        return {
            name: peak_memory(
                f"{__name__}:steps",
                name=name,
                mask=files[way.mask],
                model=setting.model,
                images=setting.images,
                prompts=setting.prompts,
            )
            for name, way in WAYS.items()
        }


def steps(
    name: str, mask: str, model: str, images: int, prompts: int, device: str = "cpu"
) -> TrainingWork:
    """The work whose memory is measured: a small step, which makes the state, and whole ones."""
    own = make_task(model, images, prompts)
    if device != "cpu":  # it makes a copy
        own = own.to(torch.device(device))
    batches = chain([own.part(1)], repeat(own))
    step = WAYS[name].method(own.model, CooMask.load(mask), lambda model: next(batches).loss(model))
    return TrainingWork(
        step,
        own.model,
        optimizer=getattr(step, "optimizer", None),
        batch=(own.images, own.labels, own.tokens),
        device=torch.device(device),
    )
