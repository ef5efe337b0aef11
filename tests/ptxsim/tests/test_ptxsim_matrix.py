"""Matrix instructions, cp.async, redux and vector atomics in hand-written PTX.

The fragment layouts are written down here a second time, element by element as in the tables of
the PTX ISA, so that a mistake in the runtime does not cancel out.
"""

import numpy as np
import pytest
import torch

import ptxsim

HEADER = ".version 8.4\n.target sm_90\n.address_size 64\n"
LANE = np.arange(32)
GROUP, POS = LANE // 4, LANE % 4


def a_layout(shape, kind):
    """(row, col) of element i of lane l in the A fragment."""
    k = int(shape.split("k")[1])
    if kind == "f16":
        if k == 16:
            return [
                (
                    GROUP + (0 if i < 2 or 4 <= i < 6 else 8),
                    POS * 2 + (i & 1) + (8 if i >= 4 else 0),
                )
                for i in range(8)
            ]
        return [(GROUP + (0 if i < 2 else 8), POS * 2 + (i & 1)) for i in range(4)]
    if kind == "tf32":
        if k == 8:
            return [(GROUP + 8 * (i in (1, 3)), POS + 4 * (i >= 2)) for i in range(4)]
        return [(GROUP + 8 * i, POS) for i in range(2)]
    if k == 32:
        return [
            (GROUP + (0 if i < 4 or 8 <= i < 12 else 8), POS * 4 + (i & 3) + 16 * (i >= 8))
            for i in range(16)
        ]
    return [(GROUP + 8 * (i >= 4), POS * 4 + (i & 3)) for i in range(8)]


def b_layout(shape, kind):
    """(row, col) of element i of lane l in the B fragment."""
    k = int(shape.split("k")[1])
    if kind == "f16":
        return [(POS * 2 + (i & 1) + 8 * (i >= 2), GROUP) for i in range(4 if k == 16 else 2)]
    if kind == "tf32":
        return [(POS + 4 * i, GROUP) for i in range(2 if k == 8 else 1)]
    return [(POS * 4 + (i & 3) + 16 * (i >= 4), GROUP) for i in range(8 if k == 32 else 4)]


C_LAYOUT = [(GROUP + 8 * (i >= 2), POS * 2 + (i & 1)) for i in range(4)]


def fragment(matrix, layout):
    """Registers of every lane: (32, n) uint32."""
    values = np.stack([matrix[r, c] for r, c in layout], 1)
    return np.ascontiguousarray(values).view(np.uint32)


def mma_kernel(name, op, na, nb, nc):
    lines = [f".visible .entry {name}(.param .u64 pa, .param .u64 pb, .param .u64 pc) {{"]
    lines.append(".reg .b32 %a<8>, %b<8>, %c<8>; .reg .b32 %r<4>; .reg .b64 %rd<8>;")
    lines.append("mov.u32 %r0, %tid.x;")
    for base, reg, n in (("pa", "a", na), ("pb", "b", nb), ("pc", "c", nc)):
        lines.append(f"ld.param.u64 %rd0, [{base}]; mad.wide.u32 %rd1, %r0, {4 * n}, %rd0;")
        lines += [f"ld.global.b32 %{reg}{i}, [%rd1+{4 * i}];" for i in range(n)]
    regs = {
        r: "{" + ",".join(f"%{r}{i}" for i in range(n)) + "}"
        for r, n in (("a", na), ("b", nb), ("c", nc))
    }
    lines.append(f"{op} {regs['c']}, {regs['a']}, {regs['b']}, {regs['c']};")
    lines += [f"st.global.b32 [%rd1+{4 * i}], %c{i};" for i in range(nc)]
    return "\n".join([*lines, "ret; }"])


CASES = {
    "f16_k16": ("m16n8k16", "f16", "f32.f16.f16.f32"),
    "f16_k8": ("m16n8k8", "f16", "f32.f16.f16.f32"),
    "f16_acc16": ("m16n8k16", "f16", "f16.f16.f16.f16"),
    "bf16_k16": ("m16n8k16", "f16", "f32.bf16.bf16.f32"),
    "bf16_k8": ("m16n8k8", "f16", "f32.bf16.bf16.f32"),
    "tf32_k8": ("m16n8k8", "tf32", "f32.tf32.tf32.f32"),
    "tf32_k4": ("m16n8k4", "tf32", "f32.tf32.tf32.f32"),
    "s8_k16": ("m16n8k16", "s8", "s32.s8.s8.s32"),
    "s8_k32": ("m16n8k32", "s8", "s32.s8.s8.s32"),
}


