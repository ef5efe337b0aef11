"""Every scalar instruction family against numpy / torch, one small PTX kernel per instruction."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.tests.scalar import HEADER, N, kernel, numbers, rounded, run

u32, s32, u64, s64, f32, f64 = (
    np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64,
)  # fmt: skip
f16 = np.float16


def wrap(x, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return np.array([int(v) & ((1 << bits) - 1) for v in x], unsigned).view(dtype)


def each(function, dtype):
    def oracle(a, b, c):
        rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        return wrap([function(*row) for row in rows], dtype)

    return oracle


def c_div(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def prmt(a, b, c):
    v = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        k = c >> 4 * i & 15
        byte = v[k & 7]
        if k & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * i
    return out


def bfe(a, b, c):
    pos, length = b & 255, c & 255
    return (a & 0xFFFFFFFF) >> pos & ((1 << length) - 1) if pos < 32 else 0


def bfi(a, b, c):
    pos, length = c & 255, c >> 8 & 255
    mask = ((1 << length) - 1) << pos & 0xFFFFFFFF
    return (b & ~mask) | (a << pos & mask)


def dp4a(a, b, c):
    return c + sum(x * y for x, y in zip(a.to_bytes(4), b.to_bytes(4), strict=True))


def lop(a, b, c):
    return (a & b) ^ (~c & 0xFFFFFFFF)


LUT = (0xF0 & 0xCC) ^ (~0xAA & 0xFF)


def to_bf16(x):
    return torch.from_numpy(np.asarray(x, f32)).bfloat16().view(torch.int16).numpy()


def half_op(function):
    def oracle(a, b, c):
        x, y, z = (v.view(f16).astype(f64) for v in (a, b, c))
        with np.errstate(all="ignore"):
            return function(x, y, z).astype(f16).reshape(-1).view(u32)

    return oracle


# name, (input types), output type, code, oracle
CASES = [
    ("add_u32", (u32, u32, u32), u32, "add.u32 %d, %a, %b;", lambda a, b, c: a + b),
    ("sub_s64", (s64, s64, s64), s64, "sub.s64 %d, %a, %b;", lambda a, b, c: a - b),
    ("add_sat", (s32, s32, s32), s32, "add.sat.s32 %d, %a, %b;",
     lambda a, b, c: np.clip(a.astype(s64) + b, -(2**31), 2**31 - 1).astype(s32)),
    ("mul_lo", (s32, s32, s32), s32, "mul.lo.s32 %d, %a, %b;", lambda a, b, c: a * b),
    ("mul_hi_u64", (u64, u64, u64), u64, "mul.hi.u64 %d, %a, %b;",
     each(lambda a, b, c: a * b >> 64, u64)),
    ("mul_hi_s32", (s32, s32, s32), s32, "mul.hi.s32 %d, %a, %b;",
     each(lambda a, b, c: a * b >> 32, s32)),
    ("mul_wide", (s32, s32, s32), s64, "mul.wide.s32 %d, %a, %b;",
     lambda a, b, c: a.astype(s64) * b),
    ("mad_lo", (u64, u64, u64), u64, "mad.lo.u64 %d, %a, %b, %c;", lambda a, b, c: a * b + c),
    ("mad_wide", (u32, u32, u64), u64, "mad.wide.u32 %d, %a, %b, %c;",
     lambda a, b, c: a.astype(u64) * b + c),
    ("mul24", (u32, u32, u32), u32, "mul24.lo.u32 %d, %a, %b;",
     lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    ("carry", (u64, u64, u64), u64,
     "mov.b64 {%r4, %r5}, %a; mov.b64 {%r6, %r7}, %b; add.cc.u32 %r4, %r4, %r6;"
     "addc.u32 %r5, %r5, %r7; mov.b64 %d, {%r4, %r5};", lambda a, b, c: a + b),
    ("borrow", (u64, u64, u64), u64,
     "mov.b64 {%r4, %r5}, %a; mov.b64 {%r6, %r7}, %b; sub.cc.u32 %r4, %r4, %r6;"
     "subc.u32 %r5, %r5, %r7; mov.b64 %d, {%r4, %r5};", lambda a, b, c: a - b),
    ("div_s32", (s32, s32, s32), s32, "or.b32 %b, %b, 1; div.s32 %d, %a, %b;",
     each(lambda a, b, c: c_div(a, b | 1), s32)),
    ("rem_u64", (u64, u64, u64), u64, "or.b64 %b, %b, 1; rem.u64 %d, %a, %b;",
     lambda a, b, c: a % (b | u64(1))),
    ("min_s32", (s32, s32, s32), s32, "min.s32 %d, %a, %b;", lambda a, b, c: np.minimum(a, b)),
    ("max_u32", (u32, u32, u32), u32, "max.u32 %d, %a, %b;", lambda a, b, c: np.maximum(a, b)),
    ("abs_s32", (s32, s32, s32), s32, "abs.s32 %d, %a;", lambda a, b, c: np.abs(a)),
    ("neg_s64", (s64, s64, s64), s64, "neg.s64 %d, %a;", lambda a, b, c: -a),
    ("xor_not", (u32, u32, u32), u32, "not.b32 %a, %a; xor.b32 %d, %a, %b;",
     lambda a, b, c: ~a ^ b),
    ("shl", (u32, u32, u32), u32, "and.b32 %b, %b, 63; shl.b32 %d, %a, %b;",
     each(lambda a, b, c: a << (b & 63) if b & 63 < 32 else 0, u32)),
    ("shr_s", (s32, u32, u32), s32, "and.b32 %b, %b, 63; shr.s32 %d, %a, %b;",
     each(lambda a, b, c: a >> min(b & 63, 31), s32)),
    ("shf_l", (u32, u32, u32), u32, "shf.l.wrap.b32 %d, %a, %b, %c;",
     each(lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32, u32)),
    ("shf_r", (u32, u32, u32), u32, "shf.r.clamp.b32 %d, %a, %b, %c;",
     each(lambda a, b, c: (b << 32 | a) >> min(c, 32), u32)),
    ("lop3", (u32, u32, u32), u32, f"lop3.b32 %d, %a, %b, %c, {LUT};", each(lop, u32)),
    ("prmt", (u32, u32, u32), u32, "prmt.b32 %d, %a, %b, %c;", each(prmt, u32)),
    ("bfe", (u32, u32, u32), u32,
     "and.b32 %b, %b, 31; and.b32 %c, %c, 31; bfe.u32 %d, %a, %b, %c;",
     each(lambda a, b, c: bfe(a, b & 31, c & 31), u32)),
    ("bfi", (u32, u32, u32), u32,
     "and.b32 %c, %c, 0x1f1f; and.b32 %r4, %c, 255; shr.u32 %r5, %c, 8;"
     "bfi.b32 %d, %a, %b, %r4, %r5;", each(lambda a, b, c: bfi(a, b, c & 0x1F1F), u32)),
    ("popc", (u64, u64, u64), u32, "popc.b64 %d, %a;", each(lambda a, b, c: a.bit_count(), u32)),
    ("clz", (u32, u32, u32), u32, "clz.b32 %d, %a;",
     each(lambda a, b, c: 32 - a.bit_length(), u32)),
    ("bfind", (u32, u32, u32), u32, "bfind.u32 %d, %a;",
     each(lambda a, b, c: a.bit_length() - 1, u32)),
    ("brev", (u32, u32, u32), u32, "brev.b32 %d, %a;",
     each(lambda a, b, c: int(f"{a:032b}"[::-1], 2), u32)),
    ("sad", (u32, u32, u32), u32, "sad.u32 %d, %a, %b, %c;",
     each(lambda a, b, c: abs(a - b) + c, u32)),
    ("dp4a", (u32, u32, u32), u32, "dp4a.u32.u32 %d, %a, %b, %c;",
     each(dp4a, u32)),
    ("setp_bool", (s32, s32, s32), u32,
     "setp.lt.s32 %p1, %a, 0; setp.gt.and.s32 %p2|%p3, %b, %c, %p1;"
     "selp.b32 %r4, 1, 0, %p2; selp.b32 %r5, 2, 0, %p3; or.b32 %d, %r4, %r5;",
     each(lambda a, b, c: (1 if b > c else 2) if a < 0 else 0, u32)),
    ("set", (f32, f32, f32), u32, "set.geu.u32.f32 %d, %a, %b;",
     lambda a, b, c: np.where(~(a < b), u32(0xFFFFFFFF), u32(0))),
    ("slct", (u32, u32, s32), u32, "slct.u32.s32 %d, %a, %b, %c;",
     lambda a, b, c: np.where(c >= 0, a, b)),
    ("add_f32", (f32, f32, f32), f32, "add.f32 %d, %a, %b;", lambda a, b, c: a + b),
    ("add_rz", (f32, f32, f32), f32, "add.rz.f32 %d, %a, %b;",
     lambda a, b, c: toward_zero(a.astype(f64) + b)),
    ("fma_f32", (f32, f32, f32), f32, "fma.rn.f32 %d, %a, %b, %c;",
     lambda a, b, c: exact_fma(a, b, c)),
    ("div_f32", (f32, f32, f32), f32, "div.full.f32 %d, %a, %b;", lambda a, b, c: a / b),
    ("mul_f64", (f64, f64, f64), f64, "mul.f64 %d, %a, %b;", lambda a, b, c: a * b),
    ("mul_ftz", (f32, f32, f32), f32, "mul.f32 %a, %a, 0f00800000; mul.ftz.f32 %d, %a, 0f3F000000;",
     lambda a, b, c: flush(flush(a * f32(2.0**-126)) * f32(0.5))),
    ("min_f32", (f32, f32, f32), f32, "min.f32 %d, %a, %b;", lambda a, b, c: np.fmin(a, b)),
    ("max_nan", (f32, f32, f32), f32, "max.NaN.f32 %d, %a, %b;",
     lambda a, b, c: np.maximum(a, b)),
    ("sqrt", (f32, f32, f32), f32, "abs.f32 %a, %a; sqrt.rn.f32 %d, %a;",
     lambda a, b, c: np.sqrt(np.abs(a))),
    ("rsqrt", (f32, f32, f32), f32, "abs.f32 %a, %a; rsqrt.approx.f32 %d, %a;",
     lambda a, b, c: (1 / np.sqrt(np.abs(a.astype(f64)))).astype(f32)),
    ("copysign", (f32, f32, f32), f32, "copysign.f32 %d, %a, %b;",
     lambda a, b, c: np.copysign(b, a)),
    ("testp", (f32, f32, f32), u32, "testp.finite.f32 %p1, %a; selp.u32 %d, 1, 0, %p1;",
     lambda a, b, c: np.isfinite(a).astype(u32)),
    ("cvt_rni", (f32, f32, f32), s32, "cvt.rni.s32.f32 %d, %a;",
     each(lambda a, b, c: to_int(a, 2**31), s32)),
    ("cvt_sat_u8", (s32, s32, s32), u32, "cvt.sat.u8.s32 %d, %a;",
     lambda a, b, c: np.clip(a, 0, 255).astype(u32)),
    ("cvt_s8", (s32, s32, s32), s32, "cvt.s32.s8 %d, %a;",
     lambda a, b, c: a.astype(np.int8).astype(s32)),
    ("cvt_f16", (f32, f32, f32), np.uint16, "cvt.rn.f16.f32 %d, %a;",
     lambda a, b, c: a.astype(f16).view(np.uint16)),
    ("cvt_f16_f64", (f64, f64, f64), np.uint16, "cvt.rn.f16.f64 %d, %a;",
     lambda a, b, c: a.astype(f16).view(np.uint16)),
    ("cvt_bf16", (f32, f32, f32), np.int16, "cvt.rn.bf16.f32 %d, %a;",
     lambda a, b, c: to_bf16(a)),
    ("cvt_bf16x2", (f32, f32, f32), u32, "cvt.rn.bf16x2.f32 %d, %a, %b;",
     lambda a, b, c: to_bf16(b).view(np.uint16) | to_bf16(a).view(np.uint16).astype(u32) << 16),
    ("cvt_tf32", (f32, f32, f32), u32, "cvt.rna.tf32.f32 %d, %a;",
     lambda a, b, c: np.where(np.isfinite(a), a.view(u32) + 0x1000 & 0xFFFFE000, a.view(u32))),
    ("hfma2", (u32, u32, u32), u32, "fma.rn.f16x2 %d, %a, %b, %c;",
     half_op(lambda x, y, z: x * y + z)),
    ("hadd2", (u32, u32, u32), u32, "add.f16x2 %d, %a, %b;", half_op(lambda x, y, z: x + y)),
    ("mov_pack", (u32, u32, u32), u32,
     "mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};",
     lambda a, b, c: a << 16 | a >> 16),
    ("clock", (u32, u32, u32), u32,
     "mov.u32 %d, %clock; mov.u64 %rd8, %globaltimer; fence.acq_rel.gpu; membar.gl;"
     "prefetch.global.L2 [%rd4]; prefetchu.L1 [%rd4];", lambda a, b, c: np.zeros_like(a)),
]  # fmt: skip
APPROX = {
    "ex2": ("ex2.approx.f32", np.exp2),
    "lg2": ("lg2.approx.f32", lambda x: np.log2(np.abs(x))),
    "sin": ("sin.approx.f32", np.sin),
    "cos": ("cos.approx.f32", np.cos),
    "tanh": ("tanh.approx.f32", np.tanh),
    "rcp": ("rcp.approx.ftz.f32", lambda x: 1 / x),
}


def toward_zero(x):
    r = x.astype(f32)
    over = np.isfinite(r) & (np.abs(r.astype(f64)) > np.abs(x))
    return np.where(over, np.nextafter(r, f32(0)), r)


def exact_fma(a, b, c):
    def one(x, y, z):
        if not all(map(math.isfinite, (x, y, z))):
            return f32(x * y + z)
        return rounded(Fraction(x) * Fraction(y) + Fraction(z), f32)

    return np.array([one(*r) for r in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], f32)


def flush(x):
    return np.where(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


def to_int(x, limit):
    if math.isnan(x):
        return 0
    return limit - 1 if x >= limit else -limit if x <= -limit else round(x)


def make_input(dtype, rng, name):
    if name in ("hfma2", "hadd2"):
        return rng.standard_normal(2 * N).astype(f16).view(u32)
    return numbers(dtype, rng)


@pytest.fixture(scope="module")
def module():
    texts = [kernel(c[0], c[1], c[2], c[3]) for c in CASES]
    for name, (op, _) in APPROX.items():
        texts.append(kernel(name, (f32, f32, f32), f32, f"{op} %d, %a;"))
    return ptxsim.Module(HEADER + "\n".join(texts))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_exact(module, rng, case):
    name, types, out_type, _, oracle = case
    arrays = [make_input(t, rng, name) for t in types]
    got = run(module, name, arrays, out_type)
    with np.errstate(all="ignore"):
        want = np.asarray(oracle(*arrays)).astype(out_type)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", APPROX)
def test_approximate(module, rng, name):
    x = rng.uniform(0.1, 8, N).astype(f32)
    got = run(module, name, [x, x, x], f32)
    np.testing.assert_allclose(got, APPROX[name][1](x.astype(f64)), rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
@pytest.mark.parametrize("threads", [1, 2])
def test_orders(module, rng, order, threads):
    a = make_input(u32, rng, "add_u32")
    options = {"order": order, "threads": threads, "seed": 7, "block_races": threads == 1}
    got = run(module, "add_u32", [a, a, a], u32, **options)
    np.testing.assert_array_equal(got, a + a)


def test_no_double_rounding():
    """Results next to a rounding tie, where an intermediate rounding would give the neighbour."""
    u16 = np.uint16
    code = "fma.rn.bf16 %d, %a, %b, %c;"
    texts = [kernel("fma", (u16, u16, u16), u16, code)]
    texts.append(kernel("cvt", (f64, f64, f64), u16, "cvt.rn.f16.f64 %d, %a;"))
    module = ptxsim.Module(HEADER + "".join(texts))
    args = [np.full(N, v, u16) for v in (0x3F81, 0x3FC0, 0x8D80)]
    assert (run(module, "fma", args, u16) == 0x3FC1).all()
    x = np.full(N, 1 + 2.0**-11 + 2.0**-40)
    assert (run(module, "cvt", [x, x, x], u16) == 0x3C01).all()
