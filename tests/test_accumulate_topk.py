"""accumulate_topk_ and compact_topk_ against their specification, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import operations
from saft_kernels import StreamingTopK, backends, layout, ops
from saft_kernels.layout import COUNT, NONFINITE, THRESHOLD

GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (0, 1, 7, 16, 17, 513, 40_003)


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
@pytest.mark.parametrize("k", [0, 1, 100, 41_057])
def test_equals_specification(device, dtype, square, k):
    torch.manual_seed(k)
    accs = [torch.randn(n, device=device) for n in SIZES]
    grads = [None if dtype is None else torch.randn_like(acc).to(dtype) for acc in accs]
    check_against_specification(accs, grads, min(k, sum(SIZES)), square=square)


def test_same_result_for_any_number_of_threads(device, threads):
    torch.manual_seed(0)
    accs = [torch.randn(300_001, device=device)]
    check_against_specification(accs, [torch.randn_like(accs[0])], k=1_000, room=500)


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


def test_backends_may_take_turns_on_one_buffer():
    accs = [torch.randn(5_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    top = StreamingTopK(300, keys=range(4))
    for i, acc in enumerate(accs):
        with backends.use_backend("reference" if i % 2 == 0 else "cpu"):
            top.update(i, acc)
    found = torch.cat([index + 5_000 * key for key, index in top.finish().items()])
    best = torch.cat(accs).abs().topk(300).indices.sort().values
    assert torch.equal(found, best)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_same_result_for_any_order_of_arrival(device, order):
    generator = torch.Generator().manual_seed(0)
    accs = [torch.randint(-3, 4, (n,), generator=generator).float() for n in (50, 0, 80, 33)]
    expected = run(accs, [None] * 4, k=40, room=7)
    assert_same(run(accs, [None] * 4, k=40, room=7, order=order), expected)


def test_equals_topk_where_there_are_no_ties(device):
    values = torch.randperm(100_000, generator=torch.Generator().manual_seed(0)).float() - 50_000.25
    outcome = run([values], [None], k=777)
    assert torch.equal(outcome.positions, values.abs().topk(777).indices.sort().values)


@pytest.mark.parametrize("value", [0.0, 1.0, torch.finfo(torch.float32).max, 1e-45])
def test_ties_go_to_the_earlier_parameter_then_the_lower_index(device, value):
    accs = [torch.full((n,), value, device=device) for n in (3, 70_000, 70_000)]
    expected = torch.cat([torch.arange(3), (1 << layout.POSITION_BITS) + torch.arange(997)])
    for order in itertools.permutations(range(3)):
        assert torch.equal(run(accs, [None] * 3, k=1000, order=order).positions, expected)


def test_rising_values_replace_every_candidate(device):
    accs = [torch.arange(50_000, dtype=torch.float32, device=device)]
    assert torch.equal(run(accs, [None], k=10, room=1).positions, torch.arange(49_990, 50_000))


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


def test_all_16_bit_gradients_convert_exactly(device):
    patterns = torch.arange(1 << 16).to(torch.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        grad = patterns.view(dtype)
        grad = grad[grad.isfinite()]
        acc = run([torch.zeros(grad.numel())], [grad], k=0, scale=1.0).accs[0]
        assert torch.equal(acc, grad.float())


@given(
    tensors=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.5, 3e38]), max_size=40),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_property_few_distinct_values_in_any_order(tensors, data):
    accs = [torch.tensor(values) for values in tensors]
    total = sum(acc.numel() for acc in accs)
    k = data.draw(st.integers(0, total))
    room = data.draw(st.integers(1, 50))
    order = data.draw(st.permutations(range(len(accs))))
    check_against_specification(accs, [None] * len(accs), k, room=room, order=order)


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


def test_opcheck(device):
    buffer = new_buffer(3, 20, device)
    acc, grad = torch.randn(50, device=device), torch.randn(50, device=device)
    shared = (buffer.values.zero_(), buffer.positions, buffer.state)
    op = operations()
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
