"""One small kernel per instruction: d[i] = instruction(a[i], b[i], c[i])."""

from fractions import Fraction

import numpy as np

N = 500
HEADER = ".version 8.6\n.target sm_90\n.address_size 64\n"
KERNEL = """
.visible .entry {name}(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{{
  .reg .pred %p<4>;
  .reg .b16 %h<4>;
  .reg .b32 %r<8>;
  .reg .b64 %rd<12>;
  .reg .b{sa} %a; .reg .b{sb} %b; .reg .b{sc} %c; .reg .b{sd} %d;
  mov.u32 %r0, %ctaid.x;
  mov.u32 %r1, %ntid.x;
  mov.u32 %r2, %tid.x;
  mad.lo.s32 %r3, %r0, %r1, %r2;
  setp.ge.u32 %p0, %r3, {n};
  @%p0 bra $DONE;
  ld.param.u64 %rd0, [pa]; ld.param.u64 %rd1, [pb];
  ld.param.u64 %rd2, [pc]; ld.param.u64 %rd3, [pd];
  mad.wide.u32 %rd4, %r3, {ba}, %rd0; mad.wide.u32 %rd5, %r3, {bb}, %rd1;
  mad.wide.u32 %rd6, %r3, {bc}, %rd2; mad.wide.u32 %rd7, %r3, {bd}, %rd3;
  ld.global.nc.b{sa} %a, [%rd4]; ld.global.L1::evict_last.b{sb} %b, [%rd5];
  ld.global.b{sc} %c, [%rd6];
  {code}
  st.global.b{sd} [%rd7], %d;
$DONE:
  ret;
}}
"""


def kernel(name, types, out, code):
    """PTX of the kernel; types of a, b, c and d."""
    sizes = [np.dtype(t).itemsize for t in (*types, out)]
    slots = dict(zip(("sa", "sb", "sc", "sd"), (8 * s for s in sizes), strict=True))
    steps = dict(zip(("ba", "bb", "bc", "bd"), sizes, strict=True))
    return KERNEL.format(name=name, n=N, code=code, **slots, **steps)


def run(module, name, arrays, out_type, **options):
    """d."""
    out = np.zeros(N, out_type)
    module.launch(name, 4, 128, [*arrays, out], **options)
    return out


def numbers(dtype, rng):
    """Random numbers of all magnitudes, and the special ones."""
    if np.dtype(dtype).kind in "ui":
        info = np.iinfo(dtype)
        x = rng.integers(info.min, info.max, N, dtype=dtype, endpoint=True)
        x[:4] = [info.max, info.min, 1, 0]
        small = rng.integers(0, 100, N, dtype=dtype)
        return np.where(rng.random(N) < 0.3, small, x).astype(dtype)
    x = rng.standard_normal(N) * 10.0 ** rng.integers(-6, 6, N)
    x[:6] = [0.0, -0.0, np.inf, -np.inf, 65520.0, 5.97e-8]
    with np.errstate(over="ignore"):
        return rng.permutation(x.astype(dtype))


def finite(dtype, rng):
    """Random finite numbers, about a third of them integers or halves, for ties."""
    x = numbers(dtype, rng)
    x[~np.isfinite(x)] = 1.5
    halves = rng.integers(-9, 9, N) / 2
    return np.where(rng.random(N) < 0.3, halves, x).astype(dtype)


def rounded(exact: Fraction, dtype, mode="rn"):
    """The number of type `dtype` that a directed or nearest rounding picks."""
    guess = dtype(float(exact))
    near = [np.nextafter(guess, dtype(-np.inf)), guess, np.nextafter(guess, dtype(np.inf))]
    pairs = [(Fraction(float(v)), v) for v in near if np.isfinite(v)]
    if mode == "rz":
        mode = "rm" if exact > 0 else "rp"
    if mode == "rm":
        return max(p for p in pairs if p[0] <= exact)[1]
    if mode == "rp":
        return min(p for p in pairs if p[0] >= exact)[1]
    raw = f"u{np.dtype(dtype).itemsize}"
    return min(pairs, key=lambda p: (abs(p[0] - exact), int(p[1].view(raw)) & 1))[1]
