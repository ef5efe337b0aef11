"""Stage 3: the optimizer step, against the fused dense one on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels import CooMask, SparseAdamW, ops, sparse_adamw_

from ..bars import held_to
from ..baselines.masked_adamw import masked_step
from ..correctness import (
    reference_step,
    require_state,
    require_stepped,
    require_untouched,
    stepped,
)
from ..harness import Contender, measure, require
from ..limits import Needs, evict_caches
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
from ..outcome import BASELINE, Figure, Outcome, Timing
from ..ratios import times_faster
from ..sweeps import growth, over_threads

DENSE = "torch.optim.AdamW(fused=True)"
COMPACT_UNIFORM = "sparse_adamw_, compact gradients, uniform mask"

#: Operations of one AdamW update of one entry: decay 2, moments 3 + 4, corrections 2, root, sum,
#: quotient, product and difference (Loshchilov & Hutter 2019, Algorithm 2).
FLOPS = 16


def run(setting: Setting) -> Outcome:
    """Speed on the whole model, bytes of state, growth with nnz, D and threads."""
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
        low = params[0].dtype != torch.float32
        master = torch.empty(len(flat), device=flat.device) if low else None
        made = cls(params, grads, flat, bounds, exp_avg, exp_avg.clone(), step, master)
        made.take_values()
        return made

    def take_values(self) -> None:
        """Let the exact values of low-precision weights be what the weights are now."""
        if self.master is None:
            return
        for param, (begin, end) in zip(self.params, pairwise(self.bounds), strict=True):
            self.master[begin:end] = ops.gather(param.detach(), self.indices[begin:end]).float()

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

    def needs(self, line: int = CACHE_LINE) -> Needs:
        """Lines of weights twice and of dense gradients once, indices, state twice."""
        pieces = [self.indices[begin:end] for begin, end in pairwise(self.bounds)]
        pairs = zip(self.params, pieces, strict=True)
        lines = line * sum(lines_touched(index, param, line) for param, index in pairs)
        nnz = self.exp_avg.numel()
        gradients = self.grads.nbytes if isinstance(self.grads, Tensor) else lines
        state = 16 if self.master is None else 24
        return Needs(2 * lines + gradients + (4 + state) * nnz, FLOPS * nnz)


def _speed(work: Workload, setting: Setting) -> Outcome:
    contenders = steps(work)
    timings = measure("optimizer step", contenders, setting.kernels)
    figures = _speed_figures(timings, work.masks, work.gradients)
    outcome = Outcome(list(timings.values()), figures)
    (ours,) = (each for each in contenders if each.name == COMPACT_UNIFORM)
    outcome += over_threads(COMPACT_UNIFORM, ours, setting.kernels)
    return outcome


def steps(work: Workload) -> list[Contender]:
    """They change one copy of the model, each from caches that a dense step has filled."""
    model = _copy_with_gradients(work, work.gradients)
    params = candidates(model)
    dense = torch.optim.AdamW(params.values(), fused=True, **ADAMW)
    checks = {kind: _sparse_check(params, mask, work) for kind, mask in work.masks.items()}
    # Weight and two moments twice, gradient once.
    element = next(iter(params.values())).element_size()
    needs = Needs(7 * element * work.numel, FLOPS * work.numel)
    contenders = [
        Contender(
            DENSE, dense.step, _dense_check(dense, params, work), needs=needs,
            covers="every parameter", role=BASELINE,
        )
    ]  # fmt: skip
    for kind, mask in work.masks.items():
        for source, step in _sparse_steps(params, mask, work).items():
            name = f"sparse_adamw_, {source} gradients, {kind} mask"
            check = _with_state(step, params, mask, work, checks[kind])
            contenders.append(Contender(name, step, check, dense.step, step.needs()))
    mask = work.masks["selected"]
    optimizer = SparseAdamW(model, mask, gradients="dense", **ADAMW)
    name = "SparseAdamW.step(), dense gradients, selected mask"
    needs = _sparse_steps(params, mask, work)["dense"].needs()
    contenders.append(Contender(name, optimizer.step, checks["selected"], dense.step, needs))
    contenders.append(_algorithm1(work, dense))
    return contenders


def _with_state(
    step: Step,
    params: Mapping[str, nn.Parameter],
    mask: CooMask,
    work: Workload,
    check: Callable[[Callable[[], Any]], None],
) -> Callable[[Callable[[], Any]], None]:
    """The check of a first step from the weights at that time, and that of its state."""

    def checked(run: Callable[[], Any]) -> None:
        step.restart()
        step.take_values()
        expected = stepped(params, work.gradients, mask)
        check(run)
        require_state(expected, step.exp_avg, step.exp_avg_sq, step.master)

    return checked


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
    compact = torch.cat([ops.gather(g, i) for g, i in zip(grads, indices, strict=True)]).float()
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
    # AdamW's seven, the gradient masked in place (two), the weights reset (three); masks are bytes.
    element = next(iter(work.gradients.values())).element_size()
    needs = Needs((12 * element + 2) * work.numel, FLOPS * work.numel)
    name = "Algorithm 1 literally: mask, fused AdamW, reset"
    return Contender(name, step, check, dense.step, needs, role=BASELINE)


def _speed_figures(
    timings: Mapping[str, Timing], masks: Mapping[str, CooMask], params: Mapping[str, Tensor]
) -> list[Figure]:
    baseline = timings[DENSE]
    figures = []
    for source, kind in product(("dense", "compact"), masks):
        what = f"sparse_adamw_ from {source} gradients against fused AdamW, {kind} mask"
        ours = timings[f"sparse_adamw_, {source} gradients, {kind} mask"]
        figures.append(held_to(f"adamw/{source}/{kind}", times_faster(what, baseline, ours)))
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
    return Outcome(figures=[held_to("adamw/state", Figure(what, total / mask.nnz, "bytes"))])


# Growth -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A series of steps on one tensor.

    Attributes:
        what: the entries are.
        over: what grows.
        cases: (nnz, D, entries lie below) of every step.
        sizes: what grows, in each.
        bar: of the exponent; empty where address translation, not this package, sets it.
    """

    what: str
    over: str
    cases: list[tuple[int, int, int]]
    sizes: list[int]
    bar: str


