"""Where SparseAdamW takes the gradients of the selected entries from: one class per mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._compile import _disable_dynamo  # lazy, where torch.compiler.disable imports it all
from torch.utils.weak import WeakTensorKeyDictionary

from saft_kernels import ops
from saft_kernels.attach import Sampled
from saft_kernels.errors import OptimizerError
from saft_kernels.flat_state import FlatState
from saft_kernels.selected_grad import SelectedGrad


class GradientSource(Protocol):
    """What the optimizer asks of a mode."""

    def attach(self, states: Sequence[FlatState], model: nn.Module | None) -> None:
        """Begin to serve these states, of parameters of ``model``; a copy may not know it."""

    def detach(self) -> None:
        """Leave the model as it was found."""

    def gradients(self, state: FlatState, begin: int, end: int) -> Sequence[Tensor] | Tensor:
        """The gradients of parameters ``begin`` to ``end``, which all have one, for the kernel."""

    def compact(self, state: FlatState, begin: int, end: int) -> Tensor:
        """The same at the selected entries: fp32, one vector."""

    def scale_(self, state: FlatState, begin: int, end: int, factor: Tensor) -> None:
        """Multiply the selected entries by ``factor``, a tensor without dimensions."""


class DenseGradients:
    """Reads ``param.grad``, whose selected entries the kernel gathers on the way."""

    def attach(self, states: Sequence[FlatState], model: nn.Module | None) -> None:
        """Nothing to do."""

    def detach(self) -> None:
        """Nothing to do."""

    def gradients(self, state: FlatState, begin: int, end: int) -> Sequence[Tensor]:
        """See :class:`GradientSource`."""
        return [_dense_grad(state, i) for i in range(begin, end)]

    def compact(self, state: FlatState, begin: int, end: int) -> Tensor:
        """See :class:`GradientSource`."""
        grads = self.gradients(state, begin, end)
        pieces = [ops.gather(grad, state.index(i)) for i, grad in enumerate(grads, begin)]
        return torch.cat(pieces).float()

    def scale_(self, state: FlatState, begin: int, end: int, factor: Tensor) -> None:
        """See :class:`GradientSource`; entries that are not selected keep their bits."""
        for i in range(begin, end):
            grad, index = _dense_grad(state, i), state.index(i)
            scaled = ops.gather(grad, index).float().mul_(factor)
            ops.scatter_(grad, index, scaled.to(grad.dtype))


def _dense_grad(state: FlatState, i: int) -> Tensor:
    grad = state.params[i].grad
    assert grad is not None
    if isinstance(grad, SelectedGrad):
        raise OptimizerError(
            f"the gradients of {state.names[i]!r} are taken by another SparseAdamW "
            "(gradients='streamed' or 'sampled'); call detach() on that one first"
        )
    _require_strided(state.names[i], grad)
    return grad


def _require_strided(name: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise OptimizerError(
            f"parameter {name!r} has a sparse gradient ({grad.layout}); SparseAdamW needs a "
            "strided one: build the layer without sparse=True"
        )


#: The parameters whose gradients are streamed: two sources would take them from each other.
_streamed: Any = WeakTensorKeyDictionary()


def is_streamed(param: Tensor) -> bool:
    """Whether an optimizer takes the gradients of this parameter as soon as they are made."""
    return param in _streamed


class StreamedGradients:
    """Takes the selected entries of each gradient once autograd has made it, and frees the rest.

    A post-accumulate-grad hook on every selected parameter gathers into the flat compact gradient
    and leaves a :class:`SelectedGrad` in ``param.grad``. That is a view of the flat vector, which
    the next backward overwrites: clone it to keep it.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._params: list[Tensor] = []
        self._flat: dict[FlatState, Tensor] = {}  # compact gradient, fp32 [nnz]
        self._pieces: dict[FlatState, list[Tensor]] = {}  # its views, one per parameter

    def attach(self, states: Sequence[FlatState], model: nn.Module | None) -> None:
        """Put the hooks on.

        Raises:
            OptimizerError: if another optimizer takes the gradients of one of these parameters.
        """
        for state in states:
            _refuse_second_source(state)
        for state in states:
            flat = torch.zeros_like(state.exp_avg)
            self._flat[state] = flat
            self._pieces[state] = [state.piece(flat, i, i + 1) for i in range(len(state))]
            for i, param in enumerate(state.params):
                self._hook(state, i)
                self._params.append(param)
                _streamed[param] = True

    def _hook(self, state: FlatState, i: int) -> None:
        param = state.params[i]
        if param.requires_grad:  # of a copied optimizer it may be frozen by now
            hook = _gather_and_free(state.names[i], self._pieces[state][i], state.index(i))
            self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Take the hooks off; gradients that were gathered stay."""
        for handle in self._handles:
            handle.remove()
        for param in self._params:
            _streamed.pop(param, None)
        self._handles.clear()
        self._params.clear()

    def __del__(self) -> None:
        """An optimizer that is gone leaves no hooks behind."""
        self.detach()

    def gradients(self, state: FlatState, begin: int, end: int) -> Tensor:
        """See :class:`GradientSource`."""
        return self.compact(state, begin, end)

    def compact(self, state: FlatState, begin: int, end: int) -> Tensor:
        """See :class:`GradientSource`; a view of the flat gradient, no copy."""
        pieces = self._pieces[state]
        for i in range(begin, end):
            _bring_home(state, i, pieces[i])
        return state.piece(self._flat[state], begin, end)

    def scale_(self, state: FlatState, begin: int, end: int, factor: Tensor) -> None:
        """See :class:`GradientSource`."""
        self.compact(state, begin, end).mul_(factor)


class SampledGradients(StreamedGradients):
    """Lets the model compute gradients at the selected entries only; dense ones never exist.

    The compact gradient of every parameter arrives in a leaf of :mod:`saft_kernels.attach`; a hook
    moves it to the flat one, where it is found as in streamed mode.
    """

    _sampled: Sampled | None = None

    def attach(self, states: Sequence[FlatState], model: nn.Module | None) -> None:
        """Put the model into sampled mode.

        Raises:
            OptimizerError: if another optimizer takes the gradients of one of these parameters.
        """
        assert model is not None
        for state in states:
            _refuse_second_source(state)
        params = {
            param: (state.names[i], state.index(i))
            for state in states
            for i, param in enumerate(state.params)
        }
        self._sampled = Sampled(model, params, leading=False)
        super().attach(states, model)

    def _hook(self, state: FlatState, i: int) -> None:
        assert self._sampled is not None
        leaf = self._sampled.entries[state.params[i]].leaf
        hook = _take_over(state.params[i], self._pieces[state][i], state.index(i))
        self._handles.append(leaf.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Leave the model as it was found; gradients that were computed stay."""
        super().detach()
        if self._sampled is not None:
            self._sampled.detach()


