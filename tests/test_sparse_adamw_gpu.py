"""sparse_adamw_ on GPUs: what depends on blocks, launches, addresses and the step count there."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import simulated
from conftest import CPU, IMPLEMENTATIONS, implementation
from saft_kernels import ops
from saft_kernels.triton import launch, sparse_adamw
from test_sparse_adamw import DTYPES, Problem, problem
from waiting import NoWaiting

GPU = [name for name in IMPLEMENTATIONS if name not in CPU]
SIMULATED = [name for name in GPU if name.partition("-")[2] in simulated.GENERATIONS]
ON_GPU = pytest.mark.parametrize("device", GPU, indirect=True)


def make(
    params: Sequence[Tensor],
    indices: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    **options: Any,
) -> Problem:
    """A step of these fp32 parameters from a state of random numbers."""
    torch.manual_seed(1)
    nnz = sum(map(len, indices))
    vector = torch.empty(0, device=params[0].device)
    return Problem(
        list(params),
        list(grads or [torch.randn_like(p) for p in params]),
        list(indices),
        vector.new_empty(nnz).normal_(),
        vector.new_empty(nnz).uniform_(),
        None,
        vector.new_zeros(len(params)),
        dict(options),
    )


def results(done: Problem) -> list[Tensor]:
    return [*done.params, *done.state]


def assert_same(a: Problem, b: Problem) -> None:
    assert all(torch.equal(x, y) for x, y in zip(results(a), results(b), strict=True))


def one_by_one(together: Problem) -> Problem:
    """The same step as a call per tensor."""
    bounds = ops.end_to_end(together.indices)[1]
    for i, (param, grad, index) in enumerate(
        zip(together.params, together.grads, together.indices, strict=True)
    ):
        own = slice(bounds[i], bounds[i + 1])
        m, v = together.exp_avg[own], together.exp_avg_sq[own]
        step = together.step[i : i + 1]
        Problem([param], [grad], [index], m, v, None, step, together.options).run()
    return together


def every(param: Tensor, k: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.arange(0, param.numel(), k, dtype=dtype, device=param.device)


# Any order of threads and blocks ------------------------------------------------------------------


def in_order(name: str, order: str, seed: int, dtype: torch.dtype, compact: bool) -> list[Tensor]:
    kind, _, generation = name.partition("-")
    with simulated.use(kind, generation) as gpu:
        before, gpu.options = gpu.options, {**gpu.options, "order": order, "seed": seed}
        try:
            return results(problem(dtype, torch.device("cpu")).run(compact))
        finally:
            gpu.options = before


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compact", [False, True])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(name, dtype, compact):
    expected = in_order(name, "fwd", 0, dtype, compact)
    for order, seed in (("rev", 0), ("random", 1), ("random", 2)):
        actual = in_order(name, order, seed, dtype, compact)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


# Launches -----------------------------------------------------------------------------------------


@pytest.fixture(params=SIMULATED)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A simulated GPU, with the launches counted from here on."""
    kind, _, generation = request.param.partition("-")
    with simulated.use(kind, generation) as gpu:
        gpu.launches.clear()
        yield gpu


def counted(gpu: Any) -> list[str]:
    kinds = ("step_kernel", "count_kernel")
    return [kind for name in gpu.launches for kind in kinds if kind in name]


def test_a_step_is_two_launches(gpu):
    problem(torch.float32, torch.device("cpu")).run()
    assert counted(gpu) == ["step_kernel", "count_kernel"]
    assert len(gpu.launches) == 2


def test_a_step_without_entries_only_counts(gpu):
    params = [torch.ones(5), torch.ones(0)]
    done = make(params, [every(p)[:0] for p in params]).run()
    assert counted(gpu) == ["count_kernel"]
    assert done.step.tolist() == [1, 1]


def test_no_tensors_are_no_launch(gpu):
    nothing = torch.zeros(0)
    ops.sparse_adamw_([], [], [], nothing, nothing.clone(), nothing.clone(), lr=0.1)
    assert gpu.launches == []


def test_more_tensors_than_a_table_holds_are_launched_in_parts(gpu):
    params = [torch.randn(1 + i % 7) for i in range(800)]
    given = make(params, [every(p, 2) for p in params])
    expected = one_by_one(given.clone())
    gpu.launches.clear()
    assert_same(given.run(), expected)
    parts = 3 if "cuda" in type(gpu).__name__.lower() else 1
    assert counted(gpu) == [*["step_kernel"] * parts, "count_kernel"]


