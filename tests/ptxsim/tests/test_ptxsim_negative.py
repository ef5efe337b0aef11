"""Planted bugs must be reported."""

import re

import numpy as np
import pytest

import ptxsim

SOURCE = r"""
#include <cuda_pipeline.h>
extern "C" __global__ void rotate(const int* x, int* o) {
  __shared__ int s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[(threadIdx.x + 77) % 256];
}
extern "C" __global__ void warp_rotate(const int* x, int* o) {
  __shared__ int s[32];
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  o[threadIdx.x] = s[(threadIdx.x + 7) % 32];
}
extern "C" __global__ void copy(const int* x, int* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) o[i] = x[i];
}
extern "C" __global__ void misaligned(const char* x, int* o) { o[0] = *(const int*)(x + 1); }
extern "C" __global__ void dynamic(int* o, int n) {
  extern __shared__ int s[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = i;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void divergent(int* o) {
  if (threadIdx.x & 1) {
    o[0] = 1;
    __syncthreads();
  } else {
    o[1] = 2;
    __syncthreads();
  }
}
extern "C" __global__ void half_barrier(int* o) {
  if (threadIdx.x < 32) __syncthreads();
  o[threadIdx.x] = 1;
}
extern "C" __global__ void exited_lane(int* o) {
  if (threadIdx.x == 5) return;
  o[threadIdx.x] = __shfl_down_sync(~0u, int(threadIdx.x), 1);
}
extern "C" __global__ void last_block(int* part, unsigned* done, int* sum) {
  __shared__ bool is_last;
  part[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) {
    int total = 0;
    for (int i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) total += part[i];
    atomicAdd(sum, total);
  }
}
extern "C" __global__ void global_rotate(const int* x, int* s, int* o) {
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[(threadIdx.x + 77) % 256];
}
extern "C" __global__ void global_warp_rotate(const int* x, int* s, int* o) {
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  o[threadIdx.x] = s[(threadIdx.x + 7) % 32];
}
extern "C" __global__ void in_place(int* x) {
  int v = x[(threadIdx.x + 1) % blockDim.x];
  __syncthreads();
  x[threadIdx.x] = v;
}
extern "C" __global__ void count_plainly(int* o) { o[0]++; }
extern "C" __global__ void count_and_read(int* o) {
  atomicAdd(o, 1);
  o[threadIdx.x + 1] = *o;
}
extern "C" __global__ void same_value(int* o) { o[0] = 7; }
extern "C" __global__ void write_write(int* o) { o[0] = blockIdx.x; }
extern "C" __global__ void read_write(int* o) {
  o[blockIdx.x] = blockIdx.x ? o[blockIdx.x - 1] + 1 : 0;
}
extern "C" __global__ void count(int* o) { atomicAdd(o, 1); }
extern "C" __global__ void mixed(int* o) { if (blockIdx.x) atomicAdd(o, 1); else *o = 5; }
extern "C" __global__ void spin(volatile int* o) { while (*o == 0) {} }
extern "C" __global__ void staged(const int4* x, int* o) {
  __shared__ int4 s[64];
  __pipeline_memcpy_async(s + threadIdx.x, x + threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  o[threadIdx.x] = s[63 - threadIdx.x].x;
}
extern "C" __global__ void asserts(int* o) { if (o[0] != 3) __trap(); }
"""


@pytest.fixture(scope="module")
def ptx():
    return ptxsim.compile_ptx(SOURCE, 80)


@pytest.fixture(scope="module")
def module(ptx):
    return ptxsim.Module(ptx)


X = np.arange(256, dtype=np.int32)


def out(n=256):
    return np.zeros(n, np.int32)


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_missing_barrier(module, ptx, order):
    good = out()
    module.launch("rotate", 1, 256, [X, good], order=order)
    np.testing.assert_array_equal(good, np.roll(X, -77))
    broken = ptxsim.Module(re.sub(r"bar\.sync\s+0;", "", ptx))
    with pytest.raises(ptxsim.KernelError, match="shared memory race"):
        broken.launch("rotate", 1, 256, [X, out()], order=order)
    # without the detector, stale data shows in some order
    bad = out()
    broken.launch("rotate", 1, 256, [X, bad], order=order, shared_races=False)
    assert not np.array_equal(bad, good)


