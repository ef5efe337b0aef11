"""A delta of any two models of one architecture: what makes one of the other, or most of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from saft_kernels import ops
from saft_kernels.delta.file import CHANGEABLE, DeltaContent, TensorRecord, dtype_name
from saft_kernels.delta.places import Target, is_sharded, tensors_of
from saft_kernels.delta.sparse_delta import SparseDelta, release, require_texts
from saft_kernels.errors import DeltaError, NonFiniteGradientError
from saft_kernels.fingerprint import count_different_bits, fingerprints, same_bits
from saft_kernels.layout import index_dtype
from saft_kernels.select import number_of_entries
from saft_kernels.topk import StreamingTopK
from saft_kernels.untrusted import near_matches

#: Elements that are compared at a time, in double precision.
PIECE = 1 << 18


@dataclass(frozen=True)
class Extraction:
    """A delta of two models, and what it leaves out.

    Attributes:
        delta: what turns the base into the other model, or close to it.
        different: entries in which the two differ, excluded tensors included.
        error: of the model that the delta makes: the Euclidean norm of what is left out over that
            of the whole difference; 0 if nothing is left out.
        largest: the largest absolute difference that is left out.
        left_out: tensors that differ and were excluded.
    """

    delta: SparseDelta
    different: int
    error: float
    largest: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    """One tensor in both models, under all its names."""

    names: tuple[str, ...]
    tuned: Tensor
    base: Tensor
    excluded: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def changeable(self) -> bool:
        return not self.excluded and self.base.dtype in CHANGEABLE

    def pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Flat index of the first entry, tuned, base: vectors of bounded size, in order."""
        offset = 0
        a, b = (t.detach() if t.dim() else t.detach().view(1) for t in (self.tuned, self.base))
        rows = max(1, PIECE // max(1, a[:1].numel()))
        for tuned, base in zip(a.split(rows), b.split(rows), strict=True):
            yield offset, tuned.reshape(-1), base.to(tuned.device).reshape(-1)
            offset += tuned.numel()


@torch.no_grad()
def extract(
    tuned: Target,
    base: Target,
    density: float | None = None,
    *,
    exclude: str | Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Extraction:
    """Make a delta of a fine-tuned model and its base, however it was fine-tuned.

    Exactly, or the ``floor(density * D)`` entries with the largest absolute differences, by one
    ranking over all D entries; ties go to the tensor that comes first, then to the lower index.
    Everything in a ``state_dict`` is covered; of a model the parameters, and the buffers that
    differ. Models are read piece by piece: neither has to fit into memory (:func:`.open_weights`).

    Args:
        tuned: a model or the tensors of its ``state_dict``.
        base: the same of the model that fine-tuning started from.
        density: share of the entries to keep; None keeps all that differ.
        exclude: tensors to leave as they are in the base, by name: a shell pattern or several.
        metadata: text to keep with the delta.

    Raises:
        DeltaError: naming the tensor, if one is missing from either model, has another shape or
            dtype there, is tied in one of them only, or holds whole numbers that differ; or, with
            a density, a difference is NaN or infinite.
        SelectionError: if the density selects nothing.
    """
    texts = require_texts(metadata)
    pairs = _pairs(_state(tuned), _state(base), exclude)
    if isinstance(base, nn.Module):
        pairs = list(_without_idle_buffers(pairs, base))
    chosen = _differing(pairs) if density is None else _largest(pairs, density)
    prints = fingerprints(pair.base for pair in pairs)
    records, originals = [], {}
    for pair, its in zip(pairs, prints, strict=True):
        indices = chosen.get(pair.name, torch.empty(0, dtype=index_dtype(pair.base.numel())))
        values, originals[pair.name] = (_gather(t, indices) for t in (pair.tuned, pair.base))
        kind = (pair.base.dtype, tuple(pair.base.shape), its)
        records.append(TensorRecord(pair.name, pair.names[1:], *kind, indices, values))
    nnz = sum(record.indices.numel() for record in records)
    candidates = sum(pair.base.numel() for pair in pairs if pair.changeable)
    share = nnz / candidates if candidates else 0.0
    content = DeltaContent(tuple(records), texts, share, release(), originals)
    return Extraction(SparseDelta(content), *_left_out(pairs, chosen))


def _state(target: Target) -> dict[str, Tensor]:
    """What its ``state_dict`` holds: no buffers that a model makes anew."""
    return tensors_of(target.state_dict() if isinstance(target, nn.Module) else target)


def _without_idle_buffers(pairs: Sequence[_Pair], base: nn.Module) -> Iterator[_Pair]:
    """Without what is no parameter and does not differ, as deltas that were captured."""
    parameters = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    for pair in pairs:
        if pair.name in parameters or count_different_bits(pair.tuned, pair.base):
            yield pair


def _pairs(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], exclude: str | Sequence[str]
) -> list[_Pair]:
    """Every tensor of the base once, in its order, with its counterpart."""
    for name in {**base, **tuned}:
        for here, there, which in ((base, tuned, "tuned model"), (tuned, base, "base")):
            if name in here and name not in there:
                raise DeltaError(
                    f"the {which} has no tensor {name!r}{near_matches(name, there)}; give two "
                    "models of one architecture"
                )
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in base):
            raise DeltaError(
                f"there is no tensor {pattern!r} to exclude{near_matches(pattern, base)}"
            )
    names: dict[Tensor, list[str]] = {}
    for name, tensor in base.items():
        names.setdefault(tensor, []).append(name)
    pairs = []
    for tensor, its in names.items():
        excluded = any(fnmatchcase(name, pattern) for name in its for pattern in patterns)
        pair = _Pair(tuple(its), tuned[its[0]], tensor, excluded)
        _require_pair(pair, tuned)
        pairs.append(pair)
    return pairs