@pytest.fixture(scope="module")
def mma_module():
    texts = []
    for name, (shape, kind, types) in CASES.items():
        per_reg = {"f16": 2, "tf32": 1, "s8": 4}[kind]
        na, nb = (len(f(shape, kind)) // per_reg for f in (a_layout, b_layout))
        op = f"mma.sync.aligned.{shape}.row.col.{types}"
        texts.append(mma_kernel(name, op, na, nb, 2 if types.startswith("f16") else 4))
    return ptxsim.Module(HEADER + "\n".join(texts))


@pytest.mark.parametrize("name", CASES)
def test_mma(mma_module, rng, name):
    shape, kind, types = CASES[name]
    k = int(shape.split("k")[1])
    if kind == "s8":
        a, b = rng.integers(-128, 128, (16, k)), rng.integers(-128, 128, (k, 8))
        c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
        raw_a, raw_b, want = a.astype(np.int8), b.astype(np.int8), c + a @ b
    else:
        a, b = torch.randn(16, k), torch.randn(k, 8)
        c = torch.randn(16, 8).numpy()
        if types.startswith("f16"):
            c = c.astype(np.float16)
        if kind == "tf32":
            raw_a, raw_b = a.numpy(), b.numpy()
            a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (raw_a, raw_b))
        else:
            dtype = torch.bfloat16 if "bf16" in types else torch.float16
            a, b = a.to(dtype), b.to(dtype)
            raw_a, raw_b = a.view(torch.int16).numpy(), b.view(torch.int16).numpy()
            a, b = a.double().numpy(), b.double().numpy()
        want = (c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)).astype(c.dtype)
    regs = [fragment(raw_a, a_layout(shape, kind)), fragment(raw_b, b_layout(shape, kind))]
    regs.append(fragment(c, C_LAYOUT))
    mma_module.launch(name, 1, 32, regs)
    got = regs[2].view(c.dtype)
    full = np.zeros_like(c)
    for i, (row, col) in enumerate(C_LAYOUT):
        full[row, col] = got[:, i]
    np.testing.assert_allclose(full, want, rtol=1e-6)


def matrix_copy(op, count, trans):
    """Stages 512 b16 values in shared memory, then runs ldmatrix; or stmatrix, then dumps."""
    suffix = f"sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    regs = "{" + ",".join(f"%v{i}" for i in range(count)) + "}"
    name = f"{op}{count}{'t' if trans else ''}"
    head = f"""
.visible .entry {name}(.param .u64 pi, .param .u64 po) {{
  .reg .b32 %r<8>, %v<4>; .reg .b64 %rd<8>;
  .shared .align 128 .b8 stage[512];
  ld.param.u64 %rd0, [pi]; ld.param.u64 %rd1, [po];
  mov.u32 %r0, %tid.x; mov.u32 %r1, stage; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2;
  mul.wide.u32 %rd2, %r0, 16; add.u64 %rd3, %rd0, %rd2; add.u64 %rd4, %rd1, %rd2;
  ld.global.v4.b32 {{%v0,%v1,%v2,%v3}}, [%rd3];
"""
    if op == "ldmatrix":
        return f"""{head}
  st.shared.v4.b32 [%r3], {{%v0,%v1,%v2,%v3}};
  bar.warp.sync -1;
  {op}.{suffix} {regs}, [%r3];
  st.global.v4.b32 [%rd4], {{%v0,%v1,%v2,%v3}};
  ret; }}"""
    return f"""{head}
  {op}.{suffix} [%r3], {regs};
  bar.sync 0;
  ld.shared.v4.b32 {{%v0,%v1,%v2,%v3}}, [%r3];
  st.global.v4.b32 [%rd4], {{%v0,%v1,%v2,%v3}};
  ret; }}"""


VARIANTS = [(n, t) for n in (1, 2, 4) for t in (False, True)]


@pytest.fixture(scope="module")
def copy_module():
    texts = [matrix_copy(op, n, t) for op in ("ldmatrix", "stmatrix") for n, t in VARIANTS]
    return ptxsim.Module(HEADER + "\n".join(texts))


@pytest.mark.parametrize(("count", "trans"), VARIANTS)
def test_ldmatrix_and_stmatrix(copy_module, rng, count, trans):
    name = f"{count}{'t' if trans else ''}"
    x = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((32, 4, 2), np.uint16)
    copy_module.launch("ldmatrix" + name, 1, 32, [x, out])
    for i in range(count):
        m = x[i].T if trans else x[i]
        for e in range(2):
            np.testing.assert_array_equal(out[:, i, e], m[GROUP, 2 * POS + e])
    # stmatrix: the inverse, registers in, matrices out
    regs = rng.integers(0, 2**16, (32, 4, 2), dtype=np.uint16)
    dump = np.zeros((4, 8, 8), np.uint16)
    copy_module.launch("stmatrix" + name, 1, 32, [regs, dump])
    for i in range(count):
        m = dump[i].T if trans else dump[i]
        for e in range(2):
            np.testing.assert_array_equal(m[GROUP, 2 * POS + e], regs[:, i, e])


