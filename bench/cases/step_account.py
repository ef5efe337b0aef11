"""Where the time of one sampled training step goes, operation by operation.

The step runs under torch's profiler, phase by phase; the time of every operation itself, without
what it calls, is added up by kind. The rest of the step is Python, and the profiler. Beside the
times stand the operations of a step, counted, and the rate of a large product on this machine,
which runs in turns with the steps as a copy does: what a step would take if it were nothing but
products at that rate.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.profiler import profile

from saft_kernels import SparseAdamW

from .. import limits
from ..correctness import require_loss
from ..display import progress
from ..flops import Flops
from ..harness import require
from ..limits import Needs
from ..models import (
    ADAMW,
    CACHE_LINE,
    Setting,
    Task,
    Workload,
    cache_lines,
    candidates,
    with_concentrated_mask,
    workload,
)
from ..outcome import Figure, Outcome, Timing
from ..timers import CPU
from .clip_step import PRODUCTS as PRODUCT_DTYPES
from .sparse_adamw import FLOPS

PHASES = ("forward", "backward", "optimizer")

#: Names of operations that multiply matrices, attention included.
PRODUCTS = ("mm", "matmul", "linear", "convolution", "scaled_dot_product", "mkldnn")

#: Wall time and processor time of all threads, in seconds.
Sample = tuple[float, float]


@dataclass(frozen=True)
class Account:
    """Two steps, and what the machine can do at best.

    Attributes:
        phases: times of each, of a step without the profiler.
        kinds: seconds by (phase, kind of operation), of one under it.
        total: seconds of that one.
        copied: seconds of a copy (:func:`.limits.copy_once`).
        multiplied: seconds of a matrix product (:func:`.limits.multiply_once`).
    """

    phases: dict[str, Sample]
    kinds: Counter[tuple[str, str]]
    total: float
    copied: float
    multiplied: float


def run(setting: Setting) -> Outcome:
    """Both precisions and both masks."""
    work = with_concentrated_mask(workload(replace(setting, dtype="fp32")), setting.density)
    outcome = Outcome()
    for precision in PRODUCT_DTYPES:
        for kind in ("concentrated", "uniform"):
            outcome += _one(work, precision, kind, setting)
    return outcome


def _one(work: Workload, precision: str, kind: str, setting: Setting) -> Outcome:
    task = replace(work.task, precision=precision, model=copy.deepcopy(work.task.model))
    optimizer = SparseAdamW(task.model, work.masks[kind], gradients="sampled", **ADAMW)
    loss, flops = _count(task, optimizer)
    require_loss(loss, work.loss, precision)
    _require_limits(precision)
    group = f"one step in {precision}, sampled gradients, {kind} mask"
    rounds = setting.steps.least
    accounts = []
    with progress(group, rounds) as advance:
        for _ in range(rounds):
            accounts.append(_account(task, optimizer))
            advance()
    optimizer.detach()
    rate = limits.rate([account.multiplied for account in accounts], CPU.device)
    needs = _needs(work, precision, kind, flops)
    timings = [_timing(group, phase, accounts, needs[phase], rate) for phase in PHASES]
    figures = _shares(group, accounts)
    figures += _counted(group, accounts, flops, rate)
    return Outcome(timings, figures)


def _timing(group: str, phase: str, accounts: list[Account], needs: Needs, rate: float) -> Timing:
    walls, cpus = zip(*(account.phases[phase] for account in accounts), strict=True)
    return Timing(
        group,
        phase,
        list(walls),
        list(cpus),
        needs.moves,
        needs.flops,
        limits.bandwidth([account.copied for account in accounts], CPU.device),
        rate if needs.arithmetic else None,
        limits.dtype_name(needs.dtype),
    )


# Counting -----------------------------------------------------------------------------------------


def _count(task: Task, optimizer: SparseAdamW) -> tuple[float, dict[str, Flops]]:
    """The loss of a step, and its floating point operations by phase."""
    flops = {phase: Flops() for phase in ("forward", "backward")}
    with flops["forward"].counting():
        loss = task.loss(task.model)
    with flops["backward"].counting():
        loss.backward()
    optimizer.zero_grad()
    return loss.item(), flops


def _needs(work: Workload, precision: str, kind: str, flops: dict[str, Flops]) -> dict[str, Needs]:
    """What each phase cannot do without: every weight once a pass, every selected entry's state.

    The optimizer reads and writes the cache lines of the selected weights and both moments, and
    reads gradients and indices.
    """
    params, mask = candidates(work.task.model), work.masks[kind]
    weights = sum(param.nbytes for param in params.values())
    lines = CACHE_LINE * cache_lines(mask, params)
    dtype = PRODUCT_DTYPES[precision]
    passes = {phase: flops[phase].needs(weights, dtype)() for phase in ("forward", "backward")}
    return {**passes, "optimizer": Needs(2 * lines + 24 * mask.nnz, FLOPS * mask.nnz)}


def _require_limits(precision: str) -> None:
    """Run what tells how fast the machine is once, untimed, and check it."""
    limits.copy_once(CPU.device)()
    require(limits.copied(CPU.device), "the copy differs from its source")
    product = limits.multiply_once(CPU.device, PRODUCT_DTYPES[precision])()
    require(limits.multiplied(product), "the product is wrong")


# Measuring ----------------------------------------------------------------------------------------


def _account(task: Task, optimizer: SparseAdamW) -> Account:
    """One step under the profiler and one without, whose phases are timed; a copy, a product."""
    copied, _ = CPU.time(limits.copy_once(CPU.device))
    multiplied, _ = CPU.time(limits.multiply_once(CPU.device, PRODUCT_DTYPES[task.precision]))
    phases = _step(task, optimizer, lambda phase: nullcontext())
    kinds: Counter[tuple[str, str]] = Counter()
    profiles = {phase: profile(use_kineto=False) for phase in PHASES}
    total = sum(wall for wall, _ in _step(task, optimizer, profiles.__getitem__).values())
    for phase, profiled in profiles.items():
        for event in profiled.key_averages():
            kinds[phase, _kind(event.key)] += event.self_cpu_time_total / 1e6
    return Account(phases, kinds, total, copied, multiplied)


def _step(task: Task, optimizer: SparseAdamW, around: Callable[[str], Any]) -> dict[str, Sample]:
    """One training step; the times of its phases."""
    losses: list[Tensor] = []
    work: dict[str, Callable[[], Any]] = {
        "forward": lambda: losses.append(task.loss(task.model)),
        "backward": lambda: losses.pop().backward(),
        "optimizer": lambda: _step_and_free(optimizer),
    }
    times = {}
    for phase in PHASES:
        with around(phase):
            times[phase] = CPU.time(work[phase])
    return times


def _step_and_free(optimizer: SparseAdamW) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _kind(name: str) -> str:
    if name == "saft_kernels::sampled_grad":
        return "sampled products"
    if name.startswith("saft_kernels::"):
        return "other kernels"
    return "products" if any(part in name for part in PRODUCTS) else "everything else"


# Reporting ----------------------------------------------------------------------------------------

#: What the account lists, and as what.
LINES = {
    ("forward", "products"): "forward, matrix products and attention",
    ("forward", "everything else"): "forward, everything else (norms, GELU, copies)",
    ("forward", "other kernels"): "forward, packing the used columns",
    ("backward", "products"): "input gradients, matrix products and attention",
    ("backward", "everything else"): "input gradients, everything else",
    ("backward", "sampled products"): "gradients of selected entries, sampled products",
    ("backward", "other kernels"): "gradients of selected entries, embeddings and vectors",
}


def _shares(group: str, accounts: list[Account]) -> list[Figure]:
    """The lines of the account in percent of the step, medians over the rounds."""
    lines = {text: [a.kinds[key] / a.total for a in accounts] for key, text in LINES.items()}
    lines["optimizer step"] = [
        sum(seconds for (phase, _), seconds in a.kinds.items() if phase == "optimizer") / a.total
        for a in accounts
    ]
    lines["Python, and the profiler"] = [
        1 - sum(values[i] for values in lines.values()) for i in range(len(accounts))
    ]
    total = statistics.median(a.total for a in accounts)
    return [
        Figure(
            f"share of {group}: {text}",
            100 * statistics.median(values),
            "%",
            note=f"{statistics.median(values) * total:.3g} s of {total:.3g} s",
        )
        for text, values in lines.items()
    ]


def _counted(
    group: str, accounts: list[Account], flops: dict[str, Flops], rate: float
) -> list[Figure]:
    """The step against its products at the machine's rate; sampled products against a dense one."""
    total = statistics.median(sum(wall for wall, _ in a.phases.values()) for a in accounts)
    dense = sum(each.dense for each in flops.values())
    sampled = flops["backward"].sampled
    kernel = statistics.median(a.kinds["backward", "sampled products"] for a in accounts)
    figures = [
        Figure(
            f"{group}: time over that of its matrix products at the machine's rate",
            total / (dense / rate),
            "times",
            note=f"{flops['forward'].dense / 1e9:.4g} + {flops['backward'].dense / 1e9:.4g} GFLOP "
            f"at {rate / 1e9:.3g} GFLOP/s",
        )
    ]
    if kernel > 0:
        figures.append(
            Figure(
                f"{group}: rate of the sampled products over the machine's",
                sampled / kernel / rate * 100,
                "%",
                note=f"{sampled / 1e9:.3g} GFLOP, {sampled / dense:.2%} of the products above",
            )
        )
    return figures
