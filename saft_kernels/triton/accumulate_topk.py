"""``acc += scale * grad``, and the k largest magnitudes so far.

The kernels of ``csrc/cuda``: ``accumulate_topk_kernel.cu`` says what an element moves, which
program settles and when a refill happens, ``settle_topk.cuh`` how the threshold follows.

On AMD GPUs settling is a launch of its own. There a barrier does not wait for the stores of other
waves, so a program cannot tell when all that it wrote can be read, and every release writes back a
whole second level cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from saft_kernels import layout
from saft_kernels.triton import launch
from saft_kernels.triton.launch import ceil_div

# Elements of a program, and candidates or elements that one which works alone takes at a time. Its
# registers let two programs share a processor, which has 32 KB of fp32 under way while both load.
BLOCK = 2048
STEP = 1024
STEP_ALONE = 2048
WARPS = 8

#: Whether the last program of a scan settles.
SETTLES_IN_SCAN = torch.version.hip is None

#: Up to how many elements the program that settled refills alone, and the programs of a launch that
#: does it otherwise.
ALONE = 1 << 20
REFILL_PROGRAMS = 512

#: Parts of a tensor of more than ALONE elements that a program of a scan goes over.
PARTS = 4

COUNT = tl.constexpr(layout.COUNT)
THRESHOLD = tl.constexpr(layout.THRESHOLD)
TIE = tl.constexpr(layout.TIE)
NONFINITE = tl.constexpr(layout.NONFINITE)
BIN = tl.constexpr(layout.BIN)
ABOVE = tl.constexpr(layout.ABOVE)
FRESH = tl.constexpr(layout.FRESH)
DONE = tl.constexpr(layout.DONE)
REFILL = tl.constexpr(layout.REFILL)
HISTOGRAM = tl.constexpr(layout.HISTOGRAM)
BIN_SHIFT = tl.constexpr(layout.BIN_SHIFT)
BINS = tl.constexpr(layout.BINS)
NO_POSITION = tl.constexpr(layout.NO_POSITION)
INFINITY = tl.constexpr(0x7F800000)

WINDOW = tl.constexpr(1024)  # bins that the threshold may pass in one step
PLACE_BITS = tl.constexpr(63)
DIGIT_BITS = tl.constexpr(9)
DIGITS = tl.constexpr(1 << 9)


@triton.jit
def _magnitude_bits(x):
    # Non-negative floats order as their bits do.
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _append(bits, position, chosen, values, positions, capacity, begin, counter):
    """Appends candidates behind ``begin`` others and counts them, whether or not there is room."""
    rank = tl.cumsum(chosen.to(tl.int32), 0)
    total = tl.max(rank, 0)
    if total > 0:
        slot = begin + tl.atomic_add(counter, total.to(tl.int64), sem="relaxed") + rank - 1
        fits = chosen & (slot < capacity)
        tl.store(values + slot, bits.to(tl.float32, bitcast=True), fits)
        tl.store(positions + slot, position, fits)


@triton.jit
def _keeps(bits, position, threshold, tie):
    """Whether a candidate reaches the bar; the k-th best itself may lie at the tie."""
    return (bits > threshold) | ((bits == threshold) & (position <= tie))


@triton.jit
def _raise_to_bin(state, k):
    """The highest bin that k candidates reach, and their number."""
    bin_ = tl.load(state + BIN)
    above = tl.load(state + ABOVE)
    while (bin_ + 1 < BINS) & (above - tl.load(state + HISTOGRAM + bin_) >= k):
        bins = bin_ + tl.arange(0, WINDOW)
        counts = tl.load(state + HISTOGRAM + bins, bins < BINS, other=0)
        passed = (bins + 1 < BINS) & (above - tl.cumsum(counts, 0) >= k)
        bin_ += tl.sum(passed.to(tl.int64), 0)
        above -= tl.sum(tl.where(passed, counts, 0), 0)
    return bin_, above


@triton.jit
def _digit_counts(
    counts, candidates, positions, base, n, bits_known, bits_unknown, place_known, place_unknown,
    shift, STEP: tl.constexpr,
):  # fmt: skip
    """Adds how many candidates with the bound's known bits have each value of its next digit."""
    start = tl.full([], 0, tl.int64)
    while start < n:
        i = start + tl.arange(0, STEP).to(tl.int64)
        exists = i < n
        bits = _magnitude_bits(tl.load(candidates + i, exists, other=0.0))
        matches = exists & (((bits ^ bits_known) >> bits_unknown) == 0)
        if positions is None:
            position = base + i
        else:
            position = tl.load(positions + i, matches & (bits_unknown == 0), other=NO_POSITION)
        place = NO_POSITION - position
        matches &= (bits_unknown > 0) | (((place ^ place_known) >> place_unknown) == 0)
        digit = tl.where(bits_unknown > 0, bits.to(tl.int64), place) >> shift
        digit = (digit & (DIGITS - 1)).to(tl.int32)
        counts += tl.histogram(digit, DIGITS, matches).to(tl.int64)
        start += STEP
    return counts


