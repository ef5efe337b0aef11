"""Ten lines of plain torch: compact values, and a hook that gathers their gradients.

It trains the mask's entries by the rule of this package. State and values are compact; the dense
gradient of each parameter exists until its hook has run. What the mask leaves out is frozen, and
linear layers see their tokens in two dimensions, as those of :mod:`.frozen` do and for its reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saft_kernels import CooMask

from ..models import ADAMW
from . import Loss, Step
from .frozen import flat_linear

COVERS = ""


def index_and_hook(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train the selected entries as compact parameters that are copied into the weights."""
    model.requires_grad_(False)
    selected = [(param, indices.long()) for _, param, indices in mask.parameters(model)]
    values = [nn.Parameter(param.detach().view(-1)[indices]) for param, indices in selected]
    optimizer = torch.optim.AdamW(values, fused=True, **ADAMW)
    for (param, indices), value in zip(selected, values, strict=True):
        param.requires_grad_(True)
        param.register_post_accumulate_grad_hook(_take(indices, value))

    def step() -> Tensor:
        with flat_linear():
            result = loss(model)
        result.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for (param, indices), value in zip(selected, values, strict=True):
                param.view(-1).index_copy_(0, indices, value)
        return result

    return step


def _take(indices: Tensor, value: nn.Parameter) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        assert param.grad is not None
        value.grad, param.grad = param.grad.reshape(-1)[indices], None

    return hook
