"""select(): the selection contracts, one test per sentence."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from saft_kernels.batches import count_examples, split_examples, with_last
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.gradient_pass import ALIGNMENT, aligned, cut_into_chunks
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.select import number_of_entries, select
from saft_kernels.topk import StreamingTopK

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Convolution, batch norm, embedding and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(5, 8)
        self.fc = nn.Linear(4 * 16, 8)
        self.shared = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.shared.weight
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(images))).flatten(1)
        x = self.fc(x) + self.embedding(torch.arange(len(images)) % 5)
        x = self.shared(torch.tanh(self.shared(x)))
        return self.head(torch.tanh(self.tied(x)))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Layers this small gain nothing from threads and wait for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def make_batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 2, 4, 4, generator=generator),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.fixture
def batches() -> list[Batch]:
    return make_batches(6, 6, 1)


def mean_gradient(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """The mean over all examples of the loss gradient, the plain way."""
    model = copy.deepcopy(model)
    total = sum(len(labels) for _, labels in batches)
    named = dict(model.named_parameters())
    mean = {name: torch.zeros(param.shape) for name, param in named.items()}
    for batch in batches:
        grads = torch.autograd.grad(loss_fn(model, batch), list(named.values()), allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                mean[name] += grad.float() * (len(batch[1]) / total)
    return mean


def top_entries(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """torch.topk over the concatenation; scores without ties above zero."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()]).abs()
    best = flat.topk(k).indices.sort().values
    found, begin = {}, 0
    for name, score in scores.items():
        here = best[(best >= begin) & (best < begin + score.numel())] - begin
        if here.numel():
            found[name] = here.int()
        begin += score.numel()
    return found


def assert_indices(mask: CooMask, expected: dict[str, Tensor]) -> None:
    assert list(mask) == list(expected)
    for name, index in expected.items():
        assert torch.equal(mask[name], index), name


# mean_grad --------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.002, 0.01, 0.3])
def test_equals_topk_on_the_concatenated_mean_gradient(
    model: Net, batches: list[Batch], density: float
) -> None:
    mask = select(model, loss_fn, batches, density)
    assert_indices(mask, top_entries(mean_gradient(model, batches), mask.nnz))


@pytest.mark.parametrize("density", [0.0015, 0.01, 0.123, 0.5, 1.0])
def test_selects_exactly_floor_of_density_times_d(
    model: Net, batches: list[Batch], density: float
) -> None:
    total = sum(param.numel() for param in model.parameters())
    mask = select(model, loss_fn, batches, density)
    assert mask.nnz == int(density * total)
    assert mask.numel == total


def test_ties_go_to_the_earlier_parameter_then_the_lower_index() -> None:
    model = nn.ModuleDict({"b": nn.Linear(3, 2, bias=False), "a": nn.Linear(3, 2, bias=False)})

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model["a"](x) - model["b"](x)).sum()

    mask = select(model, loss, [torch.ones(1, 3)], density=0.6)
    assert_indices(
        mask,
        {"b.weight": torch.arange(6, dtype=torch.int32), "a.weight": torch.tensor([0]).int()},
    )


def test_a_short_last_batch_does_not_count_as_a_full_one() -> None:
    model = nn.Linear(2, 1, bias=False)
    # The first entry's gradient is 1 for each of 3 examples; the second's is 2 for one example.
    batches = [torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 2.0]])]
    mask = select(model, lambda m, x: m(x).mean(), batches, density=0.5)
    assert mask["weight"].tolist() == [0]


def test_the_result_does_not_depend_on_how_examples_are_batched(model: Net) -> None:
    images, labels = make_batches(12)[0]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model.head(model.fc(batch[0].flatten(1).repeat(1, 2))), batch[1])

    masks = [
        select(model, loss, list(zip(images.split(size), labels.split(size), strict=True)), 0.01)
        for size in (12, 5, 1)
    ]
    assert masks[0] == masks[1] == masks[2]


