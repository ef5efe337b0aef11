"""A whole selection: the gradients of some batches, added up, and the largest of all parameters.

The floor is the gradients alone: forward and backward pass of every batch, each gradient freed as
soon as it is there. Sums in another order round otherwise, so that two selections may differ in
entries that are as large as the smallest selected one to within roundings, and in no others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from saft_clip.methods.base import FROZEN
from saft_kernels import select

from ..baselines.dense_selection import accumulated, dense_selection
from ..baselines.topk import concatenated
from ..flops import Flops
from ..harness import Contender, measure, require
from ..models import Setting, Task, Workload, candidates, workload
from ..outcome import BASELINE, FLOOR, OURS, Outcome
from ..ratios import times_as_long

BATCHES = 4

SELECT = "select"
PLAIN = "accumulated gradients, torch.cat, torch.topk"
GRADIENTS = "floor: the gradients alone"

#: How far sums in another order may be apart, relative to the smallest selected one.
ROUNDING = 1e-3


def run(setting: Setting) -> Outcome:
    """Some batches of the setting's size, cut from one."""
    work = workload(replace(setting, dtype="fp32"))
    contenders = _contenders(work, setting.density)
    group = f"selection, {BATCHES} batches of {len(work.task.images) // BATCHES} images"
    timings = measure(group, contenders, setting.steps)
    figures = [
        times_as_long(
            f"a whole selection: {SELECT} against {other}", timings[SELECT], timings[other]
        )
        for other in (PLAIN, GRADIENTS)
    ]
    return Outcome(list(timings.values()), figures)


def _contenders(work: Workload, density: float) -> list[Contender]:
    model = copy.deepcopy(work.task.model)
    tasks = _batches(work.task)
    losses = [task.loss for task in tasks]
    k = work.masks["selected"].nnz
    check = _same_selection(accumulated(model, losses), k)

    def ours() -> dict[str, Tensor]:
        mask = select(
            model,
            lambda model, task: task.loss(model),
            tasks,
            density=density,
            exclude=list(FROZEN),
            examples=lambda task: len(task.images),
        )
        return dict(mask.items())

    return [
        _contender(SELECT, ours, check, work, 12),
        _contender(PLAIN, lambda: dense_selection(model, losses, k), check, work, 16, BASELINE),
        _contender(GRADIENTS, lambda: _gradients(model, tasks), _ran, work, 0, FLOOR),
    ]


def _batches(task: Task) -> list[Task]:
    """Parts of the images, each with all prompts."""
    size = max(len(task.images) // BATCHES, 1)
    return [
        replace(task, images=task.images[i : i + size], labels=task.labels[i : i + size])
        for i in range(0, size * min(BATCHES, len(task.images)), size)
    ]


def _gradients(model: nn.Module, tasks: list[Task]) -> int:
    """Every gradient comes into being and goes; how many did."""
    count = 0

    def free(param: Tensor) -> None:
        nonlocal count
        count += 1
        param.grad = None

    trained = [param for param in candidates(model).values() if param.requires_grad]
    hooks = [param.register_post_accumulate_grad_hook(free) for param in trained]
    for task in tasks:
        task.loss(model).backward()
    for hook in hooks:
        hook.remove()
    return count


def _contender(
    name: str,
    run: Callable[[], Any],
    check: Callable[[Callable[[], Any]], None],
    work: Workload,
    accumulation: int,
    role: str = OURS,
) -> Contender:
    """Weights are read forward and backward; ``accumulation`` bytes per entry come on top."""
    flops = Flops()
    needs = flops.needs(BATCHES * (8 + accumulation) * work.numel)
    return Contender(name, run, flops.checked(check), needs=needs, role=role)


def _ran(run: Callable[[], Any]) -> None:
    require(run() > 0, "no gradient came")


def _same_selection(sums: Mapping[str, Tensor], k: int) -> Callable[[Callable[[], Any]], None]:
    """The k largest, to within roundings."""
    smallest = concatenated(sums).topk(k).values[-1]

    def check(run: Callable[[], Any]) -> None:
        chosen = run()
        require(sum(index.numel() for index in chosen.values()) == k, f"not {k} entries")
        below = sum(
            int((sums[name].view(-1)[index].abs() < (1 - ROUNDING) * smallest).sum())
            for name, index in chosen.items()
        )
        require(below == 0, f"{below} of the selected entries are not among the {k} largest")

    return check
