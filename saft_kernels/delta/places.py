"""Where the entries of a delta lie in a model: in whole parameters, or in this process's shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels import ops
from saft_kernels.delta.file import TensorRecord
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import same_bits

#: A model, or the tensors of its parameters by name.
Target = nn.Module | Mapping[str, Tensor]


def tensors_of(target: Target) -> dict[str, Tensor]:
    """Parameters and buffers by all their names; what is tied is one object under several.

    In a model that was loaded with ``assign=True`` tied parameters are several objects that share
    their memory, and so are they in a ``state_dict``.
    """
    if isinstance(target, nn.Module):
        tensors = dict[str, Tensor](target.named_parameters(remove_duplicate=False))
        tensors |= target.named_buffers(remove_duplicate=False)
    else:
        tensors = {name: value for name, value in target.items() if isinstance(value, Tensor)}
    first: dict[object, Tensor] = {}
    return {name: first.setdefault(_memory(tensor), tensor) for name, tensor in tensors.items()}


def _memory(tensor: Tensor) -> object:
    """Where its elements lie; the tensor itself if they lie nowhere, or elsewhere too."""
    if tensor.is_meta or not tensor.numel() or is_sharded(tensor):
        return tensor
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


@dataclass(frozen=True)
class Place:
    """The entries of one record that this process holds.

    Attributes:
        record: whose entries.
        param: the parameter.
        tensor: its elements, or this process's shard of them.
        indices: flat indices into ``tensor``, on its device.
        chosen: which of the record's entries these are; None: all of them.
    """

    record: TensorRecord
    param: Tensor
    tensor: Tensor
    indices: Tensor
    chosen: Tensor | None = None

    def of_them(self, values: Tensor) -> Tensor:
        """Of values of all entries of the record those of the entries here, ready to be written."""
        if self.chosen is not None:
            values = values[self.chosen]
        return values.to(self.tensor.device, self.tensor.dtype)

    def gather(self) -> Tensor:
        """The values here."""
        return ops.gather(self.tensor, self.indices)

    def scatter_(self, values: Tensor) -> None:
        """Write values, one for each entry here."""
        ops.scatter_(self.tensor, self.indices, values)

    def holds(self, values: Tensor) -> bool:
        """Whether these are the values here, bit for bit."""
        return bool(same_bits(self.gather(), values).all())


def place_of(record: TensorRecord, param: Tensor) -> Place:
    """Where the entries of a record lie in a parameter.

    Raises:
        DeltaError: if it has no elements yet (``meta``), or is sharded in a way that has no place
            for single entries.
    """
    if param.is_meta:
        raise DeltaError(f"parameter {record.name!r} is on the meta device; load its values first")
    if not is_sharded(param):
        return Place(record, param, param.detach(), record.indices.to(param.device))
    sharded: Any = param
    chunks = sharded.__create_chunk_list__()
    if len(chunks) != 1 or any(each.is_partial() for each in sharded.placements):
        raise DeltaError(
            f"parameter {record.name!r} is sharded as {sharded.placements}, which deltas do not "
            "know; apply the delta before it is sharded"
        )
    local = sharded.to_local().detach()
    (chunk,) = chunks
    inside = torch.ones(record.indices.shape, dtype=torch.bool)
    flat = torch.zeros(record.indices.shape, dtype=torch.int64)
    along = torch.unravel_index(record.indices.long(), record.shape) if record.shape else ()
    for axis, begin, size in zip(along, chunk.offsets, chunk.sizes, strict=True):
        inside &= (axis >= begin) & (axis < begin + size)
        flat = flat * size + (axis - begin)
    chosen = inside.nonzero().flatten()
    indices = flat[chosen].to(record.indices.dtype)
    return Place(record, param, local, indices.to(local.device), chosen)


def whole(param: Tensor) -> Tensor:
    """The whole of a parameter; collected from all processes if it is sharded."""
    if is_sharded(param):
        return param.full_tensor()  # type: ignore[attr-defined]
    return param


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, as FSDP2 and tensor parallelism make them."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def write(places: Sequence[Place], new: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """Write new values at all places; on any error or interrupt put the old ones back.

    Raises:
        DeltaError: if parameters are sharded and another process could not write its part.
    """
    begun: list[Place] = []
    try:
        for place, values in zip(places, new, strict=True):
            begun.append(place)
            place.scatter_(values)
    except BaseException:
        put(begun, old)
        everywhere(False, places)
        raise
    if not everywhere(True, places):
        put(places, old)
        raise DeltaError("another process could not write its part; the model is as it was")


def put(places: Sequence[Place], values: Sequence[Tensor]) -> None:
    """Write values at all places, of which there may be fewer than values."""
    for place, its in zip(places, values, strict=False):
        place.scatter_(its)


def everywhere(condition: bool, places: Iterable[Place]) -> bool:
    """Whether a condition holds in every process, if parameters are sharded; else here."""
    return bool(least_of_all(int(condition), [place.param for place in places]))


def least_of_all(number: int, params: Iterable[Tensor]) -> int:
    """The least of the numbers of all processes, if parameters are sharded; else this one."""
    sharded = next((param for param in params if is_sharded(param)), None)
    if sharded is None:
        return number
    least = torch.tensor([number], device=sharded.device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least.item())
