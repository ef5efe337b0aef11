"""Full fine-tuning: the fused AdamW over every parameter.

It pays for a dense gradient (4 bytes per parameter) and dense moments (8).
"""

from __future__ import annotations

import torch
from torch import nn

from saft_kernels import CooMask

from ..models import ADAMW, candidates
from . import Loss, Step, step_of

COVERS = "every parameter"


def full_adamw(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train everything; the mask is not used."""
    optimizer = torch.optim.AdamW(candidates(model).values(), fused=True, **ADAMW)
    return step_of(optimizer, model, loss)
