"""Kernels compiled by nvcc."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.cuda_support import cuda_home

SOURCE = Path(__file__).with_name("kernels.cu")
pytestmark = pytest.mark.skipif(
    not (cuda_home() / "bin" / "nvcc").exists() and not shutil.which("nvcc"), reason="no nvcc"
)


@pytest.fixture(scope="module", params=[80, 90])
def module(request):
    return ptxsim.load_cuda(SOURCE, sm=request.param)


def test_everything_is_supported(module):
    assert not module.unsupported


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_cub_radix_sort(module, rng, order):
    keys = rng.integers(0, 2**32, (4, 1024), dtype=np.uint32)
    values = np.arange(keys.size, dtype=np.int32).reshape(keys.shape)
    out, vout = np.zeros_like(keys), np.zeros_like(values)
    module.launch("cub_sort", 4, 128, [keys, out, values, vout], order=order)
    index = np.argsort(keys, 1, kind="stable")
    np.testing.assert_array_equal(out, np.sort(keys, 1))
    np.testing.assert_array_equal(vout, np.take_along_axis(values, index, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_cub_scan_and_reduce(module, rng, threads):
    x = rng.integers(0, 100, (20, 256), dtype=np.int32)
    out, sums = np.zeros_like(x), np.zeros(20, np.float32)
    module.launch("cub_scan", 20, 256, [x, out, sums], threads=threads, block_races=threads == 1)
    np.testing.assert_array_equal(out, x.cumsum(1) - x)
    np.testing.assert_array_equal(sums, x.sum(1).astype(np.float32))


def test_half_and_bfloat16(module):
    a, b = torch.randn(1000, 2).half(), torch.randn(1000, 2).half()
    c = torch.randn(1000, 2).bfloat16()
    o, p = torch.zeros_like(a), torch.zeros_like(c)
    module.launch("half_math", 4, 256, [a, b, o, c, p, 1000])
    exact = (a.double() * b.double() + (a + b).double()).numpy()
    # NumPy rounds once; torch goes from double to half by way of float, and rounds twice.
    np.testing.assert_array_equal(o.numpy(), exact.astype(np.float16))
    assert torch.equal(p, c * c)


@pytest.mark.parametrize("threads", [1, 2])
def test_atomics(module, rng, threads):
    n = 5000
    x = rng.integers(0, 2**32, n, dtype=np.uint32)
    f, u, w = np.zeros(1, np.float32), np.zeros(18, np.uint32), np.zeros(1, np.uint64)
    h, b = torch.zeros(2).half(), torch.zeros(2).bfloat16()
    m = np.array([0, 2**31 - 1], np.int32)
    args = [x, n, f, u, w, h, b, m]
    with pytest.raises(ptxsim.KernelError, match="race"):  # u[16] is also read by a plain load
        module.launch("atomics", 6, 128, args)
    for a in (f, u, w, h, b):
        a[:] = 0
    options = {"races": False, "block_races": False}
    module.launch("atomics", 6, 128, args, threads=threads, **options)
    assert f[0] == n / 2
    assert w[0] == x.astype(np.uint64).sum()
    np.testing.assert_array_equal(u[:16], np.bincount(x % 16, minlength=16))
    assert u[16] == 3 * n
    assert u[17] == n % 10
    assert h.tolist() == [64, 128]
    assert b.tolist() == [64, 128]
    assert m.tolist() == [(x >> 1).max(), (x >> 1).min()]


def test_warp_operations(module, rng):
    x = rng.integers(0, 100, (4, 4, 32), dtype=np.int32)
    out = np.zeros((4, 4, 32, 8), np.int32)
    lanes = np.arange(32)
    module.launch("warp_ops", 4, 128, [x, out])
    bits = ((x & 1).astype(np.uint64) << lanes.astype(np.uint64)).sum(2).astype(np.uint32)
    same = (x[..., :, None] % 5 == x[..., None, :] % 5).astype(np.uint64)
    match = (same << lanes.astype(np.uint64)).sum(3).astype(np.uint32)
    any_all = (x > 90).any(2) + 2 * (x >= 0).all(2)
    odd = (x * (x & 1)).sum(2)
    even = np.where(x & 1, -1, x).max(2)
    np.testing.assert_array_equal(out[..., 0], x.cumsum(2))
    np.testing.assert_array_equal(out[..., 1], x[..., lanes ^ 5])
    np.testing.assert_array_equal(out[..., 2], x[..., lanes // 16 * 16 + 3])
    np.testing.assert_array_equal(out[..., 3].view(np.uint32), np.repeat(bits[..., None], 32, 2))
    np.testing.assert_array_equal(out[..., 4].view(np.uint32), match)
    np.testing.assert_array_equal(out[..., 5], np.repeat(any_all[..., None], 32, 2))
    np.testing.assert_array_equal(out[..., 6], np.where(x & 1, odd[..., None], even[..., None]))
    np.testing.assert_array_equal(out[..., 7], (x > 50).sum((1, 2))[:, None, None] + 0 * x)


def test_vector_loads(module, rng):
    assert "ld.global.v4" in ptxsim.compile_ptx(SOURCE, 80)
    x = rng.standard_normal((3001, 4)).astype(np.float32)
    out = np.zeros_like(x)
    module.launch("copy4", 5, 64, [x, out, len(x)])
    want = np.stack([x[:, 3], x[:, 2] * 2, x[:, 1] + 1, x[:, 0] - x[:, 3]], 1)
    np.testing.assert_array_equal(out, want)


def test_scalars_structs_templates(module):
    class Pair(ctypes.Structure):
        _fields_ = [("scale", ctypes.c_int), ("shift", ctypes.c_double)]

    x = torch.arange(100.0)
    module.launch("templated", 1, 128, [x, Pair(3, 0.5), 100])
    assert torch.equal(x, torch.arange(100.0) * 3 + 0.5)


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_last_block_pattern_is_no_race(module, rng, order):
    x = rng.standard_normal(33).astype(np.float32)
    partial, out = np.zeros_like(x), np.zeros(1, np.float32)
    count = np.zeros(1, np.uint32)
    module.launch("last_block", 33, 32, [x, partial, count, out], order=order)
    np.testing.assert_allclose(out[0], x.sum(), rtol=1e-5)


def test_pointers_in_memory_need_extra(module):
    x = np.arange(32, dtype=np.float32)
    table, out = np.array([x.ctypes.data]), np.zeros(32, np.float32)
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        module.launch("through_table", 1, 32, [table, out])
    module.launch("through_table", 1, 32, [table, out], extra=[x])
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_spinning_threads_make_progress(module, order):
    out, turn = np.zeros(1, np.int32), np.zeros(1, np.int32)
    module.launch("take_turns", 1, 64, [out, turn], order=order)
    want = 0
    for i in range(64):
        want = (want * 3 + i) & 0xFFFFFFFF
    assert out.view(np.uint32)[0] == want


def test_libm(module):
    x = torch.randn(2000)
    out = torch.zeros(2000, 4)
    module.launch("libm", 8, 256, [x, out, 2000])
    d = x.double()
    want = [torch.sin((x * 1e5).double()), d.abs() ** 1.7, torch.erf(d)]
    want.append(d.exp() + torch.log1p(d.abs()))
    torch.testing.assert_close(out, torch.stack(want, 1).float(), rtol=1e-6, atol=1e-6)


def test_functions_tables_and_local_arrays(module, rng):
    x = rng.integers(0, 1000, 500, dtype=np.int32)
    out = np.zeros(500, np.float32)
    module.launch("calls", 2, 256, [x, out, 500])
    v = x + (x & 7)
    table = np.array([10, 20, 30, 40])
    picks = np.stack([v * 3, v ^ 0x55, table[v & 3], ~v, v // 7])
    i = np.arange(500)
    want = picks[i % 5, i].astype(np.float32) * np.array([1.5, -2], np.float32)[i & 1]
    np.testing.assert_array_equal(out, want)


def test_grid_stride_loop(module):
    n = 1 << 18
    x, y = torch.randn(n), torch.randn(n)
    want = y.double() + 2.5 * x.double()
    module.launch("saxpy", 100, 256, [x, y, 2.5, n])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)


def test_ptx_from_a_built_library(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void twice(int* x) { x[threadIdx.x] *= 2; }\n')
    library = tmp_path / "k.so"
    nvcc = cuda_home() / "bin" / "nvcc"
    command = [nvcc, "-gencode", "arch=compute_80,code=compute_80", "-shared", "-Xcompiler"]
    subprocess.run([*command, "-fPIC", source, "-o", library], check=True)
    x = np.arange(32, dtype=np.int32)
    ptxsim.load_library(library).launch("twice", 1, 32, [x])
    np.testing.assert_array_equal(x, np.arange(32) * 2)
