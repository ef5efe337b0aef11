"""Which entries of a model are trained: flat indices per parameter, checked, saved and loaded.

A mask file is a safetensors file: one integer tensor per parameter that has selected entries, and
in its metadata ``format``, ``version``, ``shapes`` (JSON: every candidate parameter and its shape)
and ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from saft_kernels.errors import DeltaFormatError, MaskError
from saft_kernels.files import atomic_write, sort_metadata
from saft_kernels.layout import MAX_ELEMENTS, index_dtype
from saft_kernels.untrusted import (
    MAX_NAME,
    is_name,
    near_matches,
    open_safetensors,
    parse_json,
    quoted,
    shown,
)

FORMAT = "saft-mask"
VERSION = "1"

# A bound on what a file may hold, far above any model's.
_MAX_DIMENSIONS = 64
_INDEX_DTYPES = {"I32": torch.int32, "I64": torch.int64}


class CooMask:
    """The selected entries of a model, in coordinate (COO) form.

    For every parameter with selected entries it holds their flat indices into the parameter's
    logical row-major order (whatever its memory layout, channels_last included): sorted, unique,
    on the CPU, int32, or int64 if the parameter has 2**31 elements or more. The index tensors
    belong to the mask and must not be changed. Two masks are equal if names, shapes and indices
    are.

    Args:
        indices: parameter name -> flat indices as above; parameters without entries may be left
            out.
        shapes: name -> shape of *every* candidate parameter, in model order. Their elements are
            the D of :attr:`density`.

    Raises:
        MaskError: if indices are not sorted, not unique, out of range or of the wrong dtype,
            belong to no candidate, or if there is none at all.
    """

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in shapes.items()}
        for name in indices:
            if name not in self.shapes:
                raise MaskError(f"{name!r} has indices but is no candidate parameter")
        self._indices: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name in indices and indices[name].numel():
                index = indices[name].detach().cpu().contiguous()
                _check_indices(name, index, math.prod(shape))
                self._indices[name] = index
        if not self._indices:
            raise MaskError("the mask selects no entry; give at least one index")

    @classmethod
    def from_indices(cls, model: nn.Module, indices: Mapping[str, Tensor]) -> CooMask:
        """A mask with the given entries of a model; all its parameters count as candidates.

        Args:
            model: the model; a tied parameter counts once, under its first name.
            indices: parameter name -> flat indices into its row-major order, int32 or int64 [n],
                in any order.

        Raises:
            MaskError: if a parameter is unknown, or its indices are not one-dimensional integers,
                repeat, or lie out of range, or if there is no index at all.
        """
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        prepared = {}
        for name, given in indices.items():
            if name not in shapes:
                raise MaskError(_unknown_name(model, name))
            prepared[name] = _sorted_indices(name, given, math.prod(shapes[name]))
        return cls(prepared, shapes)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, flat indices) for every parameter with selected entries, in model order."""
        return iter(self._indices.items())

    def __iter__(self) -> Iterator[str]:
        """The names of the parameters with selected entries, in model order."""
        return iter(self._indices)

    def __getitem__(self, name: str) -> Tensor:
        """The flat indices of a parameter with selected entries."""
        return self._indices[name]

    def __contains__(self, name: object) -> bool:
        """Whether a parameter of this name has selected entries."""
        return name in self._indices

    def __len__(self) -> int:
        """The number of parameters with selected entries."""
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        """Whether names, shapes and indices are the same."""
        if not isinstance(other, CooMask):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        """One line of counts."""
        return (
            f"CooMask(nnz={self.nnz:,} of {self.numel:,}, density={self.density:.3g}, "
            f"parameters={len(self)} of {len(self.shapes)})"
        )

    @property
    def nnz(self) -> int:
        """The number of selected entries, d."""
        return sum(index.numel() for index in self._indices.values())

    @property
    def numel(self) -> int:
        """The number of elements of all candidate parameters, D."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """nnz / numel."""
        return self.nnz / self.numel

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over names, shapes and indices, whatever the parameters' order."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            index = self._indices.get(name, torch.empty(0, dtype=torch.int32))
            header = [name, self.shapes[name], index.numel(), str(index.dtype)]
            digest.update(json.dumps(header).encode())
            digest.update(index.numpy().astype(f"<i{index.itemsize}").tobytes())
        return digest.hexdigest()

    def check(self, model: nn.Module) -> None:
        """Make sure that this mask fits a model: every candidate is there, with its shape.

        Raises:
            MaskError: naming the first parameter that is missing, has another shape, or is the
                same tensor as another candidate.
        """
        params = dict(model.named_parameters(remove_duplicate=False))
        owner: dict[nn.Parameter, str] = {}
        for name, shape in self.shapes.items():
            param = params.get(name)
            if param is None:
                raise MaskError(
                    f"the mask does not fit this model: it has no parameter {name!r}"
                    + near_matches(name, params)
                )
            if tuple(param.shape) != shape:
                raise MaskError(
                    f"the mask does not fit this model: parameter {name!r} has shape "
                    f"{list(param.shape)}, the mask was made for {list(shape)}"
                )
            if owner.setdefault(param, name) != name:
                raise MaskError(
                    f"the mask does not fit this model: {name!r} and {owner[param]!r} are one tied "
                    "parameter here, the mask was made for two"
                )

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter, flat indices) of all parameters with selected entries, in model order.

        Raises:
            MaskError: if the mask does not fit the model (:meth:`check`).
        """
        self.check(model)
        params = model.named_parameters(remove_duplicate=False)
        return [(name, param, self[name]) for name, param in params if name in self]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to a safetensors file, atomically.

        Raises:
            FileWriteError: if the file cannot be written; a file that was there before stays as it
                was.
        """
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "shapes": json.dumps(self.shapes),
            "fingerprint": self.fingerprint,
        }
        tensors = {name: index.numpy() for name, index in self.items()}
        with atomic_write(path) as temporary:
            safetensors.numpy.save_file(tensors, temporary, metadata)
            sort_metadata(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CooMask:
        """Read a mask that :meth:`save` wrote; :meth:`check` then tells whether it fits a model.

        Raises:
            DeltaFormatError: if the file cannot be read, is broken, is no mask file, or was
                written by a newer release.
        """
        where = f"mask file {os.fspath(path)}"
        try:
            with open_safetensors(path) as file:
                metadata = _read_metadata(file.metadata())
                mask = cls(_read_indices(file), _read_shapes(metadata["shapes"]))
        except MaskError as error:
            raise DeltaFormatError(f"{where} is broken: {error}") from error
        except safetensors.SafetensorError as error:
            raise DeltaFormatError(
                f"{where} is not a valid safetensors file: {shown(error)}"
            ) from error
        except OSError as error:
            raise DeltaFormatError(f"{where} cannot be read: {error.strerror or error}") from error
        if mask.fingerprint != metadata["fingerprint"]:
            raise DeltaFormatError(f"{where} is broken: its content does not match its fingerprint")
        return mask


def _check_indices(name: str, index: Tensor, numel: int) -> None:
    if index.dim() != 1 or index.dtype != index_dtype(numel):
        raise MaskError(
            f"the indices of {name!r} are {index.dtype} {list(index.shape)}; a vector of "
            f"{index_dtype(numel)} is needed"
        )
    if not bool((index[1:] > index[:-1]).all()):
        raise MaskError(f"the indices of {name!r} are not sorted and unique")
    _check_range(name, int(index[0]), int(index[-1]), numel)


def _check_range(name: str, low: int, high: int, numel: int) -> None:
    if low < 0 or high >= numel:
        raise MaskError(
            f"index {low if low < 0 else high} of {name!r} is out of range: the parameter has "
            f"{numel:,} elements"
        )


def _sorted_indices(name: str, given: Tensor, numel: int) -> Tensor:
    """The caller's indices in the form that :class:`CooMask` keeps."""
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        found = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise MaskError(
            f"the indices of {name!r} are {found}; give an int32 or int64 tensor of flat indices "
            "(of a boolean mask: mask.flatten().nonzero().flatten())"
        )
    if given.dim() != 1:
        raise MaskError(
            f"the indices of {name!r} have shape {list(given.shape)}; give one vector of flat "
            "indices"
        )
    index = given.detach().cpu().sort().values
    if index.numel():
        _check_range(name, int(index[0]), int(index[-1]), numel)
    repeated = index[1:][index[1:] == index[:-1]]
    if repeated.numel():
        raise MaskError(f"index {int(repeated[0])} of {name!r} is given more than once")
    return index.to(index_dtype(numel))


