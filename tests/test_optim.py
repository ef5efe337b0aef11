"""SparseAdamW as a citizen of torch.optim. Its arithmetic is tested in test_algorithm1.py."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import training
from saft_kernels import ops
from saft_kernels.errors import (
    MaskError,
    NonFiniteGradientError,
    OptimizerError,
    OptimizerStateError,
)
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.select import select
from saft_kernels.selected_grad import SelectedGrad
from tolerances import assert_close
from training import (
    DTYPES,
    MODES,
    STEPS,
    SmallModel,
    assert_unselected_unchanged,
    backward,
    checkpoint_path,
    make_optimizer,
    resumable,
    small_mask,
    small_model,
    snapshot,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
schedulers = torch.optim.lr_scheduler


def full_mask(model: nn.Module) -> CooMask:
    """Selects everything: the step is then exactly torch.optim.AdamW's."""
    return CooMask.from_indices(model, {n: torch.arange(p.numel()) for n, p in params_of(model)})


def params_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    backward(model, step)
    optimizer.step()


def assert_same_weights(a: nn.Module, b: nn.Module, mode: str = "dense") -> None:
    """Bit for bit, unless the gradients of only one were sampled: summed in another order."""
    for name, param in a.named_parameters():
        if mode == "sampled":
            assert_close(param.detach(), b.get_parameter(name).detach(), "adamw_trajectory")
        else:
            assert torch.equal(param, b.get_parameter(name)), name


def assert_same_state(a: Any, b: Any) -> None:
    for pa, pb in zip(a.state.values(), b.state.values(), strict=True):
        assert pa.keys() == pb.keys()
        for key in pa:
            assert torch.equal(pa[key], pb[key]), key


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


# State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_fp32_with_one_entry_per_selected_index(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    mask = small_mask(model)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    for name, indices in mask.items():
        state = optimizer.state[model.get_parameter(name)]
        assert torch.equal(state["indices"], indices)
        for key in state.keys() - {"indices", "step"}:
            assert state[key].dtype == torch.float32
            assert state[key].shape == indices.shape
        assert ("master" in state) == (dtype != torch.float32)
    assert len(optimizer.state) == len(mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_state_takes_at_most_20_bytes_per_selected_entry(dtype: torch.dtype, mode: str) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).to(dtype)
    mask = CooMask.from_indices(model, {f"{i}.weight": torch.arange(0, 90_000, 3) for i in (0, 1)})
    optimizer = SparseAdamW(model, mask, gradients=mode)
    model(torch.randn(2, 300, dtype=dtype)).sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values()]
    kept += [p.grad.values() for p in model.parameters() if isinstance(p.grad, SelectedGrad)]
    steps = 4 * len(mask)
    assert sum(storages(kept).values()) <= 20 * mask.nnz + steps


def test_the_state_is_what_the_step_works_on() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    state = optimizer.state[model.scale]
    assert state["step"].shape == ()
    assert state["step"] == 1
    before = state["exp_avg"].clone()
    one_step(model, optimizer, 2)
    assert state["step"] == 2
    assert not torch.equal(state["exp_avg"], before)


# What stays unchanged -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_leaves_unselected_entries_alone(dtype: torch.dtype, mode: str) -> None:
    model = small_model(dtype)
    before, mask = snapshot(model), small_mask(model)
    optimizer = make_optimizer(model, mode, lr=0.1, weight_decay=0.9)
    for step in range(5):
        one_step(model, optimizer, step)
    assert_unselected_unchanged(model, before, mask)


