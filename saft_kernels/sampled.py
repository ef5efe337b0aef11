"""Layers whose weight gradient is computed at selected entries only.

Each function computes what its namesake in torch computes, at the same speed, with the weight as it
stands. ``values`` are a compact leaf tensor that stands for the selected entries in autograd: their
gradient goes there, and no dense weight gradient exists at any time. What is kept for backward is
not the input but the columns of it that some selected entry uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from saft_kernels import ops
from saft_kernels.once import once
from saft_kernels.plan import Conv2dPlan, EmbeddingPlan, LinearPlan


def sampled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
) -> Tensor:
    """``x @ weight.T + bias``, differentiable in ``x``, ``bias`` and ``values``.

    Args:
        x: [..., I], fp32, bf16, fp16 or fp64; under autocast it is cast as ``F.linear`` does.
        weight: [O, I]. Used as it is; it gets no gradient.
        bias: [O] or None.
        values: fp32 [nnz] (fp64 for fp64 weights): what ``weight`` holds at ``indices``. They are
            not read; their gradient is that of the weight at the indices.
        indices: int32 or int64 [nnz], strictly increasing flat indices into ``weight``.

    Returns:
        [..., O].

    Raises:
        RuntimeError: if a shape or dtype does not fit, or an index is out of range.
    """
    _require_values(values, indices)
    return linear(x, weight, bias, values, None, _plan_of(weight.shape[1], indices))


def _plan_of(in_features: int, indices: Tensor) -> LinearPlan:
    def make() -> LinearPlan:
        return LinearPlan.of(in_features, indices)

    return once(indices, ("linear plan", in_features), make)


def _require_values(values: Tensor, indices: Tensor) -> None:
    if values.shape != indices.shape:
        raise RuntimeError(
            f"values must have one entry per index: {list(indices.shape)}, not {list(values.shape)}"
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    bias_values: Tensor | None,
    plan: LinearPlan,
) -> Tensor:
    """:func:`sampled_linear` with a plan made before, and selected entries of the bias too.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.
        values: for the selected entries of ``weight``; None if there are none.
        bias_values: the same for ``bias``.
        plan: made for these entries.

    Returns:
        [..., O].
    """
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias, values, bias_values, *plan.tensors())
    return result


def _flat_tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _packed(x: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns as the product used them: autocast may have rounded them on their way into it."""
    if x.dtype == torch.float32:
        return ops.pack_columns(x, columns, dtype)
    return ops.pack_columns(x, columns).to(dtype)


def _sizes(*values: Tensor | None) -> list[int]:
    return [0 if value is None else value.numel() for value in values]


