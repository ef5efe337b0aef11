"""A gradient of selected entries: what it does, and that it refuses the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saft_kernels.errors import SaftError, SelectedGradientError
from saft_kernels.selected_grad import SelectedGrad

pytestmark = pytest.mark.usefixtures("one_thread")

INDICES = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
VALUES = torch.tensor([1.0, -2.0, 3.0, 0.5])


def selected(dtype: torch.dtype = torch.float32) -> SelectedGrad:
    param = torch.zeros(3, 4, dtype=dtype)
    return SelectedGrad(param, VALUES.clone(), INDICES)


def dense_like() -> Tensor:
    return torch.arange(12.0).view(3, 4)


def test_it_looks_like_its_parameter_and_holds_only_the_selected_entries() -> None:
    param = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    grad = SelectedGrad(param, VALUES, INDICES)
    assert (grad.shape, grad.dtype, grad.stride()) == (param.shape, param.dtype, param.stride())
    assert grad.values() is VALUES
    assert grad.indices() is INDICES
    with pytest.raises(RuntimeError):
        grad.untyped_storage().data_ptr()  # there is no dense memory behind it
    assert "nnz=4" in repr(grad)


def test_to_dense_fills_up_with_zeros() -> None:
    expected = torch.zeros(12)
    expected[INDICES.long()] = VALUES
    assert torch.equal(selected().to_dense(), expected.view(3, 4))
    assert selected(torch.float16).to_dense().dtype == torch.float16


ENTRYWISE: dict[str, Callable[[Any], Any]] = {
    "mul": lambda g: g * 3.0,
    "mul by a tensor": lambda g: g * torch.tensor(3.0),
    "div": lambda g: g / 4.0,
    "neg": lambda g: -g,
    "clone": lambda g: g.clone(),
    "add itself": lambda g: g + g,
    "sub itself, scaled": lambda g: g.add(g, alpha=-0.5),
}


@pytest.mark.parametrize("name", ENTRYWISE)
def test_operations_out_of_place(name: str) -> None:
    operation, grad = ENTRYWISE[name], selected()
    result = operation(grad)
    assert isinstance(result, SelectedGrad)
    assert torch.equal(result.values(), operation(VALUES))
    assert torch.equal(grad.values(), VALUES)


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda g: g.mul_(3.0),
    "mul_ by a tensor": lambda g: g.mul_(torch.tensor(0.5)),
    "div_": lambda g: g.div_(4.0),
    "clamp_": lambda g: g.clamp_(-1.0, 1.0),
    "clamp_min_": lambda g: g.clamp_min_(0.0),
    "zero_": lambda g: g.zero_(),
    "add_ itself": lambda g: g.add_(g.clone()),
    "foreach mul_": lambda g: torch._foreach_mul_([g], 2.0)[0],
    "foreach div_": lambda g: torch._foreach_div_([g], torch.tensor(2.0))[0],
    "foreach zero_": lambda g: torch._foreach_zero_([g])[0],
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_operations_in_place(name: str) -> None:
    operation, grad = IN_PLACE[name], selected()
    values = grad.values()
    result = operation(grad)
    assert isinstance(result, SelectedGrad)
    assert grad.values() is values
    assert torch.equal(values, operation(VALUES.clone()))


def test_a_dense_gradient_is_added_at_the_selected_entries() -> None:
    grad, dense = selected(), dense_like()
    picked = dense.view(-1)[INDICES.long()]
    assert torch.equal((grad + dense).values(), VALUES + picked)
    assert torch.equal((dense + grad).values(), VALUES + picked)
    grad += dense.t().contiguous().t()  # another layout
    assert torch.equal(grad.values(), VALUES + picked)


def test_low_precision_gradients_accumulate_in_fp32() -> None:
    grad = selected(torch.bfloat16)
    small = torch.full((3, 4), 2.0**-10, dtype=torch.bfloat16)
    for _ in range(4):
        grad += small
    assert grad.values()[0] == 1.0 + 4 * 2.0**-10  # bf16 would still be 1


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_norms_are_those_of_the_selected_entries(order: float) -> None:
    expected = torch.linalg.vector_norm(VALUES, order)
    assert torch.equal(torch.linalg.vector_norm(selected(), order), expected)
    assert torch.equal(torch._foreach_norm([selected()], order)[0], expected)
    assert torch.equal(torch.nn.utils.get_total_norm([selected()], order), expected)


def test_unscaling_a_mixed_list_finds_infinity_in_either_kind() -> None:
    for where in ("selected", "dense", "nowhere"):
        grad, dense = selected(torch.float16), torch.ones(3, dtype=torch.float16)
        if where == "selected":
            grad.values()[1] = float("inf")
        if where == "dense":
            dense[0] = float("nan")
        found = torch.zeros(1)
        torch._amp_foreach_non_finite_check_and_unscale_([grad, dense], found, torch.tensor(0.5))
        assert bool(found) == (where != "nowhere")
    assert torch.equal(grad.values(), VALUES * 0.5)
    assert torch.equal(dense, torch.full((3,), 0.5, dtype=torch.float16))


def test_detach_shares_and_deepcopy_does_not() -> None:
    grad = selected()
    grad.detach().mul_(2.0)
    assert torch.equal(grad.values(), VALUES * 2)
    copied = copy.deepcopy(grad)
    copied.mul_(2.0)
    assert isinstance(copied, SelectedGrad)
    assert torch.equal(grad.values(), VALUES * 2)


REFUSED: dict[str, Callable[[SelectedGrad], Any]] = {
    "sum": lambda g: g.sum(),
    "abs": lambda g: g.abs(),
    "isnan": lambda g: g.isnan(),
    "matmul": lambda g: g @ torch.ones(4, 2),
    "cast": lambda g: g.double(),
    "index": lambda g: g[0],
    "add a number": lambda g: g.add_(1.0),
    "add another shape": lambda g: g + torch.ones(4),
    "add sparse": lambda g: g + torch.ones(3, 4).to_sparse(),
    "add into a dense one": lambda g: torch.ones(3, 4).add_(g),
    "multiply by a matrix": lambda g: g * torch.ones(3, 4),
    "divide a number by it": lambda g: torch.tensor(2.0) / g,
    "norm of rows": lambda g: torch.linalg.vector_norm(g, 2, dim=1),
    "copy into a dense one": lambda g: torch.ones(3, 4).copy_(g),
    "stock AdamW": lambda g: step_with(g),
}


def step_with(grad: SelectedGrad) -> None:
    param = torch.nn.Parameter(torch.zeros(3, 4))
    param.grad = grad
    torch.optim.AdamW([param], foreach=False).step()


@pytest.mark.parametrize("name", REFUSED)
def test_whatever_needs_the_whole_gradient_is_refused_in_one_clear_sentence(name: str) -> None:
    with pytest.raises(SelectedGradientError, match="holds only the selected entries") as caught:
        REFUSED[name](selected())
    assert "to_dense()" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SaftError)


def test_gradients_of_different_masks_are_not_added() -> None:
    other = SelectedGrad(torch.zeros(3, 4), VALUES, INDICES + 1 - (INDICES == 11).int())
    with pytest.raises(SelectedGradientError, match="made with another mask"):
        selected() + other
    same = SelectedGrad(torch.zeros(3, 4), VALUES, INDICES.clone())
    assert torch.equal((selected() + same).values(), 2 * VALUES)
