"""The executable specification: every operation of :mod:`saft_kernels.ops` in plain torch.

Each function has the signature of its namesake in ``ops`` and defines its result. Kernels are
tested against this module, benchmarks check their results against it, and
``SAFT_BACKEND=reference`` runs it. It
is written to be read: clarity first, no attention to speed or memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

from saft_kernels.layout import (
    ABOVE,
    BIN,
    BIN_SHIFT,
    BINS,
    COUNT,
    HISTOGRAM,
    NONFINITE,
    POSITION_BITS,
    THRESHOLD,
    TIE,
    TOKENS,
    index_code,
    index_code_bytes,
    index_dtype,
)


def accumulate_topk_(
    acc: Tensor,
    grad: Tensor | None,
    scale: float,
    square: bool,
    key: int,
    offset: int,
    k: int,
    values: Tensor,
    positions: Tensor,
    state: Tensor,
) -> None:
    """``acc += scale * grad`` (two roundings, not fused), then keep the k best candidates."""
    flat = acc.view(-1)
    if grad is not None:
        term = grad.reshape(-1).float()
        if square:
            term = term * term
        flat.add_(term * scale)
    if flat.numel() == 0:
        return
    position = (key << POSITION_BITS) + offset + torch.arange(flat.numel(), device=acc.device)
    broken = ~flat.isfinite()
    if broken.any():
        state[NONFINITE] = min(int(state[NONFINITE]), int(position[broken].min()))
    if k == 0:
        return
    count = int(state[COUNT])
    fresh = ~broken & _beats_threshold(flat.abs(), position, state)
    _count_in_histogram(k, flat.abs()[fresh], state)
    score = torch.cat([values[:count], flat.abs()[fresh]])
    where = torch.cat([positions[:count], position[fresh]])
    _keep_best(k, score, where, values, positions, state)


def compact_topk_(k: int, values: Tensor, positions: Tensor, state: Tensor) -> None:
    """Keep the k best of the buffered candidates and raise the threshold to the worst of them."""
    count = int(state[COUNT])
    _keep_best(k, values[:count].clone(), positions[:count].clone(), values, positions, state)


def _beats_threshold(score: Tensor, position: Tensor, state: Tensor) -> Tensor:
    """Where (score, position) ranks before the k-th best so far; ties go to the lower position."""
    threshold = state[THRESHOLD : THRESHOLD + 1].to(torch.int32).view(torch.float32)
    if int(state[THRESHOLD]) < 0:  # nothing is excluded yet
        return torch.ones_like(score, dtype=torch.bool)
    return (score > threshold) | ((score == threshold) & (position < state[TIE]))


def _count_in_histogram(k: int, score: Tensor, state: Tensor) -> None:
    """Count the candidates by value, and find the highest bin that k of all have reached."""
    histogram = state[HISTOGRAM : HISTOGRAM + BINS]
    histogram += (score.view(torch.int32) >> BIN_SHIFT).bincount(minlength=BINS)
    reached = histogram.flip(0).cumsum(0).flip(0)
    state[BIN] = max(int((reached >= k).sum()) - 1, 0)
    state[ABOVE] = reached[state[BIN]]


def _keep_best(
    k: int, score: Tensor, where: Tensor, values: Tensor, positions: Tensor, state: Tensor
) -> None:
    by_position = where.argsort()
    order = by_position[score[by_position].argsort(descending=True, stable=True)][:k]
    n = order.numel()
    values[:n] = score[order]
    positions[:n] = where[order]
    state[COUNT] = n
    if n == k and k > 0:
        state[THRESHOLD] = values[n - 1].view(torch.int32)
        state[TIE] = positions[n - 1]


def gather(dense: Tensor, indices: Tensor) -> Tensor:
    """``dense.flatten()[indices]`` in logical row-major order, whatever the memory layout."""
    _require_increase_below(indices, dense.numel())
    return dense.reshape(-1)[indices.long()]


def _require_increase_below(indices: Tensor, numel: int) -> None:
    if indices.numel() == 0:
        return
    increase = bool((indices[1:] > indices[:-1]).all())
    if not increase or int(indices[0]) < 0 or int(indices[-1]) >= numel:
        raise RuntimeError(
            f"indices must increase strictly and lie within the {numel} elements of the tensor"
        )


def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    """``dense.flatten()[indices] = values`` in logical row-major order, for any memory layout."""
    _require_increase_below(indices, dense.numel())
    if indices.numel():
        shaped = dense if dense.dim() else dense.view(1)
        shaped[torch.unravel_index(indices.long(), shaped.shape)] = values


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grad: Tensor | None,
    indices: Tensor,
    bounds: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    step: Tensor,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, Algorithm 2) over the selected entries only."""
    if found_inf is not None and found_inf.item() != 0:
        return
    step.add_(1)
    rate = lr if lr_tensor is None else float(lr_tensor)
    inverse = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    for tensor, (param, (begin, end)) in enumerate(zip(params, pairwise(bounds), strict=True)):
        index = indices[begin:end]
        if compact_grad is not None:
            g = compact_grad[begin:end].float()
        else:
            g = gather(grads[tensor], index).float()
        g = g * inverse if grad_scale is not None else g
        g = -g if maximize else g
        w = master[begin:end] if master is not None else gather(param, index).float()
        m, v = exp_avg[begin:end], exp_avg_sq[begin:end]
        t = float(step[tensor])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(eps)
        w = (w * (1 - rate * weight_decay)).addcdiv_(m, denominator, value=-rate / (1 - beta1**t))
        if master is not None:
            master[begin:end] = w
        scatter_(param, index, w.to(param.dtype))


