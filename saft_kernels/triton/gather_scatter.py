"""``values[i] = dense[index[i]]`` and ``dense[index[i]] = values[i]``.

See ``csrc/cuda/gather_scatter_kernel.cu`` for what an entry moves. Values are moved as integers of
their size, so that every bit arrives.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from saft_kernels.triton import launch
from saft_kernels.triton.launch import ceil_div
from saft_kernels.triton.strided import place_of, strided_of

BLOCK = 512
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _gather_kernel(
    dense, indices, values, n, sizes, strides, DIMS: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < n
    index = tl.load(indices + entry, exists, other=0).to(tl.int64)
    place = place_of(index, sizes, strides, DIMS)
    tl.store(values + entry, tl.load(dense + place, exists), exists)


@triton.jit
def _scatter_kernel(
    dense, indices, values, n, sizes, strides, DIMS: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < n
    index = tl.load(indices + entry, exists, other=0).to(tl.int64)
    place = place_of(index, sizes, strides, DIMS)
    tl.store(dense + place, tl.load(values + entry, exists), exists)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _move(kernel: Any, dense: Tensor, indices: Tensor, values: Tensor) -> None:
    sizes, strides = strided_of(dense)
    launch.launch(
        kernel, ceil_div(indices.numel(), BLOCK),
        _bits(dense), indices, _bits(values), indices.numel(), sizes, strides,
        DIMS=len(sizes), BLOCK=BLOCK,
    )  # fmt: skip


def gather(dense: Tensor, indices: Tensor) -> Tensor:
    """See :func:`saft_kernels.ops.gather`."""
    values = launch.new_empty(dense, [indices.numel()])
    torch.ops.saft_kernels.check_gather(dense, indices, values)
    _move(_gather_kernel, dense, indices, values)
    return values


def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    """See :func:`saft_kernels.ops.scatter_`."""
    torch.ops.saft_kernels.check_scatter(dense, indices, values)
    _move(_scatter_kernel, dense, indices, values)
