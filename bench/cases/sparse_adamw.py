"""Stage 3: the optimizer step, against the fused dense one on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels import CooMask, SparseAdamW, ops, sparse_adamw_

from ..baselines.masked_adamw import masked_step
from ..checks import reference_step, require_stepped, require_untouched
from ..harness import (
    Contender,
    Figure,
    Outcome,
    Timing,
    evict_caches,
    fitted_exponent,
    measure,
    require,
    times_faster,
)
from ..models import (
    ADAMW,
    CACHE_LINE,
    Setting,
    Workload,
    cache_lines,
    candidates,
    lines_touched,
    workload,
)

DENSE = "torch.optim.AdamW(fused=True)"

#: Least speed-ups over the dense step, by source of the gradients and mask.
BARS = {
    ("dense", "uniform"): 30,
    ("dense", "selected"): 60,
    ("compact", "uniform"): 50,
    ("compact", "selected"): 100,
}


def run(setting: Setting) -> Outcome:
    """Speed on the whole model, bytes of state, growth with nnz and D."""
    work = workload(setting)
    outcome = _speed(work, setting)
    outcome += _state(work)
    outcome += _growth(work, setting)
    return outcome


# Speed --------------------------------------------------------------------------------------------


@dataclass
class Step:
    """The arguments of one :func:`saft_kernels.sparse_adamw_` call, ready to be repeated."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor] | Tensor
    indices: Tensor
    bounds: list[int]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    master: Tensor | None

    @classmethod
    def of(
        cls, params: Sequence[Tensor], grads: Sequence[Tensor] | Tensor, indices: Sequence[Tensor]
    ) -> Step:
        """With a state of zeros; weights of less than fp32 get exact values."""
        flat, bounds = ops.end_to_end(indices)
        exp_avg, step = (torch.zeros(len(each), device=flat.device) for each in (flat, params))
        master = None
        if params[0].dtype != torch.float32:
            pairs = zip(params, indices, strict=True)
            master = torch.cat(
                [ops.gather(param.detach(), index) for param, index in pairs]
            ).float()
        return cls(params, grads, flat, bounds, exp_avg, exp_avg.clone(), step, master)

    def restart(self) -> None:
        """Go back to a state of zeros."""
        for state in (self.exp_avg, self.exp_avg_sq, self.step):
            state.zero_()

    def __call__(self) -> None:
        """Take the step."""
        sparse_adamw_(
            self.params, self.grads, self.indices, self.exp_avg, self.exp_avg_sq, self.step,
            bounds=self.bounds, master=self.master, **ADAMW,
        )  # fmt: skip

    def moves(self, line: int = CACHE_LINE) -> int:
        """Bytes it must move: lines of weights twice and of dense gradients, indices, state."""
        pieces = [self.indices[begin:end] for begin, end in pairwise(self.bounds)]
        pairs = zip(self.params, pieces, strict=True)
        lines = line * sum(lines_touched(index, param, line) for param, index in pairs)
        nnz = self.exp_avg.numel()
        gradients = 4 * nnz if isinstance(self.grads, Tensor) else lines
        state = 16 if self.master is None else 24
        return 2 * lines + gradients + (4 + state) * nnz


def _speed(work: Workload, setting: Setting) -> Outcome:
    """Contenders change one copy of the model, each from caches that a dense step has filled."""
    model = _copy_with_gradients(work, work.gradients)
    params = candidates(model)
    dense = torch.optim.AdamW(params.values(), fused=True, **ADAMW)
    checks = {kind: _sparse_check(params, mask, work) for kind, mask in work.masks.items()}

    contenders = [
        Contender(DENSE, dense.step, _dense_check(dense, params, work), moves=28 * work.numel)
    ]
    for kind, mask in work.masks.items():
        for source, step in _sparse_steps(params, mask, work).items():
            name = f"sparse_adamw_, {source} gradients, {kind} mask"
            contenders.append(Contender(name, step, checks[kind], dense.step, step.moves()))
    optimizer = SparseAdamW(model, work.masks["selected"], gradients="dense", **ADAMW)
    name = "SparseAdamW.step(), dense gradients, selected mask"
    contenders.append(Contender(name, optimizer.step, checks["selected"], dense.step))
    contenders.append(_algorithm1(work, dense))
    timings = measure("optimizer step", contenders, setting.kernels)
    return Outcome(list(timings.values()), _speed_figures(timings, work.masks, params))