def test_examples_says_how_many_examples_a_batch_has() -> None:
    model = nn.Linear(2, 1, bias=False)
    batches = [{"x": torch.tensor([[1.0, 0.0]]), "n": 3}, {"x": torch.tensor([[0.0, 2.0]]), "n": 1}]
    mask = select(
        model,
        lambda m, batch: m(batch["x"]).mean(),
        batches,
        density=0.5,
        examples=lambda batch: batch["n"],
    )
    assert mask["weight"].tolist() == [0]


def test_shared_and_repeatedly_used_parameters_add_up(model: Net, batches: list[Batch]) -> None:
    mask = select(model, loss_fn, batches, 0.02, include="shared.weight")
    mean = {"shared.weight": mean_gradient(model, batches)["shared.weight"]}
    assert_indices(mask, top_entries(mean, 1))
    assert list(mask.shapes) == ["shared.weight"]


def test_parameters_without_a_gradient_are_offered_as_zeros(
    model: Net, batches: list[Batch]
) -> None:
    mask = select(model, loss_fn, batches, density=1.0)
    assert mask["unused.weight"].tolist() == list(range(9))


def test_a_parameter_that_only_some_batches_use_counts() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))})

    def loss(model: nn.Module, batch: tuple[str, float]) -> Tensor:
        name, scale = batch
        return (model[name] * torch.tensor([1.0, scale])).sum()

    batches = [("a", 3.0), ("b", 2.0), ("b", 2.0)]
    mask = select(model, loss, batches, density=0.5)
    assert_indices(mask, {"a": torch.tensor([1]).int(), "b": torch.tensor([1]).int()})
    assert mask == select(model, loss, batches[::-1], density=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_dtype_add_up_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 8).to(dtype)
    batches = [torch.randn(4, 32, dtype=dtype) for _ in range(8)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    scores = {name: torch.zeros(param.shape) for name, param in model.named_parameters()}
    for x in batches:
        grads = torch.autograd.grad(loss(model, x), list(model.parameters()))
        for score, grad in zip(scores.values(), grads, strict=True):
            score += 4 * grad.float()
    assert_indices(select(model, loss, batches, 0.1), top_entries(scores, 26))


def test_sparse_embedding_gradients_count(batches: list[Batch]) -> None:
    def make(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(50, 4, sparse=sparse), nn.Linear(4, 1))

    data = [torch.tensor([[1, 1, 7]]), torch.tensor([[30, 2, 7]])]
    masks = [
        select(make(sparse), lambda m, x: m(x).square().mean(), data, 0.05)
        for sparse in (True, False)
    ]
    assert masks[0] == masks[1]


def test_indices_are_row_major_for_channels_last_weights(model: Net, batches: list[Batch]) -> None:
    expected = top_entries(mean_gradient(model, batches), 30)
    model.conv.to(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    total = sum(param.numel() for param in model.parameters())
    assert_indices(select(model, loss_fn, batches, 30 / total), expected)


def test_checkpointed_activations_give_the_same_mask(model: Net, batches: list[Batch]) -> None:
    def checkpointed(model: nn.Module, batch: Batch) -> Tensor:
        return checkpoint(loss_fn, model, batch, use_reentrant=False)

    assert select(model, checkpointed, batches, 0.05) == select(model, loss_fn, batches, 0.05)


# fisher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, 5, 2), (12,), (1,) * 12])
def test_fisher_is_the_mean_of_squared_per_example_gradients(
    model: Net, sizes: tuple[int, ...]
) -> None:
    batches = make_batches(*sizes)
    scores = {name: torch.zeros(param.shape) for name, param in model.named_parameters()}
    for images, labels in batches:
        for example in zip(images.split(1), labels.split(1), strict=True):
            for name, grad in mean_gradient(model, [example]).items():
                scores[name] += grad.square()
    mask = select(model, loss_fn, batches, 0.02, score="fisher")
    assert_indices(mask, top_entries(scores, mask.nnz))


def test_fisher_refuses_batches_that_cannot_be_cut() -> None:
    with pytest.raises(SelectionError, match="batch of 3 examples cannot be cut"):
        select(
            nn.Linear(2, 1),
            lambda m, batch: m(batch[0]).mean(),
            [[torch.ones(2, 2)]],
            0.5,
            "fisher",
            examples=lambda _: 3,
        )


# magnitude and random ---------------------------------------------------------------------------


def test_magnitude_selects_the_smallest_weights() -> None:
    model = nn.ParameterDict(
        {
            "a": nn.Parameter(torch.tensor([[3.0, -1e-40, 1e38], [-0.5, 0.25, -3e38]])),
            "b": nn.Parameter(torch.tensor([0.0, -0.25, 2.0, -0.0])),
        }
    )
    order = [("b", 0), ("b", 3), ("a", 1), ("a", 4), ("b", 1), ("a", 3), ("b", 2), ("a", 0)]
    for k in range(1, len(order) + 1):
        mask = select(model, density=k / 10, score="magnitude")
        found = [(name, i) for name, index in mask.items() for i in index.tolist()]
        assert sorted(found) == sorted(order[:k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_magnitude_in_every_dtype_and_layout(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's name for the module is taken by the function.
    monkeypatch.setattr(sys.modules["saft_kernels.select"], "_MAGNITUDE_PIECE", 37)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 5, bias=False).to(dtype)
    smallest = model.weight.detach().float().abs().flatten().argsort(stable=True)[:30]
    for form in (model, copy.deepcopy(model).to(memory_format=torch.channels_last)):
        mask = select(form, density=0.1, score="magnitude")
        assert mask["weight"].tolist() == sorted(smallest.tolist())


def test_magnitude_refuses_non_finite_weights() -> None:
    model = nn.Linear(2, 2)
    model.weight.data[0, 1] = float("nan")
    with pytest.raises(SelectionError, match="'weight' holds NaN"):
        select(model, density=0.5, score="magnitude")


def test_random_is_seeded_and_the_same_on_every_machine() -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 10), "b": nn.Linear(4, 4)})
    mask = select(model, density=0.05, score="random", seed=3)
    assert {name: index.tolist() for name, index in mask.items()} == RANDOM_SEED_3
    assert mask == select(model, density=0.05, score="random", seed=3)
    assert mask != select(model, density=0.05, score="random", seed=4)


RANDOM_SEED_3 = {"a.weight": [6, 17, 91], "a.bias": [0, 8], "b.weight": [14]}


def test_random_is_uniform_without_replacement() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 3, bias=False), "b": nn.Linear(2, 1, bias=False)})
    for k in (1, 7, 13, 20):
        counts = torch.zeros(20)
        for seed in range(400):
            mask = select(model, density=k / 20, score="random", seed=seed)
            assert mask.nnz == k
            counts[mask["a.weight"].long() if "a.weight" in mask else []] += 1
            counts[mask["b.weight"].long() + 18 if "b.weight" in mask else []] += 1
        deviation = (400 * k / 20 * (1 - k / 20)) ** 0.5
        assert (counts - 400 * k / 20).abs().max() <= 4 * deviation


