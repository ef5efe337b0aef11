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
    """Fails on an operation that waits for a GPU, or would if the tensors were on one.

    Where everything is on the CPU, copies between the host's and the GPU's memory look like any
    other; but every tensor that is made of the host's numbers is noticed.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        waits = func in WAITING or _picks_by_mask(func, args) or _reads_back(func, args, kwargs)
        if waits or func is aten.lift_fresh.default:
            raise AssertionError(f"{func} would wait for the GPU")
        return func(*args, **kwargs)


def _picks_by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a mask says what to index, which is as many elements as it has ones."""
    indexing = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
    return indexing and any(i is not None and i.dtype == torch.bool for i in args[1])


def _reads_back(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is aten._to_copy.default:
        source, target = args[0].device, kwargs.get("device") or args[0].device
    elif func is aten.copy_.default:
        source, target = args[1].device, args[0].device
    else:
        return False
    return source.type != "cpu" and target.type == "cpu"
