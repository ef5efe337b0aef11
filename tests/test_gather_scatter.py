"""gather and scatter_ against their specification, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import operations
from saft_kernels import backends, ops, reference

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def every_third(dense: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(0, dense.numel(), 3, dtype=dtype, device=dense.device)


def layouts(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Tensors whose memory order differs from their logical order, and plain ones."""
    image = torch.randn(6, 5, 4, 3, device=device).to(dtype)
    video = torch.randn(2, 3, 4, 3, 5, device=device).to(dtype)
    return {
        "scalar": torch.randn((), device=device).to(dtype),
        "one": torch.randn(1, device=device).to(dtype),
        "empty": torch.empty(0, 3, device=device, dtype=dtype),
        "vector": torch.randn(100_003, device=device).to(dtype),
        "matrix": torch.randn(37, 41, device=device).to(dtype),
        "transposed": torch.randn(41, 37, device=device).to(dtype).t(),
        "channels_last": image.to(memory_format=torch.channels_last),
        "channels_last_3d": video.to(memory_format=torch.channels_last_3d),
        "slice": torch.randn(50, 20, device=device).to(dtype)[5:40:2, ::3],
        "permuted": video.permute(3, 0, 4, 2, 1),
    }


def on(device: torch.device, view: Tensor) -> Tensor:
    """A copy on a device, with the strides of a view."""
    copied = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=device)
    return copied.copy_(view)


LAYOUTS = list(layouts(torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_equals_specification(device, dtype, layout, index_dtype):
    dense = layouts(dtype, device)[layout]
    indices = every_third(dense, index_dtype)
    assert torch.equal(ops.gather(dense, indices), reference.gather(dense, indices))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_changes_the_indexed_entries_and_no_other(device, dtype, layout):
    dense = layouts(dtype, device)[layout]
    indices = every_third(dense)
    values = torch.randn(indices.numel(), device=device).to(dtype)
    expected = dense.clone(memory_format=torch.preserve_format)
    reference.scatter_(expected, indices, values)
    strides = dense.stride()
    ops.scatter_(dense, indices, values)
    assert torch.equal(dense, expected)
    assert dense.stride() == strides
    assert torch.equal(ops.gather(dense, indices), values)


def test_memory_outside_a_slice_is_not_touched(device):
    storage = torch.zeros(50, 20, device=device)
    window = storage[5:40:2, ::3]
    indices = every_third(window)
    ops.scatter_(window, indices, torch.ones(len(indices), device=device))
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[5:40:2, ::3] = False
    assert (storage[outside] == 0).all()
    assert storage.sum() == len(indices)


def test_bits_survive_the_round_trip(device):
    patterns = torch.arange(1 << 16).to(torch.uint16).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        dense = patterns.clone().view(dtype)
        indices = torch.arange(1 << 16, device=device)
        values = ops.gather(dense, indices)
        ops.scatter_(dense.zero_(), indices, values)
        assert torch.equal(dense.view(torch.int16), patterns.view(torch.int16))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("begin", range(4))
def test_vectors_may_begin_anywhere_in_memory(device, begin, index_dtype):
    """Slices of larger vectors, which wide loads must not take for aligned ones."""
    dense = torch.randn(900, device=device)
    indices = torch.arange(0, 900, 3, dtype=index_dtype, device=device)[begin:]
    expected = dense[begin * 3 :: 3]
    assert torch.equal(ops.gather(dense, indices), expected)
    values = torch.randn(300, device=device)[begin:]
    ops.scatter_(dense, indices, values)
    assert torch.equal(dense[begin * 3 :: 3], values)


def test_same_result_for_any_number_of_threads(device, threads):
    dense = torch.randn(400_000, device=device)
    indices = every_third(dense)
    values = ops.gather(dense, indices)
    assert torch.equal(values, dense[::3])
    ops.scatter_(dense, indices, -values)
    assert torch.equal(dense[::3], -values)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_property_any_strided_view(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    dense = torch.arange(float(torch.Size(shape).numel())).reshape(shape).permute(order)
    dense = dense[..., :: data.draw(st.integers(1, 3))]
    picked = data.draw(st.sets(st.integers(0, dense.numel() - 1)))
    indices = torch.tensor(sorted(picked), dtype=torch.int32)
    assert torch.equal(ops.gather(dense, indices), reference.gather(dense, indices))


#: (size, stride) of dimensions of which no two are one stretch of memory.
FOUR = [(2, 40), (3, 12), (2, 5), (3, 1)]
EIGHT = [(2, 3 ** (d ^ 5)) for d in range(8)]


@pytest.mark.parametrize("dims", [*itertools.permutations(FOUR), EIGHT, sorted(EIGHT)])
def test_strides_in_any_order_are_told_from_overlapping_ones(dims):
    sizes, strides = zip(*dims, strict=True)
    memory = torch.zeros(1 + sum((size - 1) * stride for size, stride in dims))
    dense = memory.as_strided(sizes, strides)
    indices = every_third(dense)
    values = torch.arange(1.0, 1 + len(indices))
    ops.scatter_(dense, indices, values)
    assert torch.equal(ops.gather(dense, indices), values)
    assert int(memory.count_nonzero()) == len(indices)
    longest = max(strides)  # shorter, it would step onto the last place that the others reach
    reached = sum((size - 1) * stride for size, stride in dims if stride < longest)
    shorter = [reached if stride == longest else stride for stride in strides]
    with pytest.raises(RuntimeError, match="share one place"):
        ops.scatter_(memory.as_strided(sizes, shorter), indices, values)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([-1, 2]), "lie within"),
        (torch.tensor([0, 10]), "lie within"),
        (torch.tensor([2, 2]), "increase strictly"),
        (torch.tensor([3, 1]), "increase strictly"),
        (torch.tensor([5, 99, 7]), "increase strictly"),
        (torch.tensor([0.0, 1.0]), "int32 or int64"),
        (torch.tensor([[0, 1]]), "contiguous vector"),
        (torch.arange(10)[::2], "contiguous vector"),
    ],
)
def test_bad_indices_are_refused_and_nothing_is_written(device, indices, message):
    dense, indices = torch.zeros(10, device=device), on(device, indices)
    with pytest.raises(RuntimeError, match=message):
        ops.gather(dense, indices)
    with pytest.raises(RuntimeError, match=message):
        ops.scatter_(dense, indices, torch.ones(indices.numel(), device=device))
    assert (dense == 0).all()


