"""The delta file: a safetensors file with a few flat tensors and a table.

Tensors, each holding the parameters' entries one after the other in the order of the table:

- ``indices``: flat indices, as :func:`.ops.encode_indices` makes bytes of them;
- ``values.<dtype>``: new values, one tensor per dtype among the changed parameters;
- ``originals.<dtype>``: the base's values, optional.

Metadata, all text: ``format``, ``version``, ``created_by``, ``density``, ``metadata`` (JSON object
of text), ``tensors`` (JSON table, one row per parameter of the base: name, names tied to it, dtype,
shape, fingerprint, number of changed entries) and ``checksum`` (SHA-256 over all of that and the
tensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from saft_kernels import ops
from saft_kernels.errors import DeltaFormatError
from saft_kernels.files import atomic_write, sort_metadata
from saft_kernels.fingerprint import is_fingerprint
from saft_kernels.layout import MAX_ELEMENTS, index_code_bytes, index_dtype
from saft_kernels.untrusted import (
    MAX_NAME,
    is_name,
    open_safetensors,
    parse_json,
    quoted,
    shown,
)

FORMAT = "saft-delta"
VERSION = "2"

_TEXTS = ("format", "version", "created_by", "density", "metadata", "tensors")
_MAX_DIMENSIONS = 64

#: By their names in a safetensors file.
_CHANGED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
#: What a delta can hold new values of.
CHANGEABLE = frozenset(_CHANGED_DTYPES.values())

_INDICES = "indices"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the file: ``float32`` and so on."""
    return str(dtype).removeprefix("torch.")


#: The tensors that a file may hold, and their dtypes.
_POOLS = {_INDICES: "U8"} | {
    f"{kind}.{dtype_name(dtype)}": stored
    for kind in ("values", "originals")
    for stored, dtype in _CHANGED_DTYPES.items()
}

_DTYPES = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


@dataclass(frozen=True)
class TensorRecord:
    """One parameter of the base, and what the delta changes in it.

    Attributes:
        name: its first name in the model.
        tied: its other names.
        dtype: of the parameter and of ``values``.
        shape: of the parameter.
        fingerprint: of the base's tensor.
        indices: int32 or int64 [n], strictly increasing flat indices; empty if nothing is changed.
        values: [n], what the fine-tuned model holds there.
    """

    name: str
    tied: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    fingerprint: str
    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class DeltaContent:
    """All that a delta file holds.

    Attributes:
        records: every parameter of the base.
        metadata: text of whoever made the delta.
        density: changed entries over candidates.
        created_by: the release that made it.
        originals: name -> the base's values at the indices of that record; None if not known.
    """

    records: tuple[TensorRecord, ...]
    metadata: Mapping[str, str]
    density: float
    created_by: str
    originals: Mapping[str, Tensor] | None


# Writing ------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], content: DeltaContent) -> None:
    """Write a delta file atomically.

    Raises:
        FileWriteError: if it cannot be written; a file that was there before stays as it was.
    """
    tensors = _pool(content)
    texts = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": content.created_by,
        "density": repr(content.density),
        "metadata": json.dumps(dict(content.metadata)),
        "tensors": json.dumps([_row(r) for r in content.records], separators=(",", ":")),
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {**texts, "checksum": _checksum(texts, tensors)})
        sort_metadata(temporary)


def _pool(content: DeltaContent) -> dict[str, Tensor]:
    pieces: defaultdict[str, list[Tensor]] = defaultdict(list)
    for record in content.records:
        if record.indices.numel():
            numel = math.prod(record.shape)
            pieces[_INDICES].append(ops.encode_indices(record.indices, numel))
            pieces[f"values.{dtype_name(record.dtype)}"].append(record.values)
            if content.originals is not None:
                originals = content.originals[record.name]
                pieces[f"originals.{dtype_name(record.dtype)}"].append(originals)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _row(record: TensorRecord) -> list[Any]:
    return [
        record.name,
        record.tied,
        dtype_name(record.dtype),
        record.shape,
        record.fingerprint,
        record.indices.numel(),
    ]


def _checksum(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([texts[key] for key in _TEXTS]).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].numel()}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Reading ------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> DeltaContent:
    """Read a delta file and check everything in it.

    Memory stays within a small multiple of the file's size, whatever the file claims.

    Raises:
        DeltaFormatError: if the file cannot be read, is broken, cut short or hostile, is no delta,
            or was written by a newer release.
    """
    where = f"delta file {os.fspath(path)}"
    try:
        with open_safetensors(path) as file:
            texts = _read_texts(file.metadata())
            tensors = _read_tensors(file)
    except DeltaFormatError as error:
        raise DeltaFormatError(f"{where} {error}") from error
    except safetensors.SafetensorError as error:
        raise DeltaFormatError(
            f"{where} is not a valid safetensors file: {shown(error)}"
        ) from error
    except OSError as error:
        raise DeltaFormatError(f"{where} cannot be read: {error.strerror or error}") from error
    if _checksum(texts, tensors) != texts["checksum"]:
        raise DeltaFormatError(f"{where} is broken: its content does not match its checksum")
    try:
        return _content(texts, tensors)
    except DeltaFormatError as error:
        raise DeltaFormatError(f"{where} is broken: {error}") from error


