"""What this package is measured against: each a few lines that anyone can read and check.

A method of training is a function ``(model, mask, loss) -> step``: it sets everything up, and
``step`` takes one training step and returns the loss. If it has an attribute ``optimizer``, as
those of :func:`step_of` do, that tells what state there is (:mod:`bench.memory`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saft_kernels import CooMask

Loss = Callable[[nn.Module], Tensor]
Step = Callable[[], Tensor]
Method = Callable[[nn.Module, CooMask, Loss], Step]


@dataclass(frozen=True)
class TrainingStep:
    """A training step of an optimizer that was set up for the model."""

    optimizer: torch.optim.Optimizer
    model: nn.Module
    loss: Loss

    def __call__(self) -> Tensor:
        """Take it; the loss."""
        value = self.loss(self.model)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value


def step_of(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss) -> Step:
    """A training step of an optimizer that was set up for the model."""
    return TrainingStep(optimizer, model, loss)
