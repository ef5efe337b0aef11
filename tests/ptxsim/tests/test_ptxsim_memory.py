"""Wide accesses, cache hints and atomics in hand-written PTX."""

import re

import numpy as np
import pytest

import ptxsim

HEADER = ".version 8.8\n.target sm_90\n.address_size 64\n"
COPY = """
.visible .entry copy{i}(.param .u64 pi, .param .u64 po) {{
  .reg .b32 %r<12>; .reg .b64 %rd<8>, %v<4>; .reg .f32 %f<4>; .reg .f64 %d<2>; .reg .b16 %h<8>;
  .reg .b64 %policy;
  ld.param.u64 %rd0, [pi]; ld.param.u64 %rd1, [po];
  cvta.to.global.u64 %rd0, %rd0; cvta.to.global.u64 %rd1, %rd1;
  mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 16; add.u64 %rd3, %rd0, %rd2;
  add.u64 %rd4, %rd1, %rd2;
  createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %policy, 1.0;
  {load}
  {store}
  ret;
}}
"""
R4, F4, D2, V2 = "{%r1, %r2, %r3, %r4}", "{%f0, %f1, %f2, %f3}", "{%d0, %d1}", "{%v0, %v1}"
H8 = "{%h0, %h1, %h2, %h3, %h4, %h5, %h6, %h7}"
# load, store: 16 bytes per thread
COPIES = [
    (f"ld.global.v4.b32 {R4}, [%rd3];", f"st.global.v4.b32 [%rd4], {R4};"),
    (f"ld.global.nc.v4.f32 {F4}, [%rd3];", f"st.global.v4.f32 [%rd4], {F4};"),
    (f"ld.global.v2.b64 {V2}, [%rd3];", f"st.global.v2.b64 [%rd4], {V2};"),
    (f"ld.global.nc.v2.u64 {V2}, [%rd3];", f"st.global.cs.v2.u64 [%rd4], {V2};"),
    (f"ld.global.ca.v2.f64 {D2}, [%rd3];", f"st.global.wb.v2.f64 [%rd4], {D2};"),
    (f"ld.global.cg.v4.u32 {R4}, [%rd3];", f"st.global.cg.v4.u32 [%rd4], {R4};"),
    (f"ld.global.cs.v4.s32 {R4}, [%rd3];", f"st.global.wt.v4.s32 [%rd4], {R4};"),
    (f"ld.global.v8.b16 {H8}, [%rd3];", f"st.global.v8.b16 [%rd4], {H8};"),
    (
        f"ld.global.L1::no_allocate.L2::128B.v4.b32 {R4}, [%rd3];",
        f"st.global.L1::no_allocate.v4.b32 [%rd4], {R4};",
    ),
    (
        f"ld.global.nc.L1::no_allocate.L2::256B.v2.b64 {V2}, [%rd3];",
        f"st.global.L1::evict_first.v2.b64 [%rd4], {V2};",
    ),
    (
        f"ld.global.L1::evict_last.L2::cache_hint.L2::64B.v4.b32 {R4}, [%rd3], %policy;",
        f"st.global.L2::cache_hint.v4.b32 [%rd4], {R4}, %policy;",
    ),
    (
        f"ld.global.nc.L1::evict_first.L2::evict_last.v4.b32 {R4}, [%rd3];",
        f"st.global.L2::evict_normal.v4.b32 [%rd4], {R4};",
    ),
    (
        "ld.global.lu.b64 %v0, [%rd3]; ld.volatile.global.b64 %v1, [%rd3+8];",
        "st.volatile.global.b64 [%rd4], %v0; st.relaxed.gpu.global.b64 [%rd4+8], %v1;",
    ),
    (
        "ld.acquire.gpu.global.b64 %v0, [%rd3]; ld.relaxed.sys.global.b64 %v1, [%rd3+8];",
        "st.release.gpu.global.b64 [%rd4], %v0; st.release.sys.global.b64 [%rd4+8], %v1;",
    ),
    (f"ld.v4.b32 {R4}, [%rd3];", f"st.v4.b32 [%rd4], {R4};"),
    (
        "prefetch.global.L1 [%rd3]; prefetch.global.L2::evict_last [%rd3]; prefetch.L2 [%rd3];"
        f"applypriority.global.L2::evict_normal [%rd3], 128; ld.global.v4.b32 {R4}, [%rd3];",
        f"st.global.v4.b32 [%rd4], {R4};",
    ),
]


@pytest.fixture(scope="module")
def copies():
    texts = [COPY.format(i=i, load=load, store=store) for i, (load, store) in enumerate(COPIES)]
    return ptxsim.Module(HEADER + "".join(texts))


def aligned(nbytes):
    memory = np.zeros(nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + nbytes]


