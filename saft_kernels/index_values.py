"""What index vectors must hold, checked for the GPU backends before a kernel reads them.

The CPU kernels check their indices in every call. On a GPU that takes a synchronisation, so a
vector is checked when it is first used and then trusted for as long as it lives and nobody writes
to it: a training step, whose vectors are always the same, waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

# The vectors that were checked (a slice counts as part of its base): version, and what is known.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def require_increasing(
    indices: Tensor, numel: Sequence[int], name: str, bounds: Sequence[int] | None = None
) -> None:
    """Every vector ``indices[bounds[i]:bounds[i + 1]]`` increases strictly within [0, numel[i]).

    Args:
        indices: int32 or int64 [n].
        numel: T limits.
        name: of the vector, for the message.
        bounds: T + 1 numbers that rise from 0 to n; None for a single vector.

    Raises:
        RuntimeError: if one does not.
    """
    bounds = (0, indices.numel()) if bounds is None else bounds
    fact = ("increasing", tuple(numel), tuple(bounds))
    _require(indices, fact, lambda: _check_increasing(indices, numel, name, bounds))


def require_offsets(offsets: Tensor, n: int) -> None:
    """``offsets`` rise from 0 to n without decreasing."""
    _require(offsets, ("offsets", n), lambda: _check_offsets(offsets, n))


def require_columns(columns: Tensor, packed: int) -> None:
    """``columns`` lie within [0, packed)."""
    _require(columns, ("columns", packed), lambda: _check_columns(columns, packed))


def _require(vector: Tensor, fact: Hashable, check: Callable[[], None]) -> None:
    """Run ``check`` unless it has passed for this vector as it stands."""
    if torch.compiler.is_compiling() or isinstance(vector, FakeTensor):
        return
    whole = vector if vector._base is None else vector._base
    version, facts = _known.get(whole, (None, set()))
    if version != vector._version:
        facts = set()
    fact = (vector.storage_offset(), vector.numel(), fact)
    if fact in facts:
        return
    if vector.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "index vectors are checked when they are first used, which a CUDA graph cannot "
            "capture; run the step once before capturing it"
        )
    check()
    _known[whole] = (vector._version, facts | {fact})


def _check_increasing(
    indices: Tensor, numel: Sequence[int], name: str, bounds: Sequence[int]
) -> None:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return  # the operation itself says so
    sound = torch.ones((), dtype=torch.bool, device=indices.device)
    rising = indices[1:] > indices[:-1]
    begins = [begin for begin, end in pairwise(bounds) if 0 < begin < end]
    if begins:  # a vector's first index may be lower than the last of the one before
        rising[torch.tensor(begins, device=indices.device) - 1] = True
    sound &= rising.all()
    owners = [(begin, end, n) for (begin, end), n in zip(pairwise(bounds), numel, strict=True)]
    owners = [owner for owner in owners if owner[0] < owner[1]]
    if owners:
        first, end, limit = torch.tensor(owners, device=indices.device).unbind(1)
        sound &= (indices[first] >= 0).all() & (indices[end - 1] < limit).all()
    if not bool(sound):
        raise RuntimeError(_disorder(indices, numel, name, bounds))


def _disorder(indices: Tensor, numel: Sequence[int], name: str, bounds: Sequence[int]) -> str:
    for (begin, end), n in zip(pairwise(bounds), numel, strict=True):
        own = indices[begin:end]
        if own.numel() and not bool((own[1:] > own[:-1]).all() & (own[0] >= 0) & (own[-1] < n)):
            break
    return f"{name} must increase strictly and lie within the tensor's {n} elements"


def _check_offsets(offsets: Tensor, n: int) -> None:
    if offsets.dim() != 1 or offsets.numel() == 0:
        return  # the operation itself says so
    sound = (offsets[0] == 0) & (offsets[-1] == n) & (offsets[1:] >= offsets[:-1]).all()
    if not bool(sound):
        raise RuntimeError(
            f"offsets must rise from 0 to the number of entries, {n}, in {offsets.numel()} values"
        )


def _check_columns(columns: Tensor, packed: int) -> None:
    if not bool(((columns >= 0) & (columns < packed)).all()):
        raise RuntimeError(f"columns must lie within the {packed} packed columns")