def test_more_layouts_than_a_table_holds_are_launched_in_parts(gpu):
    params = [torch.randn(7, 2 + i, 3).permute(2, 0, 1) for i in range(70)]
    grads = [torch.randn(2 + i, 3, 7).permute(1, 2, 0) for i in range(70)]
    given = make(params, [every(p, 5) for p in params], grads)
    expected = one_by_one(given.clone())
    gpu.launches.clear()
    assert_same(given.run(), expected)
    parts = 2 if "cuda" in type(gpu).__name__.lower() else 1
    assert counted(gpu) == [*["step_kernel"] * parts, "count_kernel"]


# Sizes, alignment, offsets ------------------------------------------------------------------------

SIZES = [0, 1, 2, 3, 4, 5, 7, 127, 511, 512, 513, 1025, 2048 + 3]


@ON_GPU
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_every_size_alone_and_behind_another(device, index_dtype):
    """A tensor's entries begin anywhere in the vectors, and end anywhere in a block."""
    params = [torch.randn(n, device=device) for n in SIZES for _ in range(2)]
    given = make(params, [every(p, 1, index_dtype) for p in params])
    assert_same(given.clone().run(), one_by_one(given.clone()))


@ON_GPU
@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_vectors_may_begin_anywhere(device, offset, index_dtype):
    """As those of a part of an optimizer's parameters do."""
    params = [torch.randn(n, device=device) for n in (600, 3, 1000)]
    given = make(params, [every(p, 1, index_dtype) for p in params])
    expected, grad = given.clone().run(), given.compact_grad()
    indices, bounds = ops.end_to_end(given.indices)

    def shifted(vector: Tensor, by: int) -> Tensor:
        longer = vector.new_empty(by + len(vector))
        longer[by:] = vector
        return longer[by:]

    actual = given.clone()
    actual.exp_avg = shifted(given.exp_avg, offset)
    actual.exp_avg_sq = shifted(given.exp_avg_sq, offset)
    ops.sparse_adamw_(
        actual.params, shifted(grad, 1), shifted(indices, offset), actual.exp_avg,
        actual.exp_avg_sq, actual.step, bounds=bounds, lr=1e-2, weight_decay=0.1,
    )  # fmt: skip
    assert_same(actual, expected)


@ON_GPU
def test_places_beyond_32_bits(device):
    """Two rows, whose distance in memory is more than 2^31 elements."""
    far, width = 2**31 + 64, 700
    param = torch.empty(far + width, dtype=torch.bfloat16, device=device).as_strided(
        (2, width), (far, 1)
    )
    near = torch.randn(2, width, device=device).bfloat16()
    param.copy_(near)
    grad = torch.randn_like(near)
    index = every(near, 3)
    zeros = torch.zeros(len(index), device=device)
    master = near.reshape(-1)[::3].float()
    both = [
        Problem(
            [weight], [grad], [index], zeros.clone(), zeros.clone(), master.clone(), zeros[:1] + 0
        ).run()
        for weight in (param, near)
    ]
    assert_same(*both)


# Numbers of the step ------------------------------------------------------------------------------


def corrections(betas: tuple[float, float], t: Tensor, device: torch.device) -> Tensor:
    """Weights after step t from zero with unit gradients: see the tests."""
    n = len(t)
    ones = torch.ones(n, device=device)
    weights = [torch.zeros(1, device=device) for _ in range(n)]
    first = torch.zeros(1, dtype=torch.int32, device=device)
    ops.sparse_adamw_(
        weights, ones, [first] * n, ones.clone(), ones * 0, (t - 1).float().to(device),
        lr=1.0, betas=betas, eps=0.0, weight_decay=0.0,
    )  # fmt: skip
    return torch.cat(weights).cpu().double()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.999, 0.9999, 1 - 1e-7])
def test_bias_corrections_are_right_to_two_ulps(device, beta):
    """Two of the correction itself, and half of one for every other rounding on its way."""
    t = torch.cat([torch.arange(1, 101), torch.logspace(2, 6, 300, dtype=torch.float64).long()])
    exact = 1 - torch.tensor(beta, dtype=torch.float64) ** t
    ulp = 2.0**-23
    # m = v = 1, so that the weight is -1 / (1 - beta^t)
    first = corrections((beta, 0.0), t, device)
    assert (first * exact + 1).abs().max() < (2 + 0.5) * ulp
    # m = 1, v = 1 - beta, so that it is -sqrt(1 - beta^t) / sqrt(1 - beta); a root halves errors
    second = corrections((0.0, beta), t, device)
    root = torch.tensor(1 - beta).double().sqrt()
    assert (second * root / exact.sqrt() + 1).abs().max() < (1 + 3 * 0.5) * ulp


