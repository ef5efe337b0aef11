"""Checkpoints: everything a run needs to continue bit for bit, in one safetensors file.

The file holds the tensors of a nested structure of dicts, lists, tuples, numbers and texts; its
metadata hold the rest of the structure as JSON, and a checksum. No pickle is written or read.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from saft_clip.errors import CheckpointError
from saft_kernels.files import atomic_write, remove_leftovers, sort_metadata

FORMAT = "saft-checkpoint"
VERSION = "1"

#: Checkpoints that are kept: the last one, and the one before it in case the last is damaged.
KEPT = 2

_PATTERN = "step-*.safetensors"


def save_checkpoint(folder: Path, step: int, state: Any) -> Path:
    """Write the checkpoint of a step, atomically, then remove all but the newest two.

    Args:
        folder: of this run's checkpoints; made if it is missing.
        step: optimizer steps taken.
        state: nested dicts, lists and tuples of tensors, numbers, texts and None.

    Returns:
        The file.

    Raises:
        FileWriteError: if it cannot be written; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_take_apart(state, tensors))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "structure": structure,
        "checksum": _checksum(structure, tensors),
    }
    path = folder / f"step-{step:08d}.safetensors"
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
        sort_metadata(temporary)
    _prune(folder)
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """This run's checkpoints, oldest first."""
    return sorted(folder.glob(_PATTERN))


def load_latest(folder: Path) -> Any | None:
    """The state in the newest checkpoint; None if there is none.

    Raises:
        CheckpointError: if that file is broken; the message names the one before it, if any.
    """
    found = find_checkpoints(folder)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1])
    except CheckpointError as error:
        advice = "there is no earlier one, so start again in another folder"
        if len(found) > 1:
            advice = f"delete it to continue from the one before it, {found[-2].name}"
        raise CheckpointError(f"{error}; {advice}") from error


def load_checkpoint(path: Path) -> Any:
    """Read what :func:`save_checkpoint` wrote; all tensors are on the CPU.

    Raises:
        CheckpointError: if the file is missing, cut short, broken, or not of this release.
    """
    where = f"the checkpoint {path}"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{where} is broken or cut short ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror or error})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(f"{where} was not written by this release")
    structure = metadata.get("structure", "")
    if metadata.get("checksum") != _checksum(structure, tensors):
        raise CheckpointError(f"{where} is broken: its content does not match its checksum")
    return _put_together(json.loads(structure), tensors)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators: Python's, numpy's, torch's, and the CUDA device's."""
    state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = state
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_states`."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _prune(folder: Path) -> None:
    for path in find_checkpoints(folder)[:-KEPT]:
        with suppress(OSError):
            path.unlink()
    remove_leftovers(folder, [_PATTERN])


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The structure in JSON values: a container or tensor is a list that begins with its kind."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _alone(value)
        return ["tensor", name]
    if isinstance(value, Mapping):
        return ["dict", [[k, _take_apart(v, tensors)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_take_apart(v, tensors) for v in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value)}")


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(one, tensors) for key, one in content}
    items = [_put_together(one, tensors) for one in content]
    return tuple(items) if kind == "tuple" else items


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and in a storage of its own: safetensors refuses shared ones."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if shared else tensor


def _checksum(structure: str, tensors: dict[str, Tensor]) -> str:
    value = zlib.crc32(structure.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