def test_indices_of_a_wrong_form_teach_nothing_about_their_memory(device):
    """A GPU backend knows again the memory of vectors that were checked."""
    dense = torch.zeros(10, device=device)
    table = torch.tensor([[5, 3], [99, 1]], device=device)
    spread = torch.tensor([0, 99, 1, 3], device=device)
    for wrong, vector in ((table, table.view(-1)), (spread[::2], spread[:2])):
        with pytest.raises(RuntimeError, match="contiguous vector"):
            ops.gather(dense, wrong)
        with pytest.raises(RuntimeError, match="increase strictly"):
            ops.gather(dense, vector)


@pytest.mark.parametrize("indices", [[-1, 2], [0, 10], [2, 2], [3, 1]])
def test_the_specification_refuses_bad_indices_too(indices):
    dense = torch.zeros(10)
    with backends.use_backend("reference"):
        with pytest.raises(RuntimeError, match="increase strictly and lie within"):
            ops.gather(dense, torch.tensor(indices))
        with pytest.raises(RuntimeError, match="increase strictly and lie within"):
            ops.scatter_(dense, torch.tensor(indices), torch.ones(2))
    assert (dense == 0).all()


def test_other_bad_arguments_are_refused(device):
    indices = torch.tensor([0, 1], device=device)
    dense, values = torch.zeros(5, device=device), torch.ones(3, device=device)
    for overlapping in (dense[:1].expand(3), dense.as_strided((3, 3), (1, 1))):
        with pytest.raises(RuntimeError, match="share one place"):
            ops.scatter_(overlapping, indices, values[:2])
    with pytest.raises(RuntimeError, match="dense must be of a floating type"):
        ops.gather(dense.int(), indices)
    with pytest.raises(RuntimeError, match="values must be Float"):
        ops.scatter_(dense, indices, values[:2].double())
    with pytest.raises(RuntimeError, match="values must have 2 elements"):
        ops.scatter_(dense, indices, values)


