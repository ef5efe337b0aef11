"""Every tolerance of the test suite, with the reason why it cannot be zero.

Whatever can be bit-exact is compared with ``torch.equal`` and has no entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How far ``actual`` may be from ``expected``: ``|a - e| <= atol + rtol |e|``."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    "adamw_trajectory": Tolerance(
        rtol=2e-6,
        atol=2e-6,
        reason="Two fp32 AdamW runs that compute their own gradients: the bias corrections are "
        "rounded at different places, and each difference goes back through the model for 60 "
        "steps at lr 1e-2 (largest seen: 2.4e-7).",
    ),
    "adamw_same_gradients": Tolerance(
        rtol=1e-6,
        atol=1e-6,
        reason="fp32 values after 60 AdamW steps on identical gradients at lr 1e-2: one rounding "
        "per operation and step, added up (largest seen: 3e-7).",
    ),
    "adamw_step": Tolerance(
        rtol=1e-6,
        atol=2e-7,
        reason="One AdamW step in fp32: the specification fuses multiply-adds where torch does on "
        "this CPU, the kernels never do; a few roundings of values of order one.",
    ),
    "adamw_rounded_weight": Tolerance(
        rtol=2**-7,
        atol=2**-24,
        reason="The rounding of such a value to bf16 or fp16 may fall to the other neighbour: one "
        "unit in the last place of bf16, or the smallest denormal of fp16.",
    ),
    "sampled_grad": Tolerance(
        rtol=1e-5,
        atol=1e-4,
        reason="An fp32 sum over up to a thousand tokens of products of numbers of order one, in "
        "another order: roundings grow with the root of their number, and the sum may cancel.",
    ),
    "rounded_gradient": Tolerance(
        rtol=2**-6,
        atol=2**-6,
        reason="The gradient of an input in bf16 by two kernels that sum in another order: one "
        "unit in the last place, of values of a few units.",
    ),
    "double_model": Tolerance(
        rtol=1e-7,
        atol=1e-7,
        reason="A model's loss and gradients in float64 with sums in another order; some "
        "gradients, as of a key's bias, are zero but for rounding.",
    ),
    "norm": Tolerance(
        rtol=1e-6,
        atol=0.0,
        reason="A norm summed in another order: per parameter and then over them, or over all.",
    ),
}


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Compare within the named tolerance; NaN never passes."""
    tolerance = TOLERANCES[name]
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=False
    )
