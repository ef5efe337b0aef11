"""Files of weights: a ``state_dict`` that is read without running anything in it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from saft_kernels.errors import WeightsFileError
from saft_kernels.files import atomic_write, sort_metadata
from saft_kernels.untrusted import open_safetensors, reason, require_plain_archive

#: What the tensors of a training checkpoint may stand under.
_NESTED = ("state_dict", "model")

#: What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.")


def open_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a file of torch's that holds nothing but tensors.

    They stay in the file until they are used (it is mapped into memory), so that two files larger
    than the memory can be compared; do not change the file meanwhile. Of a file of torch's that
    holds more than the weights, those under ``state_dict`` or ``model`` are taken, and what
    wrappers (``module.``, ``_orig_mod.``) put before every name is taken off. Nothing in a pickle
    is run: torch reads it with ``weights_only``.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote.

    Returns:
        name -> tensor, on the CPU, not to be written to.

    Raises:
        WeightsFileError: if the file cannot be read, is broken or cut short, or holds anything else
            than tensors by name.
    """
    where = f"the file of weights {os.fspath(path)}"
    try:
        tensors = _safetensors(path) if _is_safetensors(path) else _of_torch(path)
    except safetensors.SafetensorError as error:
        raise WeightsFileError(
            f"{where} is not a valid safetensors file: {reason(error)}"
        ) from error
    except OSError as error:
        raise WeightsFileError(
            f"{where} cannot be read: {error.strerror or reason(error)}"
        ) from error
    # Reading foreign bytes as a pickle, even a harmless one, may raise anything.
    except Exception as error:
        raise WeightsFileError(
            f"{where} cannot be read: it is broken, cut short, or holds more than tensors "
            f"({reason(error)}); give a whole .safetensors file, or a .pt file of tensors only"
        ) from error
    if not tensors:
        raise WeightsFileError(f"{where} holds no tensors by name")
    return tensors


def save_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write a ``state_dict`` to a safetensors file, atomically.

    What is tied is written under each of its names: readers expect all of them.

    Raises:
        FileWriteError: if it cannot be written; a file that was there before stays as it was.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in own.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            own[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    with atomic_write(path) as temporary:
        save_file(own, temporary, {"format": "pt"})  # which transformers insists on
        sort_metadata(temporary)


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By its name, or since it begins with the length of a header and a brace."""
    if Path(path).suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote: tensors, numbers and texts in containers, or an error.

    Nothing in it is run. Tensors stay in the file, which is mapped into memory, but for the format
    of torch before 1.6.

    Raises:
        ValueError: if parts of the archive are compressed or overlap.
        Exception: of any kind, if it is broken or holds anything else.
    """
    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\3\4"  # as torch tells them apart
    if archive:
        require_plain_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def require_real(tensor: Tensor) -> None:
    """Refuse a tensor of which the file does not hold every number.

    One number may stand for a billion, of which a copy would be a tensor of a billion.

    Raises:
        ValueError: if it is sparse, quantized or on no device, or shares its own numbers.
    """
    plain = tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or tensor.device.type != "cpu":
        raise ValueError("a tensor is no plain list of numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError("a tensor claims more numbers than the file holds")


def _of_torch(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    content = load_torch_file(path)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return _without_prefixes(_tensors(content))


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for tensor in tensors.values():
        require_real(tensor)
    return tensors


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
