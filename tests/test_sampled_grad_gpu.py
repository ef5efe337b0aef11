"""Sampled gradients on GPUs: what depends on blocks, parts, launches and addresses there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import simulated
from conftest import implementation
from saft_kernels import cost_model
from test_sampled_grad import DTYPES, Problem, lookup, problem, run_lookup
from tolerances import assert_close

CPU = torch.device("cpu")
SIMULATED = simulated.names()


@pytest.fixture(params=SIMULATED)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A simulated GPU, with the launches counted from here on."""
    with simulated.use(*request.param.split("-")) as gpu:
        gpu.launches.clear()
        yield gpu


def launched(gpu: Any) -> list[str]:
    """Which kernels ran, by the names that both backends use."""
    kinds = ("pack", "entries", "product", "sum_parts", "find_rows", "sum_tokens")
    return [kind for name in gpu.launches for kind in kinds if f"{kind}_kernel" in name]


def in_order(gpu: Any, order: str, seed: int, run: Any) -> Tensor:
    before, gpu.options = gpu.options, {**gpu.options, "order": order, "seed": seed}
    try:
        return run()
    finally:
        gpu.options = before


def outcomes(gpu: Any, run: Any) -> list[Tensor]:
    """One result per order of threads and blocks."""
    orders = (("fwd", 0), ("rev", 0), ("random", 1))
    return [in_order(gpu, order, seed, run) for order, seed in orders]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", [False, True])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(gpu, dtype, product):
    p = problem(CPU, dtype, 500, width=140, height=90, every=5)  # many parts, tiles, blocks
    first, *others = outcomes(gpu, lambda: p.run(product))
    assert all(torch.equal(first, other) for other in others)
    assert "sum_parts" in launched(gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_gives_the_same_bits_for_embeddings(gpu, dtype):
    p = lookup(CPU, dtype, 700)
    first, *others = outcomes(gpu, lambda: run_lookup(p))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("product", [False, True])
def test_launches_do_not_depend_on_values(gpu, product):
    """What a CUDA graph needs: one launch to pack, one or two for the sum."""
    way = "product" if product else "entries"
    for tokens, expected in ((48, ["pack", way]), (300, ["pack", way, "sum_parts"])):
        p = problem(CPU, torch.float32, tokens)
        for _ in range(2):
            gpu.launches.clear()
            p.run(product)
            assert launched(gpu) == expected
            p.x.zero_()


def test_an_embedding_takes_two_launches_and_a_sort(gpu):
    p = lookup(CPU, torch.float32, 100)
    run_lookup(p)
    assert launched(gpu) == ["find_rows", "sum_tokens"]


def test_nothing_is_launched_for_nothing(gpu):
    p = problem(CPU, torch.float32)
    p.entries = p.entries[:0]
    assert p.run(False).numel() == p.run(True).numel() == 0
    p = lookup(CPU, torch.float32, 0)
    p.entries = p.entries[:0]
    assert run_lookup(p).numel() == 0
    assert launched(gpu) == []


def test_the_model_chooses_the_way(gpu):
    crowd, few = (problem(CPU, torch.bfloat16, 40, 64, 64, every) for every in (1, 97))
    for p, way in ((crowd, "product"), (few, "entries")):
        columns, rows, _, of_entry = p.plan()
        sizes = of_entry.numel(), rows.numel(), columns.numel(), p.x.dtype
        assert cost_model.prefers_product(*sizes) == (way == "product")
        gpu.launches.clear()
        p.run()
        assert launched(gpu) == ["pack", way]


def test_tiles_without_entries_are_skipped(gpu):
    """Their columns of x are not even read: 0 x NaN would be seen in shared sums."""
    p = problem(CPU, torch.bfloat16, 40, width=200, height=200)
    row, column = p.entries.t()
    p.entries = p.entries[(row < 64) == (column < 64)]
    assert_close(p.run(True).double(), p.dense(), "sampled_grad")


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("parts", [2, 8, 9, 10, 17])
def test_every_part_is_added(gpu, product, parts):
    """Also the last one, which may be alone in its group."""
    tokens = 16 * 4 * parts
    x, dy = torch.ones(tokens, 1), torch.ones(tokens, 1)
    p = Problem(x, dy, torch.tensor([[0, 0], [0, 1]]))
    assert p.run(product).tolist() == [tokens, tokens]


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("tokens", [16 * 4 * 256, 16 * 4 * 256 + 17])
def test_more_tokens_than_parts(gpu, product, tokens):
    """A part then has more than the least number of blocks; the last may be shorter."""
    x, dy = torch.ones(tokens, 1), torch.ones(tokens, 1)
    x[-1], dy[0] = 3, 5
    p = Problem(x, dy, torch.tensor([[0, 0], [0, 1]]))
    assert p.run(product).tolist() == [tokens + 6, tokens + 4]


@pytest.mark.parametrize("product", [False, True])
def test_offsets_of_more_than_32_bits(gpu, product):
    """Tokens so far apart that an element's place needs 64 bits; most pages are never touched."""
    apart = 2**30 + 7
    memory = torch.empty(2 * apart + 100, dtype=torch.bfloat16)
    p = problem(CPU, torch.bfloat16, 3)
    far = Problem(
        memory.as_strided((3, 37), (apart, 1)),
        memory[50:].as_strided((3, 23), (apart, 1)),
        p.entries,
    )
    far.x.copy_(p.x)
    far.dy.copy_(p.dy)
    assert torch.equal(far.run(product), p.run(product))


@pytest.mark.parametrize("name", SIMULATED)
def test_offsets_of_more_than_32_bits_in_an_embedding(name):
    with implementation(name) as device:
        p = lookup(device, torch.bfloat16, 3)
        apart = 2**30 + 7
        far = torch.empty(2 * apart + 100, dtype=torch.bfloat16).as_strided((3, 12), (apart, 1))
        far.copy_(p.dy)
        assert torch.equal(run_lookup(Problem(p.x, far, p.entries)), run_lookup(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_gpu_generations_give_the_same_bits(dtype):
    p, tokens = problem(CPU, dtype, 500, every=2), lookup(CPU, dtype, 500)
    for kind in {name.split("-")[0] for name in SIMULATED}:
        found = []
        for generation in simulated.GENERATIONS:
            with simulated.use(kind, generation):
                found.append([p.run(False), p.run(True), run_lookup(tokens)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), kind
