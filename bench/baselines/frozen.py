"""The floor of a training step: no weight gradients, only those of the layers' outputs.

It is as fast as plain torch can be made. For a frozen matrix and an input of three dimensions that
is not contiguous, as ``nn.MultiheadAttention`` has it, torch takes a batched product, forward and
backward: slower in fp32 and much slower in bf16, where freezing the weights would cost
time in place of saving it. The linear layers here see their tokens in two dimensions, which is one
plain product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.nn import functional as F

from saft_kernels import CooMask

from ..harness import require
from . import Loss, Step

COVERS = "nothing"

_linear = F.linear


def frozen(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train nothing; the mask is not used."""
    model.requires_grad_(False)
    reached: list[Tensor] = []
    first = [
        layer
        for kind in (nn.Conv2d, nn.Embedding)
        for layer in [module for module in model.modules() if isinstance(module, kind)][:1]
    ]  # an image classifier has no embedding

    def begin_backward_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output.requires_grad_().register_hook(reached.append)
        return output

    for layer in first:
        layer.register_forward_hook(begin_backward_here)

    def step() -> Tensor:
        with flat_linear():
            value = loss(model)
        value.backward()
        require(len(reached) >= len(first), "the backward pass did not get to the first layers")
        reached.clear()
        return value

    return step


@contextmanager
def flat_linear() -> Iterator[None]:
    """Let linear layers see their tokens in two dimensions, within this block."""
    # Where nn.Linear looks it up, and multi_head_attention_forward with its helpers too.
    with patch.object(F, "linear", _flat_linear):
        yield


def _flat_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on tokens in two dimensions."""
    y = _linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], y.shape[-1])
