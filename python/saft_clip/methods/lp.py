"""A linear probe: a classifier on image features that stay what they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.methods.head import HEAD, WithHead
from saft_clip.models import autocast


class LinearProbe(WithHead):
    """Trains the classifier alone (Radford et al. 2021, Section 3.2; started from the prompts)."""

    name = "lp"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The head."""
        return {HEAD: self.head}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy; nothing goes back into the encoder."""
        with torch.no_grad(), autocast(self.config.precision, self.device):
            features = self.image_features(images)
        return F.cross_entropy(self.logits(features), labels.to(self.device))