def _growth(work: Workload, setting: Setting) -> Outcome:
    """Time over the number of selected entries at fixed D, and over D at a fixed number.

    The same entries should cost the same in a larger tensor. Entries that spread out over it cost
    more each, since fewer of them share a page or a part of the page tables.
    """
    numel, nnz = work.numel, work.masks["uniform"].nnz
    counts = [nnz // 16, nnz // 4, nnz, 4 * nnz]
    sizes = [numel // 16, numel // 8, numel // 4, numel // 2, numel]
    few = counts[0]
    weights, gradients = (torch.randn(numel).to(setting.torch_dtype) for _ in range(2))
    outcome = Outcome()
    for series in (
        Series(
            "entries anywhere", "nnz", [(n, numel, numel) for n in counts], counts,
            "adamw/growth/nnz",
        ),
        Series(
            "the same entries", "D", [(few, size, sizes[0]) for size in sizes], sizes,
            "adamw/growth/D",
        ),
        Series("entries spread over it", "D", [(few, size, size) for size in sizes], sizes, ""),
    ):  # fmt: skip
        group = f"optimizer step over {series.over}, {series.what}"
        contenders = [_step(weights[:d], gradients[:d], n, below) for n, d, below in series.cases]
        timings = list(measure(group, contenders, setting.kernels).values())
        label = f"sparse_adamw_, {series.what}"
        figure, line = growth(label, series.over, series.sizes, timings)
        if series.bar:
            figure = held_to(series.bar, figure)
        outcome += Outcome(timings, [figure], [line])
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
        step.take_values()
        expected = stepped({"weights": weights}, {"weights": gradients}, mask)
        run()
        require_stepped({"weights": weights}, expected.values, mask)
        require_state(expected, step.exp_avg, step.exp_avg_sq, step.master)
        require_untouched({"weights": weights}, {"weights": before}, mask)

    name = f"sparse_adamw_, nnz = {indices.numel():,}, D = {weights.numel():,}"
    return Contender(name, step, check, evict_caches, step.needs())
