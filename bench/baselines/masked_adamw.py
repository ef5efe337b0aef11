"""SAFT's Algorithm 1 taken literally: mask the dense gradient, step AdamW, reset the rest.

It trains the mask's entries by the rule of this package and pays as if it trained everything: the
gradients (4 bytes per parameter) and moments (8) are dense. On top come a copy of the pretrained
weights (4) and the mask as booleans (1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saft_kernels import CooMask

from ..models import ADAMW, candidates
from . import Loss, Step

COVERS = ""


def masked_adamw(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train the selected entries."""
    optimizer_step = masked_step(model, mask)

    def step() -> Tensor:
        value = loss(model)
        value.backward()
        optimizer_step()
        model.zero_grad()
        return value

    return step


def masked_step(model: nn.Module, mask: CooMask) -> Callable[[], None]:
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
