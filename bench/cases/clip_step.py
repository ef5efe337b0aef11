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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from saft_kernels import CooMask, SparseAdamW

from ..bars import held_to
from ..baselines import Loss, Method, Step, step_of
from ..baselines.frozen import frozen
from ..baselines.full_adamw import full_adamw
from ..baselines.index_and_hook import index_and_hook
from ..baselines.lora import lora, pretrained, require_trained
from ..correctness import reference_step, require_loss, require_stepped, require_untouched
from ..flops import Flops
from ..harness import Contender, measure
from ..limits import Needs
from ..memory import Memory, peak_memory
from ..models import (
    ADAMW,
    DTYPES,
    Setting,
    Task,
    Workload,
    candidates,
    make_task,
    with_concentrated_mask,
    workload,
)
from ..outcome import Figure, MemoryUse, Outcome, Timing
from ..ratios import times_as_long

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

#: Whose matrix products set the rate of a step, by precision.
PRODUCTS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}

#: What the sampled steps are held to: name in the bars -> contender.
OTHERS = {"floor": FLOOR, "full": FULL, "index-and-hook": INDEX_AND_HOOK, "lora": LORA}


def streamed(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients gathered and freed as they come."""
    return step_of(SparseAdamW(model, mask, gradients="streamed", **ADAMW), model, loss)


def sampled(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients computed at the selected entries only."""
    return step_of(SparseAdamW(model, mask, gradients="sampled", **ADAMW), model, loss)


@dataclass(frozen=True)
class Way:
    """A method, the mask it trains, and what it covers if that is not this mask."""

    method: Method
    mask: str = "uniform"
    covers: str = ""


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
    outcome = Outcome()
    if setting.dtype == "fp32":
        outcome += _in_fp32(work, setting)
    outcome += _in_bf16(work, setting)
    outcome += _memories(work, setting)
    return outcome


def _in_fp32(work: Workload, setting: Setting) -> Outcome:
    times = _times(work, "fp32", list(WAYS), setting)
    figures = [*_streamed_figures(times), *_sampled_figures(times, "fp32")]
    return Outcome(list(times.values()), figures)


def _in_bf16(work: Workload, setting: Setting) -> Outcome:
    times = _times(work, "amp_bf16", [n for n in WAYS if n != STREAMED_SELECTED], setting)
    return Outcome(list(times.values()), _sampled_figures(times, "amp_bf16"))


def _group(precision: str, setting: Setting) -> str:
    return f"training step in {precision}, {setting.images} images and {setting.prompts} prompts"


def _times(work: Workload, precision: str, names: list[str], setting: Setting) -> dict[str, Timing]:
    task = replace(work.task, precision=precision)
    effort = replace(setting.steps, warm_up=1)  # a first round is up to a tenth slower
    # Their copies of the model are freed before others, and other processes, need the memory.
    contenders = [_contender(name, work, task) for name in names]
    return measure(_group(precision, setting), contenders, effort)


def _streamed_figures(times: dict[str, Timing]) -> list[Figure]:
    figures = []
    for name, bar in (
        (STREAMED, "streamed/uniform/time"),
        (STREAMED_SELECTED, "streamed/selected/time"),
    ):
        what = f"training step against full fine-tuning's: {name}"
        figures.append(held_to(bar, times_as_long(what, times[name], times[FULL])))
    what = f"training step against full fine-tuning's: {FLOOR}"
    return [*figures, times_as_long(what, times[FLOOR], times[FULL])]


def _sampled_figures(times: dict[str, Timing], precision: str) -> list[Figure]:
    return [
        held_to(
            f"step/{precision}/{WAYS[name].mask}/{key}",
            times_as_long(
                f"training step in {precision}: {name} against {other}", times[name], times[other]
            ),
        )
        for name in ALL_SAMPLED
        for key, other in OTHERS.items()
    ]


def _memory_figures(memory: dict[str, Memory], numel: int) -> list[Figure]:
    full, floor = memory[FULL].peak, memory[FLOOR].peak

    def below_full(name: str) -> Figure:
        what = f"peak memory below full fine-tuning's, per parameter: {name}"
        return Figure(what, (full - memory[name].peak) / numel, "bytes")

    def above_floor(name: str) -> Figure:
        what = f"peak memory above the floor's, in percent of what full fine-tuning adds: {name}"
        return Figure(what, 100 * (memory[name].peak - floor) / max(full - floor, 1), "%")

    return [
        held_to("streamed/uniform/memory", below_full(STREAMED)),
        held_to("streamed/selected/memory", below_full(STREAMED_SELECTED)),
        below_full(FLOOR),
        above_floor(SAMPLED),
        held_to("step/memory/concentrated", above_floor(SAMPLED_CONCENTRATED)),
        held_to("step/memory/selected", above_floor(SAMPLED_SELECTED)),
    ]


def _contender(name: str, work: Workload, task: Task) -> Contender:
    """A step reads every weight forward and backward, and does at least what is counted."""
    model = copy.deepcopy(task.model)
    way = WAYS[name]
    step = way.method(model, work.masks[way.mask], task.loss)
    flops, weights = Flops(), sum(param.nbytes for param in candidates(task.model).values())
    needs = lambda: Needs(2 * weights, flops.total, PRODUCTS[task.precision])  # noqa: E731
    check = flops.checked(_check(name, model, work, task.precision))
    return Contender(name, step, check, needs=needs, covers=way.covers)


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


def _memories(work: Workload, setting: Setting) -> Outcome:
    """Of every method, at the precision that its weights have."""
    precision = "fp32" if setting.dtype == "fp32" else "amp_bf16"
    with TemporaryDirectory() as folder:
        files = {kind: str(Path(folder, f"{kind}.safetensors")) for kind in work.masks}
        for kind, mask in work.masks.items():
            mask.save(files[kind])
        memory = {
            name: peak_memory(
                f"{__name__}:steps",
                name=name,
                mask=files[way.mask],
                model=setting.model,
                images=setting.images,
                prompts=setting.prompts,
                dtype=setting.dtype,
                precision=precision,
            )
            for name, way in WAYS.items()
        }
    group = _group(precision, setting)
    uses = [MemoryUse(group, n, each.peak, covers=WAYS[n].covers) for n, each in memory.items()]
    return Outcome(figures=_memory_figures(memory, work.numel), memory=uses)


def steps(
    name: str, mask: str, model: str, images: int, prompts: int, dtype: str, precision: str
) -> Callable[[], object]:
    """The work whose memory is measured: a small step, which makes the state, and a whole one."""
    own = replace(make_task(model, images, prompts), precision=precision)
    own.model.to(DTYPES[dtype])
    batches = iter([own.part(1), own])
    step = WAYS[name].method(own.model, CooMask.load(mask), lambda model: next(batches).loss(model))
    return lambda: [step(), step()]
