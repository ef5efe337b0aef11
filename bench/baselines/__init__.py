"""What this package is measured against: each a few lines that anyone can read and check.

A method of training is a function ``(model, mask, loss) -> step``: it sets everything up, and
``step`` takes one training step and returns the loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saft_kernels import CooMask

Loss = Callable[[nn.Module], Tensor]
Step = Callable[[], Tensor]
Method = Callable[[nn.Module, CooMask, Loss], Step]


def step_of(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss) -> Step:
    """A training step of an optimizer that was set up for the model."""

    def step() -> Tensor:
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step
