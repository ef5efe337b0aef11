"""Floating-point arithmetic in all rounding modes, comparisons, packed halves."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.tests.scalar import HEADER, N, finite, kernel, numbers, rounded, run

MODES = ("rn", "rz", "rm", "rp")
REAL = {"f32": np.float32, "f64": np.float64}
RAW = {"f32": "u4", "f64": "u8"}


# ---------------------------------------------------------------- rounding modes
def exact_sqrt(x, dtype, mode):
    guess = dtype(math.sqrt(x))
    pairs = [(v, Fraction(float(v)) ** 2) for v in (guess, *neighbours(guess, dtype))]
    exact = Fraction(float(x))
    if mode in ("rm", "rz"):
        return max(v for v, square in pairs if square <= exact)
    if mode == "rp":
        return min(v for v, square in pairs if square >= exact)
    return guess if dtype is np.float64 else dtype(math.sqrt(np.float64(x)))


def neighbours(x, dtype):
    return np.nextafter(x, dtype(-np.inf)), np.nextafter(x, dtype(np.inf))


ARITHMETIC = {
    "add": lambda x, y, z: x + y,
    "sub": lambda x, y, z: x - y,
    "mul": lambda x, y, z: x * y,
    "div": lambda x, y, z: x / y,
    "fma": lambda x, y, z: x * y + z,
    "rcp": lambda x, y, z: 1 / y,
}
CASES = list(itertools.product(ARITHMETIC, MODES, REAL))


@pytest.fixture(scope="module")
def arithmetic():
    texts = []
    for op, mode, real in [*CASES, *itertools.product(["sqrt"], MODES, REAL)]:
        operands = {"fma": "%a, %b, %c", "rcp": "%b", "sqrt": "%b"}.get(op, "%a, %b")
        code = f"{op}.{mode}.{real} %d, {operands};"
        texts.append(kernel(f"{op}_{mode}_{real}", [RAW[real]] * 3, RAW[real], code))
    return ptxsim.Module(HEADER + "".join(texts))


def operands(real, rng):
    a, b, c = (finite(REAL[real], rng) for _ in range(3))
    b[b == 0] = 3  # no division by zero
    c[c == 0] = 1  # and no zero sums of signed zeros
    a[a == 0] = 1
    b[: N // 4] = (a[: N // 4].astype(np.float64) * 2.0**-30).astype(b.dtype)  # far apart
    return a, b, c


@pytest.mark.parametrize(("op", "mode", "real"), CASES)
def test_rounding(arithmetic, rng, op, mode, real):
    a, b, c = operands(real, rng)
    got = run(arithmetic, f"{op}_{mode}_{real}", [a, b, c], REAL[real])
    exact = [
        ARITHMETIC[op](*(Fraction(v.item()) for v in row)) for row in zip(a, b, c, strict=True)
    ]
    keep = np.array([abs(x) > Fraction(2) ** -120 for x in exact])  # no subnormals, no zero sums
    want = np.array([rounded(x, REAL[real], mode) for x in itertools.compress(exact, keep)])
    np.testing.assert_array_equal(got[keep], want)


@pytest.mark.parametrize(("mode", "real"), [*itertools.product(MODES, REAL)])
def test_square_root(arithmetic, rng, mode, real):
    a, b, c = operands(real, rng)
    b = np.abs(b)
    got = run(arithmetic, f"sqrt_{mode}_{real}", [a, b, c], REAL[real])
    np.testing.assert_array_equal(got, [exact_sqrt(x, REAL[real], mode) for x in b])


# ---------------------------------------------------------------- comparisons, classes
ORDERED = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": np.not_equal,
}
CLASSES = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda x: ~np.isnan(x),
    "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
    "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
}


@pytest.fixture(scope="module")
def comparisons():
    texts = []
    for real, raw in RAW.items():
        for name in [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"]:
            code = f"setp.{name}.{real} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;"
            texts.append(kernel(f"setp_{name}_{real}", [raw] * 3, "u4", code))
        for name in CLASSES:
            code = f"testp.{name}.{real} %p1, %a; selp.u32 %d, 1, 0, %p1;"
            texts.append(kernel(f"testp_{name}_{real}", [raw] * 3, "u4", code))
        for name in ("min", "max", *(["min.NaN", "max.NaN"] if real == "f32" else [])):
            code = f"{name}.{real} %d, %a, %b;"
            texts.append(kernel(f"{name.replace('.', '_')}_{real}", [raw] * 3, raw, code))
    return ptxsim.Module(HEADER + "".join(texts))


def special(real, rng):
    dtype = REAL[real]
    values = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny / 4]
    pairs = np.array(list(itertools.product(values, values)), dtype)
    a, b = numbers(dtype, rng), numbers(dtype, rng)
    a[: len(pairs)], b[: len(pairs)] = pairs.T
    return a, b


@pytest.mark.parametrize("real", REAL)
def test_comparisons(comparisons, rng, real):
    a, b = special(real, rng)
    nan = np.isnan(a) | np.isnan(b)
    want = {name: compare(a, b) & ~nan for name, compare in ORDERED.items()}
    want |= {f"{name}u": compare(a, b) | nan for name, compare in ORDERED.items()}
    want |= {"num": ~nan, "nan": nan}
    for name, oracle in want.items():
        got = run(comparisons, f"setp_{name}_{real}", [a, b, a], np.uint32)
        np.testing.assert_array_equal(got, oracle, err_msg=name)


@pytest.mark.parametrize("real", REAL)
def test_classes(comparisons, rng, real):
    a, b = special(real, rng)
    for name, oracle in CLASSES.items():
        got = run(comparisons, f"testp_{name}_{real}", [a, b, a], np.uint32)
        np.testing.assert_array_equal(got, oracle(a), err_msg=name)


@pytest.mark.parametrize(
    "name", ["min_f32", "max_f32", "min_f64", "max_f64", "min_NaN_f32", "max_NaN_f32"]
)
def test_minimum_and_maximum(comparisons, rng, name):
    op, *nan, real = name.split("_")
    a, b = special(real, rng)
    function = getattr(np, {"min": "fmin", "max": "fmax"}[op] if not nan else f"{op}imum")
    got, want = run(comparisons, name, [a, b, a], REAL[real]), function(a, b)
    zeros = (a == 0) & (b == 0)  # -0 is less than 0
    negative = np.signbit(a) | np.signbit(b) if op == "min" else np.signbit(a) & np.signbit(b)
    want = np.where(zeros, np.where(negative, -0.0, 0.0), want)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(want[zeros]))


# ---------------------------------------------------------------- half, bfloat16
HALF = {"f16": torch.float16, "bf16": torch.bfloat16}
PACKED = {
    "add": lambda x, y, z: x + y,
    "sub": lambda x, y, z: x - y,
    "mul": lambda x, y, z: x * y,
    "fma.rn": lambda x, y, z: x * y + z,
    "fma.rn.relu": lambda x, y, z: (x * y + z).clamp(min=0),
    "min": lambda x, y, z: torch.fmin(x, y),
    "max": lambda x, y, z: torch.fmax(x, y),
    "min.NaN": lambda x, y, z: torch.minimum(x, y),
    "max.NaN": lambda x, y, z: torch.maximum(x, y),
    "neg": lambda x, y, z: -x,
    "abs": lambda x, y, z: x.abs(),
}


@pytest.fixture(scope="module")
def halves():
    texts = []
    for half in HALF:
        for op in PACKED:
            count = 3 if "fma" in op else 1 if op in ("neg", "abs") else 2
            args = ", ".join(["%a", "%b", "%c"][:count])
            for type_, raw in ((half, "u2"), (f"{half}x2", "u4")):
                name = f"{op.replace('.', '_')}_{type_}"
                texts.append(kernel(name, [raw] * 3, raw, f"{op}.{type_} %d, {args};"))
    return ptxsim.Module(HEADER + "".join(texts))


@pytest.mark.parametrize("packed", [False, True], ids=["one", "two"])
@pytest.mark.parametrize(("half", "op"), [*itertools.product(HALF, PACKED)])
def test_halves(halves, rng, half, op, packed):
    count = 2 * N if packed else N
    x, y, z = (torch.from_numpy(rng.standard_normal(count)).to(HALF[half]) for _ in range(3))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0]).to(HALF[half])
    pairs = torch.cartesian_prod(special, special)
    x[: len(pairs)], y[: len(pairs)] = pairs.T
    dtype = np.uint32 if packed else np.uint16
    arrays = [v.view(torch.int16).numpy().view(dtype) for v in (x, y, z)]
    name = f"{op.replace('.', '_')}_{half}{'x2' if packed else ''}"
    bits = run(halves, name, arrays, dtype)
    got = torch.from_numpy(bits.view(np.int16)).view(HALF[half])
    # In double the sums and products of halves are exact, and rounded once.
    want = PACKED[op](x.double(), y.double(), z.double()).to(HALF[half])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
