"""cvt between all types, in all rounding modes, against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.tests.scalar import HEADER, N, finite, kernel, numbers, rounded, run

INTEGERS = {f"{k}{b}": np.dtype(f"{'ui'[k == 's']}{b // 8}") for k in "us" for b in (8, 16, 32, 64)}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
MODES = ("rn", "rz", "rm", "rp")
TO_INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def register(name):
    """Type of the memory that holds a value: registers of 8 bits do not exist."""
    dtype = INTEGERS.get(name) or np.dtype(FLOATS[name])
    return np.dtype(f"{dtype.kind}4") if dtype.itemsize == 1 else dtype


def clamped(value, dtype):
    info = np.iinfo(dtype)
    return min(max(value, int(info.min)), int(info.max))


def integral(x, mode, dtype):
    if math.isinf(x):
        return clamped(int(math.copysign(10**30, x)), dtype)
    return clamped(TO_INTEGRAL[mode](Fraction(float(x))), dtype)


def integer_cases():
    for source, from_ in INTEGERS.items():
        for dest, to in INTEGERS.items():
            if source == dest:
                continue
            code = f"{dest}.{source}"
            yield code, source, dest, lambda x, f=from_, t=to: x.astype(f).astype(t)
            yield (
                f"sat.{code}",
                source,
                dest,
                lambda x, f=from_, t=to: [clamped(int(v), t) for v in x.astype(f)],
            )


def float_cases():
    for real, dtype in FLOATS.items():
        for mode in TO_INTEGRAL:
            yield (
                f"{mode}.{real}.{real}",
                real,
                real,
                lambda x, m=mode, d=dtype: integral_float(x, m, d),
            )
            for name in ("u32", "s32", "u64", "s64", "s16", "u8"):
                yield (
                    f"{mode}.{name}.{real}",
                    real,
                    name,
                    lambda x, m=mode, t=INTEGERS[name]: [integral(v, m, t) for v in x],
                )
        modes = MODES if real != "f16" else ("rn",)
        for mode in modes:
            for name in ("u32", "s32", "u64", "s64", "s16"):
                yield f"{mode}.{real}.{name}", name, real, rounding(dtype, mode)
    for mode in MODES:
        yield f"{mode}.f32.f64", "f64", "f32", rounding(np.float32, mode)
    yield "rn.f16.f32", "f32", "f16", rounding(np.float16, "rn")
    yield "rz.f16.f32", "f32", "f16", rounding(np.float16, "rz")
    yield "rn.f16.f64", "f64", "f16", rounding(np.float16, "rn")
    yield "f32.f16", "f16", "f32", lambda x: x
    yield "f64.f32", "f32", "f64", lambda x: x
    yield "sat.f32.f32", "f32", "f32", lambda x: np.clip(x, 0, 1)
    yield "rn.sat.f16.f32", "f32", "f16", lambda x: np.clip(x, 0, 1).astype(np.float16)
    yield "rn.relu.f16.f32", "f32", "f16", lambda x: np.maximum(x, 0).astype(np.float16)


def integral_float(x, mode, dtype):
    values = [v if math.isinf(v) else TO_INTEGRAL[mode](Fraction(float(v))) for v in x]
    return np.copysign(np.array(values, dtype), x)


def rounding(dtype, mode):
    def convert(x):
        maximum = np.finfo(dtype).max
        largest = Fraction(float(maximum))
        half_step = (largest - Fraction(float(np.nextafter(maximum, dtype(0))))) / 2

        def one(v):
            exact = Fraction(v.item())
            if abs(exact) <= largest:
                return np.copysign(rounded(exact, dtype, mode), v)
            toward = mode == "rz" or mode == ("rm" if exact > 0 else "rp")
            near = abs(exact) - largest < half_step
            big = largest if toward or (mode == "rn" and near) else math.inf
            return dtype(math.copysign(float(big), exact))

        return np.array([one(v) for v in x], dtype)

    return convert


CASES = [*integer_cases(), *float_cases()]


def inputs(source, code, rng):
    if source in INTEGERS:
        wide = numbers(register(source), rng)
        return wide.astype(INTEGERS[source]).astype(wide.dtype)
    x = finite(FLOATS[source], rng)
    if ".s" in code or ".u" in code or "i." in code:
        x[:2] = [np.inf, -np.inf]
    return x


@pytest.fixture(scope="module")
def module():
    texts = []
    for code, source, dest, _ in CASES:
        types = (register(source), np.uint32, np.uint32)
        name = code.replace(".", "_")
        texts.append(kernel(name, types, register(dest), f"cvt.{code} %d, %a;"))
    return ptxsim.Module(HEADER + "\n".join(texts))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_conversion(module, rng, case):
    code, source, dest, oracle = case
    x = inputs(source, code, rng)
    pad = np.zeros(N, np.uint32)
    got = run(module, code.replace(".", "_"), [x, pad, pad], register(dest))
    with np.errstate(all="ignore"):
        want = oracle(x)
        if isinstance(want, list):
            want = np.array(want, INTEGERS[dest])
        want = want.astype(register(dest))
    np.testing.assert_array_equal(got, want)
    if dest in FLOATS and "sat" not in code:
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


# ---------------------------------------------------------------- bfloat16, packed
def bf16(x):
    return (
        torch.from_numpy(np.asarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view("u2")
    )


def truncated(x):
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def packed(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def f16(x):
    return x.astype(np.float16).view(np.uint16)


PACKED = {
    "rn.bf16x2.f32": lambda a, b: packed(bf16(b), bf16(a)),
    "rz.bf16x2.f32": lambda a, b: packed(truncated(b), truncated(a)),
    "rn.relu.bf16x2.f32": lambda a, b: packed(bf16(np.maximum(b, 0)), bf16(np.maximum(a, 0))),
    "rn.f16x2.f32": lambda a, b: packed(f16(b), f16(a)),
    "rn.relu.f16x2.f32": lambda a, b: packed(f16(np.maximum(b, 0)), f16(np.maximum(a, 0))),
}


@pytest.mark.parametrize("code", PACKED)
def test_packed(rng, code):
    text = kernel("k", ("f4", "f4", "u4"), "u4", f"cvt.{code} %d, %a, %b;")
    a, b = finite(np.float32, rng), finite(np.float32, rng)
    got = run(ptxsim.Module(HEADER + text), "k", [a, b, a], np.uint32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, PACKED[code](a, b))


@pytest.mark.parametrize("source", ["u16", "s32", "u32", "s64", "u64", "f32", "f64"])
def test_to_bfloat16(rng, source):
    dtype = INTEGERS.get(source) or np.dtype(FLOATS[source])
    text = kernel("k", (dtype, "u4", "u4"), "u2", f"cvt.rn.bf16.{source} %d, %a;")
    x = numbers(dtype, rng) if source in INTEGERS else finite(FLOATS[source], rng)
    if source in ("s64", "u64", "f64"):  # next to a tie: rounding to f32 or f64 first is wrong
        x[:2] = (
            [(0x181 << 53) + 1, (0x181 << 53) - 1] if source != "f64" else [257 + 1e-9, 257 - 1e-9]
        )
    got = run(ptxsim.Module(HEADER + text), "k", [x, *[np.zeros(N, np.uint32)] * 2], np.uint16)

    def one(v):  # the nearest of the neighbours with 8 bits
        down = truncated(rounded(Fraction(v.item()), np.float32, "rz"))[()]
        pair = [int(down), int(down) + 1]
        values = [Fraction(float(np.uint32(p << 16).view(np.float32))) for p in pair]
        exact = Fraction(v.item())
        best = min(zip(pair, values, strict=True), key=lambda p: (abs(p[1] - exact), p[0] & 1))[0]
        return best or 0x8000 * int(np.signbit(v))

    np.testing.assert_array_equal(got, np.array([one(v) for v in x], np.uint16))


def test_from_bfloat16(rng):
    bits = rng.integers(0, 2**16, N).astype(np.uint16)
    text = kernel("k", ("u2", "u4", "u4"), "u4", "cvt.f32.bf16 %d, %a;")
    pad = np.zeros(N, np.uint32)
    got = run(ptxsim.Module(HEADER + text), "k", [bits, pad, pad], np.uint32)
    nan = (bits & 0x7FFF) > 0x7F80
    np.testing.assert_array_equal(got[~nan], bits[~nan].astype(np.uint32) << 16)
    assert np.isnan(got[nan].view(np.float32)).all()


def test_float_to_integer_of_nan():
    texts = [
        kernel(f"k{b}", ("f4", "u4", "u4"), f"i{b // 8}", f"cvt.rzi.s{b}.f32 %d, %a;")
        for b in (32, 64)
    ]
    module = ptxsim.Module(HEADER + "".join(texts))
    x, pad = np.full(N, np.nan, np.float32), np.zeros(N, np.uint32)
    assert (run(module, "k32", [x, pad, pad], np.int32) == 0).all()
    assert (run(module, "k64", [x, pad, pad], np.int64) == -(2**63)).all()


@pytest.mark.parametrize(
    "code",
    [
        "rn.satfinite.e4m3x2.f32 %d, %a, %b",
        "rn.satfinite.bf16x2.f32 %d, %a, %b",
        "rz.tf32.f32 %d, %a",
    ],
)
def test_unsupported(code):
    text = kernel("k", ("f4", "f4", "u4"), "u4", f"cvt.{code};")
    with pytest.raises(ptxsim.UnsupportedError, match=r"unsupported: cvt"):
        ptxsim.Module(HEADER + text, require=["k"])
