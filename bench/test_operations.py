"""The operations one by one, under pytest-benchmark: what ``make bench`` runs, in minutes.

Each contender is checked before it is timed, as everywhere here. pytest-benchmark times one test
after the other, and not in turns: a ratio to rely on is one of ``python -m bench run``. Its own
options apply: ``--benchmark-autosave`` keeps a run, ``--benchmark-compare`` compares with the last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import accumulate_topk, gather_scatter, sampled_grad, sparse_adamw
from .harness import Contender
from .models import Setting, workload

SETTING = Setting()

ROUNDS = 9


def _selection() -> list[Contender]:
    return accumulate_topk.selection(workload(SETTING).gradients, _nnz())


def _accumulation() -> list[Contender]:
    gradients = workload(SETTING).gradients
    sums = {name: accumulate_topk.SCALE * gradient for name, gradient in gradients.items()}
    return accumulate_topk.accumulation(sums, gradients, _nnz())


def _nnz() -> int:
    return workload(SETTING).masks["uniform"].nnz


def _both_ways(which: str) -> list[Contender]:
    work = workload(SETTING)
    return gather_scatter.gather_scatter(work.masks["uniform"], work)[which]


def _steps() -> list[Contender]:
    return sparse_adamw.steps(workload(SETTING))


def _weight_gradient(dtype: torch.dtype) -> list[Contender]:
    return sampled_grad.weight_gradient(dtype, sampled_grad.SIZES, SETTING.density)


#: Operation -> what makes its contenders.
OPERATIONS: dict[str, Callable[[], list[Contender]]] = {
    "selection": _selection,
    "accumulation": _accumulation,
    "gather": lambda: _both_ways("gather"),
    "scatter_": lambda: _both_ways("scatter_"),
    "optimizer step": _steps,
    "weight gradient, float32": lambda: _weight_gradient(torch.float32),
    "weight gradient, bfloat16": lambda: _weight_gradient(torch.bfloat16),
}

#: The contenders of each, in their order. They are only made when they are needed.
CONTENDERS = {
    "selection": ("torch.topk", "StreamingTopK"),
    "accumulation": ("acc.add_(grad)", "StreamingTopK.update(acc, grad)"),
    "gather": ("torch indexing", "gather"),
    "scatter_": ("torch indexing", "scatter_"),
    "optimizer step": (
        sparse_adamw.DENSE,
        "sparse_adamw_, dense gradients, uniform mask",
        "sparse_adamw_, compact gradients, uniform mask",
        "sparse_adamw_, dense gradients, selected mask",
        "sparse_adamw_, compact gradients, selected mask",
        "SparseAdamW.step(), dense gradients, selected mask",
        "Algorithm 1 literally: mask, fused AdamW, reset",
    ),
    **{
        f"weight gradient, {dtype}": (
            sampled_grad.DENSE,
            "sampled_grad, uniform mask",
            "pack_columns, uniform mask",
            "sampled_grad, concentrated mask",
            "pack_columns, concentrated mask",
            *(["torch.sparse.sampled_addmm, uniform mask"] if dtype == "float32" else []),
        )
        for dtype in ("float32", "bfloat16")
    },
}


@lru_cache(maxsize=1)  # tests of an operation follow each other; two would need twice the memory
def contenders_of(operation: str) -> dict[str, Contender]:
    """By name."""
    return {contender.name: contender for contender in OPERATIONS[operation]()}


@pytest.mark.parametrize(
    ("operation", "name"), [(key, name) for key, names in CONTENDERS.items() for name in names]
)
def test_operation(operation: str, name: str, benchmark: BenchmarkFixture) -> None:
    """Check one contender, and time it."""
    contender = contenders_of(operation)[name]
    contender.before()
    contender.check(contender.run)
    benchmark.group = operation

    def before() -> Any:
        contender.before()

    benchmark.pedantic(contender.run, setup=before, rounds=ROUNDS, warmup_rounds=1)
