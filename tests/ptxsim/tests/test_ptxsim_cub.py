"""Block and warp primitives of CUB, as the toolkit's headers have them."""

from pathlib import Path

import numpy as np
import pytest

import ptxsim
from ptxsim.cuda_support import nvcc

SOURCE = Path(__file__).with_name("cub.cu")
ORDERS = pytest.mark.parametrize("order", ["fwd", "rev", "random"])
pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="module", params=[80, 90])
def module(request):
    return ptxsim.load_cuda(SOURCE, sm=request.param)


def test_everything_is_supported(module):
    assert not module.unsupported


@ORDERS
@pytest.mark.parametrize(
    ("name", "threads"),
    [("scan_raking", 128), ("scan_memoize", 128), ("scan_warps", 128), ("scan_odd", 100)],
)
def test_block_scan(module, rng, name, threads, order):
    x = rng.integers(-100, 100, (3, 4 * threads), dtype=np.int32)
    o = np.zeros((3, 12 * threads + 1), np.int32)
    module.launch(name, 3, threads, [x, o], order=order)
    inclusive, exclusive, maximum = np.split(o[:, :-1], 3, axis=1)
    np.testing.assert_array_equal(inclusive, x.cumsum(1))
    np.testing.assert_array_equal(exclusive, x.cumsum(1) - x)
    np.testing.assert_array_equal(maximum, np.maximum.accumulate(x, 1))
    np.testing.assert_array_equal(o[:, -1], x.sum(1))


@ORDERS
@pytest.mark.parametrize(
    ("name", "threads"),
    [
        ("reduce_raking", 128),
        ("reduce_commutative", 128),
        ("reduce_warps", 128),
        ("reduce_odd", 100),
    ],
)
@pytest.mark.parametrize("valid", [1, 37, 64, 99])
def test_block_reduce(module, rng, name, threads, valid, order):
    x = rng.integers(-100, 100, (4, threads)).astype(np.float64)
    o = np.zeros((4, 3))
    module.launch(name, 4, threads, [x, valid, o], order=order)
    np.testing.assert_array_equal(o, np.stack([x.sum(1), x[:, :valid].sum(1), x.max(1)], 1))


@ORDERS
@pytest.mark.parametrize("n", [1, 300, 448])
def test_block_radix_sort(module, rng, n, order):
    x = rng.standard_normal(n).astype(np.float32)
    o = np.zeros_like(x)
    module.launch("sort_float", 1, 64, [x, o, n], order=order)
    np.testing.assert_array_equal(o, np.sort(x)[::-1])
    x = rng.integers(-(2**62), 2**62, n)
    o = np.zeros_like(x)
    x[x < -1e30] = 0
    module.launch("sort_long", 1, 64, [x, o, n], order=order)
    np.testing.assert_array_equal(o, np.sort(x)[::-1])


@ORDERS
def test_block_radix_sort_of_some_bits(module, rng, order):
    x = rng.integers(0, 2**32, 256, dtype=np.uint32)
    o = np.zeros_like(x)
    module.launch("sort_bits", 1, 128, [x, o, 5, 17], order=order)
    np.testing.assert_array_equal(o, x[np.argsort(x >> 5 & 0xFFF, kind="stable")])


@ORDERS
@pytest.mark.parametrize("lanes", [8, 32])
@pytest.mark.parametrize("valid", [1, 5, 8])
def test_warp_reduce_and_scan(module, rng, lanes, valid, order):
    x = rng.integers(-50, 50, (128 // lanes, lanes)).astype(np.float32)
    heads = (rng.random(x.shape) < 0.3).astype(np.int32)
    o = np.zeros((*x.shape, 5), np.float32)
    module.launch(f"warp_{lanes}", 1, 128, [x, heads, valid, o], order=order)
    np.testing.assert_array_equal(o[:, 0, 0], x.sum(1))
    np.testing.assert_array_equal(o[:, 0, 1], x[:, :valid].sum(1))
    for values, head, got in zip(x, heads, o[:, :, 2], strict=True):
        starts = sorted({0, *np.flatnonzero(head)})
        np.testing.assert_array_equal(got[starts], np.add.reduceat(values, starts))
    np.testing.assert_array_equal(o[:, :, 3], x.cumsum(1) - x)
    np.testing.assert_array_equal(o[:, :, 4], x.sum(1, keepdims=True) + 0 * x)


@ORDERS
@pytest.mark.parametrize("name", ["histogram_sort", "histogram_atomic"])
def test_block_histogram(module, rng, name, order):
    x = rng.integers(0, 64, 512, dtype=np.uint8)
    o = np.zeros(64, np.int32)
    module.launch(name, 1, 128, [x, o], order=order)
    np.testing.assert_array_equal(o, np.bincount(x, minlength=64))