def pack_columns(x: Tensor, columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The named columns of ``x``, the last possible one being ones, 16 tokens side by side."""
    tokens, width = x.shape
    if columns.numel() and int(columns[-1]) > width:
        raise RuntimeError(
            f"columns must increase strictly and lie within the {width + 1} columns of x, that of "
            "ones included"
        )
    chosen = torch.cat([x, x.new_ones(tokens, 1)], 1)[:, columns.long()]
    blocks = -(-tokens // TOKENS)
    padded = torch.cat([chosen, chosen.new_zeros(blocks * TOKENS - tokens, columns.numel())])
    return padded.view(blocks, TOKENS, columns.numel()).transpose(1, 2).contiguous().to(dtype)


def sampled_grad(
    packed: Tensor,
    grad_output: Tensor,
    rows: Tensor,
    offsets: Tensor,
    columns: Tensor,
    product: bool,  # a matter of speed
) -> Tensor:
    """``(grad_output.T @ x)[row, column]`` of every entry, x being what was packed."""
    tokens = grad_output.shape[0]
    x = packed.transpose(1, 2).reshape(packed.shape[0] * TOKENS, packed.shape[1])[:tokens]
    row_of_entry = rows.long().repeat_interleave(offsets.long().diff())
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    dy = grad_output[:, row_of_entry].to(dtype)
    return (dy * x[:, columns.long()].to(dtype)).sum(0)


def sampled_embedding_grad(
    tokens: Tensor, grad_output: Tensor, rows: Tensor, offsets: Tensor, columns: Tensor
) -> Tensor:
    """``grad_output[t, column]`` of every entry (row, column), summed where token t is the row."""
    row_of_entry = rows.long().repeat_interleave(offsets.long().diff())
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    hits = (tokens[:, None] == row_of_entry).to(dtype)
    return (grad_output[:, columns.long()].to(dtype) * hits).sum(0)


def encode_indices(indices: Tensor, numel: int) -> Tensor:
    """The lower bits of all indices, then bits of which number (upper bits) + i is 1 for index i.

    (Elias 1974 and Fano 1971; csrc/ops/index_code.h has the details.)
    """
    if indices.numel() > numel:
        raise RuntimeError(f"there cannot be {indices.numel()} different indices below {numel}")
    _require_increase_below(indices, numel)
    low_bits, high_length = index_code(indices.numel(), numel)
    order = torch.arange(indices.numel())
    low = indices.long()[:, None] >> torch.arange(low_bits) & 1
    high = torch.zeros(high_length, dtype=torch.int64)
    high[(indices.long() >> low_bits) + order] = 1
    return torch.cat([_bytes_of(low.flatten()), _bytes_of(high)])


def decode_indices(code: Tensor, n: int, numel: int) -> Tensor:
    """The indices below ``numel`` whose code this is: upper bits from where the ones are."""
    if not 0 <= n <= numel:
        raise RuntimeError(f"there cannot be {n} different indices below {numel}")
    size = index_code_bytes(n, numel)
    if code.numel() != size:
        raise RuntimeError(
            f"the code of {n} indices below {numel} has {size} bytes, not {code.numel()}"
        )
    low_bits, _ = index_code(n, numel)
    bits = (code.long()[:, None] >> torch.arange(8) & 1).flatten()
    lower = bits[: n * low_bits].view(n, low_bits) << torch.arange(low_bits)
    ones = bits[-(-n * low_bits // 8) * 8 :].nonzero().flatten()
    if len(ones) == n:
        indices = (ones - torch.arange(n) << low_bits) + lower.sum(1)
        with suppress(RuntimeError):  # not increasing, or out of range
            if torch.equal(encode_indices(indices, numel), code):
                return indices.to(index_dtype(numel))
    raise RuntimeError(f"this is no code of {n} increasing indices below {numel}")


def _bytes_of(bits: Tensor) -> Tensor:
    """Eight bits to a byte, the first being the lowest, the last byte filled up with zeros."""
    padded = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (padded << torch.arange(8)).sum(1).to(torch.uint8)
