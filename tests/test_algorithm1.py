"""SparseAdamW against Algorithm 1 of the SAFT paper (arXiv 2407.03036), run literally."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu_modes import GPU_MODES
from saft_kernels import ops
from saft_kernels.mask import CooMask
from saft_kernels.selected_grad import SelectedGrad
from tolerances import assert_close
from training import (
    DTYPES,
    MODES,
    STEPS,
    assert_unselected_unchanged,
    backward,
    cosine,
    make_optimizer,
    selected_bits,
    small_mask,
    small_model,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ON_GPU = pytest.mark.parametrize(("device", "mode"), GPU_MODES, indirect=["device"])
LOW_PRECISION = [torch.bfloat16, torch.float16]


class Algorithm1:
    """AdamW over the whole model on masked dense gradients, then every other weight put back."""

    def __init__(self, model: nn.Module, mask: CooMask, **options: Any) -> None:
        self.model = model
        self.selected = selected_bits(model, mask)
        self.pretrained = snapshot(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)

    def step(self) -> None:
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                param.grad[~self.selected[name]] = 0
        self.optimizer.step()
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                unselected = ~self.selected[name]
                param[unselected] = self.pretrained[name][unselected]


def warmup_cosine(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    warmup = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    return schedulers.SequentialLR(optimizer, [warmup, cosine(optimizer)], milestones=[10])


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    # moves beta1 as well
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=STEPS + 1)


def constant(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


SCHEDULES = [constant, warmup_cosine, one_cycle]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_training_follows_algorithm_1(
    mode: str, schedule: Callable[..., Any], accumulate: int, weight_decay: float
) -> None:
    train_like_algorithm_1(small_model(), mode, schedule, accumulate, weight_decay)


@ON_GPU
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_on_a_gpu_follows_algorithm_1(
    device: torch.device, mode: str, accumulate: int
) -> None:
    model = small_model().to(device)
    train_like_algorithm_1(model, mode, one_cycle, accumulate, 0.1, steps=STEPS // 4)


def train_like_algorithm_1(
    model: nn.Module,
    mode: str,
    schedule: Callable[..., Any],
    accumulate: int,
    weight_decay: float,
    steps: int = STEPS,
) -> None:
    pretrained, mask = snapshot(model), small_mask(model)
    oracle = Algorithm1(copy.deepcopy(model), mask, lr=1e-2, weight_decay=weight_decay)
    optimizer = make_optimizer(model, mode, weight_decay=weight_decay)
    pair = [(oracle, schedule(oracle.optimizer)), (optimizer, schedule(optimizer))]
    for step in range(steps):
        oracle.model.zero_grad()
        optimizer.zero_grad()
        backward(oracle.model, step, accumulate)
        backward(model, step, accumulate)
        for stepper, scheduler in pair:
            stepper.step()
            scheduler.step()
        assert_unselected_unchanged(model, pretrained, mask)
    for name, expected in oracle.model.named_parameters():
        assert_close(model.get_parameter(name), expected, "adamw_trajectory")
    assert_it_moved(model, pretrained, mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_on_the_same_gradients_follow_algorithm_1_on_an_fp32_copy(
    dtype: torch.dtype, mode: str, schedule: Callable[..., Any], maximize: bool
) -> None:
    step_like_algorithm_1(small_model(dtype), mode, schedule, maximize)


@ON_GPU
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_steps_on_a_gpu_follow_algorithm_1_on_an_fp32_copy(
    device: torch.device, dtype: torch.dtype, mode: str
) -> None:
    model = small_model(dtype).to(device)
    step_like_algorithm_1(model, mode, warmup_cosine, maximize=True, steps=STEPS // 2)


def step_like_algorithm_1(
    model: nn.Module,
    mode: str,
    schedule: Callable[..., Any],
    maximize: bool,
    steps: int = STEPS,
) -> None:
    pretrained, mask = snapshot(model), small_mask(model)
    exact = copy.deepcopy(model).float()
    options = {"weight_decay": 0.1, "maximize": maximize}
    oracle = Algorithm1(exact, mask, lr=1e-2, **options)
    optimizer = make_optimizer(model, mode, **options)
    pair = [(oracle, schedule(oracle.optimizer)), (optimizer, schedule(optimizer))]
    for step in range(steps):
        optimizer.zero_grad()
        gradients = dense_gradients(model, step)
        backward(model, step)
        if mode == "sampled":  # never rounded to the dtype of the weights, and summed otherwise
            gradients = exact_gradients(model)
        for name, param in exact.named_parameters():
            param.grad = None if gradients[name] is None else gradients[name].float()
        for stepper, scheduler in pair:
            stepper.step()
            scheduler.step()
        assert_unselected_unchanged(model, pretrained, mask)
    for name, indices in mask.items():
        assert_entry_close(optimizer, model.get_parameter(name), indices, exact.get_parameter(name))
    assert_it_moved(model, pretrained, mask)


def dense_gradients(model: nn.Module, step: int) -> dict[str, Tensor | None]:
    """The gradients of a twin of the model, which no hook has touched."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(True)
    twin.zero_grad()
    backward(twin, step)
    return {name: param.grad for name, param in twin.named_parameters()}


def exact_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The selected gradients in fp32, zero elsewhere."""
    found: dict[str, Tensor | None] = {}
    for name, param in model.named_parameters():
        found[name] = None
        if isinstance(param.grad, SelectedGrad):
            dense = torch.zeros(param.shape, device=param.device)
            ops.scatter_(dense, param.grad.indices(), param.grad.values())
            found[name] = dense
    return found


def assert_entry_close(optimizer: Any, param: Tensor, indices: Tensor, exact: Tensor) -> None:
    indices = indices.to(param.device)
    expected = ops.gather(exact, indices)
    if param.dtype == torch.float32:
        assert_close(ops.gather(param, indices), expected, "adamw_same_gradients")
        return
    master = optimizer.state[param]["master"]
    assert_close(master, expected, "adamw_same_gradients")
    assert torch.equal(ops.gather(param, indices), master.to(param.dtype))


def assert_it_moved(model: nn.Module, before: dict[str, Tensor], mask: CooMask) -> None:
    """Guard against passing because nothing happened."""
    selected = selected_bits(model, mask)
    moved = sum(
        int((model.get_parameter(name) != before[name])[selected[name]].sum()) for name in before
    )
    assert moved > 0.9 * mask.nnz


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("mode", MODES)
def test_steps_too_small_for_the_dtype_of_the_weights_add_up(dtype: torch.dtype, mode: str) -> None:
    model = small_model(dtype)
    pretrained, mask = snapshot(model), small_mask(model)
    name = "norm.weight"  # all ones: a step of 1e-4 is less than half the distance to a neighbour
    assert torch.ones((), dtype=dtype) - 1e-4 == 1
    optimizer = make_optimizer(model, mode, lr=1e-4, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model, 0)
        optimizer.step()
    moved = model.get_parameter(name) != pretrained[name]
    assert torch.equal(moved, selected_bits(model, mask)[name])