def test_random_needs_memory_for_the_selected_entries_only() -> None:
    with torch.device("meta"):
        model = nn.Linear(2**18, 2**17, bias=False)
    assert select(model, density=1e-7, score="random").nnz == 3435


# What is a candidate ----------------------------------------------------------------------------


def test_tied_parameters_count_once(model: Net) -> None:
    mask = select(model, density=0.5, score="magnitude")
    assert "tied.weight" not in mask.shapes
    assert mask.numel == sum(param.numel() for param in model.parameters())


def test_frozen_parameters_are_no_candidates(model: Net, batches: list[Batch]) -> None:
    model.fc.requires_grad_(False)
    mask = select(model, loss_fn, batches, 0.1)
    assert [n for n in dict(model.named_parameters()) if n not in mask.shapes] == [
        "fc.weight",
        "fc.bias",
    ]


def test_include_and_exclude_take_patterns_and_functions(model: Net) -> None:
    def names(**filters: Any) -> list[str]:
        return list(select(model, density=1.0, score="magnitude", **filters).shapes)

    assert names(include="fc.*") == ["fc.weight", "fc.bias"]
    assert names(include=["fc.*", "head.*"], exclude="*.bias") == ["fc.weight", "head.weight"]
    assert names(include=lambda name: name.startswith("norm")) == ["norm.weight", "norm.bias"]
    assert names(include="tied.*") == ["shared.weight", "tied.bias"]
    assert "shared.weight" not in names(exclude=["tied.weight", "logit_scale"])


