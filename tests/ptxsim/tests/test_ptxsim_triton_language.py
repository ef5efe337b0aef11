"""What Triton's language offers to kernels, on both GPU generations."""

import numpy as np
import pytest
import torch

import ptxsim

triton = pytest.importorskip("triton")
tl = triton.language
libdevice = pytest.importorskip("triton.language.extra.libdevice")

SM = pytest.mark.parametrize("sm", [80, 90])
WARPS = pytest.mark.parametrize("num_warps", [1, 4, 8])


def simulated(fn, sm):
    return ptxsim.SimulatedTriton(fn, sm=sm)


# ---------------------------------------------------------------- control flow, constants
@triton.jit
def scaled(x, FACTOR: tl.constexpr):
    if FACTOR == 1:
        return x
    return x * FACTOR


@triton.jit
def collatz_kernel(x, o, steps: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0)
    v = tl.load(x + i)
    count = 0
    while (v != 1) & (count < 1000):
        v = tl.where(v % 2 == 0, v // 2, 3 * v + 1)
        count += 1
    for k in tl.static_range(steps):
        count += scaled(k, k)
    tl.store(o + i + tl.arange(0, N) * tl.num_programs(0), tl.full((N,), count, tl.int32))


@SM
@WARPS
def test_loops_and_constants(sm, num_warps):
    x, o = torch.arange(1, 41, dtype=torch.int32), torch.zeros(16, 40, dtype=torch.int32)
    simulated(collatz_kernel, sm)[40](x, o, steps=4, N=16, num_warps=num_warps)

    def count(v):
        n = 0
        while v != 1:
            v, n = (v // 2 if v % 2 == 0 else 3 * v + 1), n + 1
        return n + 0 + 1 + 4 + 9

    assert torch.equal(o, torch.tensor([count(v) for v in range(1, 41)]).int().expand(16, 40))


@triton.jit
def tuple_kernel(pointers, sizes, o, B: tl.constexpr):
    i = tl.arange(0, B)
    total = tl.zeros((B,), tl.float32)
    for k in tl.static_range(len(pointers)):
        total += tl.load(pointers[k] + i, mask=i < sizes[k], other=0.0)
    tl.store(o + i, total)


@SM
def test_tuples(sm):
    x, y, o = torch.randn(40), torch.randn(64), torch.zeros(64)
    simulated(tuple_kernel, sm)[1]((x, y), (40, 64), o, B=64)
    want = y.clone()
    want[:40] += x
    torch.testing.assert_close(o, want)


@triton.jit
def annotated_kernel(o, x: tl.float64, k: tl.int64):
    tl.store(o, x * k.to(tl.float64))


@SM
def test_annotated_scalars(sm):
    o = torch.zeros(1, dtype=torch.float64)
    simulated(annotated_kernel, sm)[1](o, 1 / 3, 3 << 40)
    assert o[0] == 1 / 3 * (3 << 40)


# ---------------------------------------------------------------- atomics
@triton.jit
def atomic_kernel(
    p, x, old, n, OP: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr, B: tl.constexpr
):
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = (i < n) & (i % 3 != 0)
    v = tl.load(x + i, mask=i < n, other=0)
    place = p + i % 8
    if OP == "add":
        before = tl.atomic_add(place, v, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "max":
        before = tl.atomic_max(place, v, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "min":
        before = tl.atomic_min(place, v, mask=mask, sem=SEM, scope=SCOPE)
    elif OP == "xchg":
        before = tl.atomic_xchg(place, v, mask=mask, sem=SEM, scope=SCOPE)
    else:
        before = tl.atomic_xor(place, v, mask=mask, sem=SEM, scope=SCOPE)
    tl.store(old + i, before, mask=mask)


ATOMICS = [
    ("add", "int32", "relaxed", "gpu"),
    ("add", "int64", "acq_rel", "sys"),
    ("add", "float32", "release", "gpu"),
    ("add", "float64", "acquire", "gpu"),
    ("add", "float16", "relaxed", "gpu"),
    ("add", "bfloat16", "acq_rel", "gpu"),
    ("max", "int32", "acq_rel", "gpu"),
    ("max", "float32", "relaxed", "gpu"),
    ("min", "int64", "relaxed", "sys"),
    ("min", "float32", "acq_rel", "gpu"),
    ("xor", "int64", "relaxed", "gpu"),
    ("xchg", "int32", "acq_rel", "gpu"),
]


@SM
@pytest.mark.parametrize(("op", "dtype", "sem", "scope"), ATOMICS)
def test_atomics(sm, op, dtype, sem, scope):
    dtype = getattr(torch, dtype)
    x = torch.randint(-8, 9, (500,)).to(dtype)
    p, old = torch.zeros(8, dtype=dtype), torch.full((500,), 77, dtype=dtype)
    simulated(atomic_kernel, sm)[4](
        p, x, old, 500, OP=op, SEM=sem, SCOPE=scope, B=128, order="random"
    )
    masked = torch.arange(500) % 3 != 0
    assert (old[~masked] == 77).all()
    for k in range(8):
        mine = x[masked & (torch.arange(500) % 8 == k)]
        seen = old[masked & (torch.arange(500) % 8 == k)]
        if op == "add":
            assert p[k] == mine.double().sum()
        elif op == "xor":
            assert p[k] == np.bitwise_xor.reduce(mine.numpy())
        elif op == "xchg":  # every value is seen once, but for the last
            assert sorted([*seen.tolist(), p[k]]) == sorted([*mine.tolist(), 0])
        else:
            limit = mine.max() if op == "max" else mine.min()
            assert p[k] == (max if op == "max" else min)(0, limit.item())


@triton.jit
def ticket_kernel(lock, o, B: tl.constexpr):
    while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
        pass
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(o + i) * 3 + tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release")


@SM
def test_lock(sm):
    lock, o = torch.zeros(1, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    simulated(ticket_kernel, sm)[5](lock, o, B=128)
    want = 0
    for k in range(5):
        want = want * 3 + k
    assert (o == want).all()
    assert lock[0] == 0


# ---------------------------------------------------------------- scans, sorts, reductions
@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def scan_kernel(x, sums, back, maxima, total, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + i)
    tl.store(sums + i, tl.cumsum(v, 1))
    tl.store(back + i, tl.cumsum(v, 0, reverse=True))
    tl.store(maxima + i, tl.associative_scan(v, 1, larger))
    tl.store(total + tl.arange(0, M), tl.reduce(v, 1, larger))


@SM
@WARPS
def test_scans_in_two_dimensions(sm, num_warps):
    x = torch.randint(-100, 100, (16, 64), dtype=torch.int32)
    outs = [torch.zeros_like(x) for _ in range(3)]
    total = torch.zeros(16, dtype=torch.int32)
    simulated(scan_kernel, sm)[1](x, *outs, total, M=16, N=64, num_warps=num_warps)
    assert torch.equal(outs[0], x.cumsum(1).int())
    assert torch.equal(outs[1], x.flip(0).cumsum(0).flip(0).int())
    assert torch.equal(outs[2], x.cummax(1).values)
    assert torch.equal(total, x.max(1).values)


@triton.jit
def rearrange_kernel(x, down, top, flipped, joined, picked, counts, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(down + i, tl.sort(v, descending=True))
    tl.store(top + tl.arange(0, 8), tl.topk(v, 8))
    tl.store(flipped + i, tl.flip(v, 0))
    tl.store(joined + tl.arange(0, 2 * N), tl.interleave(v, -v))
    tl.store(picked + i, tl.gather(v, (i * 7) % N, 0))
    tl.store(counts + tl.arange(0, 32), tl.histogram((v & 31).to(tl.int32), 32, mask=i % 2 == 0))


@pytest.mark.parametrize(
    ("sm", "num_warps", "dtype"),
    [(80, 1, torch.int32), (80, 4, torch.int64), (90, 4, torch.int32), (90, 8, torch.int64)],
)
def test_rearrangements(sm, num_warps, dtype):
    n = 256
    x = torch.randint(-(2**31), 2**31, (n,)).to(dtype)
    outs = [torch.zeros(k, dtype=dtype) for k in (n, 8, n, 2 * n, n)]
    counts = torch.zeros(32, dtype=torch.int32)
    simulated(rearrange_kernel, sm)[1](x, *outs, counts, N=n, num_warps=num_warps)
    down, top, flipped, joined, picked = outs
    assert torch.equal(down, x.sort(descending=True).values)
    assert torch.equal(top, down[:8])
    assert torch.equal(flipped, x.flip(0))
    assert torch.equal(joined, torch.stack([x, -x], 1).flatten())
    assert torch.equal(picked, x[torch.arange(n) * 7 % n])
    assert torch.equal(counts.long(), torch.bincount(x[::2] & 31, minlength=32))


# ---------------------------------------------------------------- memory
@triton.jit
def table_kernel(table, lengths, o, B: tl.constexpr):
    k = tl.program_id(0)
    row = tl.load(table + k).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, B)
    mask = i < tl.load(lengths + k)
    tl.store(o + k * B + i, tl.load(row + i, mask=mask, other=-1.0), mask=i < B)
    tl.store(row + i, i.to(tl.float32), mask=mask)


@SM
def test_pointers_loaded_from_memory(sm):
    rows = [torch.randn(n) for n in (5, 64, 1)]
    before = [row.clone() for row in rows]
    table = torch.tensor([row.data_ptr() for row in rows])
    lengths, o = torch.tensor([len(row) for row in rows]), torch.zeros(3, 128)
    simulated(table_kernel, sm)[3](table, lengths, o, B=128, extra=rows)
    for row, old, out in zip(rows, before, o, strict=True):
        assert torch.equal(out[: len(row)], old)
        assert (out[len(row) :] == -1).all()
        assert torch.equal(row, torch.arange(len(row)).float())
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        simulated(table_kernel, sm)[3](table, lengths, o, B=128, extra=rows[:2])


@triton.jit
def hints_kernel(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < n
    a = tl.load(x + i, mask=mask, cache_modifier=".cg")
    b = tl.load(x + i, mask=mask, eviction_policy="evict_first")
    c = tl.load(x + i, mask=mask, volatile=True)
    d = tl.load(x + i, mask=mask, eviction_policy="evict_last")
    tl.store(o + i, a + b, mask=mask, cache_modifier=".cs")
    tl.store(o + n + i, c + d, mask=mask, eviction_policy="evict_first")


@SM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_cache_hints(sm, dtype):
    x = torch.randint(0, 20, (1001,)).to(dtype)
    o = torch.zeros(2, 1001, dtype=dtype)
    simulated(hints_kernel, sm)[2](x, o, 1001, B=512)
    assert torch.equal(o, torch.stack([2 * x, 2 * x]))


# ---------------------------------------------------------------- arithmetic
def square_root(x):
    """Correctly rounded, which torch's is not."""
    return torch.from_numpy(np.sqrt(x.numpy()))


@triton.jit
def double_kernel(x, y, o, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(o + i, a / b)
    tl.store(o + N + i, tl.sqrt(a))
    tl.store(o + 2 * N + i, tl.fma(a, b, a))
    tl.store(o + 3 * N + i, libdevice.expm1(b))
    tl.store(o + 4 * N + i, libdevice.pow(a, b))
    tl.store(o + 5 * N + i, libdevice.log1p(a))
    tl.store(o + 6 * N + i, tl.floor(a * 10))


@SM
def test_double(sm):
    n = 128
    x, y = torch.rand(n, dtype=torch.double) + 0.1, torch.randn(n, dtype=torch.double)
    o = torch.zeros(7, n, dtype=torch.double)
    simulated(double_kernel, sm)[1](x, y, o, N=n)
    assert torch.equal(o[0], x / y)
    assert torch.equal(o[1], square_root(x))
    want = [x * y + x, torch.expm1(y), x**y, torch.log1p(x), (x * 10).floor()]
    torch.testing.assert_close(o[2:], torch.stack(want), rtol=1e-14, atol=1e-15)


@triton.jit
def float_kernel(x, y, o, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(o + i, tl.div_rn(a, b))
    tl.store(o + N + i, tl.sqrt_rn(a))
    tl.store(o + 2 * N + i, libdevice.div_rn(a, b))
    tl.store(o + 3 * N + i, libdevice.sqrt_rn(a))
    tl.store(o + 4 * N + i, a / b)
    tl.store(o + 5 * N + i, libdevice.expm1(b))
    tl.store(o + 6 * N + i, libdevice.erf(b))
    tl.store(o + 7 * N + i, libdevice.rsqrt(a))
    tl.store(o + 8 * N + i, tl.exp(b))
    tl.store(o + 9 * N + i, tl.log(a))
    tl.store(o + 10 * N + i, tl.sigmoid(b))
    tl.store(o + 11 * N + i, libdevice.tanh(b))


@SM
def test_float(sm):
    n = 512
    x, y = torch.rand(n) + 0.1, torch.randn(n)
    o = torch.zeros(12, n)
    simulated(float_kernel, sm)[1](x, y, o, N=n)
    exact = [x / y, square_root(x), x / y, square_root(x)]
    assert torch.equal(o[:4], torch.stack(exact))
    a, b = x.double(), y.double()
    want = [a / b, b.expm1(), b.erf(), a.rsqrt(), b.exp(), a.log(), b.sigmoid(), b.tanh()]
    torch.testing.assert_close(o[4:].double(), torch.stack(want), rtol=1e-6, atol=1e-6)


@triton.jit
def random_kernel(o, u, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.randint(seed, i))
    tl.store(u + i, tl.rand(seed, i))


@SM
def test_random_numbers(sm):
    outs = []
    for num_warps in (1, 4):
        o, u = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024)
        simulated(random_kernel, sm)[1](o, u, 1234, N=1024, num_warps=num_warps)
        outs.append(o)
        assert ((u >= 0) & (u < 1)).all()
        assert abs(u.mean() - 0.5) < 0.05
    assert torch.equal(*outs)
    assert len(outs[0].unique()) > 1020


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(a + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :])
    tl.store(c + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.dot(x, tl.trans(y)))


@WARPS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_dot(dtype, num_warps):
    a, b = (torch.randint(-9, 9, (32, 64)).to(dtype) for _ in range(2))
    c = torch.zeros(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    sim = simulated(dot_kernel, 80)
    sim[1](a, b, c, M=32, N=32, K=64, num_warps=num_warps)
    assert "mma.sync" in sim.last.ptx
    assert torch.equal(c.double(), a.double() @ b.double().T)


# ---------------------------------------------------------------- debugging
@triton.jit
def assert_kernel(x, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=0)
    tl.device_assert(v < 10, "a value below ten")
    tl.device_print("values", v)
    tl.store(x + i, v + 1, mask=i < n)


@SM
def test_device_assert(sm, capfd):
    x = torch.arange(10, dtype=torch.int32)
    sim = simulated(assert_kernel, sm)
    sim[1](x, 10, B=128, debug=True)
    assert torch.equal(x, torch.arange(1, 11, dtype=torch.int32))
    assert capfd.readouterr().out == ""
    message = r"assertion failed: a value below ten at .*test_ptxsim_triton_language\.py:\d+ in "
    with pytest.raises(ptxsim.KernelError, match=message):
        sim[1](x, 10, B=128, debug=True)
    sim[1](x, 10, B=128)  # compiled without assertions
