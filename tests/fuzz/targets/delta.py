"""Deltas: what loads has sound indices, changes a model exactly there, and can be taken back."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fuzz import mutations, trees
from fuzz.choices import Choices
from fuzz.containers import SIZES, Container, parse
from fuzz.oracles import (
    bytes_of,
    check_indices,
    check_shown,
    refusals,
    require,
    state_of,
    untouched,
)
from fuzz.targets.base import SafetensorsTarget
from saft_clip import delta_cli
from saft_clip.console import output
from saft_kernels import SparseDelta, ops
from saft_kernels.delta import DeltaSwap
from saft_kernels.delta import file as delta_file
from saft_kernels.delta.file import DeltaContent, TensorRecord
from saft_kernels.errors import DeltaError, DeltaFormatError
from saft_kernels.layout import index_code_bytes, index_dtype
from small_deltas import DTYPES, make_base, tuned_pair

_TEXTS = ("format", "version", "created_by", "density", "metadata", "tensors")


def seal(container: Container) -> None:
    """Give a delta file the checksum of docs/delta_format.md."""
    texts = [trees.plain(container.texts.get(key)) for key in _TEXTS]
    digest = hashlib.sha256(json.dumps(texts).encode())
    for tensor in sorted(container.tensors, key=lambda each: str(each.name)):
        count = len(tensor.data) // SIZES.get(str(tensor.dtype), 1)
        digest.update(f"{tensor.name} {count}".encode("utf-8", "surrogatepass") + tensor.data)
    container.texts.put("checksum", digest.hexdigest())


class DeltaTarget(SafetensorsTarget):
    """``SparseDelta.load``, and all that is done with a delta."""

    name = "delta"
    weight = 60

    def __init__(self) -> None:
        self._models = {dtype: make_base(dtype) for dtype in DTYPES}
        self._bits = {dtype: state_of(model) for dtype, model in self._models.items()}

    def make_seeds(self) -> list[bytes]:
        """Deltas of a small model in every dtype, with and without originals, and of odd bases."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "d.safetensors"
            files = []
            for dtype in DTYPES:
                for originals in (False, True):
                    tuned_pair(dtype)[2].save(path, originals=originals)
                    files.append(path.read_bytes())
            for content in _odd_contents():
                delta_file.write(path, content)
                files.append(path.read_bytes())
        return files

    def seal(self, container: Container) -> None:
        """Put the checksum right."""
        seal(container)

    def change(self, choices: Choices, container: Container) -> None:
        """Half of the time, change what the texts say."""
        if choices.one_in(2):
            super().change(choices, container)
        elif choices.one_in(3):
            _encode_anew(choices, container)
        else:
            key = choices.pick(["tensors", "tensors", "tensors", "metadata", "density"])
            text = container.texts.get(key)
            if isinstance(text, str):
                container.texts.put(key, mutations.change_json(choices, text))

    def read(self, path: Path) -> str:
        """Load, look at, save, apply and revert."""
        with refusals(path, of=(DeltaFormatError,)) as refused:
            delta = SparseDelta.load(path)
        if refused:
            return "DeltaFormatError"
        _check(delta, parse(path.read_bytes()))
        _check_round_trip(delta, path.with_name("again.safetensors"))
        with output.capture() as shown:
            delta_cli.info(path, json=False)
        check_shown(shown.get())
        with redirect_stdout(io.StringIO()) as printed:
            delta_cli.info(path, json=True)
        check_shown(printed.getvalue())
        require(json.loads(printed.getvalue())["file"] == str(path), "not the JSON that it prints")
        dtype = next((r.dtype for r in delta.records if r.name == "conv.weight"), torch.float32)
        dtype = dtype if dtype in self._models else torch.float32
        fits = _apply(delta, self._models[dtype], self._bits[dtype])
        return "accepted" if fits else "accepted, fits no model here"


