"""A parameter that tells torch's functions how to use it so that its gradient is sampled.

In sampled mode (:mod:`saft_kernels.attach`) every selected parameter is one of these. Functions
that have a sampled form in :mod:`saft_kernels.sampled` run that; whatever else is done with the
parameter runs as ever on the weight itself, and autograd's dense gradient of that use is gathered
and freed.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from saft_kernels import sampled
from saft_kernels.entry import Entry
from saft_kernels.plan import Conv2dPlan, EmbeddingPlan, LinearPlan


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


def _use(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function of selected parameters that autograd has to know of."""
    with DisableTorchFunctionSubclass():
        handler = _handler(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        return _stream(func, args, kwargs) if result is NotImplemented else result


def _handler(func: Any) -> Callable[..., Any] | None:
    if torch.compiler.is_dynamo_compiling():  # it cannot look up torch's functions
        return next((handler for known, handler in _HANDLERS.items() if func is known), None)
    return _HANDLERS.get(func)


def _weight(value: Any) -> Any:
    return value._saft_entry.weight if isinstance(value, SampledParameter) else value


def _is_question(func: Any) -> bool:
    """Whether this asks for a property of a tensor, so that it has nothing to do with gradients."""
    if torch.compiler.is_dynamo_compiling():  # as above; a use of the weight answers it too
        return False
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
        if entry.indices.numel() > 0:
            entries.append(entry)
        return _view(entry)

    result = func(*map(known, args), **{key: known(value) for key, value in kwargs.items()})
    differentiable = [result] if isinstance(result, Tensor) else tree_leaves(result)
    if any(isinstance(out, Tensor) and out.requires_grad for out in differentiable):
        for entry in entries:
            entry.streamed(entry, func)
    return result


def _streamed(value: Any, func: Any) -> Any:
    """The weight for a use in ``func``, whatever is done with it there."""
    entry = _entry(value)
    if entry is None:
        return value
    if entry.indices.numel() > 0:
        entry.streamed(entry, func)
    return _view(entry)


def _view(entry: Entry) -> Tensor:
    if entry.indices.numel() == 0:
        return entry.weight
    return sampled.streamed(entry.weight, entry.values, entry.indices)


# What torch does with parameters ------------------------------------------------------------------

_QUESTIONS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.data_ptr,
    Tensor.storage_offset,
    Tensor.untyped_storage,
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
        return LinearPlan.of(in_features, _indices(w), _indices(b), out_features=out_features)

    return owner.plan((LinearPlan, w is None, b, in_features, out_features), make)


def _indices(entry: Entry | None) -> Tensor | None:
    return None if entry is None else entry.indices


def _conv2d_plan(w: Entry | None, b: Entry | None, weight_shape: torch.Size) -> Conv2dPlan:
    owner = w or b
    assert owner is not None
    return owner.plan(
        (Conv2dPlan, w is None, b, weight_shape),
        lambda: Conv2dPlan.of(weight_shape, _indices(w), _indices(b)),
    )


def _embedding_plan(entry: Entry) -> EmbeddingPlan:
    width = entry.weight.shape[1]
    return entry.plan(EmbeddingPlan, lambda: EmbeddingPlan.of(width, entry.indices))


def plan_ahead(module: nn.Module) -> None:
    """Plan what is likely to be done with a module's own parameters.

    Other plans are made at the first use, which no graph of ``torch.compile`` can hold.
    """
    with DisableTorchFunctionSubclass():
        own = dict(module.named_parameters(recurse=False))
        for name, param in own.items():
            entry = _entry(param)
            if entry is None or param.dim() not in (2, 4):
                continue
            if name == "in_proj_weight":
                _plan_thirds(entry)
            if not entry.always_crowded or isinstance(module, nn.Embedding):
                bias = _entry(own.get(name.removesuffix("weight") + "bias"))
                _plan_likely_use(module, name, entry, bias)


def _plan_likely_use(module: nn.Module, name: str, entry: Entry, bias: Entry | None) -> None:
    shape = entry.weight.shape
    if isinstance(module, nn.Embedding):
        _embedding_plan(entry)
        if not entry.always_crowded:  # a language model's last layer may share it
            _linear_plan(entry, None, shape[1])
    elif len(shape) == 4:
        if name.endswith("weight"):
            _conv2d_plan(entry, bias, shape)
    elif name.endswith("weight") and type(module).__name__ != "Conv1D":
        _linear_plan(entry, bias, shape[1])
    else:  # x @ projection, as in the Conv1D of transformers' GPT-2
        _linear_plan(entry, bias, *shape)


def _plan_thirds(entry: Entry) -> None:
    """Of fused attention, for queries, keys and values that differ."""
    height, width = entry.weight.shape
    for begin in range(0, height, width or 1):
        part = entry.part(begin, begin + width)
        if not part.always_crowded:
            _linear_plan(part, None, width)


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
    plan = _conv2d_plan(w, b, weight.shape)
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
    plan = _embedding_plan(entry)
    return sampled.embedding(input, entry.weight, entry.values, plan, padding_idx)


# torch's attention --------------------------------------------------------------------------------

#: Its arguments, in order, and those that are weights of its projections.
_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_PROJECTIONS = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
    "out_proj_weight", "out_proj_bias",
)  # fmt: skip


