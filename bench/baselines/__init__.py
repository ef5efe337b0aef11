"""What this package is measured against: each a few lines that anyone can read and check.

A method of training is a function ``(model, mask, loss) -> step``: it sets everything up, and
``step`` takes one training step and returns the loss.
"""

from collections.abc import Callable

from torch import Tensor, nn

from saft_kernels import CooMask

Loss = Callable[[nn.Module], Tensor]
Step = Callable[[], Tensor]
Method = Callable[[nn.Module, CooMask, Loss], Step]
