"""L1-SP: full fine-tuning with a penalty on the absolute distance to the pretrained weights."""

from __future__ import annotations

import torch
from torch import Tensor

from saft_clip.methods.l2sp import L2SP


class L1SP(L2SP):
    """``loss + penalty * sum |w - w0|`` (Li et al. 2018 name it beside L2-SP), no weight decay."""

    name = "l1sp"

    def distance(self) -> Tensor:
        """The absolute distance to the pretrained weights."""
        parts = [(param - self._start[n]).abs().sum() for n, param in self.params.items()]
        return torch.stack(parts).sum()
