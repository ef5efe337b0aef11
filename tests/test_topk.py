"""StreamingTopK against its definition: torch.topk on the concatenation, ties by position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import CPU, IMPLEMENTATIONS, implementation
from saft_kernels import backends
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.layout import MAX_ELEMENTS
from saft_kernels.topk import StreamingTopK


@pytest.fixture(params=["reference", *IMPLEMENTATIONS])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test once per implementation, and on the specification; its device."""
    if request.param == "reference":
        with backends.use_backend("reference"):
            yield torch.device("cpu")
    else:
        with implementation(request.param) as found:
            yield found


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


def test_equals_the_definition_for_any_order_of_updates(
    device: torch.device, request: pytest.FixtureRequest
) -> None:
    compiled = request.node.callspec.params["device"] in (*CPU, "reference")

    @settings(max_examples=150 if compiled else 10, deadline=None)
    @given(
        data=st.lists(st.lists(VALUES, max_size=9), max_size=6),
        order=st.randoms(use_true_random=False),
        fraction=st.floats(0, 1),
        with_total=st.booleans(),
    )
    def check(
        data: list[list[float]], order: random.Random, fraction: float, with_total: bool
    ) -> None:
        tensors = {
            f"p{i}": torch.tensor(values, dtype=torch.float32) for i, values in enumerate(data)
        }
        total = sum(tensor.numel() for tensor in tensors.values())
        k = round(fraction * total)
        keys = list(tensors)
        top = StreamingTopK(k, keys=keys, total=total if with_total else None, device=device)
        for key in order.sample(keys, len(keys)):
            top.update(key, tensors[key].to(device, copy=True))
        assert finished(top) == expected(tensors, k)

    check()


@pytest.mark.parametrize("device", CPU, indirect=True)
@pytest.mark.parametrize("levels", [None, 3])
def test_does_not_depend_on_the_number_of_threads(
    device: torch.device, threads: int, levels: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, n in enumerate([0, 1, 70_001, 33, 200_000, 65_537]):
        values = torch.randn(n, generator=generator)
        tensors[f"p{i}"] = values if levels is None else (values * levels).round()
    top = StreamingTopK(1234, keys=list(tensors), device=device)
    for key in reversed(tensors):
        top.update(key, tensors[key].to(device, copy=True))
    assert finished(top) == expected(tensors, 1234)


def test_equals_torch_topk_where_there_are_no_ties(device: torch.device) -> None:
    whole = torch.randperm(9 * 997, generator=torch.Generator().manual_seed(0)).float()
    signs = torch.ones_like(whole).index_fill_(0, torch.arange(0, whole.numel(), 3), -1)
    tensors = {f"p{i}": piece for i, piece in enumerate((whole * signs).split(997))}
    top = StreamingTopK(500, keys=list(tensors), device=device)
    for key, tensor in tensors.items():
        top.update(key, tensor.to(device, copy=True))
    indices = top.finish()
    positions = torch.cat([indices[key] + 997 * i for i, key in enumerate(tensors)])
    assert torch.equal(positions.cpu(), whole.topk(500).indices.sort().values)


def test_ties_go_to_the_earlier_key_then_to_the_lower_index(device: torch.device) -> None:
    top = StreamingTopK(3, keys=["a", "b"], device=device)
    top.update("b", torch.tensor([1.0, -1.0], device=device))
    top.update("a", torch.tensor([0.0, -1.0, 0.5, 1.0], device=device))
    assert finished(top) == {"a": [1, 3], "b": [0]}


def test_without_declared_keys_the_first_update_sets_the_order_of_ties(
    device: torch.device,
) -> None:
    top = StreamingTopK(1, device=device)
    top.update("b", torch.ones(1, device=device), final=False)
    top.update("a", torch.ones(1, device=device))
    top.update("b", torch.ones(1, device=device))
    assert finished(top) == {"b": [0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("square", [False, True])
def test_accumulates_in_fp32_and_offers_when_final(
    device: torch.device, dtype: torch.dtype, square: bool
) -> None:
    grads = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    acc = torch.zeros(8, 5, device=device)
    mean = torch.zeros(8, 5, device=device)
    top = StreamingTopK(7, device=device)
    for step, grad in enumerate(grads):
        term = grad.float() ** 2 if square else grad.float()
        mean += 0.5 * term
        top.update("w", acc, grad, 0.5, square=square, final=step == 2)
        assert torch.equal(acc, mean)
    assert finished(top) == expected({"w": mean}, 7)


def test_a_gradient_counts_in_row_major_order_whatever_its_layout(device: torch.device) -> None:
    grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2)).to(device)
    for form in (grad, grad.to(memory_format=torch.channels_last), grad.to_sparse()):
        top = StreamingTopK(20, device=device)
        acc = torch.zeros(4, 3, 5, 5, device=device)
        top.update("conv", acc, form)
        assert torch.equal(acc, grad)
        assert finished(top) == expected({"conv": grad}, 20)


def test_pieces_of_a_tensor_are_placed_by_their_offset(device: torch.device) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    top = StreamingTopK(50, keys=["w"], device=device)
    for begin in (600, 0, 300):
        top.update("w", tensor[begin : begin + 300].to(device, copy=True), offset=begin)
    top.update("w", tensor[900:].to(device, copy=True), offset=900)
    assert finished(top) == expected({"w": tensor}, 50)


def test_indices_are_int32_and_int64_from_two_to_the_31_elements_on(device: torch.device) -> None:
    top = StreamingTopK(4, keys=["small", "large"], device=device)
    top.update("small", torch.ones(2, device=device), offset=2**31 - 3)
    top.update("large", torch.ones(2, device=device), offset=2**31 - 2)
    found = top.finish()
    assert found["small"].dtype == torch.int32
    assert found["small"].tolist() == [2**31 - 3, 2**31 - 2]
    assert found["large"].dtype == torch.int64
    assert found["large"].tolist() == [2**31 - 2, 2**31 - 1]


def test_a_key_without_winners_is_absent(device: torch.device) -> None:
    top = StreamingTopK(1, keys=["a", "b", "never offered"], device=device)
    top.update("a", torch.tensor([1.0], device=device))
    top.update("b", torch.tensor([2.0], device=device))
    assert finished(top) == {"b": [0]}


def test_k_of_zero_selects_nothing(device: torch.device) -> None:
    top = StreamingTopK(0, device=device)
    top.update("a", torch.ones(3, device=device))
    assert top.finish() == {}


def test_more_may_be_offered_after_finish(device: torch.device) -> None:
    top = StreamingTopK(2, keys=["a", "b"], device=device)
    top.update("a", torch.tensor([1.0, 2.0], device=device))
    assert finished(top) == {"a": [0, 1]}
    top.update("b", torch.tensor([3.0, 1.5], device=device))
    assert finished(top) == {"a": [1], "b": [0]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("final", [True, False])
def test_non_finite_values_raise_naming_key_and_index(
    device: torch.device, value: float, final: bool
) -> None:
    top = StreamingTopK(1, keys=["fine", "broken.weight"], device=device)
    top.update("fine", torch.ones(4, device=device))
    grad = torch.tensor([1.0, 2.0, value, 3.0], device=device)
    top.update("broken.weight", torch.zeros(4, device=device), grad, offset=10, final=final)
    with pytest.raises(NonFiniteGradientError, match=r"'broken\.weight'.*flat index 12") as caught:
        top.finish()
    assert caught.value.parameter == "broken.weight"


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading a value, copying to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "_to_copy", "copy_", "item", "equal")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "device", [name for name in IMPLEMENTATIONS if name not in CPU], indirect=True
)
def test_nothing_waits_for_the_gpu_but_a_look_every_64_updates(device: torch.device) -> None:
    top = StreamingTopK(5, device=device)
    pieces = [torch.full((20,), float(i), device=device) for i in range(64)]
    with Waits() as waits:
        for i, piece in enumerate(pieces[:63]):
            top.update(i, piece, piece)
        assert waits.count == 0
        top.update(63, pieces[63], pieces[63])
        assert waits.count == 1