@pytest.mark.parametrize("i", range(len(COPIES)), ids=lambda i: COPIES[i][0].split(" ")[0])
def test_copy(copies, rng, i):
    x, out = aligned(33 * 16), aligned(33 * 16)
    x[:] = rng.integers(0, 256, len(x))
    copies.launch(f"copy{i}", 1, 33, [x, out], order="random")
    np.testing.assert_array_equal(out, x)
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        copies.launch(f"copy{i}", 1, 33, [x[:-1], out])
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        copies.launch(f"copy{i}", 1, 33, [x, out[:-1]])
    with pytest.raises(ptxsim.KernelError, match="misaligned global memory access"):
        copies.launch(f"copy{i}", 1, 32, [x[4:], out])


# ---------------------------------------------------------------- atomics
ATOMIC = """
.visible .entry {name}(.param .u64 pp, .param .u64 pv, .param .u64 pc, .param .u64 po) {{
  .reg .b{bits} %v, %c, %old; .reg .b32 %r<8>, %s;
  .reg .b64 %rd<12>, %policy; .reg .pred %p;
  .shared .align 8 .b8 cells[32];
  ld.param.u64 %rd0, [pp]; ld.param.u64 %rd1, [pv]; ld.param.u64 %rd2, [pc];
  ld.param.u64 %rd3, [po];
  mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 3; mov.u64 %policy, 0;
  mul.wide.u32 %rd4, %r1, {size}; add.u64 %rd5, %rd0, %rd4;
  mul.wide.u32 %rd6, %r0, {size}; add.u64 %rd7, %rd1, %rd6; add.u64 %rd8, %rd2, %rd6;
  add.u64 %rd9, %rd3, %rd6; mov.u32 %s, cells; mad.lo.u32 %s, %r1, {size}, %s;
  setp.lt.u32 %p, %r0, 4;
  ld.global.b{bits} %v, [%rd7]; ld.global.b{bits} %c, [%rd8];
  {code}
  ret;
}}
"""
GLOBAL = "atom{mods}.{op} %old, [%rd5], {operands}{policy}; st.global.b{bits} [%rd9], %old;"
REDUCE = "red{mods}.{op} [%rd5], {operands}{policy};"
SHARED = """
  @%p ld.global.b{bits} %old, [%rd5]; @%p st.shared.b{bits} [%s], %old; bar.sync 0;
  atom.shared::cta.{op} %old, [%s], {operands}; bar.sync 0; st.global.b{bits} [%rd9], %old;
  @%p ld.shared.b{bits} %old, [%s]; @%p st.global.b{bits} [%rd5], %old;"""
MODS = [".global", ".relaxed.gpu.global", ".acq_rel.sys.global", "", ".global.L2::cache_hint"]
OPERATIONS = {
    "add": (lambda old, v, c: old + v, "u32 s32 u64 f32 f64"),
    "min": (lambda old, v, c: min(old, v), "u32 s32 u64 s64"),
    "max": (lambda old, v, c: max(old, v), "u32 s32 u64 s64"),
    "and": (lambda old, v, c: old & v, "b32 b64"),
    "or": (lambda old, v, c: old | v, "b32 b64"),
    "xor": (lambda old, v, c: old ^ v, "b32 b64"),
    "exch": (lambda old, v, c: v, "b32 b64"),
    "cas": (lambda old, v, c: c if old == v else old, "b16 b32 b64"),
    "inc": (lambda old, v, c: type(old)(0) if old >= v else old + type(old)(1), "u32"),
    "dec": (lambda old, v, c: v if old == 0 or old > v else old - type(old)(1), "u32"),
}
CASES = [
    (kind, op, type_)
    for op, (_, types) in OPERATIONS.items()
    for type_ in types.split()
    for kind in ("atom", "shared", *(["red"] if op not in ("exch", "cas") else []))
]


