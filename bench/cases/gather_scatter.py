"""Stage 2: values at the indices, out of the weights and back, from cold caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saft_kernels import CooMask, ops

from ..harness import Contender, Outcome, evict_caches, measure, require, times_faster
from ..models import CACHE_LINE, Setting, Workload, cache_lines, workload


def run(setting: Setting) -> Outcome:
    """Both directions against indexing in plain torch, for both masks."""
    work = workload(setting)
    outcome = Outcome()
    for kind, mask in work.masks.items():
        outcome += _one_mask(kind, mask, work, setting)
    return outcome


def _one_mask(kind: str, mask: CooMask, work: Workload, setting: Setting) -> Outcome:
    weights = {name: gradient.clone() for name, gradient in work.gradients.items() if name in mask}
    indices = dict(mask.items())
    long_indices = {name: index.long() for name, index in indices.items()}
    values = {name: weights[name].view(-1)[index] for name, index in long_indices.items()}

    def torch_gather() -> list[Tensor]:
        return [weights[name].view(-1)[index] for name, index in long_indices.items()]

    def our_gather() -> list[Tensor]:
        return [ops.gather(weights[name], index) for name, index in indices.items()]

    def torch_scatter() -> None:
        for name, index in long_indices.items():
            weights[name].view(-1)[index] = values[name]

    def our_scatter() -> None:
        for name, index in indices.items():
            ops.scatter_(weights[name], index, values[name])

    def check_gathered(run: Callable[[], Any]) -> None:
        right = all(map(torch.equal, run(), values.values()))
        require(right, "other values than those at the indices")

    def check_scattered(run: Callable[[], Any]) -> None:
        for name, index in long_indices.items():
            weights[name].view(-1)[index] = torch.nan
        run()
        for name, weight in weights.items():
            require(torch.equal(weight, work.gradients[name]), f"{name!r} holds other values")

    lines, nnz = cache_lines(mask, weights) * CACHE_LINE, mask.nnz
    outcome = Outcome()
    for what, check, plain, ours, moves in (
        ("gather", check_gathered, torch_gather, our_gather, lines + 8 * nnz),
        ("scatter_", check_scattered, torch_scatter, our_scatter, 2 * lines + 8 * nnz),
    ):
        contenders = [
            Contender("torch indexing", plain, check, evict_caches),
            Contender(what, ours, check, evict_caches, moves),
        ]
        timings = measure(f"{what}, {kind} mask", contenders, setting.kernels)
        slow, fast = timings.values()
        figure = times_faster(f"{what} against torch indexing, {kind} mask", slow, fast)
        outcome += Outcome(list(timings.values()), [figure])
    return outcome