def test_an_include_pattern_that_matches_nothing_raises(model: Net) -> None:
    with pytest.raises(SelectionError, match=r"'fc\.weigth' matches no .* mean 'fc\.weight'"):
        select(model, density=0.1, score="magnitude", include=["head.*", "fc.weigth"])


def test_a_model_without_candidates_raises(model: Net) -> None:
    with pytest.raises(SelectionError, match="no candidate: none of its 14 parameters"):
        select(model, density=0.1, score="magnitude", exclude="*")
    with pytest.raises(SelectionError, match="no candidate"):
        select(nn.ReLU(), density=0.1, score="magnitude")


def test_complex_candidates_and_several_devices_are_refused() -> None:
    complex_model = nn.ParameterDict({"c": nn.Parameter(torch.zeros(3, dtype=torch.complex64))})
    with pytest.raises(SelectionError, match=r"'c' is torch\.complex64"):
        select(complex_model, density=1.0, score="magnitude")
    split = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")})
    with pytest.raises(SelectionError, match=r"several devices \(cpu, meta\)"):
        select(split, density=1.0, score="magnitude")


# The number of entries --------------------------------------------------------------------------


def test_the_number_of_entries_does_not_suffer_from_binary_fractions() -> None:
    assert number_of_entries(0.3, 10) == 3
    assert number_of_entries(0.29, 100) == 29
    assert number_of_entries(1 / 3, 3) == 1
    assert number_of_entries(0.299999, 10) == 2
    assert number_of_entries(1e-3, 149_620_737) == 149_620
    assert number_of_entries(1.0, 10**15) == 10**15


@given(st.integers(1, 2**40), st.floats(0, 1))
def test_the_number_of_entries_inverts_the_density(numel: int, fraction: float) -> None:
    k = max(1, int(fraction * numel))
    assert number_of_entries(k / numel, numel) == k


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_density_outside_zero_to_one_raises(model: Net, density: float) -> None:
    with pytest.raises(SelectionError, match=r"density is .*; it must be above 0 and at most 1"):
        select(model, density=density, score="random")


def test_a_mask_of_zero_entries_raises(model: Net) -> None:
    with pytest.raises(SelectionError, match=r"selects no entry; use at least 0\.00"):
        select(model, density=1e-4, score="random")


# chunked ----------------------------------------------------------------------------------------


def smallest_budget(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    with pytest.raises(SelectionError, match="at least") as caught:
        select(model, *args, memory="chunked", memory_budget=1, **kwargs)
    return int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))


@pytest.mark.parametrize("score", ["mean_grad", "fisher"])
@pytest.mark.parametrize("elements", [37, 300, 10_000])
def test_chunked_gives_the_same_result(
    model: Net, batches: list[Batch], score: Any, elements: int
) -> None:
    full = select(model, loss_fn, batches, 0.05, score)
    smallest = smallest_budget(model, loss_fn, batches, 0.05, score)
    chunked = select(
        model,
        loss_fn,
        batches,
        0.05,
        score,
        memory="chunked",
        memory_budget=smallest + 4 * (elements - 1),
    )
    assert chunked == full
    assert_indices(chunked, dict(full.items()))


