"""Streaming the loss gradients of a data set into a :class:`StreamingTopK`, one layer at a time.

Gradients are caught by a hook the moment they are complete, added to an accumulator and freed, so
that no more than one layer's gradient exists at a time. With the last backward pass of the data
the accumulators are complete too, and the same hook offers them to the selection.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from saft_kernels.batches import count_examples, split_examples, with_last
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.gradients import is_streamed
from saft_kernels.topk import StreamingTopK

LossFunction = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int | None, str], None]

#: Accumulators begin at multiples of this many elements, 16 bytes, where kernels load wide: odd
#: sizes leave gaps.
ALIGNMENT = 4

# Two passes over the same data may differ by rounding on a GPU; another order of the data differs
# by more.
_SAME_LOSS = 1e-2


@dataclass(frozen=True, eq=False)
class Segment:
    """The flat indices [begin, end) of one candidate parameter."""

    name: str
    param: nn.Parameter
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return self.end - self.begin


def aligned(numel: int) -> int:
    """The elements that an accumulator of ``numel`` takes up, the gap behind it included."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def cut_into_chunks(candidates: dict[str, nn.Parameter], limit: int) -> list[list[Segment]]:
    """Cut the candidates, in order, into chunks whose accumulators take up ``limit`` elements.

    Args:
        candidates: name -> parameter.
        limit: a multiple of :data:`ALIGNMENT`; the last chunk may take up fewer.
    """
    chunks: list[list[Segment]] = [[]]
    room = limit
    for name, param in candidates.items():
        begin = 0
        while begin < param.numel():
            if room == 0:
                chunks.append([])
                room = limit
            end = min(param.numel(), begin + room)
            chunks[-1].append(Segment(name, param, begin, end))
            room -= aligned(end - begin)
            begin = end
    return chunks