def _unknown_name(model: nn.Module, name: str) -> str:
    first_names = {param: first for first, param in model.named_parameters()}
    params = dict(model.named_parameters(remove_duplicate=False))
    if name in params:
        first = first_names[params[name]]
        return f"{name!r} is tied to {first!r}; give its indices under that name"
    return f"the model has no parameter {name!r}{near_matches(name, params)}"


def _read_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    found = metadata or {}
    if found.get("format") != FORMAT:
        raise MaskError(
            f"its format is {quoted(found.get('format'))}, not {FORMAT!r}; give a file that a mask "
            "was saved to"
        )
    if found.get("version") != VERSION:
        raise MaskError(
            f"its version is {quoted(found.get('version'))}, this release reads {VERSION!r}; "
            "update saft-kernels"
        )
    for key in ("shapes", "fingerprint"):
        if key not in found:
            raise MaskError(f"its metadata lack {key!r}")
    return found


def _read_shapes(text: str) -> dict[str, tuple[int, ...]]:
    try:
        shapes = parse_json(text)
    except ValueError as error:
        raise MaskError("its shapes are not valid JSON") from error
    if not isinstance(shapes, dict):
        raise MaskError("its shapes are not a JSON object")
    return {_read_name(name): _read_shape(name, shape) for name, shape in shapes.items()}


def _read_name(name: str) -> str:
    if not is_name(name):
        raise MaskError(f"a parameter's name has more than {MAX_NAME:,} characters")
    return name


def _read_shape(name: str, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise MaskError(f"the shape of {name!r} is not a list of at most {_MAX_DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in shape):
        raise MaskError(f"the shape of {name!r} holds something that is not a size")
    if math.prod(shape) > MAX_ELEMENTS:
        raise MaskError(f"the shape of {name!r} has more than {MAX_ELEMENTS:,} elements")
    return tuple(shape)


def _read_indices(file: Any) -> dict[str, Tensor]:
    indices = {}
    for name in file.keys():  # noqa: SIM118 (a safetensors file is not iterable)
        dtype = file.get_slice(_read_name(name)).get_dtype()
        if dtype not in _INDEX_DTYPES:
            raise MaskError(f"the indices of {name!r} have dtype {dtype}, not I32 or I64")
        # A copy, so that the mask does not change if the file is later overwritten in place.
        indices[name] = file.get_tensor(name).clone()
    return indices