def _require_pair(pair: _Pair, tuned: Mapping[str, Tensor]) -> None:
    a, b, name = pair.tuned, pair.base, pair.name
    for tensor in (a, b):
        if tensor.is_meta or is_sharded(tensor):
            where = "on the meta device" if tensor.is_meta else "sharded"
            raise DeltaError(f"{name!r} is {where}; give models that hold their whole weights")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise DeltaError(
            f"{name!r} is {dtype_name(a.dtype)} {list(a.shape)} in the tuned model and "
            f"{dtype_name(b.dtype)} {list(b.shape)} in the base; give two models of one "
            "architecture, in one dtype"
        )
    for other in pair.names[1:]:
        if tuned[other] is not a and not same_bits(tuned[other], a).all():
            raise DeltaError(
                f"{name!r} and {other!r} are one tied tensor in the base, and differ in the tuned "
                "model, which a delta cannot say"
            )
    if b.dtype not in CHANGEABLE and not pair.excluded and count_different_bits(a, b):
        raise DeltaError(
            f"{name!r} differs and is {dtype_name(b.dtype)}, which a delta cannot change; leave it "
            f"as it is in the base with exclude={name!r}"
        )


def _differing(pairs: Sequence[_Pair]) -> dict[str, Tensor]:
    """The flat indices of all entries that differ, by name."""
    found = {}
    for pair in pairs:
        if pair.changeable and pair.base.numel():
            parts = [
                (~same_bits(tuned, base)).nonzero().flatten().cpu() + offset
                for offset, tuned, base in pair.pieces()
            ]
            indices = torch.cat(parts).to(index_dtype(pair.base.numel()))
            if indices.numel():
                found[pair.name] = indices
    return found


def _largest(pairs: Sequence[_Pair], density: float) -> dict[str, Tensor]:
    """Those of the largest absolute differences; fewer, if fewer differ."""
    candidates = [pair for pair in pairs if pair.changeable]
    numel = sum(pair.base.numel() for pair in candidates)
    keys = [pair.name for pair in candidates]
    top = StreamingTopK(number_of_entries(density, numel), keys=keys, total=numel)
    try:
        for pair in candidates:
            for offset, tuned, base in pair.pieces():
                difference = (tuned.double() - base.double()).float().cpu()
                top.update(pair.name, difference, offset=offset)
        found = {str(name): indices for name, indices in top.finish().items()}
    except NonFiniteGradientError as error:
        raise DeltaError(
            f"{error.parameter!r} differs by NaN or infinity, which no ranking has a place for; "
            "extract without a density, or exclude it"
        ) from error
    by_name = {pair.name: pair for pair in candidates}
    for name, indices in found.items():
        pair = by_name[name]
        differs = ~same_bits(_gather(pair.tuned, indices), _gather(pair.base, indices))
        found[name] = indices[differs]
    return {name: indices for name, indices in found.items() if indices.numel()}


def _gather(tensor: Tensor, indices: Tensor) -> Tensor:
    if not indices.numel():
        return torch.empty(0, dtype=tensor.dtype)
    return ops.gather(tensor.detach(), indices.to(tensor.device)).cpu()


def _left_out(
    pairs: Sequence[_Pair], chosen: Mapping[str, Tensor]
) -> tuple[int, float, float, tuple[str, ...]]:
    """Entries that differ, the relative error, the largest of it, and what was excluded."""
    different, everything, rest, largest = 0, 0.0, 0.0, 0.0
    excluded = []
    for pair in pairs:
        indices = chosen.get(pair.name, torch.empty(0, dtype=torch.int64)).long()
        here = 0
        for offset, tuned, base in pair.pieces():
            count = int((~same_bits(tuned, base)).sum())
            first, end = torch.searchsorted(indices, torch.tensor([offset, offset + tuned.numel()]))
            here += count
            if not count:
                continue
            difference = (tuned.double() - base.double()).cpu()
            everything += float(difference.square().sum())
            if end - first < count:
                difference[indices[first:end] - offset] = 0
                rest += float(difference.square().sum())
                largest = max(largest, float(difference.abs().max()))
        different += here
        if here and pair.excluded:
            excluded.append(pair.name)
    error = math.sqrt(rest / everything) if rest else 0.0
    return different, error, largest, tuple(excluded)