PIPELINE = """
.visible .entry pipeline(.param .u64 pi, .param .u64 po) {
  .reg .b32 %r<16>; .reg .b64 %rd<8>;
  .shared .align 16 .b8 stage[1024];
  ld.param.u64 %rd0, [pi]; ld.param.u64 %rd1, [po];
  mov.u32 %r0, %tid.x; mov.u32 %r1, stage; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2;
  mul.wide.u32 %rd2, %r0, 16; add.u64 %rd3, %rd0, %rd2; add.u64 %rd4, %rd1, %rd2;
  cp.async.cg.shared.global [%r3], [%rd3], 16;
  cp.async.commit_group;
  mov.u32 %r9, 4;
  cp.async.ca.shared.global [%r3+512], [%rd3+512], 8, %r9;
  cp.async.commit_group;
  cp.async.wait_group WAIT;
  ld.shared.v2.b32 {%r4, %r5}, [%r3];
  ld.shared.v2.b32 {%r6, %r7}, [%r3+512];
  st.global.v4.b32 [%rd4], {%r4, %r5, %r6, %r7};
  ret;
}
"""


def test_cp_async_groups(rng):
    x = rng.integers(0, 2**32, (2, 32, 4), dtype=np.uint32)
    cases = [("group 0", True, True), ("group 1", True, False), ("group 2", False, False)]
    for wait, first, second in [*cases, ("all", True, True)]:
        out = np.zeros((32, 4), np.uint32)
        module = ptxsim.Module(HEADER + PIPELINE.replace("group WAIT", wait))
        module.launch("pipeline", 1, 32, [x, out])
        assert np.array_equal(out[:, :2], x[0, :, :2]) == first
        assert np.array_equal(out[:, 2], x[1, :, 0]) == second
        assert (out[:, 3] == 0).all() == second  # zero fill past src-size


VECTOR = """
.visible .entry vector(.param .u64 pf, .param .u64 ph, .param .u64 pb, .param .u64 pr) {
  .reg .f32 %f<8>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .pred %p<4>;
  ld.param.u64 %rd0, [pf]; ld.param.u64 %rd1, [ph]; ld.param.u64 %rd2, [pb];
  ld.param.u64 %rd3, [pr];
  mov.f32 %f0, 0f3F800000; mov.f32 %f1, 0f40000000; mov.f32 %f2, 0f40400000;
  red.relaxed.gpu.global.add.v4.f32 [%rd0], {%f0, %f1, %f2, %f0};
  red.global.add.v2.f32 [%rd0], {%f0, %f0};
  mov.b32 %r0, 0x40003C00; mov.b32 %r1, 0x40003F80;
  atom.global.add.noftz.f16x2 %r2, [%rd1], %r0;
  red.global.add.noftz.v2.f16x2 [%rd1+8], {%r0, %r0};
  atom.global.add.noftz.bf16x2 %r3, [%rd2], %r1;
  mov.u32 %r4, %tid.x; mov.u32 %r5, %laneid; sub.u32 %r6, %r4, 20;
  redux.sync.add.u32 %r7, %r5, -1; redux.sync.min.s32 %r8, %r6, -1;
  redux.sync.max.u32 %r9, %r6, -1; redux.sync.xor.b32 %r10, %r5, -1;
  shl.b32 %r11, %r4, 4; cvt.u64.u32 %rd4, %r11;
  add.u64 %rd5, %rd3, %rd4;
  setp.ne.u32 %p0, %ctaid.x, 0;
  @%p0 ret;
  st.global.v4.b32 [%rd5], {%r7, %r8, %r9, %r10};
  ret;
}
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_vector_atomics_and_redux(threads):
    f, h = np.zeros(4, np.float32), torch.zeros(8).half()
    b, r = torch.zeros(2).bfloat16(), np.zeros((32, 4), np.int32)
    module = ptxsim.Module(HEADER + VECTOR)
    module.launch("vector", 2, 32, [f, h, b, r], threads=threads, block_races=threads == 1)
    assert f.tolist() == [128, 192, 192, 64]
    assert h.tolist() == [64, 128, 0, 0, 64, 128, 64, 128]
    assert b.tolist() == [64, 128]
    assert (r == [496, -20, -1, 0]).all()
