"""A parameter of 2**31 + 7 elements, through all of the data path: 32 bits do not count that far.

Its memory is never written but where entries are selected. The system gives a page when it is first
written to, and what is only read is one page of zeros that it shares, so that most of this takes
time but hardly memory.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import CPU, implementation
from saft_kernels import ops
from saft_kernels.delta import SparseDelta
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.plan import LinearPlan
from saft_kernels.select import select
from saft_kernels.topk import StreamingTopK

NUMEL = 2**31 + 7
WIDTH = 15  # NUMEL has this factor

#: Around every place at which a number of too few bits would go wrong.
PLACES = [0, 1, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 5, 2**31 + 6]
INDICES = torch.tensor(PLACES)


def memory_available() -> int:
    """Bytes; as many as anybody could want where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 60


def needs(gigabytes: float) -> pytest.MarkDecorator:
    """Leaves a test out where less memory is free."""
    free = memory_available() / 1e9
    return pytest.mark.skipif(
        sys.platform != "linux" or free < gigabytes,
        reason=f"takes {gigabytes} GB of Linux's memory, of which {free:.1f} are free",
    )


pytestmark = [needs(3), pytest.mark.usefixtures("one_thread")]


_MAP_NORESERVE = 0x4000  # Linux's; Python knows its name from 3.13 on


def zeros(dtype: torch.dtype) -> Tensor:
    """Zeros [NUMEL] that take no memory before they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, NUMEL * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.fixture(params=sorted({CPU[0], CPU[-1]}))
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with implementation(request.param):
        yield


class Large(nn.Module):
    """An embedding of NUMEL elements."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(zeros(torch.bfloat16).view(-1, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight).float().cumsum(-1).tanh()


def test_the_parameter_is_as_large_as_it_says() -> None:
    assert NUMEL % WIDTH == 0
    assert Large().weight.numel() == NUMEL > 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.usefixtures("isa")
def test_scatter_and_gather(dtype: torch.dtype) -> None:
    dense = zeros(dtype)
    values = torch.arange(1.0, len(PLACES) + 1).to(dtype)
    ops.scatter_(dense, INDICES, values)
    assert torch.equal(ops.gather(dense, INDICES).float(), values.float())
    for place, value in zip(PLACES, values.float().tolist(), strict=True):
        assert dense[place].float() == value
    untouched = torch.tensor(sorted({i + j for i in PLACES for j in (-1, 1, 2)} - {*PLACES}))
    untouched = untouched[(untouched >= 0) & (untouched < NUMEL)]
    assert not ops.gather(dense, untouched).float().any()
    with pytest.raises(RuntimeError, match="within the 2147483655 elements of the tensor"):
        ops.gather(dense, torch.tensor([NUMEL]))


def test_top_k_of_an_accumulator() -> None:
    """Read from end to end; ties go to the lower index."""
    acc = zeros(torch.float32)
    ops.scatter_(acc, INDICES, torch.where(INDICES < 2**31, -1.0, 2.0))
    top = StreamingTopK(6, keys=["w"], total=NUMEL)
    top.update("w", acc)
    found = top.finish()["w"]
    assert found.dtype == torch.int64
    assert found.tolist() == PLACES[:2] + PLACES[-4:]


