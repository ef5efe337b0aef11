"""Packing, and the weight gradient at selected entries, entry by entry or as tiles of the product.

See ``csrc/cuda/sampled_grad_kernel.cu`` and ``sampled_product_kernel.cu`` for the mathematics and
the bytes that they move.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from saft_kernels.layout import TOKENS
from saft_kernels.triton import launch
from saft_kernels.triton.launch import ceil_div
from saft_kernels.triton.search import lower_bound

BLOCK = 128
TILE = 64
#: Parts of an entry that are summed side by side.
GROUPS = 8
#: Entries of a row of a tile that are picked at a time.
PICKED = 16
#: How tiles are computed: token blocks of a step and warps, so that the registers suffice.
TENSOR_CORES = {"BLOCKS": 2, "num_warps": 4}
PLAIN = {"BLOCKS": 1, "num_warps": 8}
#: Entry by entry.
ENTRIES = {"BLOCK": BLOCK, "num_warps": 8}

# Compiled once for all sizes and addresses, and again for a stride that is one.


@triton.jit(
    do_not_specialize=["tokens", "width", "n_columns"],
    do_not_specialize_on_alignment=["x", "columns", "token_stride", "column_stride"],
)
def _pack_kernel(
    x, columns, packed, tokens, width, n_columns, token_stride, column_stride,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(n_columns, BLOCK)
    block = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    exists = (c < n_columns)[None, :]
    column = tl.load(columns + c, c < n_columns, other=0).to(tl.int64)[None, :]
    place = tl.arange(0, TOKENS)[:, None]
    token = block * TOKENS + place
    inside = (token < tokens) & exists
    values = tl.load(
        x + token * token_stride + column * column_stride, inside & (column < width), other=0.0
    )
    values = tl.where(inside & (column == width), tl.full([], 1.0, values.dtype), values)
    to = packed + (block * n_columns + c[None, :]) * TOKENS + place
    tl.store(to, values.to(packed.dtype.element_ty), exists)


@triton.jit(
    do_not_specialize=["tokens", "n_rows", "n_columns", "n", "blocks_of_part"],
    do_not_specialize_on_alignment=[
        "dy", "rows", "offsets", "columns", "token_stride", "column_stride",
    ],
)  # fmt: skip
def _entries_kernel(
    dy, packed, rows, offsets, columns, sums, tokens, n_rows, n_columns, n,
    token_stride, column_stride, blocks_of_part,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(n, BLOCK)
    part = tl.program_id(0) // chunks
    e = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = e < n
    j = lower_bound(offsets + 1, n_rows, tl.where(exists, e, 0) + 1)
    row = tl.load(rows + j, exists, other=0).to(tl.int64)[None, :]
    column = tl.load(columns + e, exists, other=0).to(tl.int64)[None, :]
    place = tl.arange(0, TOKENS)[:, None]
    first = part * blocks_of_part
    end = tl.minimum(first + blocks_of_part, tl.cdiv(tokens, TOKENS))
    total = tl.zeros([TOKENS, BLOCK], sums.dtype.element_ty)
    for block in range(first, end):
        token = tl.cast(block, tl.int64) * TOKENS + place
        g = tl.load(
            dy + token * token_stride + row * column_stride,
            (token < tokens) & exists[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            packed + (tl.cast(block, tl.int64) * n_columns + column) * TOKENS + place,
            exists[None, :], other=0.0,
        )  # fmt: skip
        total = tl.fma(g.to(total.dtype), x.to(total.dtype), total)
    tl.store(sums + part.to(tl.int64) * n + e, tl.sum(total, 0), exists)


@triton.jit(do_not_specialize=["parts", "n"])
def _sum_parts_kernel(sums, grad, parts, n, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([GROUPS, BLOCK], sums.dtype.element_ty)
    for first in range(0, parts, GROUPS):
        part = (first + tl.arange(0, GROUPS))[:, None]
        total += tl.load(sums + part.to(tl.int64) * n + e, (part < parts) & (e < n), other=0.0)
    tl.store(grad + e, tl.sum(total, 0), e < n)


@triton.jit
def _in_tile(columns, begin, end, first, first_column, TILE: tl.constexpr, PICKED: tl.constexpr):
    """Some entries of each row, their columns in the tile, and whether these are in it."""
    e = begin[:, None] + first + tl.arange(0, PICKED)[None, :]
    column = tl.load(columns + e, e < end[:, None], other=-1) - first_column
    return e, column, (column >= 0) & (column < TILE) & (e < end[:, None])


@triton.jit(
    do_not_specialize=["tokens", "n_rows", "n_columns", "n", "blocks_of_part"],
    do_not_specialize_on_alignment=[
        "dy", "rows", "offsets", "columns", "token_stride", "column_stride",
    ],
)  # fmt: skip
def _product_kernel(
    dy, packed, rows, offsets, columns, sums, tokens, n_rows, n_columns, n,
    token_stride, column_stride, blocks_of_part,
    TOKENS: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(n_columns, TILE)
    tiles = tl.cdiv(n_rows, TILE) * column_tiles
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    j = tile // column_tiles * TILE + tl.arange(0, TILE)
    first_column = tile % column_tiles * TILE
    c = first_column + tl.arange(0, TILE)
    begin = tl.load(offsets + j, j < n_rows, other=0)
    end = tl.load(offsets + j + 1, j < n_rows, other=0)
    longest = tl.max(end - begin)
    found = 0
    for first in range(0, longest, PICKED):
        _, _, inside = _in_tile(columns, begin, end, first, first_column, TILE, PICKED)
        found += tl.sum(inside.to(tl.int32))
    if found > 0:
        row = tl.load(rows + j, j < n_rows, other=0).to(tl.int64)[None, :]
        k = tl.arange(0, BLOCKS * TOKENS)[:, None]
        first_block = part * blocks_of_part
        end_block = tl.minimum(first_block + blocks_of_part, tl.cdiv(tokens, TOKENS))
        product = tl.zeros([TILE, TILE], tl.float32)
        for step in range(first_block, end_block, BLOCKS):
            block = tl.cast(step, tl.int64) + k // TOKENS
            token = tl.cast(step, tl.int64) * TOKENS + k
            exists = block < end_block
            g = tl.load(
                dy + token * token_stride + row * column_stride,
                exists & (token < tokens) & (j < n_rows)[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                packed + (block * n_columns + c[None, :]) * TOKENS + k % TOKENS,
                exists & (c < n_columns)[None, :], other=0.0,
            )  # fmt: skip
            product = tl.dot(tl.trans(g), x, product, input_precision="ieee")
        for first in range(0, longest, PICKED):
            e, column, inside = _in_tile(columns, begin, end, first, first_column, TILE, PICKED)
            picked = tl.gather(product, tl.where(inside, column, 0), 1)
            tl.store(sums + part.to(tl.int64) * n + e, picked, inside)


def pack_columns(x: Tensor, columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`saft_kernels.ops.pack_columns`."""
    torch.ops.saft_kernels.check_pack_columns(x, columns, dtype)
    blocks, n = ceil_div(x.shape[0], TOKENS), columns.numel()
    packed = launch.new_empty(x, [blocks, n, TOKENS], dtype or x.dtype)
    launch.launch(
        _pack_kernel, blocks * ceil_div(n, BLOCK),
        x, columns, packed, *x.shape, n, *x.stride(),
        TOKENS=TOKENS, BLOCK=BLOCK,
    )  # fmt: skip
    return packed


