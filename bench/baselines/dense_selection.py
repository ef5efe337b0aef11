"""Selection as anyone would write it: let ``.grad`` accumulate, concatenate it all, ``torch.topk``.

It costs a dense gradient of every parameter, one vector of all magnitudes, and a selection over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models import candidates
from . import Loss
from .topk import concatenated, topk


def accumulated(model: nn.Module, losses: Sequence[Loss]) -> dict[str, Tensor]:
    """The sum of the gradients of losses over batches of one size, by parameter."""
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss(model).backward()
    sums = {}
    for name, param in candidates(model).items():
        sums[name] = torch.zeros_like(param) if param.grad is None else param.grad.contiguous()
        param.grad = None
    return sums


def dense_selection(model: nn.Module, losses: Sequence[Loss], k: int) -> dict[str, Tensor]:
    """The k entries with the largest mean gradient.

    Returns:
        Name -> sorted flat indices, int32, for every parameter with any.
    """
    sums = accumulated(model, losses)
    return topk(concatenated(sums), sums, k)