def test_values_within_dense_are_refused_and_nothing_is_written(device):
    """They would be read while they are written."""
    memory = torch.arange(24.0, device=device)
    indices = torch.tensor([1, 2, 3], device=device)
    for dense in (memory[:20], memory[:20].view(5, 4).t()):
        for values in (memory[:3], memory[17:20], memory[19:22]):
            with pytest.raises(RuntimeError, match="must not share memory with dense"):
                ops.scatter_(dense, indices, values)
    assert torch.equal(memory, torch.arange(24.0, device=device))


def test_values_beside_dense_are_scattered(device):
    memory = torch.arange(24.0, device=device)
    indices = torch.tensor([1, 2, 3], device=device)
    ops.scatter_(memory[3:20], indices, memory[:3])
    ops.scatter_(memory[3:20], indices[:0], memory[5:5])
    ops.scatter_(memory[3:20], indices, memory[20:23])
    assert memory[3:8].tolist() == [3, 20, 21, 22, 7]
    rows = memory.view(6, 4)
    ops.scatter_(rows[:, :2], indices, rows[3, 2:].new_tensor([7, 8, 9]))
    rows[0, 2:] = torch.tensor([5.0, 6.0], device=device)
    ops.scatter_(rows[:, :2], indices[:2], rows[0, 2:])  # they lie in a gap of dense
    assert rows[0].tolist() == [0, 5, 5, 6]
    assert rows[1, :2].tolist() == [6, 9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_at_indices_of_either_width(device, dtype):
    values = torch.randn(100, device=device).to(dtype)
    for index_dtype in (torch.int32, torch.int64):
        dense = torch.zeros(300, device=device).to(dtype)
        indices = torch.arange(0, 300, 3, dtype=index_dtype, device=device)
        ops.scatter_(dense, indices, values)
        assert torch.equal(dense.float()[::3], values.float())
        assert not dense.float()[1::3].any()


def test_inference_mode(device):
    """Its tensors have no version, by which index vectors are known again."""
    with torch.inference_mode():
        dense, indices = torch.arange(9.0, device=device), torch.tensor([2, 7], device=device)
        assert ops.gather(dense, indices).tolist() == [2, 7]
        ops.scatter_(dense, indices, torch.zeros(2, device=device))
        assert dense.tolist() == [0, 1, 0, 3, 4, 5, 6, 0, 8]
        with pytest.raises(RuntimeError, match="increase strictly"):
            ops.gather(dense, indices.flip(0))


def test_gathering_a_parameter_records_no_graph(device):
    parameter = torch.nn.Parameter(torch.randn(6, device=device))
    assert not ops.gather(parameter, torch.tensor([0, 5], device=device)).requires_grad


def test_scattering_moves_the_version_counter(device):
    dense = torch.zeros(4, device=device)
    before = dense._version
    ops.scatter_(dense, torch.tensor([1], device=device), torch.ones(1, device=device))
    assert dense._version > before


# opcheck itself multiplies its inputs, which torch does not do in 8 bits.
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize > 1])
def test_opcheck(device, dtype):
    dense = torch.randn(7, 9, device=device).to(dtype)
    indices, op = every_third(dense), operations(device)
    torch.library.opcheck(op.gather.default, (dense, indices))
    torch.library.opcheck(op.scatter_.default, (dense, indices, dense.new_ones(21)))


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def swap(dense: Tensor, indices: Tensor) -> Tensor:
        old = ops.gather(dense, indices)
        ops.scatter_(dense, indices, old + 1)
        return old

    dense = torch.zeros(10)
    assert torch.equal(swap(dense, torch.tensor([2, 5])), torch.zeros(2))
    assert dense.sum() == 2
