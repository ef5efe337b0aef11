"""Two deltas of one base, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saft_kernels.delta.file import TensorRecord
from saft_kernels.delta.sparse_delta import SparseDelta
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import same_bits


@dataclass(frozen=True)
class Counted:
    """How two deltas differ in one parameter, or in all.

    Attributes:
        only_first: entries that the first one changes and the second one does not.
        only_second: the other way round.
        same: entries that both change to the same value, bit for bit.
        different: entries that both change, to different values.
    """

    only_first: int = 0
    only_second: int = 0
    same: int = 0
    different: int = 0

    @property
    def equal(self) -> bool:
        """Whether they do the same."""
        return not (self.only_first or self.only_second or self.different)

    def __add__(self, other: Counted) -> Counted:
        """Both together."""
        return Counted(
            self.only_first + other.only_first,
            self.only_second + other.only_second,
            self.same + other.same,
            self.different + other.different,
        )


@dataclass(frozen=True)
class Difference:
    """How two deltas of one base differ.

    Attributes:
        total: over all parameters.
        parameters: by name, for those that either delta changes, in model order.
        distance: Euclidean, between the two models that they make; None if the original values of
            an entry that one of them leaves alone are not known.
        metadata: key -> text in either, for what is not the same in both; None: it is missing.
    """

    total: Counted
    parameters: Mapping[str, Counted]
    distance: float | None
    metadata: Mapping[str, tuple[str | None, str | None]]


def diff(first: SparseDelta, second: SparseDelta) -> Difference:
    """Compare two deltas of one base.

    Raises:
        DeltaError: if they are of different bases.
    """
    first.base.require_same(second.base)
    parameters: dict[str, Counted] = {}
    squares: list[float | None] = []
    for a, b in zip(first.records, second.records, strict=True):
        if a.indices.numel() or b.indices.numel():
            in_a, in_b = _shared(a, b), _shared(b, a)
            same = same_bits(a.values[in_a], b.values[in_b]) if in_a.any() else in_a[:0]
            parameters[a.name] = Counted(
                int((~in_a).sum()), int((~in_b).sum()), int(same.sum()), int((~same).sum())
            )
            squares.append(_square_between(a.values[in_a], b.values[in_b]))
            squares.append(_square_alone(first, a, ~in_a))
            squares.append(_square_alone(second, b, ~in_b))
    known = [square for square in squares if square is not None]
    distance = math.sqrt(math.fsum(known)) if len(known) == len(squares) else None
    texts = {
        key: (first.metadata.get(key), second.metadata.get(key))
        for key in {**first.metadata, **second.metadata}
        if first.metadata.get(key) != second.metadata.get(key)
    }
    return Difference(sum(parameters.values(), Counted()), parameters, distance, texts)


def _shared(record: TensorRecord, other: TensorRecord) -> Tensor:
    """Which of the record's entries the other one has too."""
    return torch.isin(record.indices.long(), other.indices.long(), assume_unique=True)


def _square_between(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def _square_alone(delta: SparseDelta, record: TensorRecord, alone: Tensor) -> float | None:
    """By how much the entries are changed, squared and added; None if that cannot be known."""
    if not alone.any():
        return 0.0
    try:
        originals = delta.originals[record.name]
    except DeltaError:
        return None
    return _square_between(record.values[alone], originals[alone])
