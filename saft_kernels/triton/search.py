"""Binary search in sorted vectors."""

from __future__ import annotations

import triton
from triton import language as tl


def steps_of(n: int) -> int:
    """How often a range of ``n`` must be halved until nothing is left."""
    return n.bit_length()


@triton.jit
def lower_bound(sorted, n, values, steps):
    """The first place in ``sorted`` [n] that is not below, for each of the values (int64)."""
    first = tl.zeros_like(values)
    end = tl.zeros_like(values) + n
    for _ in range(steps):
        middle = (first + end) // 2
        inside = first < end
        below = tl.load(sorted + middle, inside, other=0).to(tl.int64) < values
        first = tl.where(inside & below, middle + 1, first)
        end = tl.where(inside & (below == 0), middle, end)
    return first
