"""SAFT's Algorithm 1 taken literally: mask the dense gradient, step AdamW, reset the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.baselines import Loss, Step
from bench.models import ADAMW, candidates
from saft_kernels import CooMask


def masked_adamw(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train the selected entries with the optimizer of full fine-tuning."""
    params = candidates(model)
    optimizer = torch.optim.AdamW(params.values(), fused=True, **ADAMW)
    pretrained = {name: param.detach().clone() for name, param in params.items()}
    selected = {name: torch.zeros_like(param, dtype=torch.bool) for name, param in params.items()}
    for name, indices in mask.items():
        selected[name].view(-1)[indices] = True

    def step() -> Tensor:
        value = loss(model)
        value.backward()
        for name, param in params.items():
            if param.grad is not None:
                param.grad.mul_(selected[name])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, param in params.items():
                torch.where(selected[name], param, pretrained[name], out=param)
        return value

    return step
