"""The operations of the data path, in its order: one function per stage.

Each function checks what only Python can know, picks the backend (:mod:`saft_kernels.backends`) and
calls it; the compiled operations check shapes, dtypes and index ranges in front of their kernels
(``csrc/ops``). :mod:`saft_kernels.reference` defines every result. The schemas are in
``csrc/library.cpp``.

All operations change their first arguments in place or return compact vectors; none is
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from saft_kernels import backends, cost_model, index_values, reference
from saft_kernels.layout import TOKENS

#: What weights and gradients may be; anything else is converted first.
FLOATING = (torch.float32, torch.bfloat16, torch.float16)

_INT32_MAX = 2**31 - 1


#: What torch.compile and opcheck are told an operation returns, without running it.
_FAKES: dict[str, Callable[..., Any]] = {}


def _implementation(name: str, backend: str) -> Any:
    return getattr(reference if backend == "reference" else backends.kernels(backend), name)


def _fake(name: str, fake: Callable[..., Any]) -> None:
    _FAKES[name] = fake
    if backends.library_error() is None:
        torch.library.register_fake(f"saft_kernels::{name}", fake)


def define(namespace: str) -> torch.library.Library:
    """Another library of the same operations, whose implementations are still to be registered.

    Args:
        namespace: its operations are ``torch.ops.<namespace>.gather`` and so on.

    Returns:
        The library; the operations exist as long as it does.
    """
    library = torch.library.Library(namespace, "DEF")
    for name, fake in _FAKES.items():
        schema = str(getattr(torch.ops.saft_kernels, name).default._schema)
        library.define(schema.removeprefix("saft_kernels::"))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


def _nothing(*_: Any) -> None:
    """The fake of every operation that only writes to its arguments."""


def _changed(tensors: Iterable[Tensor]) -> None:
    """Tell autograd that these tensors were written, so that a stale backward raises."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


# 1 ----------------------------------------------------------------------------- accumulate_topk


def accumulate_topk_(
    acc: Tensor,
    grad: Tensor | None,
    scale: float,
    *,
    square: bool,
    key: int,
    offset: int,
    k: int,
    values: Tensor,
    positions: Tensor,
    state: Tensor,
) -> None:
    """Accumulate a gradient and keep the k largest magnitudes of the result, in one pass.

    ``acc += scale * grad`` (``scale * grad**2`` if ``square``), both roundings kept, so the result
    is bit-identical on every backend. Every finite ``|acc|`` that ranks before the k-th best so far
    is appended to the candidate buffer; when the buffer is full, candidates that no longer reach
    the threshold are dropped. After any sequence of calls that offers each position once,
    :func:`compact_topk_` leaves exactly the k best under the order (larger ``|acc|``, then lower
    position), whatever the order of the calls and the number of threads.

    Args:
        acc: fp32 [n], contiguous, changed in place.
        grad: n elements, fp32, bf16 or fp16, contiguous; None offers ``acc`` as it is.
        scale: factor of the gradient, rounded to fp32.
        square: accumulate the squared gradient.
        key: rank of the parameter, 0 <= key < 2**23: ties go to the lower.
        offset: flat index of ``acc[0]`` within the parameter.
        k: how many to keep; 0 accumulates only (and still looks for non-finite values).
        values: fp32 [capacity], the candidates' ``|acc|``; capacity > k.
        positions: int64 [capacity], the candidates' packed positions (:mod:`saft_kernels.layout`).
        state: int64 [STATE_SIZE], changed in place (:mod:`saft_kernels.layout`).

    Raises:
        RuntimeError: if a shape, dtype or device does not fit.
    """
    run = _implementation("accumulate_topk_", backends.resolve(acc.device))
    run(acc, grad, scale, square, key, offset, k, values, positions, state)
    _changed((acc, values, positions, state))


_fake("accumulate_topk_", _nothing)


def compact_topk_(k: int, values: Tensor, positions: Tensor, state: Tensor) -> None:
    """Reduce the candidate buffer to its k best, in no particular order, and raise the threshold.

    Args and errors: see :func:`accumulate_topk_`.
    """
    _implementation("compact_topk_", backends.resolve(values.device))(k, values, positions, state)
    _changed((values, positions, state))


_fake("compact_topk_", _nothing)


# 2 ----------------------------------------------------------------------------- gather, scatter_