def _read_texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    texts = dict(metadata or {})
    if texts.get("format") != FORMAT:
        raise DeltaFormatError(
            f"is no delta: its format is {quoted(texts.get('format'))}, not {FORMAT!r}"
        )
    if texts.get("version") != VERSION:
        raise DeltaFormatError(
            f"has version {quoted(texts.get('version'))}, this release reads {VERSION!r}; update "
            "saft-kernels"
        )
    for key in (*_TEXTS, "checksum"):
        if key not in texts:
            raise DeltaFormatError(f"is broken: its metadata lack {key!r}")
    return texts


def _read_tensors(file: Any) -> dict[str, Tensor]:
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (a safetensors file is not iterable)
        view = file.get_slice(name)
        if name not in _POOLS:
            raise DeltaFormatError(f"is broken: it holds an unknown tensor {quoted(name)}")
        if view.get_dtype() != _POOLS[name] or len(view.get_shape()) != 1:
            raise DeltaFormatError(f"is broken: tensor {name!r} is no vector of {_POOLS[name]}")
        # A copy, so that the delta does not change if the file is later overwritten in place.
        tensors[name] = file.get_tensor(name).clone()
    return tensors


def _content(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> DeltaContent:
    rows = [_read_row(row) for row in _json(texts["tensors"], list, "table")]
    names = [name for row in rows for name in (row[0], *row[1])]
    _require(len(names) == len(set(names)), "a parameter is listed twice")
    metadata = _json(texts["metadata"], dict, "metadata")
    _require(all(isinstance(value, str) for value in metadata.values()), "metadata is not text")
    cursor = _Cursor(tensors)
    records = tuple(_record(row, cursor) for row in rows)
    with_originals = any(name.startswith("originals.") for name in tensors)
    originals = _originals(records, cursor) if with_originals else None
    cursor.require_end()
    return DeltaContent(records, metadata, _density(texts), texts["created_by"], originals)


Row = tuple[str, tuple[str, ...], torch.dtype, tuple[int, ...], str, int]


def _read_row(row: Any) -> Row:
    _require(isinstance(row, list) and len(row) == 6, "a row of its table is malformed")
    name, tied, dtype, shape, fingerprint, count = row
    _require(is_name(name), f"a parameter has no name, or one of more than {MAX_NAME:,} characters")
    where = quoted(name)
    _require(
        isinstance(tied, list) and all(map(is_name, tied)),
        f"the names tied to {where} are malformed",
    )
    _require(isinstance(dtype, str) and dtype in _DTYPES, f"the dtype of {where} is unknown")
    _require(
        isinstance(shape, list)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in shape)
        and math.prod(shape) <= MAX_ELEMENTS,
        f"the shape of {where} is impossible",
    )
    _require(is_fingerprint(fingerprint), f"the fingerprint of {where} is malformed")
    _require(
        type(count) is int and 0 <= count <= math.prod(shape),
        f"the number of entries of {where} is impossible",
    )
    return name, tuple(tied), _DTYPES[dtype], tuple(shape), fingerprint, count


class _Cursor:
    """Hands out the pooled vectors piece by piece."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._position = dict.fromkeys(tensors, 0)

    def take(self, pool: str, count: int) -> Tensor:
        _require(pool in self._tensors, f"the tensor {pool!r} is missing")
        begin = self._position[pool]
        piece = self._tensors[pool][begin : begin + count]
        _require(piece.numel() == count, f"the tensor {pool!r} is too short")
        self._position[pool] = begin + count
        return piece

    def require_end(self) -> None:
        for name, position in self._position.items():
            _require(position == self._tensors[name].numel(), f"the tensor {name!r} is too long")


def _record(row: Row, cursor: _Cursor) -> TensorRecord:
    name, tied, dtype, shape, fingerprint, count = row
    if not count:
        indices = torch.empty(0, dtype=index_dtype(math.prod(shape)))
        # Without values; a file may name dtypes that no plain tensor can have.
        return TensorRecord(name, tied, dtype, shape, fingerprint, indices, torch.empty(0))
    _require(dtype in CHANGEABLE, f"{name!r} cannot be changed in {dtype}")
    # Values first: what indices are made from may be a sixteenth of what they take.
    values = cursor.take(f"values.{dtype_name(dtype)}", count)
    code = cursor.take(_INDICES, index_code_bytes(count, math.prod(shape)))
    try:
        indices = ops.decode_indices(code, count, math.prod(shape))
    except RuntimeError as error:
        raise DeltaFormatError(f"the indices of {name!r} are malformed: {error}") from error
    return TensorRecord(name, tied, dtype, shape, fingerprint, indices, values)


def _originals(records: Iterable[TensorRecord], cursor: _Cursor) -> dict[str, Tensor]:
    return {
        record.name: cursor.take(f"originals.{dtype_name(record.dtype)}", record.indices.numel())
        for record in records
        if record.indices.numel()
    }


def _density(texts: Mapping[str, str]) -> float:
    try:
        density = float(texts["density"])
    except ValueError:
        density = math.nan
    _require(0 <= density <= 1, "its density is impossible")
    return density


def _json(text: str, kind: type, what: str) -> Any:
    try:
        parsed = parse_json(text)
    except ValueError as error:
        raise DeltaFormatError(f"its {what} is not valid JSON") from error
    _require(isinstance(parsed, kind), f"its {what} is malformed")
    return parsed


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise DeltaFormatError(sentence)