def poison(model: nn.Module) -> None:
    """Make one selected entry of one gradient infinite."""
    grad = model.get_parameter("branch.weight").grad
    assert grad is not None
    index = small_mask(model)["branch.weight"][5]
    if isinstance(grad, SelectedGrad):
        grad.values()[5] = float("inf")
    else:
        grad.view(-1)[index] = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_skipped_for_nan_changes_nothing_and_does_not_advance_step(
    dtype: torch.dtype, mode: str
) -> None:
    model = small_model(dtype)
    optimizer = make_optimizer(model, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    one_step(model, optimizer)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    scaler.scale(training.loss_of(model, 0)).backward()
    poison(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same_weights(model, with_weights(before, dtype))
    for now, then in zip(optimizer.state.values(), state["state"].values(), strict=True):
        for key in now:
            assert torch.equal(now[key], then[key]), key
    one_step(model, optimizer)
    assert optimizer.state[model.scale]["step"] == 2
    assert_unselected_unchanged(model, before, small_mask(model))


def with_weights(weights: dict[str, Tensor], dtype: torch.dtype) -> SmallModel:
    model = small_model(dtype)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_the_middle_changes_nothing(mode: str) -> None:
    model = small_model()
    groups = [{"params": model.embedding.parameters()}]  # two calls of the operation
    optimizer = make_optimizer(model, mode, param_groups=groups)
    one_step(model, optimizer)
    before, step = snapshot(model), optimizer.state[model.scale]["step"].clone()

    def broken_closure() -> Tensor:
        backward(model, 0)
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        optimizer.step(broken_closure)
    model.scale.grad = torch.ones(()).to_sparse()
    with pytest.raises(OptimizerError, match=r"'scale'.*build the layer without sparse=True"):
        optimizer.step()
    assert_same_weights(model, with_weights(before, torch.float32))
    assert torch.equal(optimizer.state[model.scale]["step"], step)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_without_gradient_is_skipped_entirely(mode: str) -> None:
    model = small_model()
    optimizer = make_optimizer(model, mode)
    one_step(model, optimizer, 0)
    before = model.branch.weight.detach().clone()
    one_step(model, optimizer, 1)  # leaves the branch out
    assert torch.equal(model.branch.weight, before)
    assert optimizer.state[model.branch.weight]["step"] == 1
    assert optimizer.state[model.scale]["step"] == 2


def test_a_step_without_any_gradient_does_nothing() -> None:
    model = small_model()
    before = snapshot(model)
    make_optimizer(model, "dense").step()
    assert_same_weights(model, with_weights(before, torch.float32))


# Options, groups, schedulers ----------------------------------------------------------------------


def both(model: nn.Module, **options: Any) -> list[tuple[nn.Module, Any]]:
    """The same model under torch.optim.AdamW and under SparseAdamW with a full mask."""
    twin = copy.deepcopy(model)
    stock = torch.optim.AdamW(twin.parameters(), **options)
    return [(twin, stock), (model, SparseAdamW(model, full_mask(model), **options))]


SCHEDULERS: list[tuple[Any, dict[str, Any]]] = [
    (schedulers.LambdaLR, {"lr_lambda": lambda step: 0.9**step}),
    (schedulers.MultiplicativeLR, {"lr_lambda": lambda step: 0.95}),
    (schedulers.StepLR, {"step_size": 3}),
    (schedulers.MultiStepLR, {"milestones": [2, 5]}),
    (schedulers.ConstantLR, {"total_iters": 4}),
    (schedulers.LinearLR, {"total_iters": 5}),
    (schedulers.ExponentialLR, {"gamma": 0.9}),
    (schedulers.PolynomialLR, {"total_iters": 9}),
    (schedulers.CosineAnnealingLR, {"T_max": 10}),
    (schedulers.CosineAnnealingWarmRestarts, {"T_0": 4}),
    (schedulers.CyclicLR, {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 3}),
    (schedulers.OneCycleLR, {"max_lr": 1e-2, "total_steps": 11}),
    (schedulers.ReduceLROnPlateau, {"patience": 0}),
]


@pytest.mark.parametrize(
    ("scheduler", "options"), SCHEDULERS, ids=lambda x: getattr(x, "__name__", "")
)
def test_every_learning_rate_scheduler_drives_it_as_it_drives_adamw(
    scheduler: Any, options: dict[str, Any]
) -> None:
    pair = both(small_model(), lr=1e-2, weight_decay=0.1)
    rates: list[list[float]] = [[], []]
    for (model, optimizer), seen in zip(pair, rates, strict=True):
        schedule = scheduler(optimizer, **options)
        for step in range(10):
            one_step(model, optimizer, step)
            metric = (1.0,) if scheduler is schedulers.ReduceLROnPlateau else ()
            schedule.step(*metric)
            seen.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    for name, expected in pair[0][0].named_parameters():
        assert_close(pair[1][0].get_parameter(name), expected, "adamw_trajectory")


def test_a_tensor_lr_is_read_at_each_step() -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    tensor_lr, float_lr = make_optimizer(model, "dense", lr=lr), make_optimizer(twin, "dense")
    for step in range(6):
        rate = 1e-2 / (step + 1)
        lr.fill_(rate)
        float_lr.param_groups[0]["lr"] = rate
        one_step(model, tensor_lr, step)
        one_step(twin, float_lr, step)
    assert tensor_lr.param_groups[0]["lr"] is lr
    assert_same_weights(model, twin)


def test_groups_have_their_own_options() -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    groups = [
        {"params": model.head.parameters(), "lr": 3e-2},
        {"params": model.branch.named_parameters(), "weight_decay": 0.5, "betas": (0.5, 0.9)},
    ]
    optimizer = SparseAdamW(model, full_mask(model), lr=1e-2, param_groups=groups)
    listed = set(map(id, [*twin.head.parameters(), *twin.branch.parameters()]))
    stock = torch.optim.AdamW(
        [
            {"params": list(twin.head.parameters()), "lr": 3e-2},
            {"params": list(twin.branch.parameters()), "weight_decay": 0.5, "betas": (0.5, 0.9)},
            {"params": [p for p in twin.parameters() if id(p) not in listed]},
        ],
        lr=1e-2,
        weight_decay=0.1,
    )
    for step in range(10):
        one_step(model, optimizer, step)
        one_step(twin, stock, step)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 8]
    for name, expected in twin.named_parameters():
        assert_close(model.get_parameter(name), expected, "adamw_trajectory")


def test_unselected_parameters_may_be_listed_and_a_group_may_end_up_empty() -> None:
    model = small_model()
    groups = [
        {"params": model.untouched.parameters(), "lr": 1.0},
        {"params": model.norm.parameters(), "lr": 2.0},
    ]
    optimizer = make_optimizer(model, "dense", param_groups=groups)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names[:2] == [[], ["norm.weight"]]
    assert len(names[2]) == len(training.SELECTED) - 1
    one_step(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def test_parameters_of_two_dtypes_share_a_group() -> None:
    model = small_model()
    model.head.to(torch.bfloat16)
    optimizer = make_optimizer(model, "dense")
    before = snapshot(model)
    for _, param in params_of(model):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(model.branch.weight, before["branch.weight"])
    assert set(optimizer.state[model.head.weight]) == {*optimizer.state[model.scale], "master"}


def test_a_group_with_a_stranger_is_refused() -> None:
    model = small_model()
    with pytest.raises(OptimizerError, match=r"group 1 .* shape \[3\] that is no parameter"):
        make_optimizer(
            model, "dense", param_groups=[{"params": model.scale}, {"params": [torch.ones(3)]}]
        )


def test_a_parameter_in_two_groups_is_refused() -> None:
    model = small_model()
    groups = [{"params": [model.scale]}, {"params": [model.scale]}]
    with pytest.raises(OptimizerError, match="'scale' is listed twice"):
        make_optimizer(model, "dense", param_groups=groups)


def test_adding_a_group_later_is_refused() -> None:
    model = small_model()
    with pytest.raises(OptimizerError, match="give param_groups"):
        make_optimizer(model, "dense").add_param_group({"params": [model.norm.bias]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": torch.ones(2)}, r"not torch.float32 \[2\]"),
        ({"lr": torch.ones(1, dtype=torch.bfloat16)}, r"not torch.bfloat16 \[1\]"),
        ({"lr": "1e-3"}, "lr='1e-3' must be a number or a tensor, not a str"),
        ({"betas": (0.9, 1.0)}, r"must lie in \[0, 1\)"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"param_groups": [{"params": [], "lr": -2.0}]}, "lr=-2.0"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        make_optimizer(small_model(), "dense", **options)


@pytest.mark.parametrize("lr", [-1.0, torch.ones(1, dtype=torch.bfloat16), "1e-3"])
def test_an_option_that_becomes_impossible_writes_nothing(lr: Any) -> None:
    model = small_model()
    groups = [{"params": [model.scale]}, {"params": model.head.parameters()}]
    optimizer = make_optimizer(model, "dense", param_groups=groups)
    backward(model, 0)
    optimizer.param_groups[1]["lr"] = lr
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OptimizerError, match="lr"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_a_sparse_gradient_is_refused_when_it_is_streamed() -> None:
    model = nn.Embedding(8, 2, sparse=True)
    mask = select(model, density=0.5, score="random")
    optimizer = SparseAdamW(model, mask, gradients="streamed")
    with pytest.raises(OptimizerError, match=r"'weight'.*build the layer without sparse=True"):
        model(torch.tensor([1, 2])).sum().backward()
    optimizer.detach()


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    mask = CooMask.from_indices(model, {"weight": torch.tensor([0])})
    with pytest.raises(OptimizerError, match="inference_mode"):
        SparseAdamW(model, mask)


def test_a_state_with_parameters_in_another_order_is_refused() -> None:
    first = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    second = nn.ModuleDict({"b": nn.Linear(3, 3), "a": nn.Linear(3, 3)})
    saved = SparseAdamW(first, full_mask(first)).state_dict()
    with pytest.raises(OptimizerStateError, match=r"holds 'a\.weight'.*has 'b\.weight'"):
        SparseAdamW(second, full_mask(second)).load_state_dict(saved)


def test_an_unknown_gradient_mode_is_refused_with_the_modes_there_are() -> None:
    with pytest.raises(
        OptimizerError, match=r"'other' is not available.*'dense', 'streamed', 'sampled'"
    ):
        make_optimizer(small_model(), "other")


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(MaskError, match="no parameter 'scale'"):
        SparseAdamW(nn.Linear(3, 3), small_mask(small_model()))


def test_a_selected_parameter_that_cannot_train_is_refused() -> None:
    model = small_model()
    model.norm.requires_grad_(False)
    with pytest.raises(OptimizerError, match=r"'norm.weight'.*requires_grad is False"):
        make_optimizer(model, "dense")


def test_float64_weights_are_refused() -> None:
    with pytest.raises(OptimizerError, match=r"'scale' is torch.float64"):
        make_optimizer(small_model(torch.float64), "dense")


def test_a_model_cast_after_the_optimizer_was_made_is_refused() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    model.bfloat16()
    with pytest.raises(OptimizerError, match=r"'scale' was torch.float32"):
        optimizer.step()


# Closures, hooks, scaler, compile -----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(mode: str) -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, mode), make_optimizer(twin, mode)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training.loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    one_step(twin, plain)
    assert loss.item() == training.loss_of(small_model(), 0).item()
    assert_same_weights(model, twin)


def test_step_and_state_hooks_run() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after step"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after load"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, **replacement})
    replacement: dict[str, Any] = {}
    one_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    replacement["param_groups"] = [{**saved["param_groups"][0], "lr": 7.0}]
    optimizer.load_state_dict(saved)
    assert seen == ["before step", "after step", "after load"]
    assert optimizer.param_groups[0]["lr"] == 7.0


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_grad_scaler_gives_the_unscaled_step(mode: str, unscale_first: bool) -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, mode), make_optimizer(twin, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: exact
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(training.loss_of(model, step)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        one_step(twin, plain, step)
    assert_same_weights(model, twin)
    assert optimizer.state[model.scale]["step"] == 6


def test_capturable_is_accepted() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense", capturable=True)
    one_step(model, optimizer)
    assert optimizer.param_groups[0]["capturable"]


# torch itself looks at this when it goes on behind a graph break, as sampled mode has them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_function_may_step(mode: str) -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, mode), make_optimizer(twin, mode)

    @torch.compile(backend="aot_eager")
    def training_step(tokens: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()

    for step in (0, 3, 6):
        training_step(*training.batch(step))
        one_step(twin, plain, step)
    assert_same_weights(model, twin)


# Gradient clipping --------------------------------------------------------------------------------


def selected_values(model: nn.Module) -> Tensor:
    """The selected gradient as one vector, computed without the optimizer."""
    pieces = []
    for name, indices in small_mask(model).items():
        grad = model.get_parameter(name).grad
        if isinstance(grad, SelectedGrad):
            pieces.append(grad.values().clone())
        elif grad is not None:
            pieces.append(grad.detach().reshape(-1)[indices.long()].float())
    return torch.cat(pieces)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_clipping_uses_the_norm_of_the_selected_gradient(
    mode: str, dtype: torch.dtype, norm_type: float
) -> None:
    model = small_model(dtype)
    optimizer = make_optimizer(model, mode)
    backward(model, 1)  # some parameters have no gradient
    before = selected_values(model)
    expected = torch.linalg.vector_norm(before, norm_type)
    assert_close(optimizer.clip_grad_norm_(0.25, norm_type), expected, "norm")
    scaled = before * (0.25 / (expected + 1e-6))
    rounded = scaled if mode == "streamed" else scaled.to(dtype).float()
    rtol = 2e-6 if rounded is scaled else torch.finfo(dtype).eps
    torch.testing.assert_close(selected_values(model), rounded, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_below_the_limit_is_not_clipped(mode: str) -> None:
    model = small_model()
    optimizer = make_optimizer(model, mode)
    backward(model, 0)
    before = selected_values(model)
    optimizer.clip_grad_norm_(1e6)
    assert torch.equal(selected_values(model), before)


def test_clipping_in_dense_mode_leaves_the_rest_of_the_gradient_alone() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    backward(model, 0)
    before = {name: p.grad.clone() for name, p in params_of(model) if p.grad is not None}
    optimizer.clip_grad_norm_(1e-3)
    for name, selected in training.selected_bits(model, small_mask(model)).items():
        grad = model.get_parameter(name).grad
        assert torch.equal(grad[~selected], before[name][~selected])


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_clipping_in_streamed_mode_is_clipping_of_the_selected_gradient(
    dtype: torch.dtype, foreach: bool | None
) -> None:
    model, twin = small_model(dtype), small_model(dtype)
    optimizers = [make_optimizer(each, "streamed") for each in (model, twin)]
    for each in (model, twin):
        backward(each, 0)
    stock = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25, foreach=foreach)
    ours = optimizers[1].clip_grad_norm_(0.25)
    assert_close(stock.float(), ours, "norm")
    torch.testing.assert_close(selected_values(model), selected_values(twin), rtol=2e-6, atol=0.0)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4, foreach=foreach)
    assert selected_values(model).abs().max() == torch.tensor(1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_that_is_not_finite_raises_if_asked_naming_the_parameter(mode: str) -> None:
    model = small_model()
    optimizer = make_optimizer(model, mode)
    backward(model, 0)
    poison(model)
    with pytest.raises(NonFiniteGradientError, match=r"'branch.weight'") as caught:
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert caught.value.parameter == "branch.weight"
    assert optimizer.clip_grad_norm_(1.0) == float("inf")


def test_the_norm_of_no_gradient_is_zero() -> None:
    assert make_optimizer(small_model(), "dense").clip_grad_norm_(1.0) == 0


# Streaming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_accumulation_over_micro_batches(mode: str, accumulate: int) -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, mode), make_optimizer(twin, "dense")
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step, accumulate)
        optimizer.step()
        plain.zero_grad()
        backward(twin, step, accumulate)
        plain.step()
    assert_same_weights(model, twin, mode)


def test_dense_gradients_are_freed_layer_by_layer() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    mask = CooMask.from_indices(model, {f"{i}.weight": torch.arange(0, 4096, 97) for i in range(6)})
    optimizer = SparseAdamW(model, mask, gradients="streamed")
    seen: list[StorageWeakRef] = []
    alive: list[int] = []

    def watch(grad: Tensor) -> None:
        alive.append(sum(not storage.expired() for storage in seen))
        seen.append(StorageWeakRef(grad.untyped_storage()))

    for index in range(6):
        model[index].weight.register_hook(watch)
    for _ in range(2):  # the second micro-batch accumulates
        model(torch.randn(3, 64)).sum().backward()
    assert len(seen) == 12
    assert max(alive) <= 1  # at most the layer above, while its hook returns
    assert all(storage.expired() for storage in seen)
    assert all(isinstance(model[i].weight.grad, SelectedGrad) for i in range(6))
    assert all(model[i].bias.grad is None for i in range(6))
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_zero_grad(mode: str, set_to_none: bool) -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, mode), make_optimizer(twin, "dense")
    for step in (0, 2):
        backward(model, step)
        optimizer.zero_grad(set_to_none)
        backward(twin, step)
        plain.zero_grad(set_to_none)
    assert (model.scale.grad is None) == set_to_none
    backward(model, 5)
    backward(twin, 5)
    optimizer.step()
    plain.step()
    assert_same_weights(model, twin, mode)


def test_streaming_freezes_parameters_outside_the_mask_and_detach_restores_them() -> None:
    model = small_model()
    model.conv.weight.requires_grad_(True)
    model.norm.bias.requires_grad_(False)  # by the user: stays so
    flags = {name: param.requires_grad for name, param in params_of(model)}
    optimizer = make_optimizer(model, "streamed")
    for name, param in params_of(model):
        assert param.requires_grad == (name in training.SELECTED), name
    optimizer.detach()
    assert {name: param.requires_grad for name, param in params_of(model)} == flags
    backward(model, 0)
    assert not any(isinstance(p.grad, SelectedGrad) for p in model.parameters())


def test_a_detached_optimizer_steps_from_dense_gradients() -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, "streamed"), make_optimizer(twin, "dense")
    optimizer.detach()
    optimizer.detach()  # twice is harmless
    for step in range(3):
        one_step(model, optimizer, step)
        one_step(twin, plain, step)
    assert_same_weights(model, twin)


def test_two_streamed_optimizers_on_one_model_are_refused() -> None:
    model = small_model()
    first = make_optimizer(model, "streamed")
    with pytest.raises(OptimizerError, match=r"gradients of 'scale' are taken.*detach"):
        make_optimizer(model, "streamed")
    first.detach()
    make_optimizer(model, "streamed")


def test_an_optimizer_that_is_gone_leaves_no_hooks() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "streamed")
    del optimizer
    gc.collect()
    backward(model, 0)
    assert not any(isinstance(p.grad, SelectedGrad) for p in model.parameters())
    make_optimizer(model, "streamed")


