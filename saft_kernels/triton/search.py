"""Binary search in sorted vectors."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def lower_bound(sorted, n, values):
    """The first place in ``sorted`` [n] that is not below, for each of the values (int64)."""
    first = tl.zeros_like(values)
    end = first + n
    longest = n
    while longest > 0:
        middle = (first + end) // 2
        inside = first < end
        below = tl.load(sorted + middle, inside, other=0).to(tl.int64) < values
        first = tl.where(inside & below, middle + 1, first)
        end = tl.where(inside & (below == 0), middle, end)
        longest = longest // 2
    return first