class GradientSelection:
    """Scores candidates by the gradients of a loss over a data set.

    Args:
        model: the model that ``loss_fn`` is called with.
        loss_fn: (model, batch) -> mean loss over the batch, one element.
        batches: the data; gone through once for each chunk, so with several chunks it must give
            the same batches each time.
        per_example: score sum_i g_i**2 with one backward pass per example (SAFT, Eq. 7; Sung et
            al. 2021), instead of sum_b n_b g_b with one per batch of n_b examples.
        examples: batch -> its number of examples; None takes the leading dimension of its first
            tensor.
        progress: called after each batch with the batches done, their total (None if unknown) and
            a description.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[Any],
        *,
        per_example: bool = False,
        examples: Callable[[Any], int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._batches = batches
        self._per_example = per_example
        self._examples = examples or count_examples
        self._progress = progress
        self._done = 0

    def offer(self, chunks: Sequence[Sequence[Segment]], top: StreamingTopK) -> None:
        """Offer the scores of all chunks to ``top``, in one pass over the data for each.

        Raises:
            NonFiniteGradientError: if a loss or a gradient is NaN or infinite.
            SelectionError: if there is no data, the passes do not see the same data, the loss
                cannot be used, or an optimizer streams the gradients.
        """
        if len(chunks) > 1 and isinstance(self._batches, Iterator):
            raise SelectionError(
                "memory='chunked' goes over the data several times, but batches is an iterator, "
                "which gives it only once; give a list or a DataLoader"
            )
        for chunk in chunks:
            _refuse_streamed(chunk)
        params = {segment.param for chunk in chunks for segment in chunk}
        largest = max(_places(chunk)[-1] for chunk in chunks)
        memory = torch.empty(largest, dtype=torch.float32, device=top.device)
        first_losses: list[float] | None = None
        depends = False
        with _undisturbed(self._model, params):
            for number, chunk in enumerate(chunks):
                description = f"pass {number + 1} of {len(chunks)}"
                with (
                    torch.random.fork_rng(_cuda_devices(params)),
                    _Collector(chunk, top, memory, square=self._per_example) as collector,
                ):
                    losses = self._go_through(collector, description, len(chunks))
                depends |= collector.depends
                if first_losses is None:
                    first_losses = losses
                _require_same_data(first_losses, losses, number + 1)
        if not depends:
            raise SelectionError(_INDEPENDENT)

    def _go_through(self, collector: _Collector, description: str, passes: int) -> list[float]:
        losses = []
        total = _length(self._batches)
        for number, (batch, last) in enumerate(with_last(self._batches), start=1):
            for part, weight, part_last in self._parts(batch, number):
                loss = self._loss(part, number)
                losses.append(_finite_value(loss, number))
                if passes == 1 and not loss.requires_grad:
                    raise SelectionError(_INDEPENDENT)
                collector.backward(loss, weight, last=last and part_last)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, None if total is None else total * passes, description)
        if not losses:
            raise SelectionError(f"batches gave no data in {description}; nothing can be selected")
        return losses

    def _parts(self, batch: Any, number: int) -> Iterator[tuple[Any, float, bool]]:
        """(part, its weight, whether it is the last one): what gets a backward pass of its own."""
        found = self._examples(batch)
        try:
            count = operator.index(found)
        except TypeError:
            raise SelectionError(
                f"examples gave {found!r} for batch {number}; it must return a whole number"
            ) from None
        if count < 1:
            raise SelectionError(f"batch {number} has {count} examples; leave out empty batches")
        if not self._per_example:
            yield batch, float(count), True
            return
        for example, last in with_last(split_examples(batch, count)):
            yield example, 1.0, last

    def _loss(self, batch: Any, number: int) -> Tensor:
        with warnings.catch_warnings():
            # torch.utils.checkpoint warns of this and goes on with zero gradients.
            warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
            try:
                loss = self._loss_fn(self._model, batch)
            except UserWarning as error:
                raise SelectionError(
                    "reentrant activation checkpointing loses the gradient of a block whose input "
                    "needs none; use torch.utils.checkpoint with use_reentrant=False"
                ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise SelectionError(
                f"loss_fn must return the mean loss of the batch as a tensor of one element; for "
                f"batch {number} it returned {found}"
            )
        return loss


_INDEPENDENT = (
    "the loss does not depend on any candidate parameter; check that loss_fn uses the model it is "
    "given and does not detach the result"
)


def _places(chunk: Sequence[Segment]) -> list[int]:
    """Where the accumulators of a chunk begin in its memory, and behind them where they end."""
    return list(accumulate((aligned(segment.numel) for segment in chunk), initial=0))


class _Collector:
    """Adds up the gradients of one chunk while its context is entered; only these are computed."""

    def __init__(
        self, chunk: Sequence[Segment], top: StreamingTopK, memory: Tensor, *, square: bool
    ) -> None:
        *places, end = _places(chunk)
        memory[:end].zero_()
        self._acc = {
            segment: memory[place : place + segment.numel]
            for segment, place in zip(chunk, places, strict=True)
        }
        self._top = top
        self._square = square
        self._weight = 1.0
        self._last = False
        self._arrived: set[Segment] = set()
        self._handles: list[Any] = []
        self.depends = False

    def __enter__(self) -> _Collector:
        for segment in self._acc:
            segment.param.requires_grad_(True)
            self._handles.append(
                segment.param.register_post_accumulate_grad_hook(self._hook(segment))
            )
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for segment in self._acc:
            segment.param.requires_grad_(False)
            segment.param.grad = None

    def backward(self, loss: Tensor, weight: float, *, last: bool) -> None:
        """Add ``weight`` times the gradient of ``loss``; with the last one the sums are offered."""
        self._weight, self._last = weight, last
        self._arrived.clear()
        if loss.requires_grad:
            self.depends = True
            loss.backward()
        if last:
            for segment, acc in self._acc.items():
                if segment not in self._arrived:
                    self._top.update(segment.name, acc, offset=segment.begin)

    def _hook(self, segment: Segment) -> Callable[[Tensor], None]:
        def take(param: Tensor) -> None:
            grad, param.grad = param.grad, None
            if grad is None:
                raise SelectionError(
                    f"another hook of {segment.name!r} took its gradient; remove it before "
                    "selecting"
                )
            if segment in self._arrived:
                raise SelectionError(
                    f"{segment.name!r} received two gradients in one backward pass, as happens "
                    "when reentrant activation checkpointing meets shared weights; use "
                    "use_reentrant=False"
                )
            self._arrived.add(segment)
            self._top.update(
                segment.name,
                self._acc[segment],
                grad.to_dense().reshape(-1)[segment.begin : segment.end],
                self._weight,
                square=self._square,
                offset=segment.begin,
                final=self._last,
            )

        return take


def _refuse_streamed(segments: Iterable[Segment]) -> None:
    """Its hook would come first, leave nothing but its own entries, and lose those it holds."""
    for segment in segments:
        if is_streamed(segment.param):
            raise SelectionError(
                f"the gradient of {segment.name!r} is streamed to a SparseAdamW; call detach() on "
                "that optimizer before selecting"
            )


@contextmanager
def _undisturbed(model: nn.Module, candidates: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze the model, put gradients aside, stop running statistics; undo it all on leaving."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training]
    flags = [(param, param.requires_grad) for param in model.parameters()]
    grads = [(param, param.grad) for param in candidates]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        # Its result differs in the last bits, and whether it is taken depends on what requires a
        # gradient.
        torch.backends.mha.set_fastpath_enabled(False)
        for norm in norms:
            norm.training = False
        for param, _ in flags:
            param.requires_grad_(False)
        for param, _ in grads:
            param.grad = None
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for norm in norms:
            norm.training = True
        for param, flag in flags:
            param.requires_grad_(flag)
        for param, grad in grads:
            param.grad = grad


def _finite_value(loss: Tensor, number: int) -> float:
    value = float(loss.item())
    if not math.isfinite(value):
        raise NonFiniteGradientError(
            f"the loss of batch {number} is {value}; look for bad input or too low a precision"
        )
    return value


def _require_same_data(first: list[float], losses: list[float], number: int) -> None:
    same = len(first) == len(losses) and all(
        math.isclose(a, b, rel_tol=_SAME_LOSS, abs_tol=1e-6)
        for a, b in zip(first, losses, strict=True)
    )
    if not same:
        raise SelectionError(
            f"pass {number} over batches did not see the data of the first one; memory='chunked' "
            "needs the same batches in the same order each time (no reshuffling, no augmentation "
            "of its own randomness)"
        )


def _cuda_devices(params: Iterable[nn.Parameter]) -> list[torch.device]:
    return list({param.device for param in params if param.is_cuda})


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
