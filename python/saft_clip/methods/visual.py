"""Fine-tuning of the image encoder alone."""

from __future__ import annotations

from torch import nn

from saft_clip.methods.dense import Dense


class Visual(Dense):
    """All parameters of the image encoder; class prompts stay what they were (SAFT, Table 10)."""

    name = "visual"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The image encoder."""
        return self.image_parameters()