def _grads_of_values(
    ctx: Any,
    packed: Tensor,
    tokens: Tensor,
    rows: Tensor,
    offsets: Tensor,
    entry_columns: Tensor,
    places: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the selected values of the weight and of the bias."""
    grad = ops.sampled_grad(packed, tokens, rows, offsets, entry_columns)
    weight, bias = _in_order(grad, places).split(ctx.sizes)
    _, _, _, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
    return weight if weight_wanted else None, bias if bias_wanted else None


def _in_order(grad: Tensor, places: Tensor | None) -> Tensor:
    return grad if places is None else grad.index_select(0, places)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        bias_values: Tensor | None,
        columns: Tensor,
        *plan: Tensor | None,
    ) -> Tensor:
        # Flat, here and in backward: for a frozen matrix and an input of three dimensions that is
        # not contiguous, as in attention, torch takes a batched product, far slower in bf16.
        tokens = _flat_tokens(x)
        y = F.linear(tokens, weight, bias)
        packed = _packed(tokens, columns, y.dtype)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, packed, *plan)
        ctx.sizes, ctx.x_dtype, ctx.x_shape = _sizes(values, bias_values), x.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed, *plan = ctx.saved_tensors
        dx = dbias = None
        tokens = _flat_tokens(dy)
        if weight is not None:
            dx = (tokens @ weight.to(dy.dtype)).to(ctx.x_dtype).view(ctx.x_shape)
        if ctx.needs_input_grad[2]:
            dbias = tokens.sum(0)
        dvalues, dbias_values = _grads_of_values(ctx, packed, tokens, *plan)
        return dx, None, dbias, dvalues, dbias_values, None, None, None, None, None


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    bias_values: Tensor | None,
    plan: Conv2dPlan,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``F.conv2d`` without groups; the gradient of ``weight`` is computed at selected entries only.

    Args:
        x: [N, C, H, W].
        weight: [O, C, KH, KW].
        bias: [O] or None.
        values: for the selected entries of ``weight``; None if there are none.
        bias_values: the same for ``bias``.
        plan: made for these entries.
        stride: of the output positions, [2].
        padding: zeros on each side, [2].
        dilation: of the kernel, [2].

    Returns:
        [N, O, OH, OW].
    """
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    if not torch.is_grad_enabled():
        return F.conv2d(x, weight, bias, *geometry)
    result: Tensor = _Conv2d.apply(x, weight, bias, values, bias_values, geometry, *plan.tensors())
    return result


def _input_columns(x: Tensor, weight_shape: torch.Size, geometry: Any, window: Tensor) -> Tensor:
    """The columns (channel, kernel row, kernel column) [3, K] of the unfolded input: [T, K].

    Only these are unfolded. Tokens are the output positions of all images in order.
    """
    _, _, kh, kw = weight_shape
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = geometry
    if pad_h or pad_w:
        x = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    windows = x.unfold(2, dilation_h * (kh - 1) + 1, stride_h)
    windows = windows.unfold(3, dilation_w * (kw - 1) + 1, stride_w)
    windows = windows[..., ::dilation_h, ::dilation_w].permute(1, 4, 5, 0, 2, 3)
    return windows[tuple(window)].flatten(1).t()


def _output_rows(dy: Tensor, rows: Tensor, copied: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient as [T, ...] and the rows to read there: no more than these are copied."""
    if dy.is_contiguous(memory_format=torch.channels_last):
        return dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1]), rows
    chosen = dy.transpose(0, 1).index_select(0, rows).reshape(rows.numel(), -1)
    return chosen.t(), copied


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        bias_values: Tensor | None,
        geometry: Any,
        window: Tensor,
        unfolded: Tensor,
        *plan: Tensor | None,
    ) -> Tensor:
        y = F.conv2d(x, weight, bias, *geometry)
        ctx.sizes, ctx.geometry = _sizes(values, bias_values), geometry
        packed = _packed(_input_columns(x, weight.shape, geometry, window), unfolded, y.dtype)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, packed, *plan)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed, copied, rows, *plan = ctx.saved_tensors
        dx = dbias = None
        if weight is not None:
            dx = conv2d_input(ctx.x_shape, weight.to(dy.dtype), dy, *ctx.geometry).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3))
        tokens, rows = _output_rows(dy, rows, copied)
        dvalues, dbias_values = _grads_of_values(ctx, packed, tokens, rows, *plan)
        return dx, None, dbias, dvalues, dbias_values, *(None,) * 8


def embedding(
    tokens: Tensor, weight: Tensor, values: Tensor, plan: EmbeddingPlan, padding_idx: int | None
) -> Tensor:
    """``F.embedding``; the gradient of ``weight`` is computed at selected entries only.

    Args:
        tokens: int32 or int64, any shape.
        weight: [V, E].
        values: for its selected entries.
        plan: made for these entries.
        padding_idx: a token without gradient, or None.

    Returns:
        The shape of ``tokens`` and [E].
    """
    if not torch.is_grad_enabled():
        return F.embedding(tokens, weight, padding_idx)
    result: Tensor = _Embedding.apply(tokens, weight, values, padding_idx, *plan.tensors())
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        values: Tensor,
        padding_idx: int | None,
        *plan: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(tokens, *plan)
        ctx.padding_idx = padding_idx
        return F.embedding(tokens, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *plan = ctx.saved_tensors
        flat = tokens.reshape(-1).long()
        if ctx.padding_idx is not None:
            flat = flat.masked_fill(flat == ctx.padding_idx, -1)
        grad = ops.sampled_embedding_grad(flat, _flat_tokens(dy), *plan)
        return None, None, grad, None, None, None, None


def streamed(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The weight as autograd knows it, for whatever else may be done with it.

    Its dense gradient is computed; the selected entries go on to ``values`` and the rest is freed.
    Right for small tensors (norms, biases, positional embeddings), and for uses that nothing above
    covers.

    Args:
        weight: any shape, used as it is.
        values: for its selected entries.
        indices: of these, flat.

    Returns:
        ``weight``, the same memory.
    """
    if not torch.is_grad_enabled():
        return weight
    result: Tensor = _Streamed.apply(weight, values, indices)
    return result


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.dtype = values.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return None, ops.gather(dweight, indices).to(ctx.dtype), None