def test_a_non_finite_value_raises_long_before_the_end(device: torch.device) -> None:
    top = StreamingTopK(1, device=device)

    def update_often() -> None:
        top.update("broken", torch.full((1,), float("nan"), device=device))
        for i in range(100):
            top.update(i, torch.ones(1, device=device))

    with pytest.raises(NonFiniteGradientError, match="'broken'"):
        update_often()


def test_an_overflowing_sum_is_non_finite(device: torch.device) -> None:
    top = StreamingTopK(1, device=device)
    top.update("w", torch.full((2,), 3e38, device=device), torch.full((2,), 3e38, device=device))
    with pytest.raises(NonFiniteGradientError, match="'w'"):
        top.finish()


def test_too_few_candidates_raise(device: torch.device) -> None:
    top = StreamingTopK(5, device=device)
    top.update("w", torch.ones(4, device=device))
    top.update("v", torch.ones(9, device=device), final=False)
    with pytest.raises(SelectionError, match="5 entries are wanted but only 4 were offered"):
        top.finish()


def test_an_entry_offered_twice_raises(device: torch.device) -> None:
    top = StreamingTopK(4, device=device)
    top.update("w", torch.ones(2, device=device))
    top.update("w", torch.ones(2, device=device))
    with pytest.raises(SelectionError, match="offered twice"):
        top.finish()


def test_wrong_keys_raise(device: torch.device) -> None:
    with pytest.raises(SelectionError, match="'b' is not one of the declared keys"):
        StreamingTopK(1, keys=["a"], device=device).update("b", torch.ones(1, device=device))
    with pytest.raises(SelectionError, match="'a' is declared twice"):
        StreamingTopK(1, keys=["a", "a"], device=device)
    with pytest.raises(SelectionError, match="not be negative"):
        StreamingTopK(-1, device=device)


def test_positions_outside_the_representable_range_raise(device: torch.device) -> None:
    top = StreamingTopK(1, device=device)
    for offset in (-1, MAX_ELEMENTS):
        with pytest.raises(SelectionError, match="outside"):
            top.update("w", torch.ones(1, device=device), offset=offset)


def test_memory_is_bounded_by_k_and_by_the_total(device: torch.device) -> None:
    """A candidate takes 12 bytes; a GPU's buffer has room for 2**20 beside the k at least."""
    room = 2**20 if device.type == "cuda" else 0
    fixed = StreamingTopK(0, total=0, device=device).nbytes
    assert StreamingTopK(100_000, device=device).nbytes <= fixed + 12 * max(200_000, 100_000 + room)
    assert StreamingTopK(10, total=50, device=device).nbytes <= fixed + 12 * 50
    assert StreamingTopK(2**20, device=device).nbytes <= fixed + 12 * 2**21
