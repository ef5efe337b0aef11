"""Layers with sampled weight gradients: gradcheck, stock results, and what they allocate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from allocations import Allocations
from saft_kernels import ops, reference, sampled, sampled_linear
from saft_kernels.plan import Conv2dPlan, EmbeddingPlan, LinearPlan
from tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some(device: torch.device, numel: int, share: float = 0.2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = max(1, int(share * numel))
    return torch.randperm(numel, generator=generator)[:count].sort().values.int().to(device)


def filled(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """The weight with these values at the indices, as the optimizer leaves it."""
    weight = weight.clone()
    ops.scatter_(weight, indices, values.detach())
    return weight


def double(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_(True)


# Linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (40, 5)])
def test_gradcheck_of_sampled_linear(device, shape):
    torch.manual_seed(0)
    x, weight, bias = leaf(double(device, *shape)), double(device, 4, 5), leaf(double(device, 4))
    indices = some(device, 20)
    values = leaf(ops.gather(weight, indices))

    def layer(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        return sampled_linear(x, filled(weight, indices, values), bias, values, indices)

    assert torch.autograd.gradcheck(layer, (x, bias, values))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_with_entries_of_the_bias_and_either_order_of_the_weight(
    device, transposed, with_bias
):
    torch.manual_seed(0)
    x, bias = leaf(double(device, 7, 5)), double(device, 4)
    weight = double(device, 5, 4) if transposed else double(device, 4, 5)
    w_indices, b_indices = some(device, 20), some(device, 4, 0.6) if with_bias else None
    plan = LinearPlan.of(5, w_indices, b_indices, out_features=4 if transposed else None)
    values = leaf(ops.gather(weight, w_indices))
    b_values = leaf(ops.gather(bias, b_indices)) if with_bias else None

    def layer(x: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        w = filled(weight, w_indices, values)
        b = filled(bias, b_indices, *rest) if rest else bias
        matrix = w.t() if transposed else w
        return sampled.linear(x, matrix, b, values, rest[0] if rest else None, plan)

    inputs = (x, values) if b_values is None else (x, values, b_values)
    assert torch.autograd.gradcheck(layer, inputs)


def test_only_the_bias_may_be_selected(device):
    x, weight, bias = double(device, 7, 5), double(device, 4, 5), double(device, 4)
    indices = torch.tensor([1, 3], device=device)
    values = leaf(ops.gather(bias, indices))
    plan = LinearPlan.of(5, None, indices)
    y = sampled.linear(x, weight, bias, None, values, plan)
    y.square().sum().backward()
    expected = 2 * F.linear(x, weight, bias)
    assert torch.allclose(values.grad, expected.sum(0)[indices])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_linear_gives_the_stock_result_and_the_dense_gradient_at_the_indices(
    device, dtype, batch_first
):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 24, device=device).to(dtype)
    x = leaf(x if batch_first else x.transpose(0, 1))
    weight = torch.randn(16, 24, device=device).to(dtype)
    bias = torch.randn(16, device=device).to(dtype)
    indices = some(device, 16 * 24)
    values = leaf(ops.gather(weight, indices).float())
    y = sampled_linear(x, weight, bias, values, indices)
    stock_x, stock_weight = leaf(x.detach()), leaf(weight)
    stock = F.linear(stock_x, stock_weight, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    stock.backward(dy)
    for actual, expected in ((y.detach(), stock.detach()), (x.grad, stock_x.grad)):
        if batch_first:
            assert torch.equal(actual, expected)
        else:  # torch takes a batched product, which sums in another order
            assert_close(actual.float(), expected.float(), "rounded_gradient")
    dense = dy.reshape(-1, 16).double().t() @ x.detach().reshape(-1, 24).double()
    assert_close(values.grad.double(), reference.gather(dense, indices), "sampled_grad")


def test_linear_under_autocast_uses_what_the_product_used(device):
    torch.manual_seed(0)
    x, weight = leaf(torch.randn(64, 24, device=device)), torch.randn(16, 24, device=device)
    indices = some(device, 16 * 24)
    values = leaf(ops.gather(weight, indices))
    with torch.autocast(device.type, torch.bfloat16):
        y = sampled_linear(x, weight, None, values, indices)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    y.backward(dy)
    dense = dy.double().t() @ x.detach().bfloat16().double()
    assert_close(values.grad.double(), reference.gather(dense, indices), "sampled_grad")
    assert x.grad.dtype == torch.float32


def test_indices_may_change_between_calls(device):
    """A plan is kept for as long as the indices are what they were, and the weight is as wide."""
    x, weight = double(device, 7, 4), double(device, 5, 4)
    indices = torch.tensor([1, 6, 19], device=device)
    for change in (None, lambda: indices.add_(-1), None):
        if change:
            change()
        for w, inputs in ((weight, x), (weight.view(4, 5), double(device, 7, 5))):
            values = leaf(ops.gather(w, indices))
            sampled_linear(inputs, w, None, values, indices).square().sum().backward()
            dense = leaf(w)
            F.linear(inputs, dense).square().sum().backward()
            assert torch.allclose(values.grad, reference.gather(dense.grad, indices))


def test_wrong_values_are_refused(device):
    with pytest.raises(RuntimeError, match="one entry per index"):
        sampled_linear(
            double(device, 2, 5),
            double(device, 4, 5),
            None,
            double(device, 3),
            torch.tensor([1, 2], device=device),
        )


# Convolution and embedding ------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((2, 2), (2, 2), (0, 0), (1, 1)),
        ((3, 2), (2, 1), (1, 0), (1, 2)),
    ],
)
def test_gradcheck_of_conv2d(device, kernel, stride, padding, dilation, channels_last):
    torch.manual_seed(0)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = leaf(double(device, 2, 3, 6, 5).to(memory_format=memory))
    weight, bias = double(device, 4, 3, *kernel), double(device, 4)
    w_indices, b_indices = some(device, weight.numel(), 0.3), some(device, 4, 0.5)
    plan = Conv2dPlan.of(weight.shape, w_indices, b_indices)
    values = leaf(ops.gather(weight, w_indices))
    b_values = leaf(ops.gather(bias, b_indices))

    def layer(x: Tensor, values: Tensor, b_values: Tensor) -> Tensor:
        w, b = filled(weight, w_indices, values), filled(bias, b_indices, b_values)
        return sampled.conv2d(x, w, b, values, b_values, plan, stride, padding, dilation)

    # Every partial derivative of the usual kind of convolution; of others, two random directions.
    fast = channels_last or kernel != (3, 3)
    assert torch.autograd.gradcheck(layer, (x, values, b_values), fast_mode=fast)
    stock = F.conv2d(x, weight, bias, stride, padding, dilation)
    assert torch.equal(layer(x, values, b_values), stock)


def test_only_the_bias_of_a_convolution_may_be_selected(device):
    x, weight, bias = double(device, 2, 3, 6, 5), double(device, 4, 3, 2, 2), double(device, 4)
    indices = torch.tensor([1, 3], device=device)
    values = leaf(ops.gather(bias, indices))
    plan = Conv2dPlan.of(weight.shape, None, indices)
    y = sampled.conv2d(x, weight, bias, None, values, plan, (1, 1), (0, 0), (1, 1))
    y.square().sum().backward()
    expected = 2 * F.conv2d(x, weight, bias)
    assert torch.allclose(values.grad, expected.sum((0, 2, 3))[indices])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradcheck_of_embedding(device, padding_idx):
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (3, 4), device=device)
    tokens[0, 0] = 2
    weight = double(device, 9, 5)
    indices = some(device, 45, 0.4)
    plan = EmbeddingPlan.of(5, indices)
    values = leaf(ops.gather(weight, indices))

    def layer(values: Tensor) -> Tensor:
        return sampled.embedding(tokens, filled(weight, indices, values), values, plan, padding_idx)

    if padding_idx is None:
        assert torch.autograd.gradcheck(layer, (values,))
    dense = leaf(weight)
    dy = double(device, 3, 4, 5)
    F.embedding(tokens, dense, padding_idx).backward(dy)
    layer(values).backward(dy)
    assert torch.allclose(values.grad, reference.gather(dense.grad, indices))


def test_streamed_gathers_the_dense_gradient(device):
    weight = double(device, 6, 5)
    indices = some(device, 30)
    values = leaf(ops.gather(weight, indices))
    dy = double(device, 6, 5)
    (sampled.streamed(weight, values, indices) * dy).sum().backward()
    assert torch.equal(values.grad, reference.gather(dy, indices))


# Cost ---------------------------------------------------------------------------------------------


def test_no_tensor_of_the_size_of_the_weight_is_made(device):
    x, weight = torch.randn(4, 300, device=device), torch.randn(200, 300, device=device)
    indices = some(device, 60_000, 0.001)
    values = leaf(ops.gather(weight, indices))
    with Allocations() as seen:
        sampled_linear(leaf(x), weight, None, values, indices).sum().backward()
    assert 0 < seen.largest <= 4 * 300
    with Allocations() as seen:  # the watch does see the dense one
        F.linear(x, leaf(weight)).sum().backward()
    assert seen.largest >= weight.numel()


def test_what_is_kept_for_backward_is_the_used_columns(device):
    x, weight = torch.randn(64, 300, device=device), torch.randn(200, 300, device=device)
    indices = torch.tensor([5, 7, 305], device=device)  # two columns
    values = leaf(ops.gather(weight, indices))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sampled_linear(x, weight, None, values, indices)
    assert max(kept) == 64 * 2


def test_nothing_is_packed_without_grad_mode(device):
    x, weight = torch.randn(64, 30, device=device), torch.randn(20, 30, device=device)
    values = leaf(torch.zeros(1, device=device))
    with torch.no_grad(), torch.profiler.profile() as profile:
        y = sampled_linear(x, weight, None, values, torch.tensor([3], device=device))
    assert not y.requires_grad
    assert not any("pack_columns" in event.name for event in profile.events())


@pytest.mark.parametrize("count", [1, 3])
def test_several_uses_add_up(device, count):
    weight = double(device, 4, 5)
    indices = some(device, 20)
    values = leaf(ops.gather(weight, indices))
    inputs = [double(device, 7, 5) for _ in range(count)]
    outputs = [sampled_linear(x, weight, None, values, indices) for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    dense = leaf(weight)
    sum(F.linear(x, dense).square().sum() for x in inputs).backward()
    assert torch.allclose(values.grad, reference.gather(dense.grad, indices))