@pytest.mark.parametrize("elements", [None, 4, 7, 300])
def test_accumulators_begin_where_kernels_load_wide(
    model: Net, batches: list[Batch], elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At multiples of 16 bytes, whatever the sizes before; and so do gradients."""
    assert any(param.numel() % 4 for param in model.parameters())
    options: dict[str, Any] = {}
    if elements is not None:
        smallest = smallest_budget(model, loss_fn, batches, 0.05)
        options = {"memory": "chunked", "memory_budget": smallest + 4 * (elements - 4)}
    update, places, held = StreamingTopK.update, set(), set()

    def record(top: StreamingTopK, key: Any, acc: Tensor, *arguments: Any, **kwargs: Any) -> None:
        places.add((acc.data_ptr() % 16, kwargs["offset"] % 4))
        held.add(top.nbytes + acc.untyped_storage().nbytes())
        update(top, key, acc, *arguments, **kwargs)

    monkeypatch.setattr(StreamingTopK, "update", record)
    select(model, loss_fn, batches, 0.05, **options)
    assert places == {(0, 0)}
    assert max(held) <= options.get("memory_budget", max(held))


@given(sizes=st.lists(st.integers(0, 30), max_size=8), limit=st.integers(1, 12))
def test_chunks_are_no_more_than_the_memory_calls_for(sizes: list[int], limit: int) -> None:
    limit *= ALIGNMENT
    candidates = {str(i): nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)}
    chunks = cut_into_chunks(candidates, limit)
    taken = [sum(aligned(segment.numel) for segment in chunk) for chunk in chunks]
    assert all(size == limit for size in taken[:-1])
    assert taken[-1] <= limit
    assert sum(taken) == sum(aligned(size) for size in sizes)
    for name, param in candidates.items():
        ends = [(s.begin, s.end) for chunk in chunks for s in chunk if s.name == name]
        assert [index for begin, end in ends for index in range(begin, end)] == list(
            range(param.numel())
        )


def test_chunked_refuses_a_budget_below_the_minimum(model: Net, batches: list[Batch]) -> None:
    smallest = smallest_budget(model, loss_fn, batches, 0.05)
    for budget in (None, smallest - 1, 0, -5):
        with pytest.raises(SelectionError, match=rf"memory_budget of at least {smallest:,} bytes"):
            select(model, loss_fn, batches, 0.05, memory="chunked", memory_budget=budget)
    with pytest.raises(SelectionError, match=r"memory_budget needs memory='chunked'"):
        select(model, loss_fn, batches, 0.05, memory_budget=10**9)


def budget_for_two_passes(model: nn.Module, batches: Any) -> dict[str, Any]:
    total = sum(param.numel() for param in model.parameters())
    smallest = smallest_budget(model, loss_fn, batches, 0.05)
    return {"memory": "chunked", "memory_budget": smallest + 2 * total}


def test_chunked_refuses_an_iterator(model: Net, batches: list[Batch]) -> None:
    budget = budget_for_two_passes(model, batches)
    with pytest.raises(SelectionError, match="batches is an iterator"):
        select(model, loss_fn, iter(batches), 0.05, **budget)
    full = select(model, loss_fn, iter(batches), 0.05)
    assert full == select(model, loss_fn, batches, 0.05)


@pytest.mark.parametrize("later", [[], make_batches(6, 6), make_batches(1, 6, 6)])
def test_chunked_refuses_data_that_change_between_passes(
    model: Net, batches: list[Batch], later: list[Batch]
) -> None:
    class Changing:
        passes = 0

        def __iter__(self) -> Iterator[Batch]:
            self.passes += 1
            return iter(batches if self.passes == 1 else later)

    budget = budget_for_two_passes(model, batches)
    with pytest.raises(SelectionError, match="pass 2"):
        select(model, loss_fn, Changing(), 0.05, **budget)


def test_chunked_repeats_shuffling_and_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 3)).train()
    images, labels = torch.randn(20, 16), torch.randint(3, (20,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)
    budget = budget_for_two_passes(model, loader)
    state = torch.get_rng_state()
    full = select(model, loss_fn, loader, 0.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert select(model, loss_fn, loader, 0.05, **budget) == full


def test_chunked_does_not_take_the_fast_path_of_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 2)).eval()
    batches = [torch.randn(3, 5, 16) for _ in range(2)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        assert not torch.backends.mha.get_fastpath_enabled()
        return model(x).square().mean()

    total = sum(param.numel() for param in model.parameters())
    budget = smallest_budget(model, loss, batches, 0.05) + total
    chunked = select(model, loss, batches, 0.05, memory="chunked", memory_budget=budget)
    assert chunked == select(model, loss, batches, 0.05)
    assert torch.backends.mha.get_fastpath_enabled()


# Nothing is left behind -------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "requires_grad": [param.requires_grad for param in model.parameters()],
        "grads": [param.grad for param in model.parameters()],
        "grad values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [dict(param._post_accumulate_grad_hooks or {}) for param in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name
    assert torch.equal(after["rng"], before["rng"])
    for key in ("training", "requires_grad", "hooks"):
        assert after[key] == before[key], key
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert old is new
    for old, new in zip(before["grad values"], after["grad values"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


@pytest.fixture
def used_model(model: Net) -> Net:
    """A model in the middle of training: gradients, frozen parts, mixed modes."""
    model.train()
    model.fc.eval()
    model.head.bias.requires_grad_(False)
    loss_fn(model, make_batches(3)[0]).backward()
    return model


@pytest.mark.parametrize("score", ["mean_grad", "fisher", "magnitude", "random"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_model_is_left_as_it_was(used_model: Net, score: Any, chunked: bool) -> None:
    data = make_batches(4, 2)
    options = budget_for_two_passes(used_model, data) if chunked else {}
    before = state_of(used_model)
    mask = select(used_model, loss_fn, data, 0.05, score, exclude="conv.*", **options)
    assert mask.nnz > 0
    assert_unchanged(used_model, before)


@pytest.mark.parametrize("where", ["data", "loss", "backward", "progress"])
def test_the_model_is_left_as_it_was_after_an_error(used_model: Net, where: str) -> None:
    before = state_of(used_model)

    def data() -> Iterator[Batch]:
        yield make_batches(4)[0]
        if where == "data":
            raise KeyboardInterrupt
        yield make_batches(3)[0]

    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if where == "loss" and calls == 2:
            raise KeyboardInterrupt
        value = loss_fn(model, batch)
        if where == "backward" and calls == 2:
            value = Interrupt.apply(model.head.weight) * value
        return value

    def progress(done: int, total: int | None, description: str) -> None:
        if where == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(used_model, loss, data(), 0.05, progress=progress)
    assert_unchanged(used_model, before)


class Interrupt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_batch_norm_statistics_do_not_move_and_are_the_ones_used(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    model = Net()
    model.norm.running_mean.fill_(0.7)
    training = select(model.train(), loss_fn, batches, 0.05)
    assert model.norm.training
    assert torch.equal(model.norm.running_mean, torch.full((4,), 0.7))
    assert model.norm.num_batches_tracked == 0
    assert training == select(model.eval(), loss_fn, batches, 0.05)


def test_existing_gradients_do_not_count(model: Net, batches: list[Batch]) -> None:
    clean = select(model, loss_fn, batches, 0.05)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e6)
    assert select(model, loss_fn, batches, 0.05) == clean


def test_selection_works_under_no_grad(model: Net, batches: list[Batch]) -> None:
    with torch.no_grad():
        mask = select(model, loss_fn, batches, 0.05)
        assert not torch.is_grad_enabled()
    assert mask == select(model, loss_fn, batches, 0.05)


def test_selection_is_always_in_fp32(model: Net, batches: list[Batch]) -> None:
    expected = select(model, loss_fn, batches, 0.05)
    torch.set_default_dtype(torch.float64)
    try:
        assert select(model, loss_fn, batches, 0.05) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_two_dense_gradients_exist_at_a_time(model: Net, batches: list[Batch]) -> None:
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(param.grad is not None for param in model.parameters()))

    handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
    select(model, loss_fn, batches, 0.05)
    for handle in handles:
        handle.remove()
    assert alive
    assert max(alive) <= 1


PEAK = """
import torch
from torch import nn
from saft_kernels.select import select

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(64)])
data = [torch.randn(2, 512) for _ in range(3)]
loss = lambda m, x: m(x).square().mean()
select(nn.Linear(512, 512), loss, data, 0.1)
before = peak(reset=True)
BODY
print((peak() - before) / (4 * 64 * 512**2))
"""


def peak_over_weights(body: str) -> float:
    """Peak memory that ``body`` adds, in multiples of the weights, in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    code = PEAK.replace("BODY", body)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_one_accumulator_and_one_layers_gradient() -> None:
    # 64 MiB of weights in 1 MiB layers: dense gradients and an accumulator would take 2.
    assert peak_over_weights("[loss(model, x).backward() for x in data]") > 0.9
    assert peak_over_weights("select(model, loss, data, 0.001)") < 1.25
    budget = "memory='chunked', memory_budget=2**24"
    assert peak_over_weights(f"select(model, loss, data, 0.001, {budget})") < 0.5


