"""What makes the host wait for a GPU, noticed without one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

#: Operations whose results the host must have before it goes on, or whose size depends on values.
WAITING = {
    aten._local_scalar_dense.default,  # item(), float(), bool() of a tensor
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
}


class NoWaiting(TorchDispatchMode):
    """Fails on an operation that would wait for a GPU if the tensors were there.

    Copies between the host's and the GPU's memory cannot be told apart where both are the CPU's:
    every tensor made of the host's numbers counts as one, and every conversion that names a device.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        copies = func is aten._to_copy.default and kwargs.get("device") is not None
        if func in WAITING or copies or func is aten.lift_fresh.default:
            raise AssertionError(f"{func} would wait for the GPU")
        return func(*args, **kwargs)
