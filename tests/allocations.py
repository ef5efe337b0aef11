"""Watching what operations allocate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Watches what operations make anew.

    Attributes:
        shapes: of the outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    @property
    def largest(self) -> int:
        """The most elements of an output."""
        return max((shape.numel() for shape in self.shapes), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for out in tree_leaves(result):
            if isinstance(out, Tensor) and storage_of(out) not in given:
                self.shapes.add(out.shape)
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
