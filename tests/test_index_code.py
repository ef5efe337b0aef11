"""encode_indices and decode_indices against their specification, and against bytes of any kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saft_kernels import backends, ops, reference
from saft_kernels.layout import MAX_ELEMENTS, index_code, index_code_bytes, index_dtype

#: (n, numel): nothing, one, all; below and above powers of two; 64 and more high bits in a word
SIZES = [
    *((n, numel) for numel in (0, 1, 2, 7, 64, 65) for n in range(numel + 1)),
    *((1, 2**40), (3, 2**40), (2, 2**31 - 1), (2, 2**31), (2, 2**31 + 7)),
    *((100, 1000), (128, 1 << 16), (127, 1 << 16), (5000, 5003), (777, 1_000_003)),
]


def some(n: int, numel: int, seed: int = 0) -> Tensor:
    """n sorted indices below ``numel``, the first and the last one among them if there is room."""
    generator = torch.Generator().manual_seed(seed)
    if numel <= 1 << 20:
        drawn = torch.randperm(numel, generator=generator)[:n]
    else:
        drawn = torch.tensor(sorted({0, numel - 1, numel // 2, 1})[-n:])
    return drawn.sort().values.to(index_dtype(numel))


@pytest.mark.parametrize(("n", "numel"), SIZES)
def test_code_equals_specification_and_gives_the_indices_back(n: int, numel: int) -> None:
    indices = some(n, numel)
    code = ops.encode_indices(indices, numel)
    assert code.dtype == torch.uint8
    assert code.numel() == index_code_bytes(n, numel)
    assert torch.equal(code, reference.encode_indices(indices, numel))
    for decode in (ops.decode_indices, reference.decode_indices):
        again = decode(code, n, numel)
        assert again.dtype == index_dtype(numel)
        assert torch.equal(again, indices)


@settings(max_examples=200)
@given(st.integers(1, 1 << 40).flatmap(lambda numel: st.tuples(
    st.just(numel), st.sets(st.integers(0, numel - 1), max_size=60))))  # fmt: skip
def test_any_indices(drawn: tuple[int, set[int]]) -> None:
    numel, chosen = drawn
    for dtype in (torch.int64, *([torch.int32] if numel < 1 << 31 else [])):
        indices = torch.tensor(sorted(chosen), dtype=dtype)
        code = ops.encode_indices(indices, numel)
        assert torch.equal(code, reference.encode_indices(indices, numel))
        assert torch.equal(ops.decode_indices(code, len(chosen), numel).long(), indices.long())


@pytest.mark.parametrize("n", [1, 3, 1000, 400_000])
def test_an_index_takes_two_bits_and_the_logarithm_of_its_distance(n: int) -> None:
    numel = 1_000_000
    clustered = torch.arange(n, dtype=torch.int32)
    for indices in (some(n, numel), clustered, clustered + (numel - n)):
        bits = 8 * ops.encode_indices(indices, numel).numel()
        assert bits <= n * (2 + math.log2(numel / n)) + 16


def test_a_hand_computed_code() -> None:
    """2, 5 and 11 below 16: w = 2; lower bits 2, 1, 3; upper bits 0, 1, 2 at 0, 2 and 4."""
    code = ops.encode_indices(torch.tensor([2, 5, 11]), 16)
    assert code.tolist() == [0b11_01_10, 0b010101]
    assert index_code(3, 16) == (2, 6)


@settings(max_examples=500)
@given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 2000))
@example(b"\xff", 1, 1)
@example(b"\x03", 1, 1)
def test_other_bytes_are_refused_or_are_the_code_of_what_they_give(
    data: bytes, n: int, numel: int
) -> None:
    code = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
    found = []
    for module in (ops, reference):
        try:
            found.append(module.decode_indices(code, n, numel))
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
    if isinstance(found[1], str):
        assert found[1] in found[0]
    else:
        assert torch.equal(*found)
        assert torch.equal(ops.encode_indices(found[0], numel), code)


@settings(max_examples=300)
@given(st.integers(1, 300), st.data())
def test_a_changed_bit_is_refused_or_gives_other_indices_in_range(
    n: int, data: st.DataObject
) -> None:
    numel = data.draw(st.integers(n, 5000))
    indices = some(n, numel)
    code = ops.encode_indices(indices, numel)
    bit = data.draw(st.integers(0, 8 * len(code) - 1))
    code[bit // 8] ^= 1 << (bit % 8)
    try:
        again = ops.decode_indices(code, n, numel)
    except RuntimeError as refusal:
        message = str(refusal)
    else:
        message = ""
    if message:
        assert f"this is no code of {n} increasing indices below {numel}" in message
        return
    assert not torch.equal(again, indices)
    assert bool((again[1:] > again[:-1]).all())
    assert int(again[0]) >= 0
    assert int(again[-1]) < numel


def test_codes_may_begin_anywhere_in_memory() -> None:
    indices = some(300, 9000)
    code = ops.encode_indices(indices, 9000)
    for begin in range(9):
        padded = torch.full((begin + len(code) + 9,), 255, dtype=torch.uint8)
        padded[begin : begin + len(code)] = code
        assert torch.equal(
            ops.decode_indices(padded[begin : begin + len(code)], 300, 9000), indices
        )


@pytest.mark.parametrize("asked", ["cuda", "triton", "reference"])
def test_files_are_the_cpus_whatever_backend_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Inside use_backend, tensors on the CPU are refused; those of a file are not."""
    monkeypatch.setattr(backends, "_requested", asked)
    indices = some(30, 500)
    assert torch.equal(ops.decode_indices(ops.encode_indices(indices, 500), 30, 500), indices)


