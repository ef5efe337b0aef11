"""From a flat index in logical row-major order to the element's place in memory."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl


def strided_of(dense: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a tensor, adjacent dimensions merged; none for a contiguous one."""
    if dense.is_contiguous():
        return (), ()
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(dense.shape, dense.stride(), strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return tuple(sizes), tuple(strides)


@triton.jit
def place_of(index, sizes, strides, DIMS: tl.constexpr):
    """The memory offset, in elements, of int64 flat indices; DIMS = 0 means contiguous."""
    if DIMS == 0:
        place = index
    else:
        place = tl.zeros_like(index)
        rest = index
        for i in tl.static_range(DIMS):
            place += rest % sizes[DIMS - 1 - i] * strides[DIMS - 1 - i]
            rest = rest // sizes[DIMS - 1 - i]
    return place