def test_a_gradient_put_in_by_hand_is_used_in_streamed_mode() -> None:
    model, twin = small_model(), small_model()
    optimizer, plain = make_optimizer(model, "streamed"), make_optimizer(twin, "dense")
    backward(model, 0)
    backward(twin, 0)
    model.branch.weight.grad = model.branch.weight.grad.clone() * 2.0
    twin.branch.weight.grad *= 2.0
    model.scale.grad = torch.tensor(3.0)
    twin.scale.grad = torch.tensor(3.0)
    optimizer.step()
    plain.step()
    assert_same_weights(model, twin)


# Weights changed from outside ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_changed_between_steps_are_where_the_next_step_starts(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = make_optimizer(model, "dense", weight_decay=0.0)
    one_step(model, optimizer)
    pretrained = small_model(dtype).state_dict()
    model.load_state_dict(pretrained)
    optimizer.param_groups[0]["lr"] = 0.0
    one_step(model, optimizer)
    assert_same_weights(model, small_model(dtype))


def test_writing_back_what_was_there_keeps_the_master_values() -> None:
    model = small_model(torch.bfloat16)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    kept = optimizer.state[model.branch.weight]["master"].clone()
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(small_model(torch.bfloat16).state_dict())  # an excursion, as of an EMA
    model.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[model.branch.weight]["master"], kept)


