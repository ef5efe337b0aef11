"""Several deltas of one base: what they share, and one delta made of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saft_kernels.delta.file import DeltaContent, TensorRecord
from saft_kernels.delta.sparse_delta import SparseDelta, release
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import same_bits

RULES = ("sum", "mean", "ties", "dare")


@dataclass(frozen=True)
class _Shared:
    """One parameter in all deltas.

    Attributes:
        record: of the first delta; all agree in what it says of the base.
        indices: [n], those of any delta, sorted.
        originals: [n], the base's values there.
        changes: fp64 [deltas, n], by how much each delta changes them; 0 where it does not.
        touched: bool [deltas, n], which entries each delta has.
    """

    record: TensorRecord
    indices: Tensor
    originals: Tensor
    changes: Tensor
    touched: Tensor


def _side_by_side(deltas: Sequence[SparseDelta]) -> Iterator[_Shared]:
    """Every parameter that some delta changes, in model order.

    Raises:
        DeltaError: if there are no deltas, they are of different bases, the original values of one
            are not known, or it changes an entry to or from NaN or infinity.
    """
    if not deltas:
        raise DeltaError("there are no deltas; give at least one")
    for delta in deltas[1:]:
        deltas[0].base.require_same(delta.base)
    originals = [delta.originals for delta in deltas]
    for records in zip(*(delta.records for delta in deltas), strict=True):
        first = records[0]
        indices = torch.cat([record.indices for record in records]).unique()
        if not indices.numel():
            continue
        dtype = next(record.values.dtype for record in records if record.indices.numel())
        base = torch.zeros(indices.shape, dtype=dtype)
        changes = torch.zeros(len(deltas), *indices.shape, dtype=torch.float64)
        touched = torch.zeros(changes.shape, dtype=torch.bool)
        for i, record in enumerate(records):
            if not record.indices.numel():
                continue
            at = torch.searchsorted(indices, record.indices)
            before = originals[i][record.name]
            known = touched[:i, at].any(0)
            if not same_bits(base[at][known], before[known]).all():
                raise DeltaError(
                    f"the original values of {record.name!r} are not the same in all deltas, "
                    "though their bases are; one was applied to another model without verification"
                )
            base[at] = before
            changes[i, at] = _finite(record.values.double() - before.double(), record.name)
            touched[i, at] = True
        yield _Shared(first, indices, base, changes, touched)


def _finite(changes: Tensor, name: str) -> Tensor:
    if not changes.isfinite().all():
        raise DeltaError(f"a delta changes {name!r} to or from NaN or infinity; leave it out")
    return changes


# Composing ----------------------------------------------------------------------------------------


def compose(
    deltas: Sequence[SparseDelta],
    rule: str = "sum",
    *,
    weights: Sequence[float] | None = None,
    keep: float = 1.0,
    drop: float = 0.9,
    seed: int = 0,
) -> SparseDelta:
    """One delta that does what several of the same base do.

    With t_i the change that delta i makes to an entry (0 where it makes none) and w_i its weight,
    the entry becomes its original value plus

    ======== ====================================================================================
    sum      the sum of all w_i t_i (task arithmetic; Ilharco et al. 2023, section 2)
    mean     that over the sum of all w_i (model soups; Wortsman et al. 2022b, section 2)
    ties     of the changes that are among the ``keep`` largest of their delta, those whose sign is
             that of the sum of all w_i t_i: their mean, weighted by w_i (TIES; Yadav et al. 2023,
             Algorithm 1)
    dare     the sum of all w_i m_i t_i / (1 - drop), m_i being 0 with probability ``drop`` and 1
             otherwise (DARE; Yu et al. 2024, section 3.2)
    ======== ====================================================================================

    Computed in double precision and rounded once. Entries that end as they began are left out.

    Args:
        deltas: whose original values are known.
        rule: one of these.
        weights: one for each delta; 1 by default.
        keep: share of each delta's changes that ``ties`` looks at, the largest ones; above 0, at
            most 1. The paper keeps 0.2 of a dense change; a sparse delta has been trimmed already.
        drop: share of changes that ``dare`` drops; 0 to below 1.
        seed: of what is dropped.

    Returns:
        A delta of the same base, whose original values are known. Its ``metadata`` are what all
        have in common, and ``composed``, JSON that says how it was made.

    Raises:
        DeltaError: if the deltas are of different bases, original values are not known, changes
            are not finite, or an argument is out of range.
    """
    w = _checked(deltas, rule, weights, keep, drop)
    merged = _merging(deltas, rule, w, keep, drop, seed)
    records, originals = {}, {}
    for shared in _side_by_side(deltas):
        exact = shared.originals.double() + merged(shared)
        values = exact.to(shared.originals.dtype)
        changed = ~same_bits(values, shared.originals)
        records[shared.record.name] = replace(
            shared.record, indices=shared.indices[changed], values=values[changed]
        )
        originals[shared.record.name] = shared.originals[changed]
    return _delta_of(deltas, records, originals, _how(deltas, rule, w, keep, drop, seed))


def _checked(
    deltas: Sequence[SparseDelta],
    rule: str,
    weights: Sequence[float] | None,
    keep: float,
    drop: float,
) -> Tensor:
    """The weights, [deltas, 1]."""
    if rule not in RULES:
        raise DeltaError(f"there is no rule {rule!r}; choose one of {', '.join(RULES)}")
    w = torch.tensor([1.0] * len(deltas) if weights is None else list(weights), dtype=torch.float64)
    if len(w) != len(deltas):
        raise DeltaError(f"there are {len(deltas)} deltas and {len(w)} weights; give one for each")
    if not w.isfinite().all():
        raise DeltaError(f"weights must be finite numbers, not {list(weights or ())}")
    if rule == "mean" and w.sum() == 0:
        raise DeltaError("the weights of a mean must not add up to 0")
    if not 0 < keep <= 1:
        raise DeltaError(f"keep must be above 0 and at most 1, not {keep}")
    if not 0 <= drop < 1:
        raise DeltaError(f"drop must be 0 or more and below 1, not {drop}")
    return w[:, None]


def _merging(
    deltas: Sequence[SparseDelta], rule: str, w: Tensor, keep: float, drop: float, seed: int
) -> Callable[[_Shared], Tensor]:
    """What is added to the original values of a parameter."""
    if rule == "sum":
        return lambda shared: (w * shared.changes).sum(0)
    if rule == "mean":
        return lambda shared: (w * shared.changes).sum(0) / w.sum()
    if rule == "ties":
        thresholds = _thresholds(deltas, keep)
        return lambda shared: _ties(shared.changes, w, thresholds)
    generator = torch.Generator().manual_seed(seed)

    def dare(shared: _Shared) -> Tensor:
        stays = torch.rand(shared.changes.shape, generator=generator, dtype=torch.float64) >= drop
        return (w * shared.changes * stays).sum(0) / (1 - drop)

    return dare


def _ties(changes: Tensor, w: Tensor, thresholds: Tensor) -> Tensor:
    trimmed = changes * (changes.abs() >= thresholds)
    elected = (w * trimmed).sum(0).sign()
    agree = (trimmed.sign() == elected) & (elected != 0)
    total = (w * agree).sum(0)
    return torch.where(total == 0, 0, (w * trimmed * agree).sum(0) / total)


def _thresholds(deltas: Sequence[SparseDelta], keep: float) -> Tensor:
    """The least change of each delta that is among its largest; [deltas, 1]."""
    parts: list[list[Tensor]] = [[] for _ in deltas]
    for shared in _side_by_side(deltas):
        for i, part in enumerate(parts):
            part.append(shared.changes[i, shared.touched[i]].abs())
    least = []
    for part in parts:
        sizes = torch.cat(part) if part else torch.zeros(0)
        count = max(1, round(keep * len(sizes)))
        least.append(float(sizes.topk(min(count, len(sizes))).values.min()) if len(sizes) else 0.0)
    return torch.tensor(least, dtype=torch.float64)[:, None]


def _how(
    deltas: Sequence[SparseDelta], rule: str, w: Tensor, keep: float, drop: float, seed: int
) -> dict[str, object]:
    """What ``metadata`` says of a composition."""
    options: dict[str, object] = {"ties": {"keep": keep}, "dare": {"drop": drop, "seed": seed}}
    sources = [
        {"weight": weight, "nnz": delta.nnz, **delta.metadata}
        for weight, delta in zip(w.flatten().tolist(), deltas, strict=True)
    ]
    return {"rule": rule, "options": options.get(rule, {}), "sources": sources}


def _delta_of(
    deltas: Sequence[SparseDelta],
    records: dict[str, TensorRecord],
    originals: dict[str, Tensor],
    how: dict[str, object],
) -> SparseDelta:
    first = deltas[0]
    common = set(first.metadata.items()).intersection(*(d.metadata.items() for d in deltas))
    metadata = {key: value for key, value in first.metadata.items() if (key, value) in common}
    metadata["composed"] = json.dumps(how)
    kept = [records.get(record.name, _unchanged(record)) for record in first.records]
    nnz = sum(record.indices.numel() for record in kept)
    # Of the same candidates, as far as that can be told.
    candidates = max(delta.nnz / delta.density for delta in deltas if delta.density) if nnz else 1
    density = min(nnz / candidates, 1.0)
    return SparseDelta(DeltaContent(tuple(kept), metadata, density, release(), originals))


def _unchanged(record: TensorRecord) -> TensorRecord:
    return replace(record, indices=record.indices[:0], values=record.values[:0])


# Overlap ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collisions:
    """Where deltas meet in one parameter.

    Attributes:
        name: of the parameter.
        entries: that any delta changes.
        shared: that two deltas or more change.
        conflicts: of these, the ones that they change in different directions.
    """

    name: str
    entries: int
    shared: int
    conflicts: int


@dataclass(frozen=True)
class Overlap:
    """What several deltas of one base have in common.

    Attributes:
        nnz: entries of each delta.
        shared: [deltas][deltas], entries that two deltas both change; each with itself: its own.
        agree: [deltas][deltas], those of ``shared`` that both change in the same direction.
        parameters: where they meet, for every parameter that any of them changes, in model order.
    """

    nnz: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    agree: tuple[tuple[int, ...], ...]
    parameters: tuple[Collisions, ...]


def overlap(deltas: Sequence[SparseDelta]) -> Overlap:
    """How many entries deltas share, where, and whether they change them in the same direction.

    Raises:
        DeltaError: if they are of different bases, the original values of one are not known, or
            its changes are not finite.
    """
    count = len(deltas)
    shared = torch.zeros(count, count, dtype=torch.int64)
    agree = torch.zeros(count, count, dtype=torch.int64)
    parameters = []
    for each in _side_by_side(deltas):
        touched, signs = each.touched.double(), each.changes.sign()
        shared += (touched @ touched.T).long()
        up, down = (signs > 0).double(), (signs < 0).double()
        still = touched * (signs == 0)
        agree += (up @ up.T + down @ down.T + still @ still.T).long()
        several = each.touched.sum(0) > 1
        both_ways = (signs > 0).any(0) & (signs < 0).any(0)
        parameters.append(
            Collisions(
                each.record.name,
                each.indices.numel(),
                int(several.sum()),
                int((several & both_ways).sum()),
            )
        )
    nnz = tuple(delta.nnz for delta in deltas)
    return Overlap(nnz, _rows(shared), _rows(agree), tuple(parameters))


def _rows(matrix: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
