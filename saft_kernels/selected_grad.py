"""A gradient that holds only the selected entries of its parameter.

The streamed mode of :class:`saft_kernels.optim.SparseAdamW` puts one in place of every dense
gradient as soon as autograd has produced it, so that no dense gradient outlives its layer. It
stands in ``param.grad`` and does what the stock tools do with gradients: accumulation over
micro-batches, ``GradScaler``, ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` (which
then see the *selected* entries, as they should), ``zero_grad``. Everything else raises one clear
sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saft_kernels import ops
from saft_kernels.errors import SelectedGradientError

aten = torch.ops.aten


class SelectedGrad(Tensor):
    """The selected entries of a gradient: a tensor with the shape and dtype of its parameter.

    Args:
        like: the parameter (or a gradient of it).
        values: fp32 [nnz], kept by reference; in-place operations change it.
        indices: int32 or int64 [nnz], strictly increasing flat indices into the row-major order of
            ``like``.
    """

    _saft_values: Tensor
    _saft_indices: Tensor

    # Results of torch functions must not become SelectedGrads behind our back.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, values: Tensor, indices: Tensor) -> SelectedGrad:  # noqa: D102
        grad: SelectedGrad = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        grad._saft_values = values
        grad._saft_indices = indices
        return grad

    def values(self) -> Tensor:
        """The gradient at the selected entries, fp32 [nnz]."""
        return self._saft_values

    def indices(self) -> Tensor:
        """Where they are: int32 or int64 [nnz], flat indices into the row-major order."""
        return self._saft_indices

    def values_at(self, indices: Tensor) -> Tensor:
        """:meth:`values`, if these are its indices.

        Raises:
            SelectedGradientError: if they are not: other entries are unknown.
        """
        if not _is_same_memory(self.indices(), indices) and not torch.equal(
            self.indices(), indices
        ):
            raise SelectedGradientError(
                "this gradient holds other selected entries than the ones asked for: "
                "it was made with another mask"
            )
        return self.values()

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """A dense tensor with zeros at every other entry; for looking at, not for training."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        ops.scatter_(dense, self.indices(), self.values().to(self.dtype))
        return dense

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape, dtype and values."""
        return (
            f"SelectedGrad(shape={list(self.shape)}, dtype={self.dtype}, "
            f"nnz={self.values().numel()}, values={self.values()!r})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run what gradients go through on the values; refuse everything else."""
        handler = _HANDLERS.get(func)
        if handler is None:
            raise _unsupported(func)
        return handler(func, *args, **(kwargs or {}))


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors are the same by their addresses; the values of others must be compared.

    Comparing values makes the host wait for a GPU.
    """
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


def _unsupported(func: Any) -> SelectedGradientError:
    return SelectedGradientError(
        "this gradient holds only the selected entries of its parameter (gradients='streamed'), so "
        f"{func} is not defined for it; use its values(), indices() or to_dense()"
    )


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _implements(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(funcs, handler))
        return handler

    return register


def _like(grad: SelectedGrad, values: Tensor) -> SelectedGrad:
    return SelectedGrad(grad, values, grad.indices())


@_implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, grad: SelectedGrad) -> SelectedGrad:
    return _like(grad, grad.values())


@_implements(aten.clone.default)
def _clone(func: Any, grad: SelectedGrad, **_: Any) -> SelectedGrad:
    return _like(grad, grad.values().clone())


def _entries_of(other: Any, grad: SelectedGrad, func: Any) -> Tensor:
    """The values of a second gradient, dense or selected, at the indices of ``grad``."""
    if not isinstance(other, Tensor) or other.shape != grad.shape or other.layout != torch.strided:
        raise _unsupported(func)
    if not isinstance(other, SelectedGrad):
        return ops.gather(other, grad.indices()).float()
    return other.values_at(grad.indices())


@_implements(aten.add_.Tensor)
def _add_(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> SelectedGrad:
    if not isinstance(grad, SelectedGrad):  # a dense sum would have entries that are unknown
        raise _unsupported(func)
    grad.values().add_(_entries_of(other, grad, func), alpha=alpha)
    return grad


@_implements(aten.add.Tensor)
def _add(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> SelectedGrad:
    if not isinstance(grad, SelectedGrad):
        values = _entries_of(grad, other, func).add(other.values(), alpha=alpha)
        return _like(other, values)
    return _like(grad, grad.values().add(_entries_of(other, grad, func), alpha=alpha))


def _require_scalars(func: Any, grad: Any, operands: tuple[Any, ...]) -> None:
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if not isinstance(grad, SelectedGrad) or any(operand.dim() for operand in tensors):
        raise _unsupported(func)


@_implements(
    aten.zero_.default,
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
    aten.clamp_.default,
    aten.clamp_min_.default,
    aten.clamp_max_.default,
)
def _entrywise_(func: Any, grad: Any, *operands: Any, **kwargs: Any) -> SelectedGrad:
    _require_scalars(func, grad, operands)
    func(grad.values(), *operands, **kwargs)
    return grad


@_implements(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
def _entrywise(func: Any, grad: Any, *operands: Any, **kwargs: Any) -> SelectedGrad:
    _require_scalars(func, grad, operands)
    return _like(grad, func(grad.values(), *operands, **kwargs))


@_implements(aten.linalg_vector_norm.default)
def _norm(func: Any, grad: SelectedGrad, ord: float = 2, dim: Any = None, *rest: Any) -> Tensor:
    if dim is not None or rest:
        raise _unsupported(func)
    return torch.linalg.vector_norm(grad.values(), ord)


def _compact(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.values() if isinstance(tensor, SelectedGrad) else tensor for tensor in tensors]


@_implements(
    aten._foreach_norm.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_mul_.Scalar,
    aten._foreach_div_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_clamp_min_.Scalar,
    aten._foreach_clamp_max_.Scalar,
    aten._foreach_zero_.default,
)
def _foreach(func: Any, tensors: list[Tensor], *operands: Any, **kwargs: Any) -> Any:
    return func(_compact(tensors), *operands, **kwargs)


@_implements(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale(func: Any, tensors: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    # The operation wants one dtype per call, and the values are fp32 whatever the parameter is.
    selected = [tensor.values() for tensor in tensors if isinstance(tensor, SelectedGrad)]
    dense = [tensor for tensor in tensors if not isinstance(tensor, SelectedGrad)]
    for part in (selected, dense):
        if part:
            func(part, found_inf, inv_scale)