def _take_over(param: Tensor, values: Tensor, indices: Tensor) -> Callable[[Tensor], None]:
    """The hook of one leaf: its gradient becomes the parameter's, or is added to that."""

    @_disable_dynamo
    def hook(leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        with DisableTorchFunctionSubclass():  # param answers in Python otherwise
            if isinstance(param.grad, SelectedGrad):
                param.grad.values().add_(grad)
            else:
                values.copy_(grad)
                param.grad = SelectedGrad(param, values, indices)

    return hook


def _refuse_second_source(state: FlatState) -> None:
    for name, param in zip(state.names, state.params, strict=True):
        if is_streamed(param):
            raise OptimizerError(
                f"the gradients of {name!r} are taken by another SparseAdamW already; "
                "call detach() on that one first"
            )


def _gather_and_free(name: str, values: Tensor, indices: Tensor) -> Callable[[Tensor], None]:
    """The hook of one parameter. It must not refer to the optimizer, or neither would be freed."""

    @_disable_dynamo
    def hook(param: Tensor) -> None:
        grad = param.grad
        if grad is None or isinstance(grad, SelectedGrad):
            return  # accumulated into the values already
        _require_strided(name, grad)
        values.copy_(ops.gather(grad, indices))
        param.grad = SelectedGrad(param, values, indices)

    return hook


def _bring_home(state: FlatState, i: int, home: Tensor) -> None:
    """Copy a gradient that the user put in place of ours (a clone, a dense one) into the vector."""
    grad = state.params[i].grad
    if isinstance(grad, SelectedGrad):
        if grad.values() is not home:
            home.copy_(grad.values_at(state.index(i)))
    else:
        home.copy_(ops.gather(_dense_grad(state, i), state.index(i)))


#: The modes of SparseAdamW.
SOURCES: dict[str, type[GradientSource]] = {
    "dense": DenseGradients,
    "streamed": StreamedGradients,
    "sampled": SampledGradients,
}


def gradient_source(mode: str) -> GradientSource:
    """The source of a mode.

    Raises:
        OptimizerError: if there is no such mode.
    """
    if mode not in SOURCES:
        raise OptimizerError(
            f"gradients={mode!r} is not available in this release; choose one of "
            f"{', '.join(map(repr, SOURCES))}"
        )
    return SOURCES[mode]()
