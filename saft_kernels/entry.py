"""What stands for a selected parameter in sampled mode: its weight, its entries, its plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from saft_kernels import backends, cost_model, ops
from saft_kernels.cost_model import CROWDED
from saft_kernels.errors import OptimizerError

_Plan = TypeVar("_Plan")


class Entry:
    """One selected parameter: its weight, and the compact leaf that stands for its entries.

    Args:
        name: of the parameter.
        param: the parameter, which gets no gradient of its own.
        indices: flat indices of the selected entries, on its device.
        leading: whether changes of the values go to the weight before its next use, and changes of
            the weight to the values. Otherwise the values are never read and only have a ``grad``.
        streamed: is told when the parameter is used in a way that has no sampled form.
    """

    def __init__(
        self,
        name: str,
        param: nn.Parameter,
        indices: Tensor,
        leading: bool,
        streamed: Callable[[Entry, Any], None],
    ) -> None:
        self.name = name
        self.param = param
        self.indices = indices
        self.leading = leading
        self.streamed = streamed
        dtype = torch.promote_types(param.dtype, torch.float32)
        # Values that are never read need no memory of their own.
        self.leaf = nn.Parameter(
            ops.gather(param, indices).to(dtype)
            if leading
            else torch.zeros((), dtype=dtype, device=param.device).expand(indices.shape)
        )
        self._versions = self._now()
        self._plans: dict[Any, Any] = {}
        self._parts: dict[tuple[int, int], Part] = {}
        self._crowded_in = _crowded_in(indices, self.weight)

    @property
    def crowded(self) -> bool:
        """Whether so many entries are selected that the dense product is the better way.

        In the type that the next use computes in, which is known only there: that of the weight, or
        of autocast if it is on. torch.compile compiles once for each anyway.
        """
        return bool(self._crowded_in) and _computes_in(self.param) in self._crowded_in

    @property
    def always_crowded(self) -> bool:
        """Whether it is :attr:`crowded` in any type, so that there is nothing to plan."""
        return self._crowded_in == _types(self.param.dtype)

    @property
    def values(self) -> Tensor:
        """The leaf, for autograd."""
        return self.leaf

    @property
    def weight(self) -> Tensor:
        """The parameter as an ordinary tensor: the same memory and version."""
        return self.param.detach()

    def _now(self) -> tuple[int, int]:
        return self.leaf._version, self.param._version

    def follow_(self) -> None:
        """Bring weight and values together: the values' changes win over the weight's.

        Not in compiled code, which cannot see versions: there the weight follows after the step of
        an optimizer, and :meth:`require_together` refuses whatever else was changed.
        """
        if torch.compiler.is_dynamo_compiling():
            return
        if self.leading and self._now() != self._versions:
            self._follow_()

    @torch.no_grad()
    def _follow_(self) -> None:
        if self.leaf._version != self._versions[0]:
            self._lead_()
        else:
            self.leaf.copy_(ops.gather(self.weight, self.indices))
            self._versions = self._now()

    @torch.no_grad()
    def _lead_(self) -> None:
        ops.scatter_(self.weight, self.indices, self.leaf.to(self.param.dtype))
        self._versions = self._now()

    def follow_step_(self) -> None:
        """The same after an optimizer step, which may have written behind the version's back."""
        if self._now() != self._versions:
            self._follow_()
        else:
            self._lead_()

    def require_together(self, leaf: Tensor) -> None:
        """A hook for the leaf's gradient, which must belong to these values and this weight."""
        with DisableTorchFunctionSubclass():
            if self._now() == self._versions:
                return
            if not torch.equal(ops.gather(self.weight, self.indices), leaf.to(self.param.dtype)):
                raise OptimizerError(
                    f"{self.name!r} was changed by hand, its weight or its values, and the other "
                    "did not follow: call update_() after such changes, before a compiled model "
                    "or backward() runs"
                )
            self._versions = self._now()

    def plan(self, key: Any, make: Callable[[], _Plan]) -> _Plan:
        """The plan of one use of this parameter, made at the first."""
        if key not in self._plans:
            self._plans[key] = make()
        plan: _Plan = self._plans[key]
        return plan

    def part(self, begin: int, end: int) -> Part:
        """The entry of some rows, as fused projections are split into."""
        if (begin, end) not in self._parts:
            self._parts[begin, end] = Part(self, begin, end)
        return self._parts[begin, end]


def _types(dtype: torch.dtype) -> frozenset[torch.dtype]:
    """The types of products with a weight of this one; autocast leaves fp64 alone."""
    cast = () if dtype == torch.float64 else (torch.bfloat16, torch.float16)
    return frozenset({dtype, *cast})


def _computes_in(param: Tensor) -> torch.dtype:
    """The type of a product with this parameter here and now."""
    device = param.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return dtype if dtype in _types(param.dtype) else param.dtype
    return param.dtype


def _crowded_in(indices: Tensor, weight: Tensor) -> frozenset[torch.dtype]:
    """The types of a product that make the dense one the better way, by the rule of the device.

    Looks at the indices, and so waits for a GPU, once.
    """
    n = indices.numel()
    types = _types(weight.dtype)
    if backends.resolve(weight.device) not in backends.GPU:
        return types if n > CROWDED * weight.numel() else frozenset()
    if n == 0 or weight.dim() < 2:
        return frozenset()
    width = weight[0].numel()
    rows, columns = (indices // width).unique_consecutive(), (indices % width).unique()
    sizes = weight.shape[0], width, n, rows.numel(), columns.numel()
    return frozenset(t for t in types if cost_model.is_crowded(cost_model.Layer(*sizes, dtype=t)))


class Part(Entry):
    """Rows ``begin`` to ``end`` of a selected parameter."""

    def __init__(self, whole: Entry, begin: int, end: int) -> None:
        width = whole.weight[0].numel()
        bounds = torch.tensor([begin * width, end * width], device=whole.indices.device)
        self._first, self._last = torch.searchsorted(whole.indices, bounds).tolist()
        self._whole = whole
        self.param = whole.param
        self._rows = slice(begin, end)
        self._plans = {}
        self._parts = {}
        self.name, self.streamed = whole.name, whole.streamed
        self.indices = whole.indices[self._first : self._last] - begin * width
        self._crowded_in = _crowded_in(self.indices, self.weight)

    @property
    def weight(self) -> Tensor:
        """These rows of the weight."""
        return self._whole.weight[self._rows]

    @property
    def values(self) -> Tensor:
        """A part of the leaf."""
        return self._whole.values[self._first : self._last]

    def follow_(self) -> None:
        """See :class:`Entry`."""
        self._whole.follow_()
