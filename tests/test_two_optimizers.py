"""Several optimizers in one process: each does what it does alone, or is refused."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import number_of_threads
from saft_kernels import ops
from saft_kernels.errors import OptimizerError
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.topk import StreamingTopK
from training import (
    DTYPES,
    MODES,
    SELECTED,
    SmallModel,
    assert_unselected_unchanged,
    backward,
    make_optimizer,
    small_mask,
    small_model,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Pair = tuple[SmallModel, SparseAdamW]


def pair(mode: str, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    model = small_model(dtype)
    return model, make_optimizer(model, mode, **options)


def one_step(model: nn.Module, optimizer: SparseAdamW, step: int) -> None:
    optimizer.zero_grad()
    backward(model, step)
    optimizer.step()


def outcome(model: nn.Module, optimizer: SparseAdamW) -> list[Tensor]:
    """Weights and state."""
    return [
        *(param.detach().clone() for param in model.parameters()),
        *(tensor.clone() for state in optimizer.state.values() for tensor in state.values()),
    ]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Two models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", list(product(MODES, MODES)), ids="-".join)
def test_interleaved_steps_are_those_of_each_alone(modes: tuple[str, str]) -> None:
    """Forward, backward and step of one come between those of the other."""
    kinds = list(zip(modes, (torch.float32, torch.bfloat16), (1e-2, 3e-3), strict=True))
    alone = []
    for mode, dtype, lr in kinds:
        model, optimizer = pair(mode, dtype, lr=lr)
        for step in range(6):
            one_step(model, optimizer, step)
        alone.append(outcome(model, optimizer))
    pairs = [pair(mode, dtype, lr=lr) for mode, dtype, lr in kinds]
    for step in range(6):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            backward(model, step)
        for _, optimizer in reversed(pairs):
            optimizer.step()
    for together, expected in zip(pairs, alone, strict=True):
        assert_same(outcome(*together), expected)


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_train_two_models(mode: str) -> None:
    """At the same time, each with kernels on two threads."""
    expected, pairs = pair(mode), [pair(mode) for _ in range(2)]
    barrier = threading.Barrier(2)

    def train(model: nn.Module, optimizer: SparseAdamW, together: bool) -> None:
        with number_of_threads(2):  # of the calling thread
            for step in range(12):
                if together:
                    barrier.wait(timeout=60)
                one_step(model, optimizer, step)

    train(*expected, False)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(train, *each, True) for each in pairs]:
            done.result()
    for each in pairs:
        assert_same(outcome(*each), outcome(*expected))


def test_two_threads_run_the_kernels_at_once() -> None:
    """Sizes at which a kernel shares its work among threads."""
    n = 300_000
    start = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    every = torch.arange(0, n, 3, dtype=torch.int32)

    def work(which: int) -> list[Tensor]:
        weight, gradient = start[which].clone(), start[1 - which]
        state = [torch.zeros(len(every)) for _ in range(2)] + [torch.zeros(1)]
        found = []
        with number_of_threads(2):
            for _ in range(8):
                ops.sparse_adamw_([weight], [gradient], [every], *state, lr=0.1)
                top = StreamingTopK(1000, keys=["w"])
                top.update("w", weight.clone(), gradient, 0.5)
                found.append(top.finish()["w"])
        return [weight, *state, *found]

    expected = [work(which) for which in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for found, alone in zip(pool.map(work, (0, 1)), expected, strict=True):
            assert_same(found, alone)


# One model ----------------------------------------------------------------------------------------


def halves(model: nn.Module) -> tuple[CooMask, CooMask]:
    """Two masks without a common entry, most of whose parameters are the same."""
    whole = small_mask(model)
    parts = [{n: whole[n][i::2] for n in SELECTED if len(whole[n]) > i} for i in (0, 1)]
    first, second = (CooMask.from_indices(model, part) for part in parts)
    return first, second


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_dense_optimizers_with_disjoint_masks_are_one_with_both(dtype: torch.dtype) -> None:
    model, twin = small_model(dtype), small_model(dtype)
    before = snapshot(model)
    options: Any = {"lr": 1e-2, "weight_decay": 0.1}
    parts = [SparseAdamW(model, mask, **options) for mask in halves(model)]
    whole = SparseAdamW(twin, small_mask(twin), **options)
    for step in range(8):
        parts[0].zero_grad()
        parts[1].zero_grad()
        backward(model, step)
        for optimizer in parts:
            optimizer.step()
        one_step(twin, whole, step)
    assert_same(list(model.parameters()), list(twin.parameters()))
    assert_unselected_unchanged(model, before, small_mask(model))


@pytest.mark.parametrize("apart", [False, True], ids=["same parameters", "other parameters"])
@pytest.mark.parametrize(
    "modes", [modes for modes in product(MODES, MODES) if modes != ("dense", "dense")], ids="-".join
)
def test_other_pairs_are_refused_before_anything_is_written(
    modes: tuple[str, str], apart: bool
) -> None:
    """At the latest in the step of the one whose gradients the other takes, or has frozen."""
    model = small_model()
    before = snapshot(model)
    masks = halves(model)
    if apart:
        whole, names = small_mask(model), list(SELECTED)
        parts = [{n: whole[n] for n in names[i::2]} for i in (0, 1)]
        masks = CooMask.from_indices(model, parts[0]), CooMask.from_indices(model, parts[1])
    first = SparseAdamW(model, masks[0], gradients=modes[0])

    def go_on() -> None:
        second = SparseAdamW(model, masks[1], gradients=modes[1])
        backward(model, 0)
        (first if modes[0] == "dense" else second).step()

    with pytest.raises(OptimizerError, match=r"another SparseAdamW.*call detach\(\) on that one"):
        go_on()
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("mode", ["streamed", "sampled"])
def test_after_detach_another_may_train_the_rest(mode: str) -> None:
    model = small_model()
    first, second = halves(model)
    one = SparseAdamW(model, first, gradients=mode)
    one_step(model, one, 0)
    one.detach()
    other = SparseAdamW(model, second, gradients="dense")
    one_step(model, other, 0)
    one.zero_grad()
    backward(model, 2)
    one.step()  # it takes dense gradients now
    other.step()
    assert all(int(state["step"]) == 2 for state in other.state.values())


def test_an_optimizer_may_be_replaced_by_one_that_streams() -> None:
    """The old one is still there while the new one is made; it takes no step any more."""
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer, 0)
    optimizer = make_optimizer(model, "streamed")
    one_step(model, optimizer, 2)
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


def test_what_an_optimizer_that_is_gone_has_frozen_can_be_trained_again() -> None:
    model = small_model()
    one_entry = CooMask.from_indices(model, {"scale": torch.tensor([0])})
    gone = SparseAdamW(model, one_entry, gradients="streamed")
    del gone
    gc.collect()
    with pytest.raises(OptimizerError, match=r"or requires_grad_\(True\) on the parameter if"):
        make_optimizer(model, "dense")
    model.requires_grad_(True)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer, 0)
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


def test_a_parameter_that_the_user_freezes_is_skipped_as_ever() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    model.head.requires_grad_(False)
    one_step(model, optimizer, 0)
    assert int(optimizer.state[model.head.weight]["step"]) == 0
    assert int(optimizer.state[model.scale]["step"]) == 1
