"""StreamingTopK against its definition: torch.topk on the concatenation, ties by position."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saft_kernels import backends
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.layout import MAX_ELEMENTS
from saft_kernels.topk import StreamingTopK

BACKENDS = [name for name in ("reference", "cpu") if backends.backend_status(name).available]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def expected(tensors: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """The definition: sort (larger magnitude, earlier key, lower index) and take k."""
    entries = [
        (-abs(value), rank, index, key)
        for rank, (key, tensor) in enumerate(tensors.items())
        for index, value in enumerate(tensor.flatten().tolist())
    ]
    found: dict[str, list[int]] = {}
    for _, _, index, key in sorted(entries)[:k]:
        found.setdefault(key, []).append(index)
    return {key: sorted(found[key]) for key in tensors if key in found}


def finished(top: StreamingTopK) -> dict[str, list[int]]:
    return {str(key): index.tolist() for key, index in top.finish().items()}


TINY = 2.0**-149  # the smallest denormal
VALUES = st.sampled_from(
    [0.0, -0.0, TINY, -TINY, 2 * TINY, 1e-38, 1.0, -1.0, 1.5, 3e38]
) | st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(st.lists(VALUES, max_size=9), max_size=6),
    order=st.randoms(use_true_random=False),
    fraction=st.floats(0, 1),
    with_total=st.booleans(),
)
def test_equals_the_definition_for_any_order_of_updates(
    data: list[list[float]], order: random.Random, fraction: float, with_total: bool
) -> None:
    tensors = {f"p{i}": torch.tensor(values, dtype=torch.float32) for i, values in enumerate(data)}
    total = sum(tensor.numel() for tensor in tensors.values())
    k = round(fraction * total)
    top = StreamingTopK(k, keys=list(tensors), total=total if with_total else None)
    for key in order.sample(list(tensors), len(tensors)):
        top.update(key, tensors[key].clone())
    assert finished(top) == expected(tensors, k)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("levels", [None, 3])
def test_does_not_depend_on_the_number_of_threads(
    threads: None, count: int, levels: int | None
) -> None:
    torch.set_num_threads(count)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, n in enumerate([0, 1, 70_001, 33, 200_000, 65_537]):
        values = torch.randn(n, generator=generator)
        tensors[f"p{i}"] = values if levels is None else (values * levels).round()
    top = StreamingTopK(1234, keys=list(tensors))
    for key in reversed(tensors):
        top.update(key, tensors[key].clone())
    assert finished(top) == expected(tensors, 1234)


def test_equals_torch_topk_where_there_are_no_ties() -> None:
    whole = torch.randperm(9 * 997, generator=torch.Generator().manual_seed(0)).float()
    signs = torch.ones_like(whole).index_fill_(0, torch.arange(0, whole.numel(), 3), -1)
    tensors = {f"p{i}": piece for i, piece in enumerate((whole * signs).split(997))}
    top = StreamingTopK(500, keys=list(tensors))
    for key, tensor in tensors.items():
        top.update(key, tensor.clone())
    indices = top.finish()
    positions = torch.cat([indices[key] + 997 * i for i, key in enumerate(tensors)])
    assert torch.equal(positions, whole.topk(500).indices.sort().values)


def test_ties_go_to_the_earlier_key_then_to_the_lower_index() -> None:
    top = StreamingTopK(3, keys=["a", "b"])
    top.update("b", torch.tensor([1.0, -1.0]))
    top.update("a", torch.tensor([0.0, -1.0, 0.5, 1.0]))
    assert finished(top) == {"a": [1, 3], "b": [0]}


def test_without_declared_keys_the_first_update_sets_the_order_of_ties() -> None:
    top = StreamingTopK(1)
    top.update("b", torch.ones(1), final=False)
    top.update("a", torch.ones(1))
    top.update("b", torch.ones(1))
    assert finished(top) == {"b": [0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("square", [False, True])
def test_accumulates_in_fp32_and_offers_when_final(dtype: torch.dtype, square: bool) -> None:
    grads = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    acc = torch.zeros(8, 5)
    mean = torch.zeros(8, 5)
    top = StreamingTopK(7)
    for step, grad in enumerate(grads):
        term = grad.float() ** 2 if square else grad.float()
        mean += 0.5 * term
        top.update("w", acc, grad, 0.5, square=square, final=step == 2)
        assert torch.equal(acc, mean)
    assert finished(top) == expected({"w": mean}, 7)


def test_a_gradient_counts_in_row_major_order_whatever_its_layout() -> None:
    grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    for form in (grad, grad.to(memory_format=torch.channels_last), grad.to_sparse()):
        top = StreamingTopK(20)
        acc = torch.zeros(4, 3, 5, 5)
        top.update("conv", acc, form)
        assert torch.equal(acc, grad)
        assert finished(top) == expected({"conv": grad}, 20)


def test_pieces_of_a_tensor_are_placed_by_their_offset() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    top = StreamingTopK(50, keys=["w"])
    for begin in (600, 0, 300):
        top.update("w", tensor[begin : begin + 300].clone(), offset=begin)
    top.update("w", tensor[900:].clone(), offset=900)
    assert finished(top) == expected({"w": tensor}, 50)


def test_indices_are_int32_and_int64_from_two_to_the_31_elements_on() -> None:
    top = StreamingTopK(4, keys=["small", "large"])
    top.update("small", torch.ones(2), offset=2**31 - 3)
    top.update("large", torch.ones(2), offset=2**31 - 2)
    found = top.finish()
    assert found["small"].dtype == torch.int32
    assert found["small"].tolist() == [2**31 - 3, 2**31 - 2]
    assert found["large"].dtype == torch.int64
    assert found["large"].tolist() == [2**31 - 2, 2**31 - 1]


def test_a_key_without_winners_is_absent() -> None:
    top = StreamingTopK(1, keys=["a", "b", "never offered"])
    top.update("a", torch.tensor([1.0]))
    top.update("b", torch.tensor([2.0]))
    assert finished(top) == {"b": [0]}


def test_k_of_zero_selects_nothing() -> None:
    top = StreamingTopK(0)
    top.update("a", torch.ones(3))
    assert top.finish() == {}


def test_more_may_be_offered_after_finish() -> None:
    top = StreamingTopK(2, keys=["a", "b"])
    top.update("a", torch.tensor([1.0, 2.0]))
    assert finished(top) == {"a": [0, 1]}
    top.update("b", torch.tensor([3.0, 1.5]))
    assert finished(top) == {"a": [1], "b": [0]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("final", [True, False])
def test_non_finite_values_raise_naming_key_and_index(value: float, final: bool) -> None:
    top = StreamingTopK(1, keys=["fine", "broken.weight"])
    top.update("fine", torch.ones(4))
    grad = torch.tensor([1.0, 2.0, value, 3.0])
    top.update("broken.weight", torch.zeros(4), grad, offset=10, final=final)
    with pytest.raises(NonFiniteGradientError, match=r"'broken\.weight'.*flat index 12") as caught:
        top.finish()
    assert caught.value.parameter == "broken.weight"


def test_a_non_finite_value_raises_long_before_the_end() -> None:
    top = StreamingTopK(1)

    def update_often() -> None:
        top.update("broken", torch.full((1,), float("nan")))
        for i in range(100):
            top.update(i, torch.ones(1))

    with pytest.raises(NonFiniteGradientError, match="'broken'"):
        update_often()


def test_an_overflowing_sum_is_non_finite() -> None:
    top = StreamingTopK(1)
    top.update("w", torch.full((2,), 3e38), torch.full((2,), 3e38))
    with pytest.raises(NonFiniteGradientError, match="'w'"):
        top.finish()


def test_too_few_candidates_raise() -> None:
    top = StreamingTopK(5)
    top.update("w", torch.ones(4))
    top.update("v", torch.ones(9), final=False)
    with pytest.raises(SelectionError, match="5 entries are wanted but only 4 were offered"):
        top.finish()


def test_an_entry_offered_twice_raises() -> None:
    top = StreamingTopK(4)
    top.update("w", torch.ones(2))
    top.update("w", torch.ones(2))
    with pytest.raises(SelectionError, match="offered twice"):
        top.finish()


def test_wrong_keys_raise() -> None:
    with pytest.raises(SelectionError, match="'b' is not one of the declared keys"):
        StreamingTopK(1, keys=["a"]).update("b", torch.ones(1))
    with pytest.raises(SelectionError, match="'a' is declared twice"):
        StreamingTopK(1, keys=["a", "a"])
    with pytest.raises(SelectionError, match="not be negative"):
        StreamingTopK(-1)


def test_positions_outside_the_representable_range_raise() -> None:
    top = StreamingTopK(1)
    for offset in (-1, MAX_ELEMENTS):
        with pytest.raises(SelectionError, match="outside"):
            top.update("w", torch.ones(1), offset=offset)


def test_memory_is_bounded_by_k_and_by_the_total() -> None:
    fixed = StreamingTopK(0, total=0).nbytes
    assert StreamingTopK(100_000).nbytes <= fixed + 12 * 200_000
    assert StreamingTopK(10, total=50).nbytes <= fixed + 12 * 50
    assert StreamingTopK(2**20).nbytes <= fixed + 12 * 2**21
