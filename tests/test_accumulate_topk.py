"""accumulate_topk_ and compact_topk_ against their specification, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import simulated
from conftest import CPU, GPU, IMPLEMENTATIONS, implementation, operations
from saft_kernels import backends, layout, ops
from saft_kernels.layout import COUNT, NONFINITE, THRESHOLD
from saft_kernels.triton import accumulate_topk as triton_topk

GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (0, 1, 7, 16, 17, 513, 4_003)

ON_GPU = [name for name in IMPLEMENTATIONS if name not in CPU]
SIMULATED = [name for name in simulated.names() if name in IMPLEMENTATIONS]

#: Elements of one thread block or program of a scan.
BLOCK = 2048


@dataclass
class Buffer:
    values: Tensor
    positions: Tensor
    state: Tensor


def new_buffer(k: int, room: int, device: torch.device) -> Buffer:
    """A buffer for k + room candidates, poisoned with NaN and nonsense positions."""
    state = torch.zeros(layout.STATE_SIZE, dtype=torch.int64)
    state[THRESHOLD] = layout.NO_THRESHOLD
    state[layout.TIE] = state[NONFINITE] = layout.NO_POSITION
    return Buffer(
        torch.full((k + room,), torch.nan, device=device),
        torch.full((k + room,), -1, dtype=torch.int64, device=device),
        state.to(device),
    )


@dataclass
class Outcome:
    accs: list[Tensor]
    positions: Tensor
    values: Tensor
    nonfinite: int


def run(
    accs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    k: int,
    *,
    room: int = 64,
    order: Sequence[int] | None = None,
    scale: float = 0.3,
    square: bool = False,
) -> Outcome:
    """Offers all tensors in the given order; what is left after compaction, by position."""
    accs = [acc.clone() for acc in accs]
    buffer = new_buffer(k, room, accs[0].device)
    for key in order if order is not None else range(len(accs)):
        ops.accumulate_topk_(
            accs[key], grads[key], scale, square=square, key=key, offset=0, k=k,
            values=buffer.values, positions=buffer.positions, state=buffer.state,
        )  # fmt: skip
    ops.compact_topk_(k, buffer.values, buffer.positions, buffer.state)
    kept = int(buffer.state[COUNT])
    by_position = buffer.positions[:kept].argsort()
    return Outcome(
        accs,
        buffer.positions[:kept][by_position],
        buffer.values[:kept][by_position],
        int(buffer.state[NONFINITE]),
    )


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual.accs, expected.accs, strict=True))
    assert torch.equal(actual.positions, expected.positions)
    assert torch.equal(actual.values, expected.values)
    assert actual.nonfinite == expected.nonfinite


def check_against_specification(accs, grads, k, **options) -> None:
    actual = run(accs, grads, k, **options)
    with backends.use_backend("reference"):
        expected = run(accs, grads, k, **options)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [None, *GRAD_DTYPES])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("k", [0, 1, 100, sum(SIZES)])
def test_equals_specification(device, dtype, square, k):
    torch.manual_seed(k)
    accs = [torch.randn(n, device=device) for n in SIZES]
    grads = [None if dtype is None else torch.randn_like(acc).to(dtype) for acc in accs]
    check_against_specification(accs, grads, k, square=square)


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("device", CPU, indirect=True)
def test_same_result_for_any_number_of_threads(device, threads, dtype):
    torch.manual_seed(0)
    accs = [torch.randn(300_001, device=device)]
    check_against_specification(accs, [torch.randn_like(accs[0]).to(dtype)], k=1_000, room=500)


DISTRIBUTIONS = {
    "normal": lambda x: x,
    "few values": lambda x: (3 * x).round(),
    "rising": lambda x: x.abs().sort().values,
    "falling": lambda x: x.abs().sort(descending=True).values,
    "equal": torch.zeros_like,
}


@pytest.mark.parametrize(("k", "room"), [(1, 1), (700, 1), (700, 100), (40_000, 3000)])
@pytest.mark.parametrize("data", DISTRIBUTIONS)
def test_batches_of_several_threads_in_a_tight_buffer(threads, data, k, room):
    """Every batch meets a full buffer; the later key comes first, so that ties are settled late."""
    generator = torch.Generator().manual_seed(k + room)
    values = DISTRIBUTIONS[data](torch.randn(200_000, generator=generator))
    accs = [values[:70_000], values[70_000:]]
    positions = run(accs, [None, None], k=k, room=room, order=(1, 0)).positions
    best = values.abs().argsort(descending=True, stable=True)[:k].sort().values
    first, second = best[best < 70_000], best[best >= 70_000] - 70_000
    expected = torch.cat([first, second + (1 << layout.POSITION_BITS)])
    assert torch.equal(positions, expected)


def cat_of_best(accs: Sequence[Tensor], k: int) -> Tensor:
    """The positions of the k best, by the definition."""
    values = torch.cat([acc.abs().flatten() for acc in accs]).cpu()
    positions = torch.cat(
        [torch.arange(acc.numel()) + (i << layout.POSITION_BITS) for i, acc in enumerate(accs)]
    )
    return positions[values.argsort(descending=True, stable=True)[:k]].sort().values


@pytest.mark.parametrize(("k", "room"), [(1, 1), (300, 1), (300, 50), (3_000, 900)])
@pytest.mark.parametrize("data", DISTRIBUTIONS)
def test_a_buffer_that_overflows(device, data, k, room):
    """Several blocks find more than fits, at first and later; the later key comes first."""
    generator = torch.Generator().manual_seed(k + room)
    values = DISTRIBUTIONS[data](torch.randn(4 * BLOCK + 600, generator=generator)).to(device)
    accs = list(values.split([2 * BLOCK + 99, 30, 2 * BLOCK + 471]))
    for order in ((2, 1, 0), (1, 0, 2)):
        positions = run(accs, [None] * 3, k=k, room=room, order=order).positions
        assert torch.equal(positions.cpu(), cat_of_best(accs, k))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("k", [5, 1_500])
def test_equal_values_many_more_than_fit(device, k, order):
    """The tie moves among candidates of the buffer and elements of a tensor that does not fit."""
    accs = [torch.full((n,), -2.0, device=device) for n in (700, 3 * BLOCK + 5, 2 * BLOCK)]
    positions = run(accs, [None] * 3, k=k, room=3, order=order).positions
    assert torch.equal(positions.cpu(), cat_of_best(accs, k))


@pytest.mark.parametrize("levels", [1 << 17, 200, 3])
def test_values_within_one_bin_of_the_histogram(device, levels):
    generator = torch.Generator().manual_seed(levels)
    bits = torch.randint(levels, (4 * BLOCK,), generator=generator) + (127 << 23)
    accs = list(bits.int().view(torch.float32).to(device).split([100, 3 * BLOCK, BLOCK - 100]))
    for order in itertools.permutations(range(3)):
        positions = run(accs, [None] * 3, k=200, room=30, order=order).positions
        assert torch.equal(positions.cpu(), cat_of_best(accs, 200))


def test_overflow_in_a_later_call_by_values_far_above_all_before(device):
    accs = [torch.rand(40, device=device), 1e30 * torch.rand(3 * BLOCK, device=device)]
    check_against_specification(accs, [None, None], k=50, room=20)


@pytest.mark.parametrize("broken", [torch.nan, -torch.inf])
def test_nonfinite_entries_in_a_tensor_that_does_not_fit(device, broken):
    values = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(0))
    for data in (values, torch.full_like(values, 7.0)):
        data[[3_000, 2_000, 2_001]] = broken
        outcome = run([data.to(device)], [None], k=100, room=10)
        best = cat_of_best([data.where(data.isfinite(), 0.0)], 100)
        assert outcome.nonfinite == 2_000
        assert torch.equal(outcome.positions.cpu(), best)


@pytest.mark.parametrize("device", ON_GPU, indirect=True)
@pytest.mark.parametrize("k", [0, 100])
def test_a_large_tensor_of_which_a_block_takes_several_parts(device, k, request, monkeypatch):
    monkeypatch.setattr(triton_topk, "ALONE", BLOCK)
    on_cuda = request.node.callspec.params["device"].startswith("cuda")
    n = (1 << 20) + 3 * BLOCK + 7 if on_cuda else 6 * BLOCK + 7
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    outcome = run([torch.zeros(n, device=device)], [grad], k=k, room=2 * n, scale=1.0)
    assert torch.equal(outcome.accs[0], grad)
    assert torch.equal(outcome.positions.cpu(), cat_of_best([grad], k))


@pytest.mark.parametrize("device", ON_GPU, indirect=True)
def test_a_refill_of_more_parts_than_blocks(device, request, monkeypatch):
    monkeypatch.setattr(triton_topk, "REFILL_PROGRAMS", 2)
    monkeypatch.setattr(triton_topk, "ALONE", BLOCK)
    n = 513 * 2048 - 30 if request.node.callspec.params["device"].startswith("cuda") else 3 * BLOCK
    accs = [torch.ones(10, device=device), torch.zeros(n, device=device)]
    accs[1][-200:] = 2.0
    accs[1][:30] = 3.0
    positions = run(accs, [None, None], k=100, room=20).positions
    assert torch.equal(positions.cpu(), cat_of_best(accs, 100))


@pytest.mark.parametrize(
    "device", [name for name in ON_GPU if name.startswith("triton")], indirect=True
)
@pytest.mark.parametrize("alone", [1 << 20, BLOCK])
@pytest.mark.parametrize("data", DISTRIBUTIONS)
def test_settling_in_a_launch_of_its_own(device, data, alone, monkeypatch):
    """As on AMD GPUs."""
    monkeypatch.setattr(triton_topk, "SETTLES_IN_SCAN", False)
    monkeypatch.setattr(triton_topk, "ALONE", alone)
    values = DISTRIBUTIONS[data](torch.randn(5_000, generator=torch.Generator().manual_seed(0)))
    accs = list(values.to(device).split([2 * BLOCK + 99, 30, 5_000 - 2 * BLOCK - 129]))
    for order in ((2, 1, 0), (1, 0, 2)):
        positions = run(accs, [None] * 3, k=300, room=50, order=order).positions
        assert torch.equal(positions.cpu(), cat_of_best(accs, 300))


@pytest.mark.parametrize("device", ON_GPU, indirect=True)
@pytest.mark.parametrize("room", [1, 40, 5_000])
@pytest.mark.parametrize("levels", [None, 2])
def test_the_histogram_counts_every_candidate_once(device, levels, room):
    """Also where a buffer overflows, is refilled and compacted; the threshold stands still."""
    generator = torch.Generator().manual_seed(0)
    buffer = new_buffer(300, room, device)
    for key in range(4):
        acc = torch.randn(BLOCK + 300, generator=generator)
        acc = acc if levels is None else (levels * acc).round()
        state = buffer.state.tolist()
        bits = acc.abs().view(torch.int32).long()
        position = torch.arange(acc.numel()) + (key << layout.POSITION_BITS)
        beats = (bits > state[THRESHOLD]) | (
            (bits == state[THRESHOLD]) & (position < state[layout.TIE])
        )
        ops.accumulate_topk_(
            acc.to(device), None, 1.0, square=False, key=key, offset=0, k=300,
            values=buffer.values, positions=buffer.positions, state=buffer.state,
        )  # fmt: skip
        histogram = torch.tensor(state[layout.HISTOGRAM :])
        histogram += (bits[beats] >> layout.BIN_SHIFT).bincount(minlength=layout.BINS)
        assert torch.equal(buffer.state[layout.HISTOGRAM :].cpu(), histogram)
        count, above = int(buffer.state[COUNT]), int(buffer.state[layout.ABOVE])
        assert 300 <= count <= 300 + room
        assert above == int(histogram[int(buffer.state[layout.BIN]) :].sum()) >= 300
        assert int(buffer.state[layout.FRESH]) == 0


#: Implementations that work in the memory of one device.
SHARING = GPU or [*CPU[-1:], *SIMULATED]


@pytest.mark.parametrize(
    "names",
    [
        ("reference", *CPU[-1:]),
        *((name, "reference") for name in ON_GPU),
        *((*SHARING,), (*SHARING[::-1],)),
    ],
    ids="-then-".join,
)
@pytest.mark.parametrize(("room", "levels"), [(20, None), (20, 2), (4_000, None)])
def test_backends_may_take_turns_on_one_buffer(names, room, levels):
    generator = torch.Generator().manual_seed(room)
    accs = [torch.randn(n, generator=generator) for n in (500, 2_500, 40, 1_500, 900, 1_200)]
    accs = [acc if levels is None else (acc * levels).round() for acc in accs]
    buffer = None
    for key in reversed(range(len(accs))):
        with turn_of(names[key % len(names)], names) as device:
            buffer = buffer or new_buffer(300, room, device)
            ops.accumulate_topk_(
                accs[key].to(device), None, 1.0, square=False, key=key, offset=0, k=300,
                values=buffer.values, positions=buffer.positions, state=buffer.state,
            )  # fmt: skip
            if key % 2:
                ops.compact_topk_(300, buffer.values, buffer.positions, buffer.state)
    with turn_of(names[-1], names):
        ops.compact_topk_(300, buffer.values, buffer.positions, buffer.state)
    found = buffer.positions[: int(buffer.state[COUNT])].sort().values
    assert torch.equal(found.cpu(), cat_of_best(accs, 300))


@contextmanager
def turn_of(name: str, names: Sequence[str]) -> Iterator[torch.device]:
    """Run the operations inside the block on one of the implementations, or as specified."""
    if name == "reference":
        with backends.use_backend("reference"):
            yield torch.device("cuda" if set(names) & set(GPU) else "cpu")
    else:
        with implementation(name) as device:
            yield device


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_same_result_for_any_order_of_arrival(device, order):
    generator = torch.Generator().manual_seed(0)
    sizes = (50, 0, 80, 33)
    accs = [torch.randint(-3, 4, (n,), generator=generator).float().to(device) for n in sizes]
    expected = run(accs, [None] * 4, k=40, room=7)
    assert_same(run(accs, [None] * 4, k=40, room=7, order=order), expected)


def test_equals_topk_where_there_are_no_ties(device):
    values = torch.randperm(9_000, generator=torch.Generator().manual_seed(0)).float() - 4_500.25
    outcome = run([values.to(device)], [None], k=777)
    assert torch.equal(outcome.positions.cpu(), values.abs().topk(777).indices.sort().values)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.finfo(torch.float32).max, 1e-45])
def test_ties_go_to_the_earlier_parameter_then_the_lower_index(device, value):
    accs = [torch.full((n,), value, device=device) for n in (3, 3_000, 3_000)]
    expected = torch.cat([torch.arange(3), (1 << layout.POSITION_BITS) + torch.arange(997)])
    for order in itertools.permutations(range(3)):
        positions = run(accs, [None] * 3, k=1000, order=order).positions
        assert torch.equal(positions.cpu(), expected)


def test_rising_values_replace_every_candidate(device):
    accs = [torch.arange(7_000, dtype=torch.float32, device=device)]
    assert run(accs, [None], k=10, room=1).positions.tolist() == list(range(6_990, 7_000))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [0, 5])
def test_nonfinite_entries_are_reported_and_never_selected(device, broken, k):
    acc = torch.ones(5_000, device=device)
    acc[[4_321, 1_234]] = broken
    outcome = run([torch.ones(3, device=device), acc], [None, None], k=k)
    assert layout.split_position(outcome.nonfinite) == (1, 1_234)
    assert outcome.positions.tolist() == [0, 1, 2, 1 << 40, (1 << 40) + 1][:k]


def test_overflow_of_the_sum_is_reported(device):
    big = torch.full((20,), torch.finfo(torch.float32).max, device=device)
    assert run([big], [big], k=1, scale=1.0).nonfinite == 0


def test_offset_and_key_name_the_position(device):
    buffer = new_buffer(1, 8, device)
    ops.accumulate_topk_(
        torch.tensor([0.0, -9.0, 1.0], device=device), None, 1.0, square=False,
        key=layout.MAX_KEYS - 1, offset=layout.MAX_ELEMENTS - 3, k=1,
        values=buffer.values, positions=buffer.positions, state=buffer.state,
    )  # fmt: skip
    ops.compact_topk_(1, buffer.values, buffer.positions, buffer.state)
    position = int(buffer.positions[0])
    assert layout.split_position(position) == (layout.MAX_KEYS - 1, layout.MAX_ELEMENTS - 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_gradients_convert_exactly(device, dtype):
    grad = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    grad = grad[grad.isfinite()].to(device)
    acc = run([torch.zeros(grad.numel(), device=device)], [grad], k=0, scale=1.0).accs[0]
    assert torch.equal(acc, grad.float())


def test_both_roundings_of_the_sum_are_kept(device):
    """Values for which a fused multiply-add, or one that flushes denormals, would differ."""
    grad = torch.randn(2_000, generator=torch.Generator().manual_seed(1))
    tiny = torch.full((7,), 3 * 2.0**-149)
    acc = torch.cat([-0.1 * grad[:1_000], grad[1_000:], tiny]).to(device)
    grad = torch.cat([grad, tiny]).to(device)
    expected = acc + grad * 0.1
    assert torch.equal(run([acc], [grad], k=3, scale=0.1).accs[0], expected)
    fused = (acc.double() + grad.double() * torch.tensor(0.1).double()).float()
    assert not torch.equal(expected, fused)


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_slices_that_begin_anywhere(device, dtype, shift):
    n = 2 * BLOCK + 7
    generator = torch.Generator().manual_seed(shift)
    acc = torch.randn(n + 8, generator=generator).to(device)
    grad = torch.randn(n + 8, generator=generator).to(device, dtype)[3 - shift :][:n]
    whole = new_buffer(50, 41, device)

    def offered() -> tuple[Tensor, Tensor]:
        changed = acc.clone()
        values, positions, state = whole.values[1:], whole.positions[1:], whole.state.clone()
        for key, offset in ((0, 3), (1, 0)):
            ops.accumulate_topk_(
                changed[shift : shift + n], grad, 0.3, square=True, key=key, offset=offset, k=50,
                values=values, positions=positions, state=state,
            )  # fmt: skip
        ops.compact_topk_(50, values, positions, state)
        return changed, positions[:50].sort().values

    found = offered()
    with backends.use_backend("reference"):
        expected = offered()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert whole.values[0].isnan()
    assert int(whole.positions[0]) == -1


def test_property_few_distinct_values_in_any_order(device, request):
    values = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.5, 3e38]
    on_cpu = request.node.callspec.params["device"] in CPU

    @settings(max_examples=150 if on_cpu else 15, deadline=None)
    @given(
        tensors=st.lists(st.lists(st.sampled_from(values), max_size=40), min_size=1, max_size=5),
        data=st.data(),
    )
    def check(tensors, data):
        accs = [torch.tensor(values, device=device) for values in tensors]
        total = sum(acc.numel() for acc in accs)
        k = data.draw(st.integers(0, total))
        room = data.draw(st.integers(1, 50))
        order = data.draw(st.permutations(range(len(accs))))
        check_against_specification(accs, [None] * len(accs), k, room=room, order=order)

    check()


# What is true of a GPU only -----------------------------------------------------------------------


def made(kind: str, order: str, seed: int = 1):
    """A simulated GPU whose blocks and threads run in an order of its own."""
    if kind == "cuda":
        from simulated.cuda import SimulatedCuda as Simulated
    else:
        from simulated.triton import SimulatedTriton as Simulated
    return Simulated(80, order, seed)


KINDS = sorted({name.split("-")[0] for name in SIMULATED})


@pytest.mark.parametrize("kind", KINDS)
def test_same_result_for_any_order_of_blocks_and_threads(kind):
    generator = torch.Generator().manual_seed(5)
    offered = [(2 * torch.randn(2 * BLOCK + 77, generator=generator)).round() for _ in range(3)]
    found = []
    for order, seed in (("fwd", 1), ("rev", 1), ("random", 1), ("random", 2)):
        gpu = made(kind, order, seed)
        buffer = new_buffer(400, 60, torch.device("cpu"))
        shared = (buffer.values, buffer.positions, buffer.state)
        with gpu.active():
            for key, acc in enumerate(offered):
                gpu.accumulate_topk_(acc.clone(), acc, 0.7, False, key, 0, 400, *shared)
            gpu.compact_topk_(400, *shared)
        assert int(buffer.state[COUNT]) == 400
        by_position = buffer.positions[:400].argsort()
        found.append((buffer.positions[by_position], buffer.values[by_position], buffer.state))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_launches_depend_on_sizes_only(kind, value, monkeypatch):
    """Whether nothing beats the threshold or the buffer overflows: a CUDA graph can hold it."""
    monkeypatch.setattr(triton_topk, "ALONE", alone := 1 << 20 if kind == "cuda" else 3 * BLOCK)
    gpu = made(kind, "fwd")
    buffer = new_buffer(8, 8, torch.device("cpu"))
    shared = (buffer.values, buffer.positions, buffer.state)
    kernels = ["scan_kernel", "settle_kernel", "refill_kernel"]

    def launched(n: int, k: int) -> list[str]:
        gpu.launches.clear()
        gpu.accumulate_topk_(torch.full((n,), value), None, 1.0, False, 0, 0, k, *shared)
        return [next(k for k in kernels if k in launch) for launch in gpu.launches]

    with gpu.active():
        assert launched(0, 8) == []
        assert launched(1, 0) == ["scan_kernel"]
        for n in (20, 5, 3 * BLOCK, 1):
            assert launched(n, 8) == ["scan_kernel"]
        assert launched(alone + 1, 8) == ["scan_kernel", "refill_kernel"]
        if kind == "triton":
            monkeypatch.setattr(triton_topk, "SETTLES_IN_SCAN", False)
            assert launched(1, 0) == ["scan_kernel"]
            assert launched(1, 8) == ["scan_kernel", "settle_kernel"]
            assert launched(alone + 1, 8) == kernels
        gpu.launches.clear()
        gpu.compact_topk_(8, *shared)
        assert len(gpu.launches) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acc": torch.zeros(4, dtype=torch.float64)}, "acc must be Float"),
        ({"acc": torch.zeros(4, 4).t()[:2]}, "acc must be contiguous"),
        ({"grad": torch.zeros(3)}, "as many elements"),
        ({"grad": torch.zeros(4, dtype=torch.float64)}, "grad must be float32"),
        ({"values": torch.zeros(5)}, "same length"),
        ({"positions": torch.zeros(9, dtype=torch.int32)}, "positions must be Long"),
        ({"state": torch.zeros(4, dtype=torch.int64)}, "state must have"),
        ({"k": 9}, "must hold more than k"),
        ({"k": -1}, "must not be negative"),
        ({"key": -1}, "key must be in"),
        ({"key": 1 << 23}, "key must be in"),
        ({"offset": 1 << 40}, "offset"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    buffer = new_buffer(2, 7, torch.device("cpu"))
    arguments = {
        "acc": torch.zeros(4), "grad": None, "scale": 1.0, "square": False, "key": 0,
        "offset": 0, "k": 2, "values": buffer.values, "positions": buffer.positions,
        "state": buffer.state,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.accumulate_topk_(**(arguments | change))


def test_another_k_than_the_buffer_was_filled_with(device, request):
    """An error on the CPU; elsewhere the result is undefined, but stays within the buffer."""
    buffer = new_buffer(5, 3_000, device)
    ops.accumulate_topk_(
        torch.arange(2_000.0, device=device), None, 1.0, square=False, key=0, offset=0, k=5,
        values=buffer.values, positions=buffer.positions, state=buffer.state,
    )  # fmt: skip
    if request.node.callspec.params["device"] in CPU:
        with pytest.raises(RuntimeError, match="kept with another k"):
            ops.compact_topk_(1_000, buffer.values, buffer.positions, buffer.state)
    else:
        ops.compact_topk_(1_000, buffer.values, buffer.positions, buffer.state)
        assert 0 <= int(buffer.state[COUNT]) <= 3_005


def test_an_entry_that_is_offered_more_often_than_there_is_room(device, request):
    """An error on the CPU; elsewhere the result is undefined, but stays within the buffer."""
    buffer = new_buffer(9, 1, device)
    shared = {"values": buffer.values, "positions": buffer.positions, "state": buffer.state}

    def offer() -> None:
        for _ in range(5):
            ops.accumulate_topk_(
                torch.ones(10, device=device), None, 1.0, square=False, key=0, offset=0, k=9,
                **shared,
            )  # fmt: skip
        ops.compact_topk_(9, **shared)

    if request.node.callspec.params["device"] in CPU:
        with pytest.raises(RuntimeError, match="offered more often"):
            offer()
    else:
        offer()
        count = int(buffer.state[COUNT])
        assert 9 <= count <= 10
        assert len(set(buffer.positions[:count].tolist())) < count


def test_opcheck(device):
    buffer = new_buffer(3, 20, device)
    acc, grad = torch.randn(50, device=device), torch.randn(50, device=device)
    shared = (buffer.values.zero_(), buffer.positions, buffer.state)
    op = operations(device)
    torch.library.opcheck(op.accumulate_topk_.default, (acc, grad, 0.5, False, 1, 0, 3, *shared))
    torch.library.opcheck(op.compact_topk_.default, (3, *shared))


def test_writing_moves_the_version_counter():
    acc = torch.zeros(4)
    version = acc._version
    run_on = new_buffer(0, 1, torch.device("cpu"))
    ops.accumulate_topk_(
        acc, None, 1.0, square=False, key=0, offset=0, k=0,
        values=run_on.values, positions=run_on.positions, state=run_on.state,
    )  # fmt: skip
    assert acc._version > version
