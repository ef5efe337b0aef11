"""What index vectors must hold, checked for the GPU backends before a kernel reads them.

The CPU kernels check their indices in every call. On a GPU that takes a synchronisation, so a
vector is checked when it is first used and then trusted for as long as it lives and nobody writes
to it: a training step, whose vectors are always the same, waits for nothing.

A graph of ``torch.compile`` holds the operation without the check: index vectors that are new to it
are trusted as they come. Those of a plan or an optimizer are right by the way they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from saft_kernels.once import once_of_memory
from saft_kernels.streams import is_capturing


class _Known:
    """What has been checked of a vector's memory.

    Attributes:
        facts: (storage offset, length, what was asked) of checks that passed.
        pieces: (begin, end, limit) in the vector's storage: rises strictly within [0, limit).
    """

    def __init__(self) -> None:
        self.facts: set[Hashable] = set()
        self.pieces: set[tuple[int, int, int]] = set()


def require_increasing(
    indices: Tensor,
    numel: Sequence[int],
    name: str,
    bounds: Sequence[int] | None = None,
    *,
    of: str = "elements of the tensor",
) -> None:
    """Every vector ``indices[bounds[i]:bounds[i + 1]]`` increases strictly within [0, numel[i]).

    Pieces are known one by one: after one check of all vectors of an optimizer, a step of some of
    its parameters, or a gather at one vector, needs no other.

    Args:
        indices: int32 or int64 [n].
        numel: T limits.
        name: of the vector, for the message.
        bounds: T + 1 numbers that rise from 0 to n; None for a single vector.
        of: what there are ``numel`` of, for the message.

    Raises:
        RuntimeError: if one does not.
    """
    if _needs_no_check(indices):
        return
    bounds = (0, indices.numel()) if bounds is None else bounds
    known = _known_of(indices)
    offset = int(indices.storage_offset())
    fact = (offset, indices.numel(), tuple(numel), tuple(bounds))
    if fact in known.facts:
        return  # the usual case, and faster than to look at many pieces
    pieces = [
        (offset + begin, offset + end, n)
        for (begin, end), n in zip(pairwise(bounds), numel, strict=True)
    ]
    if known.pieces.issuperset(pieces):
        return
    _refuse_capture(indices)
    _check_increasing(indices, numel, name, bounds, of)
    known.facts.add(fact)
    known.pieces.update(pieces)


def require_offsets(offsets: Tensor, n: int) -> None:
    """``offsets`` rise from 0 to n without decreasing."""
    _require(offsets, ("offsets", n), lambda: _check_offsets(offsets, n))


def require_columns(columns: Tensor, limit: int, of: str) -> None:
    """``columns`` lie within [0, limit); ``of`` says what there are ``limit`` of."""
    _require(columns, ("columns", limit), lambda: _check_columns(columns, limit, of))


def _require(vector: Tensor, fact: Hashable, check: Callable[[], None]) -> None:
    """Run ``check`` unless it has passed for this vector as it stands."""
    if _needs_no_check(vector):
        return
    known = _known_of(vector)
    fact = (vector.storage_offset(), vector.numel(), fact)
    if fact not in known.facts:
        _refuse_capture(vector)
        check()
        known.facts.add(fact)


def _needs_no_check(vector: Tensor) -> bool:
    """Whether its values do not matter: it is traced, or the operation refuses it anyway.

    What is known of memory holds for vectors that lie in it in one piece. Nothing may be learned
    from a tensor of another form, whose numbers are others or in another order.
    """
    if torch.compiler.is_compiling() or isinstance(vector, FakeTensor):
        return True
    return vector.dim() != 1 or not vector.is_contiguous()


def _known_of(vector: Tensor) -> _Known:
    return once_of_memory(vector, "index values", _Known)


def _refuse_capture(vector: Tensor) -> None:
    if is_capturing(vector):
        raise RuntimeError(
            "index vectors are checked when they are first used, which a CUDA graph cannot "
            "capture; run the step once before capturing it"
        )


def _check_increasing(
    indices: Tensor, numel: Sequence[int], name: str, bounds: Sequence[int], of: str
) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
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
        n = _limit_of_disorder(indices, numel, bounds)
        raise RuntimeError(f"{name} must increase strictly and lie within the {n} {of}")


def _limit_of_disorder(indices: Tensor, numel: Sequence[int], bounds: Sequence[int]) -> int:
    """That of the first vector which does not increase strictly below it."""
    for (begin, end), n in zip(pairwise(bounds), numel, strict=True):
        own = indices[begin:end]
        if own.numel() and not bool((own[1:] > own[:-1]).all() & (own[0] >= 0) & (own[-1] < n)):
            break
    return n


def _check_offsets(offsets: Tensor, n: int) -> None:
    if offsets.numel() == 0:
        return  # the operation itself says so
    sound = (offsets[0] == 0) & (offsets[-1] == n) & (offsets[1:] >= offsets[:-1]).all()
    if not bool(sound):
        raise RuntimeError(
            f"offsets must rise from 0 to the number of entries, {n}, in {offsets.numel()} values"
        )


def _check_columns(columns: Tensor, limit: int, of: str) -> None:
    if not bool(((columns >= 0) & (columns < limit)).all()):
        raise RuntimeError(f"columns must lie within the {limit} {of}")
