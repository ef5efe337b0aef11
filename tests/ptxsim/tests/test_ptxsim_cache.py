"""Compiled files: where they are, that none is made twice, and many processes at once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim import cache
from ptxsim.cuda_support import nvcc

CHECKOUT = Path(__file__).parents[3]
PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry answer(.param .u64 po) {
  .reg .b64 %rd<2>; .reg .b32 %r<2>;
  ld.param.u64 %rd0, [po]; mov.u32 %r0, 42; st.global.u32 [%rd0], %r0; ret;
}
"""
CUDA = """
#include "factor.h"
extern "C" __global__ void scale(int* x) { x[threadIdx.x] *= FACTOR; }
"""
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, but for the compiled runtime."""
    runtime, header = cache.runtime_library(), cache._precompiled_header()
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "cache"))
    shutil.copy(runtime, cache.cache_dir())
    shutil.copytree(header, cache.cache_dir() / header.name)
    return cache.cache_dir()


@pytest.fixture
def no_compiler(monkeypatch):
    def prevent():
        def refuse(command, *args, **kwargs):
            raise AssertionError(f"{command} was run")

        monkeypatch.setattr(subprocess, "run", refuse)
        monkeypatch.setattr(subprocess, "check_call", refuse)

    return prevent


ANSWER = """
import sys
import numpy as np
import ptxsim
out = np.zeros(1, np.int32)
ptxsim.Module(sys.argv[1]).launch("answer", 1, 1, [out])
assert out[0] == 42
"""


def answer():
    out = np.zeros(1, np.int32)
    ptxsim.Module(PTX).launch("answer", 1, 1, [out])
    return out[0]


def test_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("PTXSIM_CACHE", raising=False)
    assert cache.cache_dir() == CHECKOUT / "build" / "ptxsim"
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "elsewhere"))
    assert cache.cache_dir() == tmp_path / "elsewhere"


def test_a_kernel_is_compiled_once(fresh, no_compiler):
    assert answer() == 42
    no_compiler()
    assert answer() == 42


def test_only_the_kernels_that_run_are_compiled(fresh):
    filler = "add.u32 %r0, %r0, 1;\n" * 2000
    big = PTX.replace("answer", "other").replace("mov.u32 %r0, 42;", "mov.u32 %r0, 1;" + filler)
    module = ptxsim.Module(PTX + big[big.index(".visible") :])
    out = np.zeros(1, np.int32)
    module.launch("answer", 1, 1, [out])
    assert len(list(fresh.glob("*.so"))) == 2  # with the runtime
    module.launch("other", 1, 1, [out])
    assert out[0] == 2001
    assert len(list(fresh.glob("*.so"))) == 3


def test_many_processes_compile_the_same_kernel(fresh):
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", ANSWER, PTX]
    processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [p.wait() for p in processes] == [0] * 4
    assert len(list(fresh.glob("*.so"))) == 2
    left_over = [p.name for p in fresh.iterdir() if p.suffix == ".lock" or p.name.startswith("tmp")]
    assert not left_over


def test_a_failed_compilation_leaves_nothing(fresh):
    def fail(path):
        path.write_text("half a file")
        raise ptxsim.CompileError("no")

    with pytest.raises(ptxsim.CompileError):
        cache.cached("thing", fail)
    assert not (fresh / "thing").exists()
    assert cache.cached("thing", lambda path: path.write_text("whole")).read_text() == "whole"


@needs_nvcc
def test_nvcc_runs_again_when_a_header_changes(fresh, tmp_path, no_compiler):
    header, source = tmp_path / "factor.h", tmp_path / "scale.cu"
    source.write_text(CUDA)
    x = np.ones(32, np.int32)
    for factor in (3, 5):
        header.write_text(f"#define FACTOR {factor}\n")
        ptxsim.load_cuda(source).launch("scale", 1, 32, [x])
    assert (x == 15).all()
    no_compiler()
    ptxsim.load_cuda(source).launch("scale", 1, 32, [x])
    assert (x == 75).all()


def test_triton_compiles_once(fresh, no_compiler):
    triton = pytest.importorskip("triton")
    from ptxsim.tests.test_ptxsim_triton import add_kernel

    hits = []
    x = torch.arange(64.0)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
        for prevent in (lambda: None, no_compiler):
            prevent()
            out = torch.zeros(64)
            ptxsim.SimulatedTriton(add_kernel)[1](x, x, out, 64, BLOCK=64)
            assert torch.equal(out, 2 * x)
    assert hits == [False, True]
    assert (fresh / "triton").is_dir()


def test_missing_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ptxsim.CompileError, match=r"g\+\+ is needed"):
        answer()