def test_refresh_master_follows_writes_through_data() -> None:
    model = small_model(torch.bfloat16)
    optimizer = make_optimizer(model, "dense", lr=0.0)
    model.scale.data.fill_(0.75)
    optimizer.refresh_master_()
    assert optimizer.state[model.scale]["master"] == 0.75
    one_step(model, optimizer)
    assert model.scale == 0.75


# Saving, loading, copying -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs saved after 25 steps here and finished in a fresh process."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype, mode in product(DTYPES, MODES):
        model, optimizer, scheduler = resumable(dtype, mode)
        train(model, optimizer, scheduler, range(25))
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "step": 25,
        }
        torch.save(saved, checkpoint_path(folder, dtype, mode))
    torch.set_num_threads(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, training.__file__, str(folder)]
    subprocess.run(command, check=True, env=environment)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_resuming_in_a_fresh_process_continues_bit_identically(
    continued: Path, dtype: torch.dtype, mode: str
) -> None:
    model, optimizer, scheduler = resumable(dtype, mode)
    before = snapshot(model)
    train(model, optimizer, scheduler, range(STEPS))
    done = torch.load(checkpoint_path(continued, dtype, mode).with_suffix(".done"))
    for name, value in model.state_dict().items():
        assert torch.equal(done["model"][name], value), name
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(done["optimizer"]["state"][key][name], value), (key, name)
    model.load_state_dict(done["model"])
    assert_unselected_unchanged(model, before, small_mask(model))


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_state_may_be_loaded_in_either_order(
    dtype: torch.dtype, weights_first: bool
) -> None:
    model = small_model(dtype)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer, 0)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = small_model(dtype)
    resumed = make_optimizer(other, "dense")
    loads: list[Callable[[], Any]] = [
        lambda: other.load_state_dict(weights),
        lambda: resumed.load_state_dict(state),
    ]
    for load in loads if weights_first else reversed(loads):
        load()
    one_step(model, optimizer, 2)
    one_step(other, resumed, 2)
    assert_same_weights(model, other)
    assert_same_state(optimizer, resumed)


