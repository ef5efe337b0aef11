"""Deltas as other programs read them: weight patches of vLLM, adapters of PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saft_kernels.delta.file import TensorRecord, dtype_name
from saft_kernels.delta.sparse_delta import SparseDelta
from saft_kernels.errors import DeltaError
from saft_kernels.files import atomic_write, make_folder, sort_metadata

PATCH_FORMAT, PATCH_VERSION = "saft-weight-patch", "1"

# vLLM ---------------------------------------------------------------------------------------------


class WeightPatch(NamedTuple):
    """New values of some entries of a tensor in a checkpoint.

    The fields, their order and meaning are those of vLLM's ``CheckpointWeightPatch`` (vllm-project/
    vllm#50723), so that ``CheckpointWeightPatch(*patch)`` is one.

    Attributes:
        name: of the tensor in the checkpoint.
        shape: of the whole tensor.
        dtype: of the whole tensor.
        values: [n].
        indices: int32 [n] (int64 for tensors of 2**31 entries or more), flat indices into the whole
            tensor, strictly increasing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


def weight_patches(
    delta: SparseDelta, names: Mapping[str, str] | None = None
) -> Iterator[WeightPatch]:
    """What the delta changes, in the coordinates of a checkpoint.

    Args:
        delta: whose names are those of the checkpoint, or are mapped to them.
        names: name in the delta -> name in the checkpoint; others are left as they are.

    Raises:
        DeltaError: if it writes NaN, which stands for "unchanged" there.
    """
    for record in delta.records:
        if record.indices.numel():
            if record.values.isnan().any():
                raise DeltaError(
                    f"the delta writes NaN to {record.name!r}, which a weight patch cannot say"
                )
            name = (names or {}).get(record.name, record.name)
            yield WeightPatch(name, record.shape, record.dtype, record.values, record.indices)


def save_patches(
    delta: SparseDelta, path: str | os.PathLike[str], names: Mapping[str, str] | None = None
) -> None:
    """Write :func:`weight_patches` to a safetensors file, atomically.

    Of each tensor there are ``<name>.indices`` and ``<name>.values``. The metadata are ``format``,
    ``version`` and ``patches``, a JSON array of ``[name, dtype, shape]`` in the delta's order.

    Raises:
        DeltaError: as :func:`weight_patches`.
        FileWriteError: if it cannot be written; a file that was there before stays as it was.
    """
    tensors, table = {}, []
    for patch in weight_patches(delta, names):
        tensors[f"{patch.name}.indices"] = patch.indices.contiguous()
        tensors[f"{patch.name}.values"] = patch.values.clone()
        table.append([patch.name, dtype_name(patch.dtype), list(patch.shape)])
    texts = {"format": PATCH_FORMAT, "version": PATCH_VERSION, "patches": json.dumps(table)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, texts)
        sort_metadata(temporary)


# PEFT ---------------------------------------------------------------------------------------------


def save_shira(
    delta: SparseDelta,
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    partial: bool = False,
) -> int:
    """Write a SHiRA adapter (Bhardwaj et al. 2024, arXiv 2406.13175) that PEFT loads.

    A SHiRA adapter adds sparse differences to the weights of linear layers, r (m + n) of them to
    each of m x n. Its rank r is the smallest that holds the fullest layer; where fewer entries
    change, zeros are added at places that do not. PEFT adds ``new - base`` to the base, and rounds:
    its model is the delta's up to that.

    Args:
        delta: whose original values are known.
        model: a model of the same architecture; tells which parameters are weights of
            ``nn.Linear``.
        folder: is made if need be; ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_model: what PEFT's ``base_model_name_or_path`` says.
        partial: leave out what is in no linear layer, instead of raising.

    Returns:
        How many changed entries are left out.

    Raises:
        DeltaError: if entries would be left out and ``partial`` is False, none would remain, a
            layer is too full, or the original values are not known.
        FileWriteError: if a file cannot be written.
    """
    originals = delta.originals
    layers = _linear_layers(delta, model)
    if not layers:
        raise DeltaError("the delta changes no weight of a linear layer, the only ones SHiRA has")
    others = delta.nnz - sum(record.indices.numel() for record in layers.values())
    if others and not partial:
        names = [r.name for r in delta.records if r.indices.numel() and r not in layers.values()]
        raise DeltaError(
            f"a SHiRA adapter has weights of linear layers only, and {others:,} of the delta's "
            f"{delta.nnz:,} entries are elsewhere ({names[0]!r} first); ask for a partial one to "
            "leave them out"
        )
    rank = max(-(-r.indices.numel() // sum(r.shape)) for r in layers.values())
    tensors = {}
    for name, record in layers.items():
        if rank * sum(record.shape) > record.shape[0] * record.shape[1]:
            raise DeltaError(
                f"a SHiRA adapter of rank {rank} does not fit into {record.name!r}, "
                f"{list(record.shape)}; it has the same rank in every layer"
            )
        values, places = _padded(record, originals[record.name], rank * sum(record.shape))
        tensors[f"base_model.model.{name}.shira_weight"] = values
        tensors[f"base_model.model.{name}.shira_indices"] = places
    make_folder(folder)
    with atomic_write(Path(folder, "adapter_model.safetensors")) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
        sort_metadata(temporary)
    config: dict[str, Any] = {
        "peft_type": "SHIRA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "target_modules": list(layers),
        "mask_type": "random",
        "random_seed": 0,  # of a mask that is drawn when it is loaded, and replaced by the file's
        "inference_mode": True,
    }
    with atomic_write(Path(folder, "adapter_config.json")) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return others


def _linear_layers(delta: SparseDelta, model: nn.Module) -> dict[str, TensorRecord]:
    """Module name -> record, for the changed weights of linear layers that are not tied."""
    # A subclass may be another thing: attention reads its output projection's weight past it.
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    found = {}
    for record in delta.records:
        name = record.name.removesuffix(".weight")
        if record.indices.numel() and not record.tied and name != record.name and name in linear:
            found[name] = record
    return found


def _padded(record: TensorRecord, originals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """fp32 differences and their places, int32 [2, count], filled up with unchanged entries."""
    height, width = record.shape
    changed = torch.zeros(height * width, dtype=torch.bool)
    changed[record.indices.long()] = True
    free = (~changed).nonzero().flatten()[: count - record.indices.numel()]
    flat = torch.cat([record.indices.long(), free])
    values = torch.zeros(count)
    differences = record.values.double() - originals.double()
    if not differences.isfinite().all():
        raise DeltaError(
            f"the delta changes {record.name!r} to or from NaN or infinity, which no difference "
            "can say"
        )
    values[: record.indices.numel()] = differences.float()
    return values, torch.stack([flat // width, flat % width]).int()
