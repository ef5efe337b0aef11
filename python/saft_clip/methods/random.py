"""Training of entries that were drawn at random: what does it matter which ones?"""

from __future__ import annotations

from saft_clip.methods.saft import Saft


class RandomEntries(Saft):
    """As many entries as SAFT, drawn uniformly (SAFT, Table 4); ``--seed`` says which."""

    name = "random"
    score = "random"
    takes_mask = False