@triton.jit
def _search(
    acc, n_elements, base, values, positions, n, k, limit, bin_, above, within, STEP: tl.constexpr
):
    """The k-th best candidate, or a bound below it that no more than ``limit`` reach.

    Better candidates are greater: a position counts as NO_POSITION minus itself, its place. Bits
    that are not known yet are zero.
    """
    bits_known = (bin_ << BIN_SHIFT).to(tl.int32)
    bits_unknown = tl.full([], BIN_SHIFT, tl.int32)
    place_known = tl.full([], 0, tl.int64)
    place_unknown = tl.full([], PLACE_BITS, tl.int32)
    rank = k - (above - within)
    reach = above
    while (reach > limit) & (bits_unknown + place_unknown > 0):
        in_bits = bits_unknown > 0
        shift = tl.maximum(tl.where(in_bits, bits_unknown, place_unknown) - DIGIT_BITS, 0)
        counts = tl.zeros([DIGITS], tl.int64)
        counts = _digit_counts(
            counts, values, positions, base, n, bits_known, bits_unknown, place_known,
            place_unknown, shift, STEP,
        )  # fmt: skip
        counts = _digit_counts(
            counts, acc, None, base, n_elements, bits_known, bits_unknown, place_known,
            place_unknown, shift, STEP,
        )  # fmt: skip
        at_or_above = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digits = tl.arange(0, DIGITS)
        digit = tl.maximum(tl.sum((at_or_above >= rank).to(tl.int32), 0) - 1, 0)
        within = tl.sum(tl.where(digits == digit, counts, 0), 0)
        rank -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        reach = k - rank + within
        if in_bits:
            bits_known |= digit << shift
            bits_unknown = shift
        else:
            place_known |= digit.to(tl.int64) << shift
            place_unknown = shift
    return bits_known.to(tl.int64), NO_POSITION - place_known


@triton.jit
def _drop_below(threshold, tie, values, positions, n, STEP: tl.constexpr):
    """Removes, in place, candidates that the bar does not keep; returns how many stay."""
    kept = tl.full([], 0, tl.int64)
    start = tl.full([], 0, tl.int64)
    while start < n:
        i = start + tl.arange(0, STEP)
        exists = i < n
        value = tl.load(values + i, exists, other=0.0)
        position = tl.load(positions + i, exists, other=0)
        chosen = exists & _keeps(_magnitude_bits(value), position, threshold, tie)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        tl.debug_barrier()  # a step is read before it is written, at or before its own begin
        tl.store(values + kept + rank - 1, value, chosen)
        tl.store(positions + kept + rank - 1, position, chosen)
        kept += tl.max(rank, 0)
        start += STEP
    return kept


