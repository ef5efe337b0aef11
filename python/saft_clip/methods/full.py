"""Full fine-tuning: every parameter of both encoders, the baseline that SAFT is compared with."""

from __future__ import annotations

from torch import nn

from saft_clip.methods.dense import Dense


class Full(Dense):
    """All parameters of both encoders, weight decay on all of them ("FT" in the tables of SAFT)."""

    name = "full"

    def trainable(self) -> dict[str, nn.Parameter]:
        """Both encoders."""
        return self.encoder_parameters()
