"""A whole selection: the gradients of some batches, added up, and the largest of all parameters.

The floor is the gradients alone: forward and backward pass of every batch, each gradient freed as
soon as it is there. Sums in another order round otherwise, so that two selections may differ in
entries that are as large as the smallest selected one to within roundings, and in no others.

The bytes that must move are counted by one rule: every batch reads the weights forward and backward
and writes its gradients; adding these to the sum of the batches before, which the floor leaves out,
reads both and writes the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
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

#: At most; fewer images are as many batches.
BATCHES = 4

#: Bytes per entry that must move, by what it takes: a batch's gradients, and adding them up.
GRADIENT, ADDITION = 4 + 4 + 4, 4 + 4 + 4

SELECT = "select"
PLAIN = "accumulated gradients, torch.cat, torch.topk"
GRADIENTS = "floor: the gradients alone"

#: How far sums in another order may be apart, relative to the smallest selected one.
ROUNDING = 1e-3


def run(setting: Setting) -> Outcome:
    """Some batches of the setting's size, cut from one."""
    work = workload(replace(setting, dtype="fp32"))
    tasks = _batches(work.task)
    group = f"selection, {len(tasks)} batches of {len(tasks[0].images)} images"
    timings = measure(group, _contenders(work, tasks, setting.density), setting.steps)
    figures = [
        times_as_long(
            f"a whole selection: {SELECT} against {other}", timings[SELECT], timings[other]
        )
        for other in (PLAIN, GRADIENTS)
    ]
    return Outcome(list(timings.values()), figures)


def _contenders(work: Workload, tasks: list[Task], density: float) -> list[Contender]:
    model = copy.deepcopy(work.task.model)
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

    alone = len(tasks) * GRADIENT * work.numel
    summed = alone + (len(tasks) - 1) * ADDITION * work.numel
    all_came = _all_came(len(tasks) * _trained(model, tasks[0]))
    return [
        _contender(SELECT, ours, check, summed),
        _contender(PLAIN, lambda: dense_selection(model, losses, k), check, summed, BASELINE),
        _contender(GRADIENTS, lambda: _gradients(model, tasks), all_came, alone, FLOOR),
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
    moves: int,
    role: str = OURS,
) -> Contender:
    """Its operations are counted; ``moves`` are the bytes that must move."""
    flops = Flops()
    return Contender(name, run, flops.checked(check), needs=flops.needs(moves), role=role)


def _trained(model: nn.Module, task: Task) -> int:
    """How many parameters get a gradient from one batch."""
    params = [param for param in candidates(model).values() if param.requires_grad]
    gradients = torch.autograd.grad(task.loss(model), params, allow_unused=True)
    return sum(gradient is not None for gradient in gradients)


def _all_came(count: int) -> Callable[[Callable[[], Any]], None]:
    def check(run: Callable[[], Any]) -> None:
        came = run()
        require(came == count, f"{came} gradients came, not {count}")

    return check


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