def test_missing_warp_sync(module, ptx):
    good = out(32)
    module.launch("warp_rotate", 1, 32, [X, good])
    np.testing.assert_array_equal(good, np.roll(X[:32], -7))
    broken = ptxsim.Module(re.sub(r"bar\.warp\.sync\s+[^;]*;", "", ptx))
    with pytest.raises(ptxsim.KernelError, match="shared memory race"):
        broken.launch("warp_rotate", 1, 32, [X, out(32)])


def test_missing_async_wait(module, ptx):
    x = np.arange(256, dtype=np.int32)
    good = out(64)
    module.launch("staged", 1, 64, [x, good])
    np.testing.assert_array_equal(good, x[::4][::-1])
    assert "cp.async" in ptx
    broken = ptxsim.Module(re.sub(r"cp\.async\.wait_group\s+\d+;", "", ptx))
    bad = out(64)
    broken.launch("staged", 1, 64, [x, bad])
    assert not (bad == good).any()


def test_out_of_bounds(module):
    o = out(100)
    module.launch("copy", 1, 256, [X, o, 100])
    np.testing.assert_array_equal(o, X[:100])
    with pytest.raises(ptxsim.KernelError, match="global memory access out of bounds"):
        module.launch("copy", 1, 256, [X, out(100), 101])
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        module.launch("copy", 1, 256, [X[:99], out(100), 100])


def test_access_across_the_end(module):
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        module.launch("copy", 1, 32, [np.zeros(7, np.uint8), out(2), 2])


def test_misaligned(module):
    with pytest.raises(ptxsim.KernelError, match="misaligned global"):
        module.launch("misaligned", 1, 1, [X, out()])


def test_shared_overrun(module):
    o = out(32)
    module.launch("dynamic", 1, 32, [o, 64], shared=256)
    with pytest.raises(ptxsim.KernelError, match="shared memory access out of bounds"):
        module.launch("dynamic", 1, 32, [o, 65], shared=256)


def test_divergent_barrier(module):
    with pytest.raises(ptxsim.KernelError, match="divergent barrier"):
        module.launch("divergent", 1, 64, [out()])


def test_barrier_not_reached_by_all(module):
    with pytest.raises(ptxsim.KernelError, match="deadlock"):
        module.launch("half_barrier", 1, 64, [out()])
    o = out(64)
    module.launch("half_barrier", 1, 64, [o], allow_exited=True)
    assert o.all()


def test_exited_lane_in_mask(module):
    with pytest.raises(ptxsim.KernelError, match="deadlock"):
        module.launch("exited_lane", 1, 32, [out()])


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_missing_barrier_for_global_memory(module, ptx, order):
    good, x = out(), X.copy()
    module.launch("global_rotate", 1, 256, [X, out(), good], order=order)
    np.testing.assert_array_equal(good, np.roll(X, -77))
    module.launch("in_place", 1, 256, [x], order=order)
    np.testing.assert_array_equal(x, np.roll(X, -1))
    broken = ptxsim.Module(re.sub(r"bar\.sync\s+0;", "", ptx))
    for name, args in (("global_rotate", [X, out(), out()]), ("in_place", [X.copy()])):
        with pytest.raises(ptxsim.KernelError, match="global memory race"):
            broken.launch(name, 1, 256, args, order=order)
        broken.launch(name, 1, 256, args, order=order, block_races=False)


def test_missing_warp_sync_for_global_memory(module, ptx):
    good = out(32)
    module.launch("global_warp_rotate", 1, 32, [X, out(32), good])
    np.testing.assert_array_equal(good, np.roll(X[:32], -7))
    broken = ptxsim.Module(re.sub(r"bar\.warp\.sync\s+[^;]*;", "", ptx))
    with pytest.raises(ptxsim.KernelError, match="global memory race"):
        broken.launch("global_warp_rotate", 1, 32, [X, out(32), out(32)])


@pytest.mark.parametrize("name", ["count_plainly", "count_and_read"])
def test_races_for_one_element_of_global_memory(module, name):
    with pytest.raises(ptxsim.KernelError, match="global memory race"):
        module.launch(name, 1, 64, [out()])


def test_equal_values_do_not_race_inside_a_block(module):
    o = out(1)
    module.launch("same_value", 1, 64, [o])
    assert o[0] == 7
    with pytest.raises(ptxsim.KernelError, match="race between blocks: write after write"):
        module.launch("same_value", 2, 64, [o])