def _attention(*args: Any, **kwargs: Any) -> Any:
    """torch's own, except for the projections."""
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    together = query is key and key is value
    # Anywhere else torch cuts the bias into three.
    whole = together and query.dim() == 3 and not given.get("use_separate_proj_weight")
    ours = (*_PROJECTIONS, "in_proj_bias") if whole else _PROJECTIONS
    known = {
        name: each if name in ours else _streamed(each, F.multi_head_attention_forward)
        for name, each in given.items()
    }
    if together:  # still one tensor, if it was a parameter
        known["key"] = known["value"] = known["query"]
    return _torch_attention(**known)


def _project(x: Tensor, weight: Any, bias: Any = None) -> Any:
    """``F.linear``. In compiled code no function called from here would come back to us."""
    if isinstance(weight, SampledParameter) or isinstance(bias, SampledParameter):
        return _use(F.linear, (x, weight, bias), {})
    return F.linear(x, weight, bias)


def _project_packed(q: Tensor, k: Tensor, v: Tensor, weight: Any, bias: Any) -> list[Tensor]:
    """Project with one weight for all three, [3 E, E]; each result is contiguous."""
    if q is k and k is v:
        projected = _project(q, weight, bias).unflatten(-1, (3, -1))
        return list(projected.movedim(-2, 0).contiguous().unbind())
    width = q.shape[-1]
    return [_project_rows(x, weight, bias, i * width, width) for i, x in enumerate((q, k, v))]


def _project_rows(x: Tensor, weight: Any, bias: Any, begin: int, count: int) -> Tensor:
    """The layer of some rows of a weight."""
    rows = slice(begin, begin + count)
    bias = None if bias is None else bias[rows]
    entry = _entry(weight)
    if entry is None:
        return F.linear(x, weight[rows], bias)
    part = entry.part(begin, begin + count)
    if part.crowded:
        part.streamed(part, F.linear)
        return F.linear(x, _view(part), bias)
    plan = _linear_plan(part, None, x.shape[-1])
    return sampled.linear(x, part.weight, bias, part.values, None, plan)


def _project_separately(q: Tensor, k: Tensor, v: Tensor, *weights_and_biases: Any) -> list[Tensor]:
    """Project with a weight for each."""
    weights, biases = weights_and_biases[:3], weights_and_biases[3:]
    return [_project(*each) for each in zip((q, k, v), weights, biases, strict=True)]


#: What torch's code looks up here.
_REPLACED = {
    "has_torch_function": lambda tensors: False,
    "linear": _project,
    "_in_projection_packed": _project_packed,
    "_in_projection": _project_separately,
}


def _with_our_projections(function: Any) -> Any:
    """The same code, with other global names."""
    names = {**function.__globals__, **_REPLACED}
    del names["__name__"]  # torch.compile would look them up in the module of this name
    result = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return result


# Should a torch come that calls other names, attention is streamed, and says so.
if _REPLACED.keys() <= set(F.multi_head_attention_forward.__code__.co_names):
    _torch_attention = _with_our_projections(F.multi_head_attention_forward)
    _HANDLERS[F.multi_head_attention_forward] = _attention
