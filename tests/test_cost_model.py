"""Which way a gradient takes: the rule of a CPU, and the model of a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import simulated
from bench.cases import gpu
from bench.cli import RESULTS
from bench.result_file import outcome_of, read_result
from bench.roofline import HEIGHT, WIDTH
from saft_kernels import CooMask, attach, cost_model, ops
from saft_kernels.cost_model import (
    CROWDED,
    MEMORY_IS_WORTH,
    Layer,
    dense_seconds,
    is_crowded,
    prefers_product,
    sampled_seconds,
)
from saft_kernels.entry import Entry

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [(3072, 768), (768, 3072), (768, 768), (4096, 4096)]


def uniform(height: int, width: int, share: float, dtype: torch.dtype) -> Layer:
    """Entries that have nothing to do with each other."""
    rows, columns = height * (1 - (1 - share) ** width), width * (1 - (1 - share) ** height)
    return Layer(height, width, int(height * width * share), int(rows), int(columns), dtype)


def border(decides: object) -> float:
    """The share, in thousandths, from which on something is true; it stays so."""
    truths = [decides(share / 1000) for share in range(1, 1001)]  # type: ignore[operator]
    assert truths == sorted(truths)
    return 1 + truths.index(True) if True in truths else float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_chosen_from_some_share_on(dtype):
    assert border(lambda s: prefers_product(int(s * 768 * 768), 768, 768, dtype)) == 56


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_dense_product_is_chosen_from_some_share_on(dtype, size):
    share = border(lambda s: is_crowded(uniform(*size, s, dtype)))
    assert share > 5  # a mask of SAFT, one entry in a thousand, is far from it
    if dtype.itemsize == 2:
        assert share <= 10
    else:  # where the sampled ways begin to save no memory
        assert share == 501


def measured_masks() -> Iterator[tuple[Layer, dict[str, float]]]:
    """What an H200 measured (``python -m bench gpu gpu_choices``): a layer's entries, and the
    seconds of each way."""
    (result,) = RESULTS.glob("nvidia-h200-*.json")
    timings = outcome_of(read_result(result)["cases"]["gpu_choices"]).timings
    seconds = {timing.name: timing.median for timing in timings}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for kind, densities in gpu.DENSITIES.items():
            for density in densities:
                flat = gpu.DRAWN[kind](HEIGHT, WIDTH, int(density * HEIGHT * WIDTH))
                used = [t.unique().numel() for t in (flat // WIDTH, flat % WIDTH)]
                what = f"{kind} mask of density {density:g}, 8,192 tokens, {name} (cuda)"
                pack = seconds[f"pack_columns, {what}"]
                yield (
                    Layer(HEIGHT, WIDTH, flat.numel(), *used, dtype),
                    {
                        "entries": pack + seconds[f"sampled_grad by entries, {what}"],
                        "tiles": pack + seconds[f"sampled_grad by tiles, {what}"],
                        "dense": seconds[f"dense product, all densities, {name}"],
                    },
                )


def test_the_model_is_what_was_measured() -> None:
    masks = list(measured_masks())
    assert len(masks) == 20
    for layer, seconds in masks:
        tiles = prefers_product(layer.n, layer.rows, layer.columns, layer.dtype)
        fastest = min(seconds["tiles"], seconds["entries"])
        assert seconds["tiles" if tiles else "entries"] <= 1.05 * fastest, layer
        assert sampled_seconds(layer) == pytest.approx(fastest, rel=0.3), layer
        assert dense_seconds(layer) == pytest.approx(seconds["dense"], rel=0.3), layer
        ratio = fastest / seconds["dense"]
        assert is_crowded(layer) == (ratio > MEMORY_IS_WORTH), layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_time_grows_with_entries(dtype):
    times = [sampled_seconds(uniform(768, 768, s / 100, dtype)) for s in range(1, 30)]
    assert times == sorted(times)


def test_an_unknown_type_is_no_error():
    assert not prefers_product(10, 5, 5, torch.int32)
    assert not is_crowded(Layer(5, 5, 25, 5, 5, torch.int32))


def test_the_tiles_are_those_of_the_kernels():
    triton = pytest.importorskip("saft_kernels.triton.sampled_grad")
    source = Path(__file__).parent.parent / "csrc" / "cuda" / "sampled_product_kernel.cu"
    (tile,) = re.findall(r"constexpr int kTile = (\d+);", source.read_text())
    assert int(tile) == triton.TILE == cost_model._TILE


def scattered(numel: int, share: float) -> torch.Tensor:
    shuffled = torch.randperm(numel, generator=torch.Generator().manual_seed(0))
    return shuffled[: int(share * numel)].sort().values


def entry_of(share: float, dtype: torch.dtype = torch.bfloat16) -> Entry:
    weight = nn.Parameter(torch.zeros(768, 768, dtype=dtype))
    indices = scattered(weight.numel(), share)
    return Entry("weight", weight, indices, False, lambda *_: None)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.125])
def test_a_cpu_has_one_measured_number(share):
    assert CROWDED == 0.1
    assert entry_of(share).crowded == (share > CROWDED)


@pytest.mark.parametrize("name", simulated.names())
def test_a_gpu_has_the_model(name):
    with simulated.use(*name.split("-")):
        assert not entry_of(0.001).crowded
        assert entry_of(0.05).crowded
        assert not entry_of(0.05, torch.float32).crowded
        assert entry_of(1.0, torch.float32).crowded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", simulated.names()[:1])
def test_the_type_is_that_of_autocast_where_it_is_on(name, dtype):
    with simulated.use(*name.split("-")):
        with torch.autocast("cpu", dtype):  # on or off at this time says nothing of later uses
            single, double = (entry_of(0.05, t) for t in (torch.float32, torch.float64))
            assert single.crowded
            assert not double.crowded
            with torch.autocast("cpu", enabled=False):
                assert not single.crowded
        assert not single.crowded
        assert not single.always_crowded
        assert entry_of(1.0, torch.float32).always_crowded
        assert entry_of(1.0, torch.float64).always_crowded
        few = entry_of(0.001, torch.float32)
        with torch.autocast("cpu", dtype):
            assert not few.crowded


def test_autocast_changes_nothing_on_a_cpu():
    for share in (0.05, 0.2):
        entry = entry_of(share, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert entry.crowded == entry.always_crowded == (share > CROWDED)


@pytest.mark.parametrize("name", simulated.names()[:1])
def test_under_autocast_a_weight_may_take_another_way_than_without(name):
    with simulated.use(*name.split("-")) as gpu:
        model = nn.Linear(768, 768, bias=False)
        mask = CooMask.from_indices(model, {"weight": scattered(768 * 768, 0.05)})
        x = torch.randn(4, 768)
        gradients = []
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(x).sum().backward()
            gradients.append(ops.gather(model.weight.grad, mask["weight"]))
            model.weight.grad = None
        with attach(model, mask) as sparse:
            (values,) = sparse.parameters()
            for enabled, sampled in ((True, False), (False, True), (True, False)):
                gpu.launches.clear()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    model(x).sum().backward()
                assert any("pack" in launch for launch in gpu.launches) == sampled
                torch.testing.assert_close(values.grad, gradients[sampled])
                values.grad = None


@pytest.mark.parametrize("name", simulated.names()[:1])
def test_a_crowded_weight_takes_the_dense_product_on_a_gpu_too(name):
    with simulated.use(*name.split("-")) as gpu:
        model = nn.Linear(768, 768, bias=False).bfloat16()
        mask = CooMask.from_indices(model, {"weight": scattered(768 * 768, 0.05)})
        x = torch.randn(4, 768).bfloat16()
        model(x).sum().backward()
        expected = ops.gather(model.weight.grad, mask["weight"])
        with attach(model, mask) as sparse:
            gpu.launches.clear()
            model(x).sum().backward()
            assert "5% of its entries" in sparse.streamed["weight"]
            assert not any("pack" in launch for launch in gpu.launches)
            assert torch.equal(next(sparse.parameters()).grad, expected.float())