def _copy_with_gradients(work: Workload, gradients: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(work.task.model)
    for name, param in candidates(model).items():
        param.grad = gradients[name]
    return model


def _sparse_steps(
    params: Mapping[str, nn.Parameter], mask: CooMask, work: Workload
) -> dict[str, Step]:
    """One step for each source of gradients."""
    names, indices = zip(*mask.items(), strict=True)
    chosen = [params[name] for name in names]
    grads = [work.gradients[name] for name in names]
    compact = torch.cat([ops.gather(g, i) for g, i in zip(grads, indices, strict=True)])
    return {
        source: Step.of(chosen, gradients, list(indices))
        for source, gradients in (("dense", grads), ("compact", compact))
    }


def _algorithm1(work: Workload, dense: torch.optim.Optimizer) -> Contender:
    """With a model and gradients of its own: it masks them in place, every time anew."""
    model = _copy_with_gradients(work, {name: g.clone() for name, g in work.gradients.items()})
    mask = work.masks["selected"]
    check = _sparse_check(candidates(model), mask, work)
    step = masked_step(model, mask)
    return Contender("Algorithm 1 literally: mask, fused AdamW, reset", step, check, dense.step)


def _speed_figures(
    timings: Mapping[str, Timing], masks: Mapping[str, CooMask], params: Mapping[str, nn.Parameter]
) -> list[Figure]:
    baseline = timings[DENSE]
    figures = []
    for (source, kind), bar in BARS.items():
        what = f"sparse_adamw_ from {source} gradients against fused AdamW, {kind} mask"
        ours = timings[f"sparse_adamw_, {source} gradients, {kind} mask"]
        figures.append(times_faster(what, baseline, ours, bar))
    for kind, mask in masks.items():
        what = f"selected entries per cache line that holds any, {kind} mask"
        figures.append(Figure(what, mask.nnz / cache_lines(mask, params), "entries"))
    return figures


def _dense_check(
    dense: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], work: Workload
) -> Callable[[Callable[[], Any]], None]:
    """Its first step, at the entries of a mask; the state is not reset as it stays dense."""

    def check(run: Callable[[], Any]) -> None:
        mask = work.masks["uniform"]
        expected = reference_step(params, work.gradients, mask)
        require(not dense.state, "the first step was taken before")
        run()
        require_stepped(params, expected, mask)

    return check


def _sparse_check(
    params: Mapping[str, nn.Parameter], mask: CooMask, work: Workload
) -> Callable[[Callable[[], Any]], None]:
    """Its first step against the specification, and every other entry bit for bit."""

    def check(run: Callable[[], Any]) -> None:
        before = {name: param.detach().clone() for name, param in params.items()}
        expected = reference_step(params, work.gradients, mask)
        run()
        require_stepped(params, expected, mask)
        require_untouched(params, before, mask)

    return check


# State --------------------------------------------------------------------------------------------


def _state(work: Workload) -> Outcome:
    """Bytes held per selected entry, for the kind of weights that needs most."""
    model = copy.deepcopy(work.task.model).to(torch.bfloat16)
    mask = work.masks["uniform"]
    optimizer = SparseAdamW(model, mask, gradients="streamed", **ADAMW)
    total = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    what = "state of SparseAdamW per selected entry: indices, moments, fp32 values of bf16 weights"
    return Outcome(figures=[Figure(what, total / mask.nnz, "bytes", bar=20, at_least=False)])


# Growth -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A series of steps on one tensor.

    Attributes:
        what: grows.
        cases: (nnz, D, entries lie below) of every step.
        sizes: what grows, in each.
        bar: the largest exponent; None where address translation, not this package, sets it.
    """

    what: str
    cases: list[tuple[int, int, int]]
    sizes: list[int]
    bar: float | None


def _growth(work: Workload, setting: Setting) -> Outcome:
    """Time over the number of selected entries at fixed D, and over D at a fixed number.

    The same entries should cost the same in a larger tensor. Entries that spread out over it cost
    more each, since fewer of them share a page or a part of the page tables.
    """
    numel, nnz = work.numel, work.masks["uniform"].nnz
    counts = [nnz // 16, nnz // 4, nnz, 4 * nnz]
    sizes = [numel // 16, numel // 8, numel // 4, numel // 2, numel]
    few = counts[0]
    weights, gradients = torch.randn(numel), torch.randn(numel)
    outcome = Outcome()
    for sweep in (
        Sweep("nnz", [(count, numel, numel) for count in counts], counts, 1.1),
        Sweep("D, the same entries", [(few, size, sizes[0]) for size in sizes], sizes, 0.1),
        Sweep("D, entries spread over it", [(few, size, size) for size in sizes], sizes, None),
    ):
        contenders = [_step(weights[:d], gradients[:d], n, below) for n, d, below in sweep.cases]
        timings = list(measure(f"step over {sweep.what}", contenders, setting.kernels).values())
        exponent = fitted_exponent(sweep.sizes, timings)
        what = f"exponent of time over {sweep.what}"
        outcome += Outcome(timings, [Figure(what, exponent, "", bar=sweep.bar, at_least=False)])
    return outcome


def _step(weights: Tensor, gradients: Tensor, nnz: int, below: int) -> Contender:
    """One tensor, entries drawn uniformly from the first ``below``, cold caches."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(below, (nnz + nnz // 4,), generator=generator).unique()
    keep = torch.randperm(drawn.numel(), generator=generator)[:nnz]
    indices = drawn[keep].sort().values.int()
    step = Step.of([weights], [gradients], [indices])
    mask = CooMask({"weights": indices}, {"weights": weights.shape})

    def check(run: Callable[[], Any]) -> None:
        before = weights.clone()
        expected = reference_step({"weights": weights}, {"weights": gradients}, mask)
        run()
        require_stepped({"weights": weights}, expected, mask)
        require_untouched({"weights": weights}, {"weights": before}, mask)

    name = f"sparse_adamw_, nnz = {indices.numel():,}, D = {weights.numel():,}"
    return Contender(name, step, check, evict_caches, step.moves())
