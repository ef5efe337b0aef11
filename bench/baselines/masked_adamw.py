"""SAFT's Algorithm 1 taken literally: mask the dense gradient, step AdamW, reset the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from saft_kernels import CooMask

from ..models import ADAMW, candidates


def masked_adamw(model: nn.Module, mask: CooMask) -> Callable[[], None]:
    """The optimizer step, once the dense gradients are there; it masks them in place."""
    params = candidates(model)
    optimizer = torch.optim.AdamW(params.values(), fused=True, **ADAMW)
    pretrained = {name: param.detach().clone() for name, param in params.items()}
    selected = {name: torch.zeros_like(param, dtype=torch.bool) for name, param in params.items()}
    for name, indices in mask.items():
        selected[name].view(-1)[indices] = True

    @torch.no_grad()
    def step() -> None:
        for name, param in params.items():
            if param.grad is not None:
                param.grad.mul_(selected[name])
        optimizer.step()
        for name, param in params.items():
            torch.where(selected[name], param, pretrained[name], out=param)

    return step
