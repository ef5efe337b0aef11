"""A parameter that tells torch's functions how to use it so that its gradient is sampled.

In sampled mode (:mod:`saft_kernels.attach`) every selected parameter is one of these. Functions
that have a sampled form in :mod:`saft_kernels.sampled` run that; whatever else is done with the
parameter runs as ever on the weight itself, and autograd's dense gradient of that use is gathered
and freed.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._compile import _disable_dynamo  # lazy, where torch.compiler.disable imports it all
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from saft_kernels import ops, sampled
from saft_kernels.plan import LinearPlan

#: The share of selected entries from which on the dense product is used. On a CPU with AVX-512 the
#: sampled product of a uniform mask was still 1.15 times faster at 10% in fp32 (``python -m bench
#: run sampled_grad``), and more in bf16 or where the entries share rows. A product over the used
#: rows and columns only would need more than a tenth of *these* selected to be faster, which masks
#: of the paper's 0.1% are far from.
CROWDED = 0.1


class SampledParameter(nn.Parameter):
    """A selected parameter in sampled mode: see the module's docstring."""

    _saft_entry: Entry

    @classmethod
    def __torch_function__(  # noqa: D105
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and not _is_question(func):
            return _use(func, args, kwargs)
        with DisableTorchFunctionSubclass():
            _follow(args)
            _follow(kwargs.values())
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A plain parameter: a copy of a model in sampled mode is an ordinary, frozen one."""
        with DisableTorchFunctionSubclass():
            plain = nn.Parameter(self.detach(), requires_grad=self.requires_grad)
            result: nn.Parameter = copy.deepcopy(plain, memo)
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain parameter too."""
        with DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


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
        self._plans: dict[Any, LinearPlan] = {}
        self._parts: dict[tuple[int, int], Part] = {}

    @property
    def values(self) -> Tensor:
        """The leaf, for autograd."""
        return self.leaf

    @property
    def crowded(self) -> bool:
        """Whether so many entries are selected that the dense product is the faster one."""
        return self.indices.numel() > CROWDED * self.weight.numel()

    @property
    def weight(self) -> Tensor:
        """The parameter as an ordinary tensor: the same memory and version."""
        return self.param.detach()

    def _now(self) -> tuple[int, int]:
        return self.leaf._version, self.param._version

    def follow_(self) -> None:
        """Bring weight and values together: the values' changes win over the weight's."""
        if self.leading and self._now() != self._versions:
            self._follow_()

    @torch.no_grad()
    def _follow_(self) -> None:
        if self.leaf._version != self._versions[0]:
            ops.scatter_(self.weight, self.indices, self.leaf.to(self.param.dtype))
        else:
            self.leaf.copy_(ops.gather(self.weight, self.indices))
        self._versions = self._now()

    def plan(self, key: Any, make: Callable[[], LinearPlan]) -> LinearPlan:
        """The plan of one use of this parameter, made at the first."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def part(self, begin: int, end: int) -> Part:
        """The entry of some rows, as fused projections are split into."""
        if (begin, end) not in self._parts:
            self._parts[begin, end] = Part(self, begin, end)
        return self._parts[begin, end]


class Part(Entry):
    """Rows ``begin`` to ``end`` of a selected parameter."""

    def __init__(self, whole: Entry, begin: int, end: int) -> None:
        width = whole.weight[0].numel()
        bounds = torch.tensor([begin * width, end * width], device=whole.indices.device)
        self._first, self._last = torch.searchsorted(whole.indices, bounds).tolist()
        self._whole = whole
        self._rows = slice(begin, end)
        self._plans = {}
        self._parts = {}
        self.name, self.streamed = whole.name, whole.streamed
        self.indices = whole.indices[self._first : self._last] - begin * width

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


def _entry(value: Any) -> Entry | None:
    if not isinstance(value, SampledParameter):
        return None
    value._saft_entry.follow_()
    return value._saft_entry


def _follow(arguments: Iterable[Any]) -> None:
    for value in arguments:
        if isinstance(value, (list, tuple)):
            _follow(value)
        else:
            _entry(value)


@_disable_dynamo
def _use(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function of selected parameters that autograd has to know of."""
    if func is F.multi_head_attention_forward:
        return _attention(*args, **kwargs)
    with DisableTorchFunctionSubclass():
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        return _stream(func, args, kwargs) if result is NotImplemented else result


def _weight(value: Any) -> Any:
    return value._saft_entry.weight if isinstance(value, SampledParameter) else value


def _is_question(func: Any) -> bool:
    """Whether this asks for a property of a tensor, so that it has nothing to do with gradients."""
    if func in _QUESTIONS:
        return True
    return getattr(func, "__name__", "").startswith(("__get__", "__set__", "is_", "_is_"))


def _stream(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on weights whose dense gradients autograd computes and we gather."""

    entries: list[Entry] = []

    def known(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(known, value))
        entry = _entry(value)
        if entry is None:
            return value
        if entry.indices.numel() == 0:
            return entry.weight
        entries.append(entry)
        return sampled.streamed(entry.weight, entry.values, entry.indices)

    result = func(*map(known, args), **{key: known(value) for key, value in kwargs.items()})
    differentiable = [result] if isinstance(result, Tensor) else tree_leaves(result)
    if any(isinstance(out, Tensor) and out.requires_grad for out in differentiable):
        for entry in entries:
            entry.streamed(entry, func)
    return result


# What torch does with parameters ------------------------------------------------------------------

_QUESTIONS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.data_ptr,
    Tensor.detach,
    Tensor.__len__,
    Tensor.__repr__,
    Tensor.__hash__,
    Tensor.__format__,
    torch.numel,
}

_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _has_gradient(*tensors: Any) -> bool:
    """Whether one of these is no selected parameter and wants a gradient of its own."""
    return any(
        isinstance(t, Tensor) and not isinstance(t, SampledParameter) and t.requires_grad
        for t in tensors
    )


def _sampled_linear(
    x: Tensor, weight: Any, bias: Any, in_features: int, out_features: int | None
) -> Any:
    """The layer with this weight, stored [O, I], or [I, O] if ``out_features`` is given."""
    if isinstance(x, SampledParameter) or _has_gradient(weight):
        return NotImplemented
    w, b = _entry(weight), _entry(bias)
    if w is not None and w.crowded:
        return NotImplemented
    plan = _linear_plan(w, b, in_features, out_features)
    matrix = _weight(weight) if out_features is None else _weight(weight).t()
    return sampled.linear(x, matrix, _weight(bias), _values(w), _values(b), plan)


def _values(entry: Entry | None) -> Tensor | None:
    return None if entry is None else entry.values


def _linear_plan(
    w: Entry | None, b: Entry | None, in_features: int, out_features: int | None = None
) -> LinearPlan:
    owner = w or b
    assert owner is not None

    def make() -> LinearPlan:
        w_indices, b_indices = (None if e is None else e.indices for e in (w, b))
        return LinearPlan.of(in_features, w_indices, b_indices, out_features=out_features)

    return owner.plan((w is None, b, in_features, out_features), make)


@_handles(F.linear)
def _linear(input: Tensor, weight: Any, bias: Any = None) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return _sampled_linear(input, weight, bias, weight.shape[1], None)


@_handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(input: Any, other: Any) -> Any:
    if not isinstance(other, SampledParameter) or other.dim() != 2:
        return NotImplemented
    return _sampled_linear(input, other, None, other.shape[0], other.shape[1])


@_handles(torch.addmm, Tensor.addmm)
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return _sampled_linear(mat1, mat2, input, mat2.shape[0], mat2.shape[1])


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (tuple(size) * 2)[:2]


@_handles(F.conv2d)
def _conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    unusual = groups != 1 or isinstance(padding, str) or input.dim() != 4
    if unusual or isinstance(input, SampledParameter) or _has_gradient(weight):
        return NotImplemented
    w, b = _entry(weight), _entry(bias)
    if w is not None and w.crowded:
        return NotImplemented
    plan = _linear_plan(w, b, _weight(weight)[0].numel())
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    return sampled.conv2d(
        input, _weight(weight), _weight(bias), _values(w), _values(b), plan, *geometry
    )


@_handles(F.embedding)
def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    entry = _entry(weight)
    assert entry is not None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    plan = _linear_plan(entry, None, weight.shape[1])
    return sampled.embedding(input, entry.weight, entry.values, plan, padding_idx)


@_handles(torch.split, Tensor.split)
def _split(tensor: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    rows = tensor.shape[0] if tensor.dim() else 0
    if dim != 0 or rows == 0:
        return NotImplemented
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - begin) for begin in range(0, rows, sizes)]
    ends = list(accumulate(sizes))
    return tuple(
        _handle(tensor._saft_entry.part(begin, end)) for begin, end in pairwise([0, *ends])
    )


def _handle(part: Part) -> SampledParameter:
    handle = part.weight.as_subclass(SampledParameter)
    handle._saft_entry = part
    return handle


@_handles(torch.chunk, Tensor.chunk)
def _chunk(input: Any, chunks: int, dim: int = 0) -> Any:
    return _split(input, -(-input.shape[0] // chunks), dim) if input.dim() else NotImplemented


def _reentrant(function: Any) -> Any:
    """A Python function of torch that does not hand itself over, but whose calls inside do."""
    inside = {**function.__globals__, "has_torch_function": lambda tensors: False}
    again = types.FunctionType(
        function.__code__, inside, function.__name__, function.__defaults__, function.__closure__
    )
    again.__kwdefaults__ = function.__kwdefaults__
    return again


# Its projections are calls of F.linear, on rows of the weight where query and key differ.
_attention = _reentrant(F.multi_head_attention_forward)