def test_bias_corrections_of_tensors_with_different_step_counts(device):
    params = [torch.zeros(n, device=device) for n in (3, 700, 2)]
    given = make(params, [every(p) for p in params])
    given.step += torch.tensor([0.0, 4.0, 1e5], device=device)
    assert_same(given.clone().run(), one_by_one(given.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("found_inf", [0.0, 1.0, float("inf"), float("nan")])
def test_scalars_of_either_type(device, dtype, found_inf):
    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    params = [torch.randn(700, device=device)]
    given = make(params, [every(params[0])])
    tensors = {"lr": number(0.25), "grad_scale": number(8.0), "found_inf": number(found_inf)}
    numbers = {"lr": 0.25, "grad_scale": None, "found_inf": None}
    actual, expected = given.clone(), given.clone()
    actual.options, expected.options = tensors, numbers
    expected.grads = [grad / 8 for grad in given.grads]
    assert_same(actual.run(), expected.run() if found_inf == 0 else given)


# Triton's table -----------------------------------------------------------------------------------

TRITON = [name for name in GPU if name.startswith("triton")]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tables that are made from here on, with an empty cache for four."""
    made: list[Any] = []
    make_table = sparse_adamw._make

    def record(*arguments: Any) -> Any:
        made.append(arguments[1:])
        return make_table(*arguments)

    monkeypatch.setattr(sparse_adamw, "_make", record)
    monkeypatch.setattr(sparse_adamw, "_tables", sparse_adamw._Tables(capacity=4))
    return made


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Any one Triton backend will do where the host's side is tested."""
    with implementation(TRITON[0]) as device:
        yield device


def test_a_table_is_made_once_for_the_same_addresses(triton_device, tables):
    given = problem(torch.float32, triton_device)
    for _ in range(3):
        given.run()
    assert len(tables) == 1
    compact = given.compact_grad()
    indices, bounds = ops.end_to_end(given.indices)
    for scale in (1, 2):  # compact gradients may lie anywhere: no table says where
        ops.sparse_adamw_(
            given.params, compact * scale, indices, given.exp_avg, given.exp_avg_sq, given.step,
            bounds=bounds, lr=0.1,
        )  # fmt: skip
    assert len(tables) == 2


def test_a_table_is_made_for_every_change(triton_device, tables):
    given = problem(torch.float32, triton_device)
    given.run()
    moved = list(given.grads)
    given.grads = [*moved[:-1], moved[-1].clone()]
    given.run()
    given.grads = [*moved[:3], moved[3].contiguous(), *moved[4:]]
    given.run()
    assert len(tables) == 3


def test_old_tables_are_dropped_and_none_keeps_a_tensor_alive(triton_device, tables):
    given = problem(torch.float32, triton_device)
    for step in range(6):
        given.grads = [grad.clone() for grad in given.grads]
        given.run()
        assert len(sparse_adamw._tables._made) == min(step + 1, 4)
    tensors = [weakref.ref(tensor) for tensor in (*given.params, *given.grads)]
    del given
    problem(torch.float32, triton_device).run()  # a simulator remembers the last call's
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)


def test_streams_do_not_share_tables(triton_device, tables):
    """What one stream copies, another would not wait for."""
    given = problem(torch.float32, triton_device)
    for stream in (1, 2, 1):
        with mock.patch.object(sparse_adamw, "stream_of", return_value=stream):
            given.run()
    assert len(tables) == 2


def test_a_capture_uses_a_known_table_and_keeps_it(triton_device, tables):
    given = problem(torch.float32, triton_device)
    capturing = mock.patch.object(sparse_adamw, "is_capturing", return_value=True)
    with capturing, pytest.raises(RuntimeError, match="run the step once before capturing"):
        given.clone().run()
    expected = given.clone().run().run()
    given.run()
    made = len(tables)
    with capturing:
        given.run()
    assert len(tables) == made
    assert_same(given, expected)
    for _ in range(5):
        given.grads = [grad.clone() for grad in given.grads]
        given.run()
    assert len(sparse_adamw._tables._captured) == 1


def test_the_host_waits_for_nothing_once_the_table_is_made(triton_device, tables):
    given = problem(torch.float32, triton_device, found_inf=torch.tensor(0.0))
    indices, bounds = ops.end_to_end(given.indices)
    arguments = (
        given.params, given.grads, None, indices, bounds, given.exp_avg, given.exp_avg_sq, None,
        given.step, 0.0, torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.1, False, torch.tensor(8.0),
        torch.tensor(0.0),
    )  # fmt: skip
    with mock.patch.object(launch, "run") as run:
        sparse_adamw.sparse_adamw_(*arguments)
        with NoWaiting():
            sparse_adamw.sparse_adamw_(*arguments)
    assert len(run.mock_calls) == 4
