"""Checkpoints: everything a run needs to continue bit for bit, in one safetensors file.

The file holds the tensors of a nested structure of dicts, lists, tuples, numbers and texts; its
metadata hold the rest of the structure as JSON, and a checksum. No pickle is written or read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from saft_clip.errors import CheckpointError
from saft_kernels.files import atomic_write, remove_leftovers, sort_metadata
from saft_kernels.untrusted import open_safetensors, parse_json, shown

FORMAT = "saft-checkpoint"
VERSION = "1"

#: Checkpoints that are kept: the last one, and the one before it in case the last is damaged.
KEPT = 2

_PATTERN = "step-*.safetensors"

#: What a list in the structure may begin with, and of which type what follows is.
_KINDS: dict[str, type] = {"tensor": str, "dict": list, "list": list, "tuple": list}


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
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise CheckpointError(f"{where} was not written by this release")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{where} is broken or cut short ({shown(error)})") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror or error})") from error
    structure = metadata.get("structure", "")
    if metadata.get("checksum") != _checksum(structure, tensors):
        raise CheckpointError(f"{where} is broken: its content does not match its checksum")
    try:
        state = _put_together(parse_json(structure), tensors)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is broken: its structure is malformed") from error
    if tensors:
        raise CheckpointError(f"{where} is broken: it holds a tensor that belongs nowhere")
    return state


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
    """The inverse of :func:`_take_apart`; the tensors that it uses are gone from ``tensors``.

    Raises:
        ValueError: if nothing that it makes was taken apart here.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind, content = _kind_and_content(value)
    if kind == "tensor":
        if content not in tensors:
            raise ValueError("a tensor is missing, or used twice")
        return tensors.pop(content)
    if kind == "dict":
        return {_key(pair): _put_together(pair[1], tensors) for pair in content}
    items = [_put_together(one, tensors) for one in content]
    return tuple(items) if kind == "tuple" else items


def _kind_and_content(value: Any) -> tuple[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("neither a value nor a container")
    kind, content = value
    if not isinstance(kind, str) or kind not in _KINDS or not isinstance(content, _KINDS[kind]):
        raise ValueError("a container of no known kind")
    return kind, content


def _key(pair: Any) -> Any:
    if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], list | dict):
        raise ValueError("a dict holds something else than pairs")
    return pair[0]


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
