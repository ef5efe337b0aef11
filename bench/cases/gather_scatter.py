"""Stage 2: values at the indices, out of the weights and back, from cold caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saft_kernels import CooMask, ops

from ..harness import Contender, measure, require
from ..limits import Needs, evict_caches
from ..models import CACHE_LINE, Setting, Workload, cache_lines, workload
from ..outcome import BASELINE, Outcome
from ..ratios import times_faster
from ..sweeps import over_threads


def run(setting: Setting) -> Outcome:
    """Both directions against indexing in plain torch, for both masks; then over threads."""
    work = workload(setting)
    outcome = Outcome()
    for kind, mask in work.masks.items():
        for what, contenders in gather_scatter(mask, work).items():
            timings = measure(f"{what}, {kind} mask", contenders, setting.kernels)
            slow, fast = timings.values()
            figure = times_faster(f"{what} against torch indexing, {kind} mask", slow, fast)
            outcome += Outcome(list(timings.values()), [figure])
    for what, (_, ours) in gather_scatter(work.masks["uniform"], work).items():
        outcome += over_threads(f"{what}, uniform mask", ours, setting.kernels)
    return outcome


def gather_scatter(mask: CooMask, work: Workload) -> dict[str, list[Contender]]:
    """torch's way and ours, in both directions."""
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

    lines = cache_lines(mask, weights) * CACHE_LINE
    element = next(iter(weights.values())).element_size()
    compact = (4 + element) * mask.nnz
    ways = {
        "gather": (check_gathered, torch_gather, our_gather, Needs(lines + compact)),
        "scatter_": (check_scattered, torch_scatter, our_scatter, Needs(2 * lines + compact)),
    }
    return {
        what: [
            Contender("torch indexing", plain, check, evict_caches, needs, role=BASELINE),
            Contender(what, ours, check, evict_caches, needs),
        ]
        for what, (check, plain, ours, needs) in ways.items()
    }
