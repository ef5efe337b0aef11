"""Triton kernels, compiled ahead of time."""

import numpy as np
import pytest
import torch

import ptxsim

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def add_kernel(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(o + i, tl.load(x + i, mask=mask) + tl.load(y + i, mask=mask), mask=mask)


@triton.jit
def sort_kernel(x, o, c, h, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(o + i, tl.sort(v))
    tl.store(c + i, tl.cumsum(v, 0))
    tl.atomic_add(h + tl.arange(0, 64), tl.histogram(v & 63, 64))


@triton.jit
def softmax_kernel(x, o, n, N: tl.constexpr):
    i = tl.arange(0, N)
    row = tl.program_id(0)
    v = tl.load(x + row * n + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + row * n + i, (e / tl.sum(e, 0)).to(o.dtype.element_ty), mask=i < n)


@triton.jit
def scatter_kernel(w, idx, o, n, D: tl.constexpr, B: tl.constexpr):
    r = tl.program_id(0) * B + tl.arange(0, B)
    c = tl.arange(0, D)
    i = tl.load(idx + r, mask=r < n, other=0)
    mask = (r < n)[:, None]
    v = tl.load(w + r[:, None] * D + c[None, :], mask=mask, other=0.0)
    tl.atomic_add(o + i[:, None] * D + c[None, :], v.to(tl.float32), mask=mask)


@triton.jit
def argmax_kernel(x, o, best, N: tl.constexpr):
    v = tl.load(x + tl.program_id(0) * N + tl.arange(0, N))
    tl.store(o + tl.program_id(0), tl.argmax(v, 0))
    tl.atomic_max(best, tl.max(v, 0))


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K,
    TF32: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        ka = (k + rk)[None, :]
        kb = (k + rk)[:, None]
        x = tl.load(a + rm[:, None] * K + ka, mask=(rm[:, None] < M) & (ka < K), other=0.0)
        y = tl.load(b + kb * N + rn[None, :], mask=(kb < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision="tf32" if TF32 else "ieee")
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def racy_kernel(o, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(o + i, i)


SM = pytest.mark.parametrize("sm", [80, 90])


@SM
@pytest.mark.parametrize("n", [1000, 1024, 4096])
def test_add(sm, n):
    x, y = torch.randn(n), torch.randn(n)
    out = torch.zeros(n)
    sim = ptxsim.SimulatedTriton(add_kernel, sm)
    sim[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, out, n, BLOCK=512)
    assert torch.equal(out, x + y)


def test_specialisation_gives_vector_loads():
    x = torch.randn(1024)
    sim = ptxsim.SimulatedTriton(add_kernel)
    sim[2](x, x, torch.zeros(1024), 1024, BLOCK=512)
    assert "ld.global.v4" in sim.last.ptx
    sim = ptxsim.SimulatedTriton(add_kernel, specialise=False)
    sim[2](x, x, torch.zeros(1024), 1024, BLOCK=512)
    assert "ld.global.v4" not in sim.last.ptx


@SM
@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_sort_cumsum_histogram(sm, order):
    x = torch.randint(0, 100000, (10, 512), dtype=torch.int32)
    o, c, h = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(64, dtype=torch.int32)
    ptxsim.SimulatedTriton(sort_kernel, sm)[10](x, o, c, h, N=512, order=order)
    assert torch.equal(o, x.sort(1).values)
    assert torch.equal(c, x.cumsum(1).int())
    assert torch.equal(h, torch.bincount((x & 63).flatten(), minlength=64).int())


@SM
def test_softmax_bf16(sm):
    x = torch.randn(20, 777).bfloat16()
    out = torch.zeros_like(x)
    ptxsim.SimulatedTriton(softmax_kernel, sm)[20](x, out, 777, N=1024, num_warps=8)
    torch.testing.assert_close(out, x.float().softmax(1).bfloat16(), rtol=1e-2, atol=1e-4)


@SM
@pytest.mark.parametrize("threads", [1, 2])
def test_scatter_add(sm, threads):
    w, idx = torch.randn(500, 32).half(), torch.randint(0, 100, (500,))
    out = torch.zeros(100, 32)
    sim = ptxsim.SimulatedTriton(scatter_kernel, sm)
    sim[32](w, idx, out, 500, D=32, B=16, threads=threads, block_races=threads == 1)
    want = torch.zeros(100, 32).index_add_(0, idx, w.float())
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@SM
def test_argmax_and_atomic_max(sm):
    x = torch.randn(10, 256)
    o, best = torch.zeros(10, dtype=torch.int32), torch.full((1,), -torch.inf)
    ptxsim.SimulatedTriton(argmax_kernel, sm)[10](x, o, best, N=256)
    assert torch.equal(o.long(), x.argmax(1))
    assert best[0] == x.max()


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("order", ["fwd", "rev"])
@pytest.mark.parametrize(
    ("dtype", "sm"),
    [("float16", 80), ("bfloat16", 80), ("float32", 80), ("tf32", 80), ("float16", 75)],
)  # fmt: skip
def test_matmul(dtype, sm, stages, order):
    m, n, k = 100, 72, 96
    torch_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = torch.randn(m, k).to(torch_dtype), torch.randn(k, n).to(torch_dtype)
    c = torch.zeros(m, n)
    sim = ptxsim.SimulatedTriton(matmul_kernel, sm)
    sim[2, 2](
        a, b, c, m, n, k,
        TF32=dtype == "tf32", BM=64, BN=64, BK=32, num_stages=stages, order=order,
    )  # fmt: skip
    if dtype != "float32" and sm >= 80:  # Triton multiplies with FMA on sm_75
        assert "mma.sync" in sim.last.ptx
    if stages > 1 and sm == 80:
        assert "cp.async" in sim.last.ptx
    tol = 2e-2 if dtype == "tf32" else 1e-4
    want = a.double() @ b.double()
    np.testing.assert_allclose(c.double().numpy(), want.numpy(), rtol=tol, atol=tol)


def test_wgmma_is_reported():
    a = torch.randn(64, 64).half()
    sim = ptxsim.SimulatedTriton(matmul_kernel, 90)
    with pytest.raises(ptxsim.UnsupportedError, match=r"unsupported: .*wgmma"):
        sim[1, 1](a, a, torch.zeros(64, 64), 64, 64, 64, TF32=True, BM=64, BN=64, BK=64)


def test_out_of_bounds():
    x = torch.randn(1000)
    sim = ptxsim.SimulatedTriton(add_kernel)
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        sim[2](x, x, torch.zeros(1000), 1001, BLOCK=512)


def test_race_between_blocks():
    sim = ptxsim.SimulatedTriton(racy_kernel)
    with pytest.raises(ptxsim.KernelError, match="race between blocks"):
        sim[3](torch.zeros(1024, dtype=torch.int32), BLOCK=256)
