"""A whole training step on one batch: forward, backward, optimizer; time and peak memory.

The uniform mask is the worst case: it has entries in nearly every tensor, so that nearly every
weight gradient has to be computed. The selected mask leaves tensors out, whose gradients are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from bench.baselines import Loss, Method, Step
from bench.baselines.frozen import frozen
from bench.baselines.full_adamw import full_adamw
from bench.baselines.index_and_hook import index_and_hook
from bench.checks import reference_step, require_stepped, require_untouched
from bench.harness import Contender, Figure, Outcome, Timing, measure, require, times_as_long
from bench.memory import Memory, peak_memory
from bench.models import ADAMW, Setting, Workload, candidates, make_task, workload
from saft_kernels import CooMask, SparseAdamW

FULL = "full fine-tuning, fused AdamW"
STREAMED = "SparseAdamW, streamed gradients, uniform mask"
SELECTED = "SparseAdamW, streamed gradients, selected mask"
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


@dataclass(frozen=True)
class Way:
    """A method, and the mask it trains: ``uniform`` or ``selected``."""

    method: Method
    mask: str = "uniform"


WAYS: dict[str, Way] = {
    FULL: Way(full_adamw),
    "index and hook in plain torch, uniform mask": Way(index_and_hook),
    STREAMED: Way(streamed),
    SELECTED: Way(streamed, "selected"),
    FLOOR: Way(frozen),
}


def run(setting: Setting) -> Outcome:
    """Every method on its own copy of the model, then each in a process of its own."""
    work = workload(setting)
    group = f"training step, {setting.images} images and {setting.prompts} prompts"
    contenders = [_contender(name, work) for name in WAYS]
    times = measure(group, contenders, setting.steps)
    contenders.clear()  # frees the copies before other processes need the memory
    memory = _memories(work, setting)
    timings = [replace(timing, peak=memory[name].peak) for name, timing in times.items()]
    return Outcome(timings, _figures(times, memory, work.numel))


def _figures(times: dict[str, Timing], memory: dict[str, Memory], numel: int) -> list[Figure]:
    def saved(name: str, bar: float | None = None) -> Figure:
        per_parameter = (memory[FULL].peak - memory[name].peak) / numel
        what = f"peak memory below full fine-tuning's, per parameter: {name}"
        return Figure(what, per_parameter, "bytes", bar=bar)

    def time(name: str, bar: float | None = None) -> Figure:
        what = f"training step against full fine-tuning's: {name}"
        return times_as_long(what, times[name], times[FULL], bar)

    return [
        time(STREAMED, bar=1.0),
        time(SELECTED, bar=1.0),
        time(FLOOR),
        saved(STREAMED, bar=7.5),
        saved(SELECTED, bar=7.5),
        saved(FLOOR),
    ]


def _contender(name: str, work: Workload) -> Contender:
    model = copy.deepcopy(work.task.model)
    way = WAYS[name]
    step = way.method(model, work.masks[way.mask], work.task.loss)
    return Contender(name, step, _check(name, model, work))


def _check(name: str, model: nn.Module, work: Workload) -> Callable[[Callable[[], Any]], None]:
    """The first step against the specification at the mask, and the bits of what must stay."""

    def check(run: Callable[[], Any]) -> None:
        mask = work.masks[WAYS[name].mask]
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


def _memories(work: Workload, setting: Setting) -> dict[str, Memory]:
    with TemporaryDirectory() as folder:
        files = {kind: str(Path(folder, f"{kind}.safetensors")) for kind in work.masks}
        for kind, mask in work.masks.items():
            mask.save(files[kind])
        return {
            name: peak_memory(
                "bench.cases.clip_step:steps",
                name=name,
                mask=files[way.mask],
                model=setting.model,
                images=setting.images,
                prompts=setting.prompts,
            )
            for name, way in WAYS.items()
        }


def steps(name: str, mask: str, model: str, images: int, prompts: int) -> Callable[[], object]:
    """The work whose memory is measured: a small step, which makes the state, and a whole one."""
    own = make_task(model, images, prompts)
    batches = iter([own.part(1), own])
    step = WAYS[name].method(own.model, CooMask.load(mask), lambda model: next(batches).loss(model))
    return lambda: [step(), step()]