# Errors -----------------------------------------------------------------------------------------


def test_unknown_choices_raise_with_the_valid_ones(model: Net, batches: list[Batch]) -> None:
    bad: Any = "gradient"
    with pytest.raises(
        SelectionError, match=r"score is 'gradient'.* mean_grad, fisher, random, magnitude"
    ):
        select(model, loss_fn, batches, score=bad)
    with pytest.raises(SelectionError, match="memory is 'gradient'; choose one of full, chunked"):
        select(model, loss_fn, batches, memory=bad)
    with pytest.raises(SelectionError, match="seed is -1"):
        select(model, density=0.1, score="random", seed=-1)


def test_gradient_scores_need_a_loss_and_data(model: Net) -> None:
    with pytest.raises(SelectionError, match="score='mean_grad' needs loss_fn and batches"):
        select(model, density=0.1)


def test_an_empty_loader_raises(model: Net) -> None:
    with pytest.raises(SelectionError, match="batches gave no data"):
        select(model, loss_fn, [], 0.1)


def test_an_empty_batch_raises(model: Net) -> None:
    with pytest.raises(SelectionError, match="batch 2 has 0 examples"):
        select(model, loss_fn, make_batches(2, 0, 2), 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_raises_naming_the_batch(
    model: Net, batches: list[Batch], value: float
) -> None:
    batches[1][0][0] = value
    with pytest.raises(NonFiniteGradientError, match="the loss of batch 2 is nan"):
        select(model, loss_fn, batches, 0.1)


@pytest.mark.parametrize("score", ["mean_grad", "fisher"])
def test_a_non_finite_gradient_raises_naming_the_parameter(
    model: Net, batches: list[Batch], score: Any
) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return loss_fn(model, batch) + (model.fc.bias * 0).sqrt().sum()

    with pytest.raises(NonFiniteGradientError, match=r"'fc\.bias'") as caught:
        select(model, loss, batches, 0.1, score)
    assert caught.value.parameter == "fc.bias"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
            r"batch 1 it returned \[6\]",
        ),
        (lambda m, b: 0.5, "it returned float"),
        (lambda m, b: None, "it returned NoneType"),
    ],
)
def test_a_loss_that_is_not_one_number_raises(
    model: Net, batches: list[Batch], result: Callable[..., Any], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        select(model, result, batches, 0.1)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_loss_that_does_not_depend_on_the_model_raises(
    model: Net, batches: list[Batch], chunked: bool
) -> None:
    options = budget_for_two_passes(model, batches) if chunked else {}
    with pytest.raises(SelectionError, match="does not depend on any candidate"):
        select(model, lambda m, batch: loss_fn(m, batch).detach(), batches, 0.05, **options)


def test_a_hook_that_takes_the_gradient_first_is_noticed(model: Net, batches: list[Batch]) -> None:
    def take(param: Tensor) -> None:
        param.grad = None

    model.head.weight.register_post_accumulate_grad_hook(take)
    with pytest.raises(SelectionError, match=r"another hook of 'head\.weight' took its gradient"):
        select(model, loss_fn, batches, 0.1)


def test_a_model_with_a_streamed_optimizer_is_refused(model: Net, batches: list[Batch]) -> None:
    mask = select(model, density=0.05, score="random")
    optimizer = SparseAdamW(model, mask, gradients="streamed")
    loss_fn(model, batches[0]).backward()
    pending = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    values = {name: grad.values().clone() for name, grad in pending.items()}
    for param in model.parameters():
        param.requires_grad_(True)
    with pytest.raises(SelectionError, match=r"is streamed to a SparseAdamW; call detach\(\)"):
        select(model, loss_fn, batches, 0.1)
    assert values
    for name, param in model.named_parameters():
        assert param.grad is pending.get(name)
        assert name not in values or torch.equal(param.grad.values(), values[name])
    optimizer.detach()
    assert select(model, loss_fn, batches, 0.1).nnz


def test_reentrant_checkpointing_is_refused_where_it_would_be_wrong() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def twice(model: nn.Module, x: Tensor) -> Tensor:
        x = checkpoint(model[1], model[0](x), use_reentrant=True)
        return checkpoint(model[1], x, use_reentrant=True).sum()

    with pytest.raises(
        SelectionError, match=r"'1\.(weight|bias)' received two gradients.*use_reentrant"
    ):
        select(model, twice, [torch.ones(1, 4)], 0.5)
    with pytest.raises(SelectionError, match="reentrant activation checkpointing loses"):
        select(model, twice, [torch.ones(1, 4)], 0.5, exclude="0.*")


# Progress and batches ---------------------------------------------------------------------------


def test_progress_counts_the_batches_of_all_passes(model: Net, batches: list[Batch]) -> None:
    calls: list[tuple[int, int | None, str]] = []
    select(model, loss_fn, batches, 0.05, progress=lambda *call: calls.append(call))
    assert calls == [(i, 3, "pass 1 of 1") for i in (1, 2, 3)]
    calls.clear()
    select(
        model,
        loss_fn,
        batches,
        0.05,
        progress=lambda *call: calls.append(call),
        **budget_for_two_passes(model, batches),
    )
    assert calls == [(i, 6, f"pass {1 if i < 4 else 2} of 2") for i in range(1, 7)]
    calls.clear()
    select(model, loss_fn, iter(batches), 0.05, progress=lambda *call: calls.append(call))
    assert calls[-1] == (3, None, "pass 1 of 1")


Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    image: Tensor
    name: str


def test_examples_are_counted_by_the_first_tensor() -> None:
    assert count_examples({"name": "x", "image": torch.zeros(3, 2)}) == 3
    assert count_examples(Sample(torch.zeros(4), "x")) == 4
    assert count_examples([torch.tensor(1.0), torch.zeros(5)]) == 1
    assert count_examples("no tensor") == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda x, s: (x, s),
        lambda x, s: [x, s],
        lambda x, s: Point(x, {"deep": [s, "text", None]}),
        lambda x, s: OrderedDict(x=x, s=s),
        lambda x, s: UserDict(x=x, s=s),
        lambda x, s: [Sample(x, "name"), s],
        lambda x, s: (x, s, ["first caption", "second caption"]),
    ],
)
@pytest.mark.parametrize("shared", [torch.tensor(1.0), torch.arange(3.0)])
def test_examples_are_cut_out_of_any_structure(build: Callable[..., Any], shared: Tensor) -> None:
    x = torch.arange(6.0).view(2, 3)
    batch = build(x, shared)
    parts = list(split_examples(batch, 2))
    assert len(parts) == 2
    for i, part in enumerate(parts):
        assert type(part) is type(batch)
        assert count_examples(part) == 1
        assert repr(part) == repr(build(x[i : i + 1], shared)).replace(
            "['first caption', 'second caption']", str([["first caption", "second caption"][i]])
        )
    assert repr(batch) == repr(build(x, shared))


def test_with_last_marks_the_last_item() -> None:
    assert list(with_last([])) == []
    assert list(with_last([1])) == [(1, True)]
    assert list(with_last(iter("ab"))) == [("a", False), ("b", True)]