def token_parts(tokens: int, warps: int) -> tuple[int, int]:
    """Into how many parts tokens are split that are summed side by side, and their blocks each.

    A function of sizes alone, so that the order of sums is the same on every GPU.

    Args:
        tokens: T.
        warps: that each part takes.
    """
    blocks = ceil_div(tokens, TOKENS)
    wanted = min(ceil_div(4096, max(warps, 1)), 256)  # a wave of an H100, half full
    count = min(ceil_div(blocks, 4), wanted)  # so that a part is worth its sums
    if count <= 1:
        return 1, blocks
    of_part = ceil_div(blocks, count)
    return ceil_div(blocks, of_part), of_part


def sampled_grad(
    packed: Tensor,
    grad_output: Tensor,
    rows: Tensor,
    offsets: Tensor,
    columns: Tensor,
    product: bool,
) -> Tensor:
    """See :func:`saft_kernels.ops.sampled_grad`. In fp64 always entry by entry."""
    check = torch.ops.saft_kernels.check_sampled_grad
    check(packed, grad_output, rows, offsets, columns)
    n, n_rows, n_columns = columns.numel(), rows.numel(), packed.shape[1]
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    if product and dtype == torch.float32:
        kernel, constants = _product_kernel, {"TILE": TILE, "PICKED": PICKED}
        constants |= PLAIN if grad_output.dtype == torch.float32 else TENSOR_CORES
        programs = ceil_div(n_rows, TILE) * ceil_div(n_columns, TILE) if n else 0
    else:
        kernel, constants = _entries_kernel, ENTRIES
        programs = ceil_div(n, BLOCK)
    parts, of_part = token_parts(grad_output.shape[0], programs * constants["num_warps"])
    grad = launch.new_empty(grad_output, [n], dtype)
    sums = grad if parts == 1 else launch.new_empty(grad_output, [parts, n], dtype)
    launch.launch(
        kernel, programs * parts,
        grad_output, packed, rows, offsets, columns, sums,
        grad_output.shape[0], n_rows, n_columns, n, *grad_output.stride(), of_part,
        TOKENS=TOKENS, **constants,
    )  # fmt: skip
    if parts > 1:
        blocks = ceil_div(n, BLOCK)
        launch.launch(_sum_parts_kernel, blocks, sums, grad, parts, n, GROUPS=GROUPS, BLOCK=BLOCK)
    return grad