def test_loading_casts_nothing_to_the_dtype_of_the_weights() -> None:
    model = small_model(torch.bfloat16)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = make_optimizer(small_model(torch.bfloat16), "dense")
    resumed.load_state_dict(saved)
    assert_same_state(optimizer, resumed)
    dtypes = {t.dtype for state in resumed.state.values() for t in state.values()}
    assert dtypes == {torch.float32, torch.int32}


def test_a_loaded_state_is_saved_as_it_was() -> None:
    """Options in the same order, too: a checkpoint of a resumed run then has the same bytes."""
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    saved = optimizer.state_dict()
    resumed = make_optimizer(small_model(), "dense")
    resumed.load_state_dict(copy.deepcopy(saved))
    again = resumed.state_dict()
    assert again["param_groups"] == saved["param_groups"]
    assert list(map(list, again["param_groups"])) == list(map(list, saved["param_groups"]))


def test_loading_copies() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    saved = optimizer.state_dict()
    other = small_model()
    resumed = make_optimizer(other, "dense")
    resumed.load_state_dict(saved)
    frozen = copy.deepcopy(saved["state"][0]["exp_avg"])
    one_step(other, resumed)
    assert torch.equal(saved["state"][0]["exp_avg"], frozen)


def test_the_state_goes_through_safetensors(tmp_path: Path) -> None:
    model = small_model(torch.float16)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    saved = optimizer.state_dict()
    flat = {f"{i}/{key}": t for i, state in saved["state"].items() for key, t in state.items()}
    save_file(flat, tmp_path / "state.safetensors")
    restored: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(tmp_path / "state.safetensors").items():
        number, key = name.split("/")
        restored.setdefault(int(number), {})[key] = tensor
    resumed = make_optimizer(small_model(torch.float16), "dense")
    resumed.load_state_dict({**saved, "state": restored})
    assert_same_state(optimizer, resumed)


