"""Training of the smallest weights, which pruning would take away."""

from __future__ import annotations

from saft_clip.methods.saft import Saft


class SmallestWeights(Saft):
    """As many entries as SAFT, those with the smallest absolute values (SAFT, Table 4)."""

    name = "magnitude"
    score = "magnitude"
    takes_mask = False