@triton.jit
def _settle(
    acc, n: tl.int64, base: tl.int64, values, positions, state, k: tl.int64, capacity: tl.int64,
    limit: tl.int64, STEP: tl.constexpr,
):  # fmt: skip
    """Takes in what a scan has found, raises the bar, and leaves at most ``limit`` candidates.

    Returns whether the scan's did not fit, and the bar.
    """
    # An entry that was offered many times can have been counted into a buffer without room for it.
    before = tl.minimum(tl.load(state + COUNT), capacity)
    found = before + tl.load(state + FRESH)
    threshold = tl.load(state + THRESHOLD)
    tie = tl.load(state + TIE)
    bin_, above = _raise_to_bin(state, k)
    edge = bin_ << BIN_SHIFT
    if (above >= k) & (edge > threshold):
        threshold = edge
        tie = tl.full([], NO_POSITION, tl.int64)

    overflow = found > capacity
    count = tl.where(overflow, before, found)
    if found > limit:
        within = tl.load(state + HISTOGRAM + bin_)
        bits, last = _search(
            acc, tl.where(overflow, n, 0), base, values, positions, count, k, limit, bin_, above,
            within, STEP,
        )  # fmt: skip
        if (bits > threshold) | ((bits == threshold) & (last < tie)):
            threshold = bits
            tie = last
        count = _drop_below(threshold, tie, values, positions, count, STEP)

    tl.debug_barrier()  # all threads have read the state
    tl.store(state + COUNT, count)
    tl.store(state + FRESH, tl.zeros_like(count))
    tl.store(state + BIN, bin_)
    tl.store(state + ABOVE, above)
    tl.store(state + THRESHOLD, threshold)
    tl.store(state + TIE, tie)
    tl.debug_barrier()
    return overflow, threshold, tie