def gather(dense: Tensor, indices: Tensor) -> Tensor:
    """The entries of ``dense`` at flat indices into its logical row-major order.

    Args:
        dense: any floating dtype (8-bit ones included), shape and strides (channels_last included).
        indices: int32 or int64 [nnz], strictly increasing, within ``dense``.

    Returns:
        [nnz], the dtype of ``dense``.

    Raises:
        RuntimeError: if an index is out of range or they do not increase strictly.
    """
    backend = backends.resolve(dense.device)
    if backend in backends.GPU:
        index_values.require_increasing(indices, [dense.numel()], "indices")
    result: Tensor = _implementation("gather", backend)(dense.detach(), indices)
    return result


_fake("gather", lambda dense, indices: dense.new_empty(indices.shape))


def scatter_(dense: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write ``values`` to ``dense`` at flat indices into its logical row-major order, in place.

    Args:
        dense: any floating dtype, shape and non-overlapping strides; every other entry keeps its
            bits.
        indices: int32 or int64 [nnz], strictly increasing, within ``dense``.
        values: [nnz], the dtype of ``dense``, in memory of their own: ``dense`` is written while
            they are read.

    Raises:
        RuntimeError: if an index is out of range or they do not increase strictly, or if ``values``
            lie in a ``dense`` that has no gaps in memory; nothing is written.
    """
    backend = backends.resolve(dense.device)
    if backend in backends.GPU:
        index_values.require_increasing(indices, [dense.numel()], "indices")
    _implementation("scatter_", backend)(dense.detach(), indices, values)
    _changed((dense,))


_fake("scatter_", _nothing)


# 3 ----------------------------------------------------------------------------- sparse_adamw_


def end_to_end(indices: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Index vectors one after the other, and the bounds of each in the result.

    Args:
        indices: T vectors, int32 or int64.

    Returns:
        (indices [nnz], bounds): vector i is ``indices[bounds[i]:bounds[i + 1]]``; int64 if any is.
    """
    bounds = [0, *accumulate(index.numel() for index in indices)]
    return torch.cat(list(indices)) if indices else torch.empty(0, dtype=torch.int32), bounds


def check_indices(indices: Tensor, bounds: Sequence[int], params: Sequence[Tensor]) -> None:
    """Look at the values of index vectors now, so that no later operation has to.

    The GPU backends do so when they first meet a vector, and wait for the GPU; afterwards they know
    it, its parts included. The CPU kernels look in every call, where it costs little.

    Args:
        indices: int32 or int64 [nnz].
        bounds: T + 1 numbers; parameter i owns ``indices[bounds[i]:bounds[i + 1]]``.
        params: T tensors.

    Raises:
        RuntimeError: if an index is out of range or they do not increase strictly.
    """
    if backends.resolve(indices.device) in backends.GPU and _fit(indices, bounds, params):
        index_values.require_increasing(indices, [p.numel() for p in params], "indices", bounds)


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor] | Tensor,
    indices: Sequence[Tensor] | Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    bounds: Sequence[int] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    master: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step over the selected entries of all ``params``, in one call.

    For every selected entry, with t the step count of its parameter after this call (Loshchilov &
    Hutter 2019, Algorithm 2, decoupled weight decay, in the order of operations of
    ``torch.optim.AdamW``)::

        m <- lerp(m, g, 1 - beta1)          v <- beta2 v + (1 - beta2) g^2
        w <- w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Weight decay acts on the selected entries only: every other entry of ``params`` keeps its bits.

    Args:
        params: T tensors of one dtype (fp32, bf16 or fp16) and device, changed in place.
        grads: either T dense tensors (shapes of ``params``; the selected entries are gathered on
            the way), or one compact vector, fp32 [nnz], in the order of ``indices``.
        indices: T vectors, int32 or int64, strictly increasing flat indices; nnz is their total
            length. Or, with ``bounds``, one vector of them end to end, which spares this call the
            concatenation and, on a GPU, a look at the values of what it made, for which the host
            waits (:func:`end_to_end` makes both).
        exp_avg: fp32 [nnz], changed in place.
        exp_avg_sq: fp32 [nnz], changed in place.
        step: fp32 [T], the number of steps each parameter has taken; incremented.
        bounds: T + 1 numbers; parameter i owns ``indices[bounds[i]:bounds[i + 1]]``.
        lr: learning rate, a float or a one-element tensor, read when the step runs if it is on the
            GPU of the others, so that nobody waits; on the CPU it is read now. So are the scalars
            below.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled decay factor.
        maximize: ascend instead of descend.
        master: fp32 [nnz], exact values of the selected entries; required for bf16 and fp16 params,
            whose entries become its rounded copy; None for fp32.
        grad_scale: one-element fp32 tensor that the gradients are divided by.
        found_inf: one-element fp32 tensor; not zero: nothing is changed, ``step`` included.

    Raises:
        RuntimeError: if a shape, dtype, device or index does not fit; nothing is written.
    """
    dense, compact = ((), grads) if isinstance(grads, Tensor) else (grads, None)
    rate, lr_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    if isinstance(indices, Tensor):
        if bounds is None:
            raise RuntimeError("one vector of indices needs bounds, which say whose they are")
    elif indices:
        indices, bounds = end_to_end(indices)
    else:
        indices, bounds = exp_avg.new_empty(0, dtype=torch.int32), [0]
    backend = backends.resolve(exp_avg.device)
    if backend in backends.GPU and _fit(indices, bounds, params):
        index_values.require_increasing(indices, [p.numel() for p in params], "indices", bounds)
    with torch.no_grad():
        _implementation("sparse_adamw_", backend)(
            list(params), list(dense), compact, indices, bounds,
            exp_avg, exp_avg_sq, master, step, rate, lr_tensor, *betas, eps, weight_decay, maximize,
            grad_scale, found_inf,
        )  # fmt: skip
    state = (exp_avg, exp_avg_sq, step) if master is None else (exp_avg, exp_avg_sq, step, master)
    _changed((*params, *state))


_fake("sparse_adamw_", _nothing)


def _fit(indices: Tensor, bounds: Sequence[int], params: Sequence[Tensor]) -> bool:
    """Whether the bounds name one vector of indices per parameter; else the operation says so."""
    ends = (bounds[0], bounds[-1]) if bounds else ()
    return (
        len(bounds) == len(params) + 1
        and ends == (0, indices.numel())
        and all(begin <= end for begin, end in pairwise(bounds))
    )


# 4 ----------------------------------------------------------------------------- sampled_grad


def pack_columns(x: Tensor, columns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What :func:`sampled_grad` needs of a layer's input: the columns that selected entries use.

    Args:
        x: [T, I] (tokens, input features), fp32, bf16, fp16 or fp64, any strides.
        columns: int32 [C], strictly increasing, within [0, I]. Column I is a column of ones: its
            entries get the gradient of the bias.
        dtype: of the result; that of ``x`` if None. An fp32 ``x`` may be packed as bf16 or fp16,
            rounded as ``x.to(dtype)`` rounds, in the same pass.

    Returns:
        [ceil(T / 16), C, 16]: 16 tokens of a column side by side, zeros behind
        the last token.

    Raises:
        RuntimeError: if a shape or dtype does not fit or a column is out of range.
    """
    backend = backends.resolve(x.device)
    if backend in backends.GPU and x.dim() == 2:
        index_values.require_increasing(
            columns, [x.shape[1] + 1], "columns", of="columns of x, that of ones included"
        )
    packed: Tensor = _implementation("pack_columns", backend)(x.detach(), columns, dtype)
    return packed