def without(ptx: str, kernel: str, pattern: str, which: int) -> ptxsim.Module:
    """The kernels, but in one of them a statement is missing."""
    begin = ptx.index(f".entry {kernel}(")
    found = list(re.finditer(pattern, ptx[begin:]))[which]
    return ptxsim.Module(ptx[: begin + found.start()] + ptx[begin + found.end() :])


def run_last_block(module: ptxsim.Module, order: str) -> int:
    total = np.zeros(1, np.int32)
    part, done = np.zeros(5 * 64, np.int32), np.zeros(1, np.uint32)
    module.launch("last_block", 5, 64, [part, done, total], order=order)
    return int(total[0])


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_the_last_block_reads_what_all_have_written(module, ptx, order):
    assert run_last_block(module, order) == 5 * 64 * 63 // 2
    for fence in (0, 1):
        with pytest.raises(ptxsim.KernelError, match="race between blocks: read after write"):
            run_last_block(without(ptx, "last_block", r"membar\.gl;|fence\S*;", fence), order)


@pytest.mark.parametrize("order", ["fwd", "random"])
def test_the_last_block_does_not_wait_for_the_warps_of_others(ptx, order):
    broken = without(ptx, "last_block", r"bar\.sync\s+0;|barrier\S*\s+0;", 0)
    with pytest.raises(ptxsim.KernelError, match="race"):
        run_last_block(broken, order)


@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
@pytest.mark.parametrize("name", ["write_write", "read_write", "mixed"])
def test_races_between_blocks(module, name, order):
    with pytest.raises(ptxsim.KernelError, match="race between blocks"):
        module.launch(name, 4, 1, [out()], order=order)
    module.launch(name, 4, 1, [out()], order=order, races=False)


def test_atomics_do_not_race(module):
    o = out(1)
    module.launch("count", 50, 64, [o])
    module.launch("count", 50, 64, [o], threads=2, block_races=False)
    assert o[0] == 6400


def test_endless_spin(module):
    with pytest.raises(ptxsim.KernelError, match="timeout"):
        module.launch("spin", 1, 1, [out()], timeout=0.2)


def test_trap(module):
    with pytest.raises(ptxsim.KernelError, match="trap"):
        module.launch("asserts", 1, 1, [out()])


def test_bad_arguments(module):
    with pytest.raises(TypeError, match="takes 3 arguments"):
        module.launch("copy", 1, 1, [X])
    with pytest.raises(OverflowError):
        module.launch("copy", 1, 1, [X, out(), 1 << 40])
    with pytest.raises(TypeError, match="unknown launch options"):
        module.launch("copy", 1, 1, [X, out(), 1], ordre="fwd")
    with pytest.raises(ValueError, match="order is one of"):
        module.launch("copy", 1, 1, [X, out(), 1], order="backward")
    with pytest.raises(ValueError, match="threads=1 only"):
        module.launch("copy", 1, 1, [X, out(), 1], threads=2)
    with pytest.raises(TypeError, match=r"is an integer, got 1\.5"):
        module.launch("copy", 1, 1, [X, out(), 1.5])
    with pytest.raises(KeyError):
        module.launch("nothing", 1, 1, [])


def test_unsupported_kernel_leaves_the_others_alone(ptx):
    extra = ".visible .entry strange() { wgmma.fence.sync.aligned; ret; }\n"
    module = ptxsim.Module(ptx + extra)
    with pytest.raises(ptxsim.UnsupportedError, match=r"unsupported: wgmma\.fence"):
        module.launch("strange", 1, 1, [])
    with pytest.raises(ptxsim.UnsupportedError, match="wgmma"):
        ptxsim.Module(ptx + extra, require=["strange"])
    assert list(module.unsupported) == ["strange"]
    module.launch("copy", 1, 256, [X, out(), 256])


def test_unsupported_function(ptx):
    """Reported for the kernels that call it, however far down."""
    extra = """
.func deep() { tcgen05.fence; ret; }
.func middle() { call deep; ret; }
.visible .entry calls_it() { call middle; ret; }
.visible .entry clustered() .reqnctapercluster 2, 1, 1 { ret; }
"""
    module = ptxsim.Module(ptx + extra)
    with pytest.raises(ptxsim.UnsupportedError, match=r"unsupported: tcgen05\.fence  \[in deep\]"):
        module.launch("calls_it", 1, 1, [])
    with pytest.raises(ptxsim.UnsupportedError, match="clusters"):
        module.launch("clustered", 2, 1, [])