@needs(12)
def test_top_k_of_accumulated_gradients() -> None:
    """Here, all of the accumulator is written."""
    acc, grad = zeros(torch.float32), zeros(torch.bfloat16)
    values = torch.arange(1.0, len(PLACES) + 1).bfloat16()
    ops.scatter_(grad, INDICES, values)
    top = StreamingTopK(4, keys=["w"], total=NUMEL)
    top.update("w", acc, grad, 0.5)
    assert torch.equal(ops.gather(acc, INDICES), values.float() / 2)
    assert top.finish()["w"].tolist() == PLACES[-4:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compact", [False, True])
def test_adamw_is_that_of_a_small_parameter(dtype: torch.dtype, compact: bool) -> None:
    values = torch.linspace(-1, 1, len(PLACES)).to(dtype)
    weight, grad = zeros(dtype), zeros(dtype)
    ops.scatter_(weight, INDICES, values)
    ops.scatter_(grad, INDICES, values.flip(0))
    outcomes = []
    for param, gradient, index in (
        (weight, grad, INDICES),
        (values.clone(), values.flip(0), torch.arange(len(PLACES))),
    ):
        n = len(PLACES)
        state = [torch.zeros(n), torch.zeros(n), torch.zeros(1)]
        master = None if dtype == torch.float32 else values.float()
        for _ in range(3):
            given = ops.gather(gradient, index).float() if compact else [gradient]
            ops.sparse_adamw_([param], given, [index], *state, lr=0.1, master=master)
        outcomes.append([ops.gather(param, index), *state])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("mode", ["dense", "sampled", pytest.param("streamed", marks=needs(7))])
def test_a_step_in_every_mode(mode: str) -> None:
    """Against a small embedding of the rows in question."""
    model, rows = Large(), (INDICES // WIDTH).unique()
    small = nn.Embedding(len(rows), WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        small.weight.copy_(torch.linspace(-1, 1, len(rows) * WIDTH).view(-1, WIDTH))
        model.weight[rows] = small.weight
    places = torch.searchsorted(rows, INDICES // WIDTH) * WIDTH + INDICES % WIDTH
    mask = CooMask.from_indices(model, {"weight": INDICES})
    optimizer = SparseAdamW(model, mask, lr=0.1, gradients=mode)
    plain = SparseAdamW(small, CooMask.from_indices(small, {"weight": places}), lr=0.1)
    small(torch.arange(len(rows))).float().cumsum(-1).tanh().sum().backward()
    if mode == "dense":  # what autograd makes is all written, and what is given here is not
        model.weight.grad = zeros(torch.bfloat16).view(-1, WIDTH)
        model.weight.grad[rows] = small.weight.grad
    else:
        model(rows).sum().backward()
    expected = plain.clip_grad_norm_(1.0)
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), expected, rtol=1e-6, atol=0)
    optimizer.step()
    plain.step()
    optimizer.detach()
    now = model.weight.detach()[rows]
    assert torch.equal(now, small.weight)
    assert not torch.equal(now, torch.linspace(-1, 1, now.numel()).bfloat16().view(-1, WIDTH))


def test_mask_and_delta(tmp_path: Path) -> None:
    """Saved, loaded, applied and taken back, with all checks."""
    models = [nn.Module() for _ in range(2)]
    for model in models:
        model.weight = nn.Parameter(zeros(torch.float8_e4m3fn).view(1, -1))
    tuned, base = models
    mask = CooMask.from_indices(tuned, {"weight": INDICES})
    mask.save(tmp_path / "mask.safetensors")
    mask = CooMask.load(tmp_path / "mask.safetensors")
    assert mask["weight"].dtype == torch.int64
    values = torch.arange(1.0, len(PLACES) + 1).to(torch.float8_e4m3fn)
    with torch.no_grad():
        ops.scatter_(tuned.weight, INDICES, values)
    SparseDelta.capture(tuned, mask, base).save(tmp_path / "delta.safetensors")
    assert os.stat(tmp_path / "delta.safetensors").st_size < 2000
    delta = SparseDelta.load(tmp_path / "delta.safetensors")
    ((_, indices, _),) = delta.items()
    assert indices.tolist() == PLACES
    delta.apply_(base)
    assert torch.equal(ops.gather(base.weight, INDICES).float(), values.float())
    delta.revert_(base)
    assert not ops.gather(base.weight, INDICES).float().any()


def test_a_random_mask_reaches_everywhere() -> None:
    model = Large()
    mask = select(model, density=2e-5, score="random")
    index = mask["weight"]
    assert index.dtype == torch.int64
    assert len(index) == int(2e-5 * NUMEL)
    assert 0 <= index[0] < 10**6
    assert 2**31 - 10**6 < index[-1] < NUMEL


def test_a_sampled_gradient_of_a_linear_layer() -> None:
    """Of a weight that need not exist: 65,537 rows of 32,768."""
    rows, width = 65_537, 32_768
    index = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 7, rows * width - 1])
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, size, generator=generator) for size in (width, rows))
    plan = LinearPlan.of(width, index)
    columns, used, offsets, entries, places = plan.tensors()
    assert places is None
    found = ops.sampled_grad(ops.pack_columns(x, columns), dy, used, offsets, entries)
    expected = (dy[:, index // width].double() * x[:, index % width].double()).sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
