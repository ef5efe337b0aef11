"""L2-SP: full fine-tuning with a penalty on the squared distance to the pretrained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saft_clip.batches import Batches
from saft_clip.methods.full import Full


class L2SP(Full):
    """``loss + penalty / 2 * sum (w - w0)^2`` (Li et al. 2018, Eq. 2), without weight decay."""

    name = "l2sp"

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Keep the pretrained weights."""
        super().prepare(batches, folder)
        self._start = {name: param.detach().clone() for name, param in self.params.items()}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy and the penalty."""
        assert self.config.penalty is not None
        return super().loss(images, labels) + self.config.penalty * self.distance()

    def distance(self) -> Tensor:
        """Half of the squared distance to the pretrained weights."""
        parts = [(param - self._start[n]).square().sum() for n, param in self.params.items()]
        return torch.stack(parts).sum() / 2