def atomic_kernel(kind, op, type_, mods):
    bits = int(re.sub(r"\D", "", type_))
    template = {"atom": GLOBAL, "red": REDUCE, "shared": SHARED}[kind]
    code = template.format(
        mods=mods,
        op=f"{op}.{type_}",
        bits=bits,
        operands="%v, %c" if op == "cas" else "%v",
        policy=", %policy" if kind != "shared" and "cache_hint" in mods else "",
    )
    name = f"{kind}_{op}_{type_}"
    return ATOMIC.format(name=name, bits=bits, size=bits // 8, code=code)


@pytest.fixture(scope="module")
def atomics():
    texts = [atomic_kernel(*case, MODS[i % len(MODS)]) for i, case in enumerate(CASES)]
    return ptxsim.Module(HEADER + "".join(texts))


@pytest.mark.parametrize(("kind", "op", "type_"), CASES)
def test_atomic(atomics, rng, kind, op, type_):
    dtype = np.dtype(f"{type_[0].translate(str.maketrans('bs', 'ui'))}{int(type_[1:]) // 8}")
    if dtype.kind == "f":
        cells, v, c = (rng.standard_normal(n).astype(dtype) for n in (4, 64, 64))
    else:
        info = np.iinfo(dtype)
        small = op in ("cas", "inc", "dec")  # so that both outcomes occur
        low, high = (0, 3) if small else (info.min, info.max)
        cells, v, c = (rng.integers(low, high, n, dtype, endpoint=True) for n in (4, 64, 64))
    want, want_old = cells.copy(), np.zeros_like(v)
    # The last thread to reach a barrier is the first to go on.
    order = np.roll(np.arange(64), 1) if kind == "shared" else range(64)
    with np.errstate(over="ignore"):
        for i in order:
            want_old[i] = want[i % 4]
            want[i % 4] = OPERATIONS[op][0](want[i % 4], v[i], c[i])
    old = np.zeros_like(v)
    atomics.launch(f"{kind}_{op}_{type_}", 1, 64, [cells, v, c, old])
    np.testing.assert_array_equal(cells, want)
    if kind != "red":
        np.testing.assert_array_equal(old, want_old)


@pytest.mark.parametrize("kind", ["atom", "red", "shared"])
def test_atomic_additions_of_subnormal_numbers(atomics, kind):
    """Global memory flushes them to zero, shared memory does not."""
    tiny = np.float32(2.0**-127)
    cells, v = np.full(4, tiny), np.full(64, tiny)
    atomics.launch(f"{kind}_add_f32", 1, 64, [cells, v, v, v.copy()])
    assert (cells == (17 * tiny if kind == "shared" else 0)).all()


# ---------------------------------------------------------------- local memory
LOCAL = """
.visible .entry reverse(.param .u64 po, .param .u32 pn) {
  .local .align 8 .b8 depot[256]; .reg .b32 %r<12>; .reg .b64 %rd<12>; .reg .pred %p<4>;
  ld.param.u64 %rd0, [po]; ld.param.u32 %r8, [pn]; mov.u32 %r9, %tid.x;
  mov.b64 %rd1, depot; cvta.local.u64 %rd2, %rd1; cvta.to.local.u64 %rd3, %rd2;
  cvt.u32.u64 %r0, %rd3; mov.b32 %r1, 0;
$FILL:
  shl.b32 %r2, %r1, 2; add.u32 %r3, %r0, %r2; add.u32 %r4, %r1, %r9;
  st.local.b32 [%r3], %r4;
  add.u32 %r1, %r1, 1; setp.lt.u32 %p0, %r1, 64; @%p0 bra $FILL;
  shl.b32 %r2, %r9, 2; sub.u32 %r5, 252, %r2; cvt.u64.u32 %rd4, %r5; add.u64 %rd5, %rd2, %rd4;
  ld.b32 %r6, [%rd5];
  cvt.u64.u32 %rd6, %r2; add.u64 %rd7, %rd0, %rd6;
  st.global.b32 [%rd7], %r6;
  isspacep.local %p1, %rd5; isspacep.global %p2, %rd5;
  @!%p1 trap; @%p2 trap;
  shl.b32 %r7, %r8, 20; add.u32 %r3, %r0, %r7; st.local.b32 [%r3], %r7;
  ret;
}
"""


def test_local_memory():
    """Local addresses fit in 32 bits; generic loads find them."""
    module, o = ptxsim.Module(HEADER + LOCAL), np.zeros(32, np.uint32)
    module.launch("reverse", 1, 32, [o, 0])
    assert (o == 63).all()
    with pytest.raises(ptxsim.KernelError, match="local memory access out of bounds"):
        module.launch("reverse", 1, 32, [o, 1])


# ---------------------------------------------------------------- .nc
STALE = """
.visible .entry stale(.param .u64 pp) {
  .reg .b32 %r<4>; .reg .b64 %rd<4>;
  ld.param.u64 %rd0, [pp]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd1, %r0, 4;
  add.u64 %rd2, %rd0, %rd1;
  ld.global.nc.b32 %r1, [%rd2]; add.u32 %r1, %r1, 1; st.global.b32 [%rd2], %r1;
  AGAIN
  ret;
}
"""


def test_non_coherent_load_of_written_memory():
    x = np.zeros(32, np.int32)
    ptxsim.Module(HEADER + STALE.replace("AGAIN", "")).launch("stale", 1, 32, [x])
    assert (x == 1).all()
    again = ptxsim.Module(HEADER + STALE.replace("AGAIN", "ld.global.nc.b32 %r2, [%rd2];"))
    with pytest.raises(ptxsim.KernelError, match=r"ld\.global\.nc of a byte that the kernel has"):
        again.launch("stale", 1, 32, [x])
