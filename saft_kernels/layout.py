"""Layouts that the specification, the wrappers and the kernels share.

``csrc/ops/jobs.h`` holds the same numbers for the compiled kernels.
"""

from __future__ import annotations

import torch

#: A candidate's position is ``key << POSITION_BITS | flat index``: ordering positions orders
#: candidates by parameter first and by flat index second, which is the tie rule. 2**23 parameters
#: of 2**40 elements fit.
POSITION_BITS = 40
MAX_KEYS = 1 << (63 - POSITION_BITS)
MAX_ELEMENTS = 1 << POSITION_BITS

# Slots of the int64 state tensor.
COUNT = 0  #: candidates now in the buffer
THRESHOLD = 1  #: fp32 bits that a score must reach; NO_THRESHOLD: nothing is excluded
TIE = 2  #: an equal score counts only at a lower position than this; NO_POSITION: at any
NONFINITE = 3  #: lowest position of a NaN or infinite accumulator; NO_POSITION: none
# The rest starts as zeros. The histogram counts the values of all candidates that beat the
# threshold when they were offered, kept or not; from it the threshold rises between two compactions
# (``csrc/ops/accumulate_topk.h``). Every backend keeps it, so that they may take turns.
BIN = 4  #: the highest bin that k candidates have reached or passed
ABOVE = 5  #: candidates in this bin and above
FRESH = 6  #: candidates that a GPU call under way has found; 0 between calls
DONE = 7  #: blocks of this call that are done; 0 between calls
REFILL = 8  #: whether the candidates did not fit; means something within a GPU call only
HISTOGRAM = 9  #: the first of BINS counts

#: A bin of the histogram is the exponent and the 6 leading mantissa bits of a non-negative fp32.
BIN_SHIFT = 17
BINS = 1 << (31 - BIN_SHIFT)
STATE_SIZE = HISTOGRAM + BINS

#: Tokens of a packed column that lie side by side.
TOKENS = 16

NO_THRESHOLD = -1
NO_POSITION = (1 << 63) - 1


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of flat indices into a parameter: int32, from 2**31 elements on int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def index_code(n: int, numel: int) -> tuple[int, int]:
    """The shape of the code of n sorted indices below ``numel`` (csrc/ops/index_code.h).

    Returns:
        How many bits of every index are kept as they are, and how many bits hold the rest of all.
    """
    if n == 0:
        return 0, 0
    low_bits = (numel // n).bit_length() - 1
    return low_bits, n + ((numel - 1) >> low_bits)


def index_code_bytes(n: int, numel: int) -> int:
    """The size of that code."""
    low_bits, high_length = index_code(n, numel)
    return (n * low_bits + 7) // 8 + (high_length + 7) // 8


def split_position(position: int) -> tuple[int, int]:
    """The (key, flat index) that a packed position stands for."""
    return position >> POSITION_BITS, position & (MAX_ELEMENTS - 1)