BAD_INDICES = {
    "unsorted": ([3, 2], 10, "must increase strictly and lie within the 10 elements"),
    "twice": ([2, 2], 10, "must increase strictly"),
    "negative": ([-1, 2], 10, "must increase strictly"),
    "too large": ([2, 10], 10, "must increase strictly"),
    "too many": ([0, 1, 2], 2, "there cannot be 3 different indices below 2"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
@pytest.mark.parametrize("module", [ops, reference])
def test_bad_indices_are_refused(case: str, module: object) -> None:
    indices, numel, message = BAD_INDICES[case]
    with pytest.raises(RuntimeError, match=message):
        module.encode_indices(torch.tensor(indices), numel)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0.0]), "indices must be int32 or int64"),
        (torch.arange(4)[::2], "indices must be a contiguous vector"),
        (torch.zeros(1, 1, dtype=torch.int64), "indices must be a contiguous vector"),
    ],
)
def test_indices_of_another_kind_are_refused(indices: Tensor, message: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        ops.encode_indices(indices, 10)


@pytest.mark.parametrize(
    ("code", "n", "numel", "message"),
    [
        (torch.zeros(2, dtype=torch.int8), 1, 2, "code must be Byte"),
        (torch.zeros(4, dtype=torch.uint8)[::2], 1, 2, "code must be a contiguous vector"),
        (torch.zeros(2, dtype=torch.uint8), -1, 2, "there cannot be -1 different indices below 2"),
        (torch.zeros(2, dtype=torch.uint8), 3, 2, "there cannot be 3 different indices below 2"),
        (torch.zeros(2, dtype=torch.uint8), 0, -1, "numel must lie between 0 and"),
        (torch.zeros(2, dtype=torch.uint8), 1, MAX_ELEMENTS + 1, "numel must lie between 0 and"),
        (torch.zeros(2, dtype=torch.uint8), 1, 1, "the code of 1 indices below 1 has 1 bytes"),
        (torch.zeros(1, dtype=torch.uint8), 0, 5, "the code of 0 indices below 5 has 0 bytes"),
    ],
)
def test_codes_of_another_kind_are_refused(code: Tensor, n: int, numel: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.decode_indices(code, n, numel)