_fake(
    "pack_columns",
    lambda x, columns, dtype=None: x.new_empty(
        (x.shape[0] + TOKENS - 1) // TOKENS, columns.shape[0], TOKENS, dtype=dtype
    ),
)


def sampled_grad(
    packed: Tensor,
    grad_output: Tensor,
    rows: Tensor,
    offsets: Tensor,
    columns: Tensor,
    *,
    product: bool | None = None,
) -> Tensor:
    """The weight gradient of a linear layer, at selected entries only (a sampled product, SDDMM).

    For ``y = x @ W.T + b``, entry e that lies in row j, ``offsets[j] <= e < offsets[j + 1]``::

        grad[e] = sum over t of grad_output[t, rows[j]] * x[t, c]

    where c is the column of ``x`` that was packed as number ``columns[e]``. The dense gradient,
    ``grad_output.T @ x``, is never computed. :class:`saft_kernels.plan.LinearPlan` makes the
    indices.

    Args:
        packed: [ceil(T / 16), C, 16] from :func:`pack_columns`.
        grad_output: [T, O], the dtype of ``packed``, any strides.
        rows: int32 [R], strictly increasing rows of W that have entries.
        offsets: int32 [R + 1], rising from 0 to n.
        columns: int32 [n], within [0, C).
        product: whether a GPU computes tiles of the product over the used rows and columns and
            picks the entries from them, which is faster where entries share rows and columns, or
            entry by entry; None: what :mod:`saft_kernels.cost_model` predicts to be faster. Only
            the order of sums differs. A CPU has one way.

    Returns:
        [n], fp32 (fp64 for fp64 inputs), in which it was summed. The bits do not depend on the
        number of threads, nor on which GPU it is, but for bf16 and fp16 products: generations of
        tensor cores add the 16 tokens of an instruction each in their own way. Backends differ.

    Raises:
        RuntimeError: if a shape or dtype does not fit or an index is out of range.
    """
    backend = backends.resolve(grad_output.device)
    if backend in backends.GPU and grad_output.dim() == 2 and packed.dim() == 3:
        index_values.require_increasing(
            rows, [grad_output.shape[1]], "rows", of="columns of grad_output"
        )
        index_values.require_offsets(offsets, columns.numel())
        index_values.require_columns(columns, packed.shape[1], "packed columns")
        if product is None:
            product = cost_model.prefers_product(
                columns.shape[0], rows.shape[0], packed.shape[1], grad_output.dtype
            )
    grad: Tensor = _implementation("sampled_grad", backend)(
        packed.detach(), grad_output.detach(), rows, offsets, columns, bool(product)
    )
    return grad


