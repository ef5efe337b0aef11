"""``grad[e]``: the sum of ``dy[t, column of e]`` over the tokens t that are the row of entry e.

See ``csrc/cuda/sampled_embedding_kernel.cu`` for how and for the bytes that this moves.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from saft_kernels.triton import launch
from saft_kernels.triton.launch import ceil_div
from saft_kernels.triton.search import lower_bound

BLOCK = 256
#: Entries of a program, and their tokens that are added at a time.
ENTRIES, LANES = 4, 32


@triton.jit(
    do_not_specialize=["n", "n_rows"],
    do_not_specialize_on_alignment=["tokens", "rows"],
)
def _find_rows_kernel(tokens, rows, found, n, n_rows, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + t, t < n, other=-1)
    place = lower_bound(rows, n_rows, token)
    is_row = tl.load(rows + place, place < n_rows, other=-1).to(tl.int64) == token
    row = tl.where(is_row & (token >= 0), place, n_rows)
    tl.store(found + t, row.to(tl.int32), t < n)


@triton.jit(
    do_not_specialize=["tokens", "n", "n_rows"],
    do_not_specialize_on_alignment=[
        "dy", "offsets", "columns", "sorted_rows", "sorted_tokens", "token_stride", "column_stride",
    ],
)  # fmt: skip
def _sum_tokens_kernel(
    dy, sorted_rows, sorted_tokens, offsets, columns, grad, tokens, n, n_rows,
    token_stride, column_stride,
    ENTRIES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = e < n
    row = lower_bound(offsets + 1, n_rows, tl.where(exists, e, 0) + 1)
    first = lower_bound(sorted_rows, tokens, row)
    end = tl.where(exists, lower_bound(sorted_rows, tokens, row + 1), first)
    column = tl.load(columns + e, exists, other=0).to(tl.int64)[:, None]
    total = tl.zeros([ENTRIES, LANES], grad.dtype.element_ty)
    for begin in range(0, tl.max(end - first), LANES):
        place = first[:, None] + begin + tl.arange(0, LANES)[None, :]
        inside = place < end[:, None]
        token = tl.load(sorted_tokens + place, inside, other=0)
        values = tl.load(dy + token * token_stride + column * column_stride, inside, other=0.0)
        total += values.to(total.dtype)
    tl.store(grad + e, tl.sum(total, 1), exists)


def sampled_embedding_grad(
    tokens: Tensor, grad_output: Tensor, rows: Tensor, offsets: Tensor, columns: Tensor
) -> Tensor:
    """See :func:`saft_kernels.ops.sampled_embedding_grad`."""
    check = torch.ops.saft_kernels.check_sampled_embedding_grad
    check(tokens, grad_output, rows, offsets, columns)
    count, n, n_rows = tokens.numel(), columns.numel(), rows.numel()
    found = launch.new_empty(tokens, [count], torch.int32)
    launch.launch(
        _find_rows_kernel, ceil_div(count, BLOCK),
        tokens, rows, found, count, n_rows, BLOCK=BLOCK,
    )  # fmt: skip
    in_order = found.sort(stable=True)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    grad = launch.new_empty(grad_output, [n], dtype)
    launch.launch(
        _sum_tokens_kernel, ceil_div(n, ENTRIES),
        grad_output, in_order.values, in_order.indices, offsets, columns, grad,
        count, n, n_rows, *grad_output.stride(),
        ENTRIES=ENTRIES, LANES=LANES,
    )  # fmt: skip
    return grad
