"""Fine-tuning of the text encoder alone."""

from __future__ import annotations

from torch import nn

from saft_clip.methods.dense import Dense


class Text(Dense):
    """All parameters of the text encoder; image features stay what they were (SAFT, Table 10)."""

    name = "text"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The text encoder."""
        return self.text_parameters()
