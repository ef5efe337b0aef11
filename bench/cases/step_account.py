"""Where the time of one sampled training step goes, operation by operation.

The step runs under torch's profiler, phase by phase; the time of every operation itself, without
what it calls, is added up by kind. The rest of the step is Python, and the profiler. Beside the
times stand the operations that had to be done, counted, and the rate of a large product on this
machine: what a step would take if it were nothing but products at that rate.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from saft_kernels import SparseAdamW

from ..correctness import require_loss
from ..display import progress
from ..flops import Flops
from ..models import ADAMW, Setting, Task, Workload, with_concentrated_mask, workload
from ..outcome import Figure, Outcome, Timing

PHASES = ("forward", "backward", "optimizer")

#: Names of operations that multiply matrices, attention included.
PRODUCTS = ("mm", "matmul", "linear", "convolution", "scaled_dot_product", "mkldnn")

_DTYPES = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}


@dataclass(frozen=True)
class Account:
    """Two steps.

    Attributes:
        phases: seconds of each, of a step without the profiler.
        kinds: seconds by (phase, kind of operation), of one under it.
        total: seconds of that one.
    """

    phases: dict[str, float]
    kinds: Counter[tuple[str, str]]
    total: float


def run(setting: Setting) -> Outcome:
    """Both precisions and both masks."""
    work = with_concentrated_mask(workload(setting), setting.density)
    outcome = Outcome()
    for precision in ("fp32", "amp_bf16"):
        rate = _rate(_DTYPES[precision], setting)
        for kind in ("concentrated", "uniform"):
            outcome += _one(work, precision, kind, rate, setting)
    return outcome


def _one(work: Workload, precision: str, kind: str, rate: float, setting: Setting) -> Outcome:
    task = replace(work.task, precision=precision, model=copy.deepcopy(work.task.model))
    optimizer = SparseAdamW(task.model, work.masks[kind], gradients="sampled", **ADAMW)
    loss, flops = _count(task, optimizer)
    require_loss(loss, work.loss, precision)
    group = f"one step in {precision}, sampled gradients, {kind} mask"
    rounds = setting.steps.least
    accounts = []
    with progress(group, rounds) as advance:
        for _ in range(rounds):
            accounts.append(_account(task, optimizer))
            advance()
    optimizer.detach()
    timings = [
        Timing(group, phase, [a.phases[phase] for a in accounts], [0.0] * rounds)
        for phase in PHASES
    ]
    figures = _shares(group, accounts)
    figures += _counted(group, accounts, flops, rate)
    return Outcome(timings, figures)


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


def _rate(dtype: torch.dtype, setting: Setting) -> float:
    """Operations per second of a large matrix product, the best of a few."""
    size = 256 if setting.model == "saft-tiny" else 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(_seconds(lambda: a @ b) for _ in range(7))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Measuring ----------------------------------------------------------------------------------------


def _account(task: Task, optimizer: SparseAdamW) -> Account:
    """One step under the profiler and one without, whose phases are timed."""
    phases = _step(task, optimizer, lambda phase: nullcontext())
    kinds: Counter[tuple[str, str]] = Counter()
    profiles = {phase: profile(use_kineto=False) for phase in PHASES}
    total = sum(_step(task, optimizer, profiles.__getitem__).values())
    for phase, profiled in profiles.items():
        for event in profiled.key_averages():
            kinds[phase, _kind(event.key)] += event.self_cpu_time_total / 1e6
    return Account(phases, kinds, total)


def _step(task: Task, optimizer: SparseAdamW, around: Callable[[str], Any]) -> dict[str, float]:
    """One training step; the seconds of its phases."""
    losses: list[Tensor] = []
    work: dict[str, Callable[[], Any]] = {
        "forward": lambda: losses.append(task.loss(task.model)),
        "backward": lambda: losses.pop().backward(),
        "optimizer": lambda: _step_and_free(optimizer),
    }
    seconds = {}
    for phase in PHASES:
        with around(phase):
            seconds[phase] = _seconds(work[phase])
    return seconds


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
    total = statistics.median(sum(a.phases.values()) for a in accounts)
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
