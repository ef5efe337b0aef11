"""A whole training step on one batch: forward, backward, optimizer; time and peak memory.

The mask is the uniform one: it has entries in nearly every tensor, so that nearly every weight
gradient has to be computed. A selected mask leaves tensors out and is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bench.baselines import Loss, Method, Step
from bench.baselines.frozen import frozen
from bench.baselines.full_adamw import full_adamw
from bench.baselines.index_and_hook import index_and_hook
from bench.checks import reference_step, require_stepped, require_untouched
from bench.harness import Contender, Figure, Outcome, Timing, measure, require, times_as_long
from bench.memory import Memory, peak_memory
from bench.models import ADAMW, Setting, Workload, candidates, make_task, uniform_mask, workload
from saft_kernels import CooMask, SparseAdamW

FULL = "full fine-tuning, fused AdamW"
STREAMED = "SparseAdamW, streamed gradients"
FLOOR = "floor: every weight frozen"


def streamed(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients gathered and freed as they come."""
    optimizer = SparseAdamW(model, mask, gradients="streamed", **ADAMW)

    def step() -> Tensor:
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


METHODS: dict[str, Method] = {
    FULL: full_adamw,
    "index and hook in plain torch": index_and_hook,
    STREAMED: streamed,
    FLOOR: frozen,
}


def run(setting: Setting) -> Outcome:
    """Every method on its own copy of the model, then each in a process of its own."""
    work = workload(setting)
    group = f"training step, {setting.images} images and {setting.prompts} prompts"
    contenders = [_contender(name, work) for name in METHODS]
    times = measure(group, contenders, setting.steps)
    contenders.clear()  # frees the copies before other processes need the memory
    memory = {name: _memory(name, setting) for name in METHODS}
    timings = [replace(timing, peak=memory[name].peak) for name, timing in times.items()]
    return Outcome(timings, _figures(times, memory, work.numel))


def _figures(times: dict[str, Timing], memory: dict[str, Memory], numel: int) -> list[Figure]:
    def saved(name: str) -> float:
        return (memory[FULL].peak - memory[name].peak) / numel

    ours, full, floor = times[STREAMED], times[FULL], times[FLOOR]
    return [
        times_as_long("streamed training step against full fine-tuning", ours, full, bar=1.0),
        Figure(
            "peak memory below full fine-tuning's, per parameter", saved(STREAMED), "bytes", bar=7.5
        ),
        Figure("the floor's, likewise", saved(FLOOR), "bytes"),
        times_as_long("streamed training step against the floor", ours, floor),
    ]


def _contender(name: str, work: Workload) -> Contender:
    model = copy.deepcopy(work.task.model)
    step = METHODS[name](model, work.masks["uniform"], work.task.loss)
    return Contender(name, step, _check(name, model, work))


def _check(name: str, model: nn.Module, work: Workload) -> Callable[[Callable[[], Any]], None]:
    """The first step against the specification at the mask, and the bits of what must stay."""

    def check(run: Callable[[], Any]) -> None:
        mask = work.masks["uniform"]
        base, params = candidates(work.task.model), candidates(model)
        loss = run().item()
        require(
            abs(loss - work.loss) <= 1e-4 * abs(work.loss), f"its loss is {loss}, not {work.loss}"
        )
        if name != FLOOR:
            require_stepped(params, reference_step(base, work.gradients, mask), mask)
        if name != FULL:
            require_untouched(params, base, None if name == FLOOR else mask)

    return check


def _memory(name: str, setting: Setting) -> Memory:
    return peak_memory(
        "bench.cases.clip_step:steps",
        method=name,
        model=setting.model,
        images=setting.images,
        prompts=setting.prompts,
        density=setting.density,
    )


def steps(
    method: str, model: str, images: int, prompts: int, density: float
) -> Callable[[], object]:
    """The work whose memory is measured: a small step, which makes the state, and a whole one."""
    own = make_task(model, images, prompts)
    batches = iter([own.part(1), own])
    mask = uniform_mask(own.model, density)
    step = METHODS[method](own.model, mask, lambda model: next(batches).loss(model))
    return lambda: [step(), step()]
