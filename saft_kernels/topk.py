"""The k largest magnitudes of a stream of accumulated gradients, without concatenating them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from saft_kernels import ops
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.layout import (
    COUNT,
    MAX_ELEMENTS,
    MAX_KEYS,
    NO_POSITION,
    NO_THRESHOLD,
    NONFINITE,
    POSITION_BITS,
    STATE_SIZE,
    THRESHOLD,
    TIE,
    index_dtype,
    split_position,
)

# Room for candidates beyond the k best. On a GPU one block compacts, alone: for 12 MB it hardly
# ever has to.
_LEAST_ROOM = 1 << 16
_LEAST_ROOM_ON_GPU = 1 << 20
_MOST_ROOM = 1 << 24

# Updates between two looks for non-finite values: on a GPU a look waits for all work before it.
_CHECK_INTERVAL = 64


class StreamingTopK:
    """Selects the k entries of largest magnitude among tensors that arrive one after the other.

    Accumulators belong to keys (parameter names, as a rule). Each entry must be offered exactly
    once, when its accumulation is complete; :meth:`finish` then returns the k best. Ties go to the
    earlier key, then to the lower flat index. The result does not depend on the number of threads
    or on the backend, and if ``keys`` is given not on the order of the updates either.

    The memory held is 12 bytes for each of k + min(max(k, 2**16), 2**24) candidates, on a GPU of
    k + min(max(k, 2**20), 2**24) (fewer if ``total`` is smaller).

    Args:
        k: how many entries to select.
        device: where the accumulators live.
        keys: every key, in the order in which they win ties; without it the order of their first
            update counts.
        total: the number of entries that will be offered, if known.

    Raises:
        SelectionError: if k is negative or there are too many keys.
    """

    def __init__(
        self,
        k: int,
        *,
        device: torch.device | str = "cpu",
        keys: Sequence[Hashable] | None = None,
        total: int | None = None,
    ) -> None:
        if k < 0:
            raise SelectionError(f"k is {k}; it must not be negative")
        self.k = k
        self.device = torch.device(device)
        self._declared = keys is not None
        self._ranks: dict[Hashable, int] = {}
        self._extents: list[int] = []
        for key in keys or ():
            self._add(key)
        capacity = k + room_for(k, self.device.type)
        if total is not None:
            capacity = max(min(capacity, total), k + 1)
        self._values = torch.empty(capacity, dtype=torch.float32, device=device)
        self._positions = torch.empty(capacity, dtype=torch.int64, device=device)
        self._state = _initial_state().to(device)
        self._updates = 0

    @property
    def nbytes(self) -> int:
        """Bytes held for the candidates."""
        return self._values.nbytes + self._positions.nbytes + self._state.nbytes

    def update(
        self,
        key: Hashable,
        acc: Tensor,
        grad: Tensor | None = None,
        scale: float = 1.0,
        *,
        square: bool = False,
        offset: int = 0,
        final: bool = True,
    ) -> None:
        """``acc += scale * grad`` (``grad**2`` if ``square``), then offer ``|acc|`` if ``final``.

        Args:
            key: what the accumulator belongs to.
            acc: fp32 [n], any shape, contiguous; changed in place if ``grad`` is given.
            grad: n elements of any floating dtype, layout and strides; its row-major order is what
                counts.
            scale: factor of the gradient, rounded to fp32.
            square: accumulate the squared gradient.
            offset: flat index of the first element of ``acc`` within the key's tensor, for tensors
                that arrive in pieces.
            final: False accumulates only; the entries must be offered by a later call.

        Raises:
            NonFiniteGradientError: if ``acc`` holds NaN or infinity; it may come a few updates
                later, in :meth:`finish` at the latest.
            SelectionError: if ``keys`` were declared and this is not one of them.
            RuntimeError: on a CPU, if an entry was offered more often than there is room for.
        """
        rank = self._rank(key)
        end = offset + acc.numel()
        if offset < 0 or end > MAX_ELEMENTS:
            raise SelectionError(
                f"{key!r}: elements {offset} to {end} lie outside 0 to {MAX_ELEMENTS}"
            )
        self._extents[rank] = max(self._extents[rank], end)
        ops.accumulate_topk_(
            acc.detach() if acc.requires_grad else acc,
            None if grad is None else _row_major(grad),
            scale,
            square=square,
            key=rank,
            offset=offset,
            k=self.k if final else 0,
            values=self._values,
            positions=self._positions,
            state=self._state,
        )
        self._updates += 1
        if self._updates % _CHECK_INTERVAL == 0:
            self._require_finite()

    def finish(self) -> dict[Hashable, Tensor]:
        """The k best entries offered so far; more may be offered afterwards.

        Returns:
            key -> sorted flat indices, int32 (int64 if the key's tensor reaches 2**31 elements), on
            :attr:`device`, keys in the order of ties. A key that won no entry is absent.

        Raises:
            NonFiniteGradientError: if an accumulator held NaN or infinity.
            SelectionError: if fewer than k entries were offered, or one of the k best twice.
        """
        ops.compact_topk_(self.k, self._values, self._positions, self._state)
        self._require_finite()
        count = int(self._state[COUNT])
        if count < self.k:
            raise SelectionError(
                f"{self.k:,} entries are wanted but only {count:,} were offered; "
                "call update(..., final=True) for every accumulator before finish()"
            )
        positions = self._sorted_positions(count)
        if bool((positions[1:] == positions[:-1]).any()):
            raise SelectionError("an entry was offered twice; offer each one exactly once")
        return self._by_key(positions)

    def _sorted_positions(self, count: int) -> Tensor:
        """The first candidates, ascending; in the free part of the buffer if they fit."""
        positions, free = self._positions[:count], self._positions[count : 2 * count]
        if self.device.type != "cpu":
            return positions.sort().values
        ascending = free.copy_(positions) if free.numel() == count else positions.clone()
        # They come in a few ascending runs, which NumPy's stable sort only has to merge.
        ascending.numpy().sort(kind="stable")
        return ascending

    def _by_key(self, positions: Tensor) -> dict[Hashable, Tensor]:
        """Split sorted positions, which are overwritten, into the flat indices of every key."""
        ranks = torch.arange(len(self._ranks) + 1, device=self.device)
        sizes = torch.searchsorted(positions, ranks << POSITION_BITS).diff().tolist()
        dtypes = [index_dtype(extent) for extent in self._extents]
        positions.bitwise_and_(MAX_ELEMENTS - 1)
        pieces = {dtype: positions.to(dtype, copy=True).split(sizes) for dtype in set(dtypes)}
        return {
            key: pieces[dtype][rank]
            for rank, (key, dtype) in enumerate(zip(self._ranks, dtypes, strict=True))
            if sizes[rank]
        }

    def _rank(self, key: Hashable) -> int:
        if key not in self._ranks:
            if self._declared:
                raise SelectionError(f"{key!r} is not one of the declared keys")
            self._add(key)
        return self._ranks[key]

    def _add(self, key: Hashable) -> None:
        if key in self._ranks:
            raise SelectionError(f"key {key!r} is declared twice")
        if len(self._ranks) == MAX_KEYS:
            raise SelectionError(f"there are more than {MAX_KEYS:,} keys")
        self._ranks[key] = len(self._ranks)
        self._extents.append(0)

    def _require_finite(self) -> None:
        position = int(self._state[NONFINITE])
        if position == NO_POSITION:
            return
        rank, index = split_position(position)
        key = list(self._ranks)[rank]
        raise NonFiniteGradientError(
            f"the gradient of {key!r} adds up to NaN or infinity at flat index {index}; look for "
            "bad input, a loss that overflows, or too low a precision",
            parameter=str(key),
        )


def room_for(k: int, device_type: str) -> int:
    """For how many candidates beyond the k best there is room: so many that compacting is rare."""
    least = _LEAST_ROOM if device_type == "cpu" else _LEAST_ROOM_ON_GPU
    return min(max(k, least), _MOST_ROOM)


def _initial_state() -> Tensor:
    state = torch.zeros(STATE_SIZE, dtype=torch.int64)
    state[THRESHOLD] = NO_THRESHOLD
    state[TIE] = NO_POSITION
    state[NONFINITE] = NO_POSITION
    return state


def _row_major(grad: Tensor) -> Tensor:
    """The gradient as the kernels take it: strided, contiguous, fp32, bf16 or fp16."""
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    if grad.dtype not in ops.FLOATING:
        grad = grad.float()
    return (grad.detach() if grad.requires_grad else grad).contiguous()