def _odd_contents() -> Iterator[DeltaContent]:
    """Deltas of huge parameters, of none, of a single scalar."""
    shapes = [(3,), (1 << 31,), (1 << 20, 1 << 20), (2, 0), ()]
    records = []
    for i, shape in enumerate(shapes):
        numel = math.prod(shape)
        chosen = sorted({0, numel // 2, numel - 1}) if numel else []
        indices = torch.tensor(chosen, dtype=index_dtype(numel))
        values = torch.arange(float(len(chosen)))
        kind = (torch.float32, shape, "0" * 32)
        records.append(TensorRecord(f"p{i}", (f"q{i}",), *kind, indices, values))
    yield DeltaContent(tuple(records), {}, 0.5, "a test", None)
    yield DeltaContent((), {"é": "日本"}, 0.0, "a test", None)
    yield DeltaContent(tuple(records[-1:]), {}, 1.0, "a test", {"p4": torch.zeros(1)})


def _encode_anew(choices: Choices, container: Container) -> None:
    """Give a row other entries or another shape, and the code that belongs to it, or nearly."""
    pool = container.find("indices")
    with suppress(*trees.IMPROPER):  # the table may be changed already
        rows = trees.plain(trees.parse(container.texts.get("tensors")))
        sizes = [(row[5], math.prod(row[3])) for row in rows]
        at = choices.integer(0, len(rows) - 1)
        begin = sum(index_code_bytes(*each) for each in sizes[:at])
        end = begin + index_code_bytes(*sizes[at])
        n, numel = sizes[at]
        if choices.one_in(2):
            numel = choices.pick([1, 2, n, n + 1, 64, 2**31 - 1, 2**31, 2**40])
            rows[at][3] = [numel]
        n = choices.pick([n, n, n + 1, max(n - 1, 0)])
        pool.data = pool.data[:begin] + _code(choices, n, numel) + pool.data[end:]
        pool.shape, rows[at][5] = [len(pool.data)], n
        container.texts.put("tensors", trees.dump(rows))


def _code(choices: Choices, n: int, numel: int) -> bytes:
    """The code of any indices; half of the time not quite."""
    if not 1 <= n <= min(numel, 1000) or numel > 2**40:
        return b""
    drawn = {choices.integer(0, numel - 1) for _ in range(n)}
    spare = (i for i in range(numel) if i not in drawn)
    drawn |= {next(spare) for _ in range(n - len(drawn))}
    indices = torch.tensor(sorted(drawn), dtype=index_dtype(numel))
    code = ops.encode_indices(indices, numel).numpy().tobytes()
    if choices.one_in(2):
        return code
    return mutations.change_bytes(choices, code)[: len(code)].ljust(len(code), b"\0")


def _check(delta: SparseDelta, container: Container) -> None:
    """Compare a loaded delta with what docs/delta_format.md says of its file."""
    names = [name for r in delta.records for name in (r.name, *r.tied)]
    require(len(names) == len(set(names)), "a name stands twice")
    require(0 <= delta.density <= 1, "the density is impossible")
    documented = _as_documented(container)
    for record in delta.records:
        check_indices(record.name, record.indices, math.prod(record.shape))
        if not record.indices.numel():
            continue
        require(record.values.dtype == record.dtype, "values of another dtype")
        indices, values = documented.pop(record.name)
        require(record.indices.tolist() == indices.tolist(), "other indices than documented")
        require(bytes_of({"": record.values})[""] == values, "other values than documented")
    require(not documented, "a record is missing")


def _as_documented(container: Container) -> dict[str, tuple[Any, bytes]]:
    """Parameter name -> flat indices, bytes of the values; read with NumPy, as the page says."""
    data = {tensor.name: tensor.data for tensor in container.tensors}
    position = dict.fromkeys(data, 0)

    def take(name: str, count: int) -> bytes:
        begin = position[name]
        position[name] += count
        return data[name][begin : begin + count]

    found = {}
    for name, _, dtype, shape, _, n in json.loads(container.texts.get("tensors")):
        if n:
            numel = math.prod(shape)
            width = (numel // n).bit_length() - 1
            low = np.frombuffer(take("indices", (n * width + 7) // 8), np.uint8)
            high = np.frombuffer(take("indices", (n + ((numel - 1) >> width) + 7) // 8), np.uint8)
            low = np.unpackbits(low, bitorder="little")[: n * width].reshape(n, width)
            high = np.flatnonzero(np.unpackbits(high, bitorder="little"))
            indices = ((high - np.arange(n)) << width) + low @ (1 << np.arange(width))
            size = getattr(torch, dtype).itemsize
            found[name] = indices, take(f"values.{dtype}", n * size)
    return found


def _check_round_trip(delta: SparseDelta, path: Path) -> None:
    with_originals = delta._originals is not None
    delta.save(path, originals=with_originals)
    again = SparseDelta.load(path)
    require(_content(again) == _content(delta), "saved and loaded, it is another delta")


def _content(delta: SparseDelta) -> Any:
    originals = delta._originals
    return (
        delta.metadata,
        delta.density,
        delta.created_by,
        None if originals is None else bytes_of(originals),
        [
            (r.name, r.tied, r.dtype, r.shape, r.fingerprint, r.indices.tolist())
            for r in delta.records
        ],
        bytes_of({r.name: r.values for r in delta.records}),
    )


def _apply(delta: SparseDelta, model: nn.Module, bits: dict[str, bytes]) -> bool:
    """Apply and revert in every way; whether the delta fits the model at all."""
    changed = _changed(delta, model)
    for verify in (True, False):
        with refusals(None, of=(DeltaError,)) as refused:
            delta.apply_(model, verify=verify)
        if refused:
            require(state_of(model) == bits, "a refused delta changed the model")
            continue
        require(state_of(model) == {**bits, **changed}, "the delta wrote something else")
        delta.revert_(model, verify=verify)
        require(state_of(model) == bits, "revert_ did not give the base")
    with untouched(model), refusals(None, of=(DeltaError,)) as unfit:
        swap = DeltaSwap(model)
        swap.to(delta)
        swap.to(None)
    return not unfit


def _changed(delta: SparseDelta, model: nn.Module) -> dict[str, bytes]:
    """What the parameters must hold then, by all their names; computed with NumPy."""
    params = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, indices, values in delta.items():
        param = params.get(name)
        if param is None or int(indices[-1]) >= param.numel():
            continue
        whole = _elements(param)
        whole[indices.numpy()] = _elements(values.to(param.dtype))
        found |= {other: whole.tobytes() for other, its in params.items() if its is param}
    return found


def _elements(tensor: Tensor) -> Any:
    """The bytes of a tensor, a row for each element."""
    content = bytes_of({"": tensor})[""]
    return np.frombuffer(content, np.uint8).reshape(-1, tensor.element_size()).copy()
