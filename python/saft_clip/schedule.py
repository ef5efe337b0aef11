"""How the learning rate changes over a run."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup: int | None = None) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov & Hutter 2017), per step.

    Args:
        step: steps taken so far, from 0.
        steps: of the whole run.
        peak: the highest learning rate.
        warmup: steps of the warm-up; None for a tenth of all.
    """
    warmup = steps // 10 if warmup is None else warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