def test_the_state_is_loaded_without_pickled_code() -> None:
    optimizer = make_optimizer(small_model(), "dense", lr=torch.tensor(1e-3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    make_optimizer(small_model(), "dense").load_state_dict(torch.load(file, weights_only=True))


def damaged(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    model = small_model(torch.bfloat16)
    optimizer = make_optimizer(model, "dense")
    one_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    by_name = {
        n: saved["state"][i] for n, i in zip(group["param_names"], group["params"], strict=True)
    }
    change(by_name)
    keys = dict(zip(group["param_names"], group["params"], strict=True))
    return {**saved, "state": {keys[name]: state for name, state in by_name.items()}}


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing": (lambda s: s.pop("conv.bias"), "'conv.bias'.*has none"),
    "no master": (lambda s: s["embedding.weight"].pop("master"), "'embedding.weight'.*instead of"),
    "cast indices": (
        lambda s: s["conv.weight"].update(indices=s["conv.weight"]["indices"].bfloat16()),
        "'conv.weight'.*indices is torch.bfloat16, not torch.int32",
    ),
    "cast moments": (
        lambda s: s["conv.weight"].update(exp_avg=s["conv.weight"]["exp_avg"].bfloat16()),
        "'conv.weight'.*exp_avg is torch.bfloat16, not torch.float32",
    ),
    "other indices": (lambda s: s["conv.bias"]["indices"].add_(1), "'conv.bias'.*another mask"),
    "cut short": (
        lambda s: s["branch.weight"].update(exp_avg_sq=torch.zeros(249)),
        "'branch.weight'.*249 entries, not 250",
    ),
    "no tensor": (lambda s: s["scale"].update(step=3.0), "'scale'.*step is not a tensor"),
    "bad step": (lambda s: s["scale"]["step"].fill_(float("nan")), "'scale'.*step is nan"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_does_not_fit_is_refused_whole(damage: str) -> None:
    change, message = DAMAGE[damage]
    optimizer = make_optimizer(small_model(torch.bfloat16), "dense")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerStateError, match=message):
        optimizer.load_state_dict(damaged(change))
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before["state"][key][name])


def test_something_else_than_a_state_is_refused() -> None:
    model = small_model()
    with pytest.raises(OptimizerStateError, match="no optimizer state"):
        make_optimizer(model, "dense").load_state_dict(model.state_dict())


BAD_GROUPS: dict[str, tuple[Any, str]] = {
    "no state": (None, "no optimizer state"),
    "groups are no list": ({"param_groups": {}, "state": {}}, "no optimizer state"),
    "states are no dict": ({"param_groups": [], "state": []}, "no optimizer state"),
    "a group is no dict": ({"param_groups": [3], "state": {}}, "a group of it is malformed"),
    "no params": ({"param_groups": [{}], "state": {}}, "a group of it is malformed"),
    "a key is a list": ({"param_groups": [{"params": [[]]}], "state": {}}, "is malformed"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_what_has_not_the_form_of_a_state_is_refused(case: str) -> None:
    state, message = BAD_GROUPS[case]
    with pytest.raises(OptimizerStateError, match=message):
        make_optimizer(small_model(), "dense").load_state_dict(state)


@pytest.mark.parametrize(
    "option",
    [
        *({"lr": None}, {"lr": -1.0}, {"lr": "x"}, {"betas": None}, {"betas": (1,)}, {"eps": "x"}),
        *({"betas": (0.9, 2.0)}, {"betas": (torch.ones(2), 0.9)}, {"eps": torch.tensor(1e-8)}),
        *({"weight_decay": []}, {"maximize": "x"}, {"param_names": ["x"]}, {"param_names": []}),
    ],
)
def test_saved_options_that_are_impossible_are_refused_whole(option: dict[str, Any]) -> None:
    optimizer = make_optimizer(small_model(), "dense")
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved["param_groups"])
    saved["param_groups"][0].update(option)
    with pytest.raises(OptimizerStateError, match=r"saved options|holds '?(x|None)'? where"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before


def test_a_state_with_other_groups_is_refused() -> None:
    model = small_model()
    saved = make_optimizer(small_model(), "dense").state_dict()
    split = make_optimizer(model, "dense", param_groups=[{"params": model.head.parameters()}])
    with pytest.raises(OptimizerStateError, match=r"groups of \[8\].*has \[2, 6\]"):
        split.load_state_dict(saved)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_of_model_and_optimizer_trains_on_alone(
    mode: str, dtype: torch.dtype, copier: Callable[[Any], Any]
) -> None:
    model = small_model(dtype)
    optimizer = make_optimizer(model, mode)
    one_step(model, optimizer, 0)
    frozen = copy.deepcopy(snapshot(model))
    other, twin = copier((model, optimizer))
    for step in (1, 2, 3):
        one_step(other, twin, step)
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value)
    for step in (1, 2, 3):
        one_step(model, optimizer, step)
    assert_same_weights(model, other)
    assert_same_state(optimizer, twin)
    if mode == "streamed":
        assert isinstance(other.scale.grad, SelectedGrad)
        twin.detach()
        assert all(p.requires_grad for p in other.parameters())
        assert not model.norm.bias.requires_grad


def test_a_copy_whose_parameters_were_frozen_meanwhile_can_be_made() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "streamed")
    model.head.requires_grad_(False)
    other, twin = copy.deepcopy((model, optimizer))
    one_step(other, twin)
    assert torch.equal(other.head.weight, model.head.weight)
    assert not torch.equal(other.branch.weight, model.branch.weight)


def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own() -> None:
    model = small_model()
    optimizer = make_optimizer(model, "streamed")
    one_step(model, optimizer)
    twin = copy.deepcopy(optimizer)
    before = snapshot(model)
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    assert_same_weights(model, with_weights(before, torch.float32))
    assert ops.gather(twin.param_groups[0]["params"][-1], torch.tensor([0])) != model.scale