@triton.jit
def _refill(
    acc, n, base, values, positions, state, threshold, tie, capacity, part, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Appends what reaches the bar, of every ``parts``-th part of the tensor from ``part`` on."""
    start = part.to(tl.int64) * BLOCK
    while start < n:
        element = start + tl.arange(0, BLOCK)
        exists = element < n
        bits = _magnitude_bits(tl.load(acc + element, exists, other=0.0))
        position = base + element
        chosen = exists & (bits < INFINITY) & _keeps(bits, position, threshold, tie)
        _append(bits, position, chosen, values, positions, capacity, 0, state + COUNT)
        start += parts * BLOCK


@triton.jit
def _settle_and_refill(
    acc, n, base, values, positions, state, k, capacity, limit, alone, STEP: tl.constexpr
):
    zero = tl.full([], 0, tl.int64)
    overflow, threshold, tie = _settle(
        acc, n, base, values, positions, state, k, capacity, limit, STEP
    )
    tl.store(state + DONE, zero)
    tl.store(state + REFILL, overflow.to(tl.int64))
    if overflow & (n <= alone):
        _refill(acc, n, base, values, positions, state, threshold, tie, capacity, zero, 1, STEP)


@triton.jit
def _is_last(state):
    """Whether all other programs have come here; then what they wrote can be read."""
    tl.debug_barrier()
    return tl.atomic_add(state + DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def _offer(
    bits, position, finite, threshold, tie, values, positions, state, capacity, BLOCK: tl.constexpr
):
    """Appends what beats the bar, and counts it in the histogram."""
    beats = (bits > threshold) | ((bits == threshold) & (position < tie))
    chosen = finite & beats
    if tl.max(chosen.to(tl.int32), 0) > 0:
        bins = bits >> BIN_SHIFT
        one = tl.full([BLOCK], 1, tl.int64)
        tl.atomic_add(state + HISTOGRAM + bins, one, chosen, sem="relaxed")
        above = tl.sum((chosen & (bins >= tl.load(state + BIN))).to(tl.int64), 0)
        tl.atomic_add(state + ABOVE, above, sem="relaxed")
        _append(
            bits, position, chosen, values, positions, capacity,
            tl.load(state + COUNT), state + FRESH,
        )  # fmt: skip


# That the number of elements is a multiple of 16 is worth a specialisation: only then are masked
# loads wide.
@triton.jit(do_not_specialize=["square", "base", "k", "capacity", "limit", "alone"])
def _scan_kernel(
    acc, grad, scale, square, n: tl.int64, base: tl.int64,
    values, positions, state, k: tl.int64, capacity: tl.int64, limit: tl.int64, alone: tl.int64,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
    SELECT: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    # First: no load moves before a store. Without a threshold its slot holds -1, which lies below
    # the bits of every magnitude.
    threshold = tl.load(state + THRESHOLD).to(tl.int32)
    tie = tl.load(state + TIE)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        element = start + tl.arange(0, BLOCK)
        exists = element < n
        a = tl.load(acc + element, exists, other=0.0)
        if grad is not None:
            g = tl.load(grad + element, exists, other=0.0).to(tl.float32)
            g = tl.where(square != 0, g * g, g)
            a = a + g * scale
            tl.store(acc + element, a, exists)
        bits = _magnitude_bits(a)
        position = base + element
        finite = bits < INFINITY
        lowest = tl.min(tl.where(exists & ~finite, position, NO_POSITION), 0)
        if lowest < NO_POSITION:
            tl.atomic_min(state + NONFINITE, lowest, sem="relaxed")
        if SELECT:
            _offer(
                bits, position, exists & finite, threshold, tie, values, positions, state, capacity,
                BLOCK,
            )  # fmt: skip
        start += tl.num_programs(0).to(tl.int64) * BLOCK

    if SELECT and SETTLE:  # noqa: SIM102 - the compiler would evaluate both sides of `and`
        if _is_last(state):
            _settle_and_refill(
                acc, n, base, values, positions, state, k, capacity, limit, alone, STEP
            )


@triton.jit(
    do_not_specialize=["n", "base", "k", "capacity", "limit", "alone"],
    do_not_specialize_on_alignment=["acc", "values", "positions"],
)
def _settle_kernel(
    acc, n: tl.int64, base: tl.int64, values, positions, state, k: tl.int64, capacity: tl.int64,
    limit: tl.int64, alone: tl.int64, STEP: tl.constexpr,
):  # fmt: skip
    _settle_and_refill(acc, n, base, values, positions, state, k, capacity, limit, alone, STEP)


@triton.jit(do_not_specialize=["base", "capacity"])
def _refill_kernel(
    acc, n: tl.int64, base: tl.int64, values, positions, state, capacity: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(state + REFILL) != 0:
        _refill(
            acc, n, base, values, positions, state, tl.load(state + THRESHOLD),
            tl.load(state + TIE), capacity, tl.program_id(0), tl.num_programs(0), BLOCK,
        )  # fmt: skip


def _settle_alone(
    acc: Tensor, n: int, base: int, k: int, limit: int, buffer: Sequence[Tensor]
) -> None:
    launch.launch(
        _settle_kernel, 1, acc, n, base, *buffer, k, buffer[0].numel(), limit, ALONE,
        STEP=STEP_ALONE, num_warps=WARPS,
    )  # fmt: skip


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
    """See :func:`saft_kernels.ops.accumulate_topk_`."""
    torch.ops.saft_kernels.check_accumulate_topk(
        acc, grad, scale, square, key, offset, k, values, positions, state
    )
    n, capacity = acc.numel(), values.numel()
    buffer = (values, positions, state)
    base = (key << layout.POSITION_BITS) + offset
    limit = k + (capacity - k) // 2  # half of the room beyond the k best is for the next tensor
    blocks = ceil_div(n, BLOCK)
    programs = ceil_div(blocks, PARTS) if n > ALONE else blocks
    launch.launch(
        _scan_kernel, programs, acc, grad, scale, int(square), n, base, *buffer, k, capacity, limit,
        ALONE, BLOCK=BLOCK, STEP=STEP, SELECT=k > 0, SETTLE=SETTLES_IN_SCAN, num_warps=WARPS,
    )  # fmt: skip
    if n == 0 or k == 0:
        return
    if not SETTLES_IN_SCAN:
        _settle_alone(acc, n, base, k, limit, buffer)
    if n > ALONE:
        launch.launch(
            _refill_kernel, min(blocks, REFILL_PROGRAMS), acc, n, base, *buffer, capacity,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def compact_topk_(k: int, values: Tensor, positions: Tensor, state: Tensor) -> None:
    """See :func:`saft_kernels.ops.compact_topk_`."""
    torch.ops.saft_kernels.check_compact_topk(k, values, positions, state)
    if k == 0:
        state[layout.COUNT].zero_()
    else:
        _settle_alone(values, 0, 0, k, k, (values, positions, state))