_fake(
    "sampled_grad",
    lambda packed, grad_output, rows, offsets, columns, product: grad_output.new_empty(
        columns.shape, dtype=torch.promote_types(grad_output.dtype, torch.float32)
    ),
)


def sampled_embedding_grad(
    tokens: Tensor, grad_output: Tensor, rows: Tensor, offsets: Tensor, columns: Tensor
) -> Tensor:
    """The weight gradient of an embedding, at selected entries only.

    For ``y[t] = W[tokens[t]]``, entry e that lies in row j, ``offsets[j] <= e < offsets[j + 1]``::

        grad[e] = sum over t with tokens[t] == rows[j] of grad_output[t, columns[e]]

    Args:
        tokens: int64 [T]; tokens that are not in ``rows`` have no part, negative ones included.
        grad_output: [T, E], fp32, bf16, fp16 or fp64, any strides.
        rows: int32 [R], strictly increasing rows of W that have entries.
        offsets: int32 [R + 1], rising from 0 to n.
        columns: int32 [n], within [0, E).

    Returns:
        [n], fp32 (fp64 for fp64 inputs), in which it was summed.

    Raises:
        RuntimeError: if a shape or dtype does not fit or an index is out of range.
    """
    backend = backends.resolve(grad_output.device)
    if backend in backends.GPU and grad_output.dim() == 2:
        index_values.require_increasing(
            rows, [_INT32_MAX], "rows", of="rows that an embedding may have"
        )
        index_values.require_offsets(offsets, columns.numel())
        index_values.require_columns(columns, grad_output.shape[1], "columns of grad_output")
    grad: Tensor = _implementation("sampled_embedding_grad", backend)(
        tokens, grad_output.detach(), rows, offsets, columns
    )
    return grad


_fake(
    "sampled_embedding_grad",
    lambda tokens, grad_output, rows, offsets, columns: grad_output.new_empty(
        columns.shape, dtype=torch.promote_types(grad_output.dtype, torch.float32)
    ),
)


# 5 ----------------------------------------------------------------------------- delta files


def encode_indices(indices: Tensor, numel: int) -> Tensor:
    """The bytes that a delta file keeps of sorted flat indices.

    They are at most ``2 + log2(numel / n)`` bits for an index, wherever the indices lie
    (``csrc/ops/index_code.h`` describes them).

    Args:
        indices: int32 or int64 [n], strictly increasing, within [0, numel), on the CPU.
        numel: elements of the parameter, at most ``layout.MAX_ELEMENTS``.

    Returns:
        uint8 [bytes]; as many as n and ``numel`` say.

    Raises:
        RuntimeError: if an index is out of range or they do not increase strictly.
    """
    code: Tensor = _implementation("encode_indices", _backend_of_files())(indices, numel)
    return code


def decode_indices(code: Tensor, n: int, numel: int) -> Tensor:
    """What :func:`encode_indices` made bytes of; no other bytes are taken.

    Args:
        code: uint8 [bytes], contiguous, on the CPU.
        n: how many indices there are.
        numel: elements of the parameter, at most ``layout.MAX_ELEMENTS``.

    Returns:
        [n], strictly increasing, within [0, numel); int32, from 2**31 elements on int64.

    Raises:
        RuntimeError: if these are not the bytes of n such indices.
    """
    indices: Tensor = _implementation("decode_indices", _backend_of_files())(code, n, numel)
    return indices


def _backend_of_files() -> str:
    """Files are read and written on the CPU, whatever backend was asked for tensors on a GPU."""
    backend = "reference" if backends.requested_backend() == "reference" else "cpu"
    backends.require(backend)
    return backend
