"""What docs/delta_format.md says of the file: the reader that it shows, hashes, sizes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from torch import nn

from saft_kernels.delta import SparseDelta
from saft_kernels.layout import index_code_bytes
from saft_kernels.mask import CooMask
from small_deltas import DTYPES, make_base, tune, tuned_pair

PAGE = Path(__file__).parent.parent / "docs" / "delta_format.md"


@pytest.fixture(scope="module")
def read_delta() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_delta"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reader_of_the_page_reads_what_is_written(
    read_delta: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    _, _, delta = tuned_pair(dtype)
    delta.save(tmp_path / "d.safetensors")
    found = read_delta(tmp_path / "d.safetensors")
    expected = {name: (indices, values) for name, indices, values in delta.items()}
    assert found.keys() == expected.keys()
    for name, (indices, values) in expected.items():
        assert found[name][0].tolist() == indices.tolist()
        assert found[name][1].view(torch.uint8).equal(values.view(torch.uint8))


def test_the_reader_of_the_page_reads_large_and_full_parameters(
    read_delta: Any, tmp_path: Path
) -> None:
    def model() -> nn.ParameterDict:
        return nn.ParameterDict({"a": torch.zeros(300_000), "b": torch.zeros(70)})

    chosen = {"a": torch.arange(5, 300_000, 1001), "b": torch.arange(70)}
    mask = CooMask.from_indices(model(), chosen)
    SparseDelta.capture(tune(model(), mask), mask, model()).save(tmp_path / "d.safetensors")
    found = read_delta(tmp_path / "d.safetensors")
    assert {name: indices.tolist() for name, (indices, _) in found.items()} == {
        name: indices.tolist() for name, indices in chosen.items()
    }


def test_checksum_fingerprints_and_sizes_are_as_the_page_says(tmp_path: Path) -> None:
    _, _, delta = tuned_pair()
    delta.save(tmp_path / "d.safetensors", originals=True)
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        texts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    assert set(tensors) == {"indices", "values.float32", "originals.float32"}
    keys = ("format", "version", "created_by", "density", "metadata", "tensors")
    assert set(texts) == {*keys, "checksum"}
    digest = hashlib.sha256(json.dumps([texts[key] for key in keys]).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.numel()}".encode() + tensor.numpy().tobytes())
    assert texts["checksum"] == digest.hexdigest()
    size = 0
    for name, _, dtype, shape, fingerprint, n in json.loads(texts["tensors"]):
        param = make_base().get_parameter(name).detach()
        assert (dtype, shape) == ("float32", list(param.shape))
        text = f'["torch.float32", {json.dumps(shape)}]'
        content = param.contiguous().numpy().tobytes()
        assert fingerprint == xxhash.xxh3_128(text.encode() + content).hexdigest()
        size += index_code_bytes(n, math.prod(shape))
    assert tensors["indices"].numel() == size
