"""One model that takes on one delta after another, in time that grows with their entries only."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saft_kernels.delta.base import Base
from saft_kernels.delta.places import Place, is_sharded, put
from saft_kernels.delta.sparse_delta import SparseDelta
from saft_kernels.errors import DeltaError


@dataclass(frozen=True)
class _Prepared:
    """A delta as it will be written: everything on the devices of the model."""

    places: list[Place]
    values: list[Tensor]


_NOTHING = _Prepared([], [])


class DeltaSwap:
    """Serves many deltas of one base with one model.

    The model is compared with the base once, when the first delta comes; from then on the swap
    knows it as long as nothing else writes to it. A delta is prepared when it is first seen (its
    indices and values go to the model's devices) and kept as long as the caller keeps it. Then a
    change from one to another reads and writes the entries of the two, however large the model is::

        swap = DeltaSwap(model)
        swap.to(birds)
        swap.to(flowers)
        swap.to(None)  # the base

    Args:
        model: a copy of the base; not sharded, not on the meta device.
        verify: compare every parameter with the fingerprints of the first delta's base. False is
            for a model known to be the base.
    """

    def __init__(self, model: nn.Module, *, verify: bool = True) -> None:
        self._model = model
        self._verify = verify
        self._base: Base | None = None
        self._prepared: WeakKeyDictionary[SparseDelta, _Prepared] = WeakKeyDictionary()
        self._current: SparseDelta | None = None
        self._originals: list[Tensor] = []

    @property
    def current(self) -> SparseDelta | None:
        """The delta that the model now has; None: it is the base."""
        return self._current

    def prepare(self, delta: SparseDelta) -> None:
        """Do beforehand what the first :meth:`to` of a delta would do.

        Raises:
            DeltaError: naming the parameter, if it is one of another base, or does not fit.
        """
        if delta not in self._prepared:
            self._prepared[delta] = self._prepare(delta)

    @torch.no_grad()
    def to(self, delta: SparseDelta | None) -> None:
        """Give the model this delta in place of the current one: all of it or nothing.

        Args:
            delta: one of the same base; None leads back to the base.

        Raises:
            DeltaError: naming the parameter, if the delta is one of another base or does not fit,
                or if the model was written to meanwhile where the current delta is; the model is
                then as it was.
        """
        if delta is not None:
            self.prepare(delta)
        if delta is self._current:
            return
        old = _NOTHING if self._current is None else self._prepared[self._current]
        new = _NOTHING if delta is None else self._prepared[delta]
        self._require_untouched(old)
        originals: list[Tensor] = []
        try:
            put(old.places, self._originals)
            originals = [place.gather() for place in new.places]
            put(new.places, new.values)
        except BaseException:
            if originals:
                put(new.places, originals)
            put(old.places, old.values)
            raise
        self._current, self._originals = delta, originals

    def _require_untouched(self, current: _Prepared) -> None:
        for place, values in zip(current.places, current.values, strict=True):
            if not place.holds(values):
                raise DeltaError(
                    f"{place.record.name!r} was written to after the current delta; load the "
                    "base weights again"
                )

    def _prepare(self, delta: SparseDelta) -> _Prepared:
        if self._base is not None:
            self._base.require_same(delta.base)
        params = delta.base.find(self._model)
        if any(param.is_meta or is_sharded(param) for param in params.values()):
            raise DeltaError(
                "the model has parameters that are sharded, or on the meta device; "
                "use SparseDelta.apply_"
            )
        if self._base is None:
            if self._verify:
                delta.base.require(params)
            self._base = delta.base
        places = delta.places(params)
        return _Prepared(places, [place.of_them(place.record.values) for place in places])
