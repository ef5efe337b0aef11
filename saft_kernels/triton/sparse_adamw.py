"""One AdamW step over the selected entries of many tensors, in one launch.

See ``csrc/cuda/sparse_adamw_kernel.cu`` for the arithmetic, for what an entry moves, and for why
the step counts are incremented by a launch of their own. Here too every program belongs to one
tensor. The tensors' addresses and layouts are in a table on the GPU, which is made and copied only
when they change: with compact gradients never, with dense ones whenever autograd puts a gradient
elsewhere. Bias corrections are computed in fp64, by every program for its tensor.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from saft_kernels.streams import is_capturing, stream_of
from saft_kernels.triton import launch
from saft_kernels.triton.launch import ceil_div
from saft_kernels.triton.strided import strided_of

BLOCK = 512
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

#: e to that power is zero, and its multiples are no NaN.
_LOG_OF_ZERO = -1000.0


# Whether a vector begins at a multiple of 16 bytes makes no difference: programs begin anywhere
# within it, so that nothing can be loaded wide. Each would double what has to be compiled.
@triton.jit(
    do_not_specialize=["compact", "has_lr", "has_scale", "has_found_inf"],
    do_not_specialize_on_alignment=[
        "table", "indices", "compact_grad", "exp_avg", "exp_avg_sq", "master", "step",
        "lr_tensor", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def _step_kernel(
    table, indices, compact_grad, exp_avg, exp_avg_sq, master, step,
    lr_tensor, grad_scale, found_inf, compact, has_lr, has_scale, has_found_inf,
    lr: tl.float64, weight_decay: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    one_minus_beta1, beta2, one_minus_beta2, eps, inverse_grad_scale, sign,
    TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = table + 2 * tl.program_id(0)
    segment = table + tl.load(block)
    entry = tl.load(block + 1) + tl.arange(0, BLOCK)
    end = tl.load(segment + 2)
    exists = entry < end
    index = tl.load(indices + entry, exists, other=0).to(tl.int64)
    m = tl.load(exp_avg + entry, exists)
    v = tl.load(exp_avg_sq + entry, exists)
    param = tl.load(segment).to(tl.pointer_type(TYPE))
    place = _place_of(index, table, tl.load(segment + 4))
    weight = param + place if master is None else master + entry
    w = tl.load(weight, exists)
    if compact:
        gradient = tl.load(compact_grad + entry, exists)
    else:
        grad = tl.load(segment + 1).to(tl.pointer_type(TYPE))
        grad_place = _place_of(index, table, tl.load(segment + 5))
        gradient = tl.load(grad + grad_place, exists).to(tl.float32)

    rate = lr
    if has_lr:
        rate = tl.load(lr_tensor).to(tl.float64)
    if has_scale:
        inverse_grad_scale = (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32)
    t = (tl.load(step + tl.load(segment + 3)) + 1.0).to(tl.float64)
    keep = tl.cast(1.0 - rate * weight_decay, tl.float32)
    step_size = tl.cast(rate / (1.0 - tl.exp(t * log_beta1)), tl.float32)
    bias_correction2 = tl.sqrt(1.0 - tl.exp(t * log_beta2)).to(tl.float32)

    # The order of operations is that of torch's AdamW and of the CPU kernel.
    g = gradient * inverse_grad_scale * sign
    m = _lerp(m, g, one_minus_beta1)
    v = v * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), bias_correction2) + eps
    w = w * keep - tl.div_rn(step_size * m, denominator)

    written = entry < _none_if_inf(end, found_inf, has_found_inf)
    tl.store(param + place, w.to(TYPE), written)
    tl.store(exp_avg + entry, m, written)
    tl.store(exp_avg_sq + entry, v, written)
    if master is not None:
        tl.store(master + entry, w, written)


@triton.jit
def _place_of(index, table, layout):
    """The memory offsets, in elements, of flat indices into a tensor with that layout."""
    place = tl.zeros_like(index)
    rest = index
    for d in range(tl.load(table + layout)):
        size = tl.load(table + layout + 1 + 2 * d)
        place += rest % size * tl.load(table + layout + 2 + 2 * d)
        rest = rest // size
    return place + rest  # rest: of a contiguous tensor, else 0


@triton.jit
def _lerp(m, g, one_minus_beta1):
    # As torch: starts from the end that is nearer, so that beta1 = 0 gives g itself.
    near_m = m + one_minus_beta1 * (g - m)
    near_g = g - (g - m) * (1.0 - one_minus_beta1)
    return tl.where(one_minus_beta1 < 0.5, near_m, near_g)


@triton.jit
def _none_if_inf(end, found_inf, has_found_inf):
    """``end``, or zero if the step must be skipped."""
    return tl.where(tl.load(found_inf, has_found_inf != 0, other=0.0) == 0, end, 0)


@triton.jit(
    do_not_specialize=["n", "has_found_inf"],
    do_not_specialize_on_alignment=["step", "found_inf"],
)
def _count_kernel(step, n, found_inf, has_found_inf, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    written = i < _none_if_inf(n, found_inf, has_found_inf)
    tl.store(step + i, tl.load(step + i, written) + 1.0, written)


class _Tables:
    """Tables on the GPU by what they hold: numbers, so that nothing is kept alive or confused.

    A table::

        per program: offset of its tensor's row below, its first entry
        per tensor: param, grad (addresses), end of its entries, number, offsets of both layouts
        per layout: how many dimensions, then size and stride of each, the innermost first
    """

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        # (stream, content) -> table and number of programs. Work of other streams does not wait for
        # the copy that fills a table, nor does its memory, once freed, wait for them.
        self._made: OrderedDict[tuple[int, Any], tuple[Tensor, int]] = OrderedDict()
        self._captured: dict[int, Tensor] = {}

    def find(
        self, like: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor], bounds: Sequence[int]
    ) -> tuple[Tensor, int]:
        """The table for these tensors, on the GPU of ``like``, and how many programs it serves."""
        content = (like.device, tuple(bounds), _places(params), _places(grads))
        if is_capturing(like):
            return self._captured_table(content)
        key = (stream_of(like), content)
        if key not in self._made:
            self._made[key] = _make(like, *content[1:])
            if len(self._made) > self._capacity:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def _captured_table(self, content: Any) -> tuple[Tensor, int]:
        """A table that a step before the capture has made; the graph may read it for ever."""
        for (_, known), made in self._made.items():
            if known == content:
                self._captured[made[0].data_ptr()] = made[0]
                return made
        raise RuntimeError(
            "the Triton backend cannot capture a step over tensors that it has not seen before: "
            "run the step once before capturing it, and keep the gradients where they are with "
            "zero_grad(set_to_none=False), or use gradients='streamed' or 'sampled'"
        )


_tables = _Tables()


def _places(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple([(tensor.data_ptr(), strided_of(tensor)) for tensor in tensors])


def _make(
    like: Tensor, bounds: Sequence[int], params: Sequence[Any], grads: Sequence[Any]
) -> tuple[Tensor, int]:
    programs = [
        (i, first)
        for i, (begin, end) in enumerate(pairwise(bounds))
        for first in range(begin, end, BLOCK)
    ]
    rows_begin = 2 * len(programs)
    layouts = _Layouts(rows_begin + _ROW * len(params))
    rows: list[int] = []
    for i, (param, layout) in enumerate(params):
        grad, grad_layout = grads[i] if grads else (0, ((), ()))
        rows += (param, grad, bounds[i + 1], i, layouts.offset(layout), layouts.offset(grad_layout))
    numbers = [n for i, first in programs for n in (rows_begin + _ROW * i, first)]
    host = torch.tensor(numbers + rows + layouts.numbers, dtype=torch.int64)
    table = launch.new_empty(like, [host.numel()], torch.int64)
    # From pinned memory, so that nobody waits.
    table.copy_(host.pin_memory() if like.is_cuda else host, non_blocking=True)
    return table, len(programs)


#: Numbers in the row of a tensor.
_ROW = 6


class _Layouts:
    """The last part of a table, in which equal layouts are one."""

    def __init__(self, begin: int) -> None:
        self.numbers: list[int] = []
        self._begin = begin
        self._offsets: dict[Any, int] = {}

    def offset(self, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
        """Where in the table a layout is; it is added if it is new."""
        if layout not in self._offsets:
            self._offsets[layout] = self._begin + len(self.numbers)
            sizes, strides = layout
            self.numbers.append(len(sizes))
            for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
                self.numbers += (size, stride)
        return self._offsets[layout]


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else _LOG_OF_ZERO


def _scalar(tensor: Tensor | None, otherwise: float, absent: Tensor) -> tuple[float, Tensor, int]:
    """A number that the host knows, or a tensor to read when the step runs, and whether it is one.

    ``absent`` stands in for a tensor that there is not.
    """
    if tensor is None:
        return otherwise, absent, 0
    if tensor.device != absent.device:  # on the CPU
        return float(tensor), absent, 0
    return otherwise, tensor, 1


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grad: Tensor | None,
    indices: Tensor,
    bounds: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    step: Tensor,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See :func:`saft_kernels.ops.sparse_adamw_`."""
    torch.ops.saft_kernels.check_sparse_adamw(
        params, grads, compact_grad, indices, bounds, exp_avg, exp_avg_sq, master, step,
        lr_tensor, grad_scale, found_inf,
    )  # fmt: skip
    if not params:
        return
    rate, lr_on_gpu, has_lr = _scalar(lr_tensor, lr, step)
    scale, scale_on_gpu, has_scale = _scalar(grad_scale, 1.0, step)
    skip, skip_on_gpu, has_found_inf = _scalar(found_inf, 0.0, step)
    if skip != 0:
        return
    table, programs = _tables.find(step, params, grads, bounds)
    launch.launch(
        _step_kernel, programs, table, indices, step if compact_grad is None else compact_grad,
        exp_avg, exp_avg_sq, master, step, lr_on_gpu, scale_on_gpu, skip_on_gpu,
        int(compact_grad is not None), has_lr, has_scale, has_found_inf,
        rate, weight_decay, _log(beta1), _log(beta2), 1 - beta1, beta2, 1 - beta2, eps,
        1 / scale, -1.0 if maximize else 1.0,
        TYPE=_TYPES[params[0].dtype], BLOCK=BLOCK,
    )  # fmt: skip
    launch.launch(
        _count_kernel, ceil_div(len(params), BLOCK), step, len(params), skip_on_gpu, has_found_inf,
        BLOCK=BLOCK,
    )  # fmt: skip
