"""What a GPU can do: a datasheet's numbers, and the shares of them that programs reach.

:mod:`saft_kernels.cost_model` chooses between kernels by these numbers, and ``bench/roofline.py``
predicts times from them. The shares are assumptions; nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds from the end of a launch to the start of the next one in the same stream.
LAUNCH = 2e-6

#: Share of the peak bandwidth that reading and writing in order reaches.
STREAMED = 0.85

#: Share of it that sectors reach which lie apart.
SCATTERED = 0.5

#: Shares of the peak rate that torch's large matrix products reach on matrix units, and without
#: them.
MATRIX = 0.6
PLAIN = 0.9


@dataclass(frozen=True)
class Gpu:
    """What a vendor says of a GPU.

    Attributes:
        name: in tables.
        bandwidth: of its memory, bytes/s.
        bf16: rate of dense bf16 products on matrix units, FLOP/s; that of fp16 is the same.
        fp32: rate of fp32 arithmetic without them, FLOP/s.
        sector: bytes that an access moves at least.
        source: of these numbers.
        known_as: what torch calls it; other variants have other numbers.
    """

    name: str
    bandwidth: float
    bf16: float
    fp32: float
    sector: int
    source: str
    known_as: str


#: The GPU that choices between kernels are made for, whichever one they run on.
H100 = Gpu("H100", 3.35e12, 989e12, 67e12, 32, "NVIDIA H100 SXM datasheet", "H100 80GB HBM3")
