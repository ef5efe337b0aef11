"""What the compilers made of the kernels, for every GPU they are compiled for.

nvcc's machine code is read out of the built library, Triton's is compiled here. A kernel that
spills registers, needs a stack frame, or lost the wide loads that it was designed around fails.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from saft_kernels import backends
from saft_kernels.layout import STATE_SIZE
from saft_kernels.triton import accumulate_topk as triton_topk
from saft_kernels.triton import library
from simulated.launches import Launch, recorded

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BUILT = backends.build_info()["cuda"]
needs_cuda = pytest.mark.skipif(
    BUILT.startswith("off"), reason=f"the library's CUDA part is {BUILT}"
)

# CUDA C++ -----------------------------------------------------------------------------------------

ARCHITECTURES = re.findall(r"sm_\d+", BUILT)

#: The generations whose instructions are read, which takes a while; the compiler's report of
#: registers and stack is read for all.
DISASSEMBLED = ("sm_80", "sm_90", "sm_100")

#: Kernel -> what its machine code must hold: the wide loads and stores that it was designed around.
#: STG and LDG are global memory; 128 is the width in bits.
WIDE = {
    "scan_kernel": r"LDG\.E\.128",
    "refill_kernel": r"LDG\.E\.128",
    "move_kernel": r"LDG\.E\.128",
    "step_kernel": r"LDG\.E\.128(.|\n)*STG\.E\.128",
    "pack_kernel": r"STG\.E\.128",
    "entries_kernel": r"LDG\.E\.128",
    "product_kernel": r"LDG\.E\.(64|128)",
}


def cuobjdump(*arguments: str) -> str:
    command = [str(TOOLS / "cuobjdump"), *arguments, str(backends.LIBRARY)]
    environment = dict(os.environ, PATH=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def resources(architecture: str) -> dict[str, dict[str, int]]:
    """Kernel -> its registers, stack, shared and local memory."""
    text = cuobjdump("--dump-resource-usage", "-arch", architecture)
    found = re.findall(r"Function (\S+):\s+(.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        for name, usage in found
    }


@functools.cache
def machine_code(architecture: str) -> dict[str, str]:
    """Kernel -> its instructions; takes some seconds."""
    pieces = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", architecture))
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def every_block(code: str) -> str:
    """Without what the last block alone does, once a fence has told it that it is the last."""
    return code.partition("MEMBAR")[0]


def kernels_in_source() -> set[str]:
    folder = Path(__file__).parent.parent / "csrc" / "cuda"
    texts = (path.read_text() for path in folder.glob("*.cu"))
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
    return {name for text in texts for name in re.findall(pattern, text)}


@needs_cuda
def test_the_library_holds_ptx_of_the_newest_architecture():
    newest = BUILT.rpartition("compute_")[2]
    assert f".target sm_{newest}" in cuobjdump("-ptx")


@needs_cuda
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_sources_is_in_the_library(architecture):
    compiled = " ".join(resources(architecture))
    assert [name for name in kernels_in_source() if name not in compiled] == []


@needs_cuda
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_needs_a_stack(architecture):
    assert resources(architecture)
    wrong = {
        name: usage
        for name, usage in resources(architecture).items()
        if usage["STACK"] > 0 or usage["LOCAL"] > 0
    }
    assert wrong == {}


@needs_cuda
@pytest.mark.parametrize("architecture", [sm for sm in ARCHITECTURES if sm in DISASSEMBLED])
def test_wide_loads_and_tensor_cores_are_there(architecture):
    codes = machine_code(architecture)
    for kernel, pattern in WIDE.items():
        own = {name: every_block(code) for name, code in codes.items() if kernel in name}
        assert own, kernel
        assert [name for name, code in own.items() if not re.search(pattern, code)] == []
    tiles = {name: "HMMA.16816.F32" in code for name, code in codes.items() if "product" in name}
    assert len(tiles) == 4
    assert tiles == {name: "bfloat16" in name or "half" in name for name in tiles}, "tensor cores"


@needs_cuda
@pytest.mark.parametrize("architecture", [sm for sm in ARCHITECTURES if sm in DISASSEMBLED])
def test_a_scan_asks_for_all_that_it_needs_before_it_writes(architecture):
    """The bar too (8 bytes of it): asked for later, it would be waited for a second time."""
    [code] = (c for name, c in machine_code(architecture).items() if "scan_kernelIf" in name)
    assert re.search(r"LDG\.E\.64(.|\n)*STG\.E\.128", every_block(code).partition("EXIT")[0])


# Triton -------------------------------------------------------------------------------------------

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def gather_scatter(dtype: torch.dtype) -> None:
    operations = library.operations()
    dense = torch.zeros(6, 5, 4, 3, dtype=dtype)
    for tensor in (dense, dense.to(memory_format=torch.channels_last)):
        for index in (torch.int32, torch.int64):
            indices = torch.arange(9, dtype=index)
            operations.scatter_(tensor, indices, operations.gather(tensor, indices))


def accumulate_topk(dtype: torch.dtype) -> None:
    operations = library.operations()
    buffer = torch.zeros(9), torch.zeros(9, dtype=torch.int64), torch.zeros(STATE_SIZE).long()
    for settles_in_scan in (True, False):
        with mock.patch.object(triton_topk, "SETTLES_IN_SCAN", settles_in_scan):
            for n in (32, 33, triton_topk.ALONE + 1):
                acc = torch.zeros(n)
                for grad in (None, acc.to(dtype)):
                    operations.accumulate_topk_(acc, grad, 0.5, True, 0, 0, 3, *buffer)
    operations.compact_topk_(3, *buffer)


def sparse_adamw(dtype: torch.dtype) -> None:
    param = torch.zeros(6, 5, 4, 3, dtype=dtype)
    m, v, master = (torch.zeros(9) for _ in range(3))
    for index in (torch.int32, torch.int64):
        library.operations().sparse_adamw_(
            [param], [param], None, torch.arange(9, dtype=index), [0, 9], m, v,
            None if dtype == torch.float32 else master, torch.zeros(1), 0.1, None,
            0.9, 0.999, 1e-8, 0.1, False, None, None,
        )  # fmt: skip


def sampled_grad(dtype: torch.dtype) -> None:
    operations = library.operations()
    columns, rows, offsets, of_entry = (
        torch.tensor(vector, dtype=torch.int32) for vector in ([0, 2], [0, 1], [0, 1, 3], [0, 0, 1])
    )
    x, dy = torch.zeros(300, 3, dtype=dtype), torch.zeros(300, 3, dtype=dtype)
    for strided_x, strided_dy in ((x, dy), (x.t().contiguous().t(), dy.t().contiguous().t())):
        packed = operations.pack_columns(strided_x, columns, None)
        for product in (False, True):
            operations.sampled_grad(packed, strided_dy, rows, offsets, of_entry, product)
    if dtype != torch.float32:
        operations.pack_columns(x.float(), columns, dtype)
    tokens = torch.zeros(300, dtype=torch.int64)
    operations.sampled_embedding_grad(tokens, dy, rows, offsets, of_entry)


WORKLOADS: dict[str, Callable[[torch.dtype], None]] = {
    "accumulate_topk": accumulate_topk,
    "gather_scatter": gather_scatter,
    "sparse_adamw": sparse_adamw,
    "sampled_grad": sampled_grad,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def launches(workload: str) -> tuple[Launch, ...]:
    """Every specialisation of every kernel that the workload launches."""
    with recorded() as found:
        for dtype in DTYPES:
            WORKLOADS[workload](dtype)
    return tuple(dict.fromkeys(found))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_triton_kernels_compile_without_spills(workload, target):
    assert launches_on(target, workload)
    for launch in launches_on(target, workload):
        compiled = launch.compile(TARGETS[target])
        stack = amd_stack(compiled) if target.startswith("gfx") else nvidia_stack(compiled)
        assert list(stack) == [], (launch.name, target)


def launches_on(target: str, workload: str) -> list[Launch]:
    """Those that GPUs of this kind make: on AMD's a selection settles in a launch of its own."""
    settles_in_scan = not target.startswith("gfx")
    constants = {launch: dict(launch.constants) for launch in launches(workload)}
    return [
        launch
        for launch, constant in constants.items()
        if constant.get("SETTLE", settles_in_scan) == settles_in_scan
    ]


def test_selection_on_amd_never_writes_back_the_second_level_cache():
    """Its kernels leave it to the end of a launch that the next one can read what they wrote."""
    for launch in launches_on("gfx942", "accumulate_topk"):
        assert "buffer_wbl2" not in launch.compile(TARGETS["gfx942"]).asm["amdgcn"], launch.name


def amd_stack(compiled: Any) -> Iterator[str]:
    """What the code object says of scratch memory and spills to it, if that is not zero.

    Scalar registers spill to lanes of vector registers, without memory.
    """
    text = compiled.asm["amdgcn"]
    numbers = re.findall(r"\.(private_segment_fixed_size|vgpr_spill_count):\s+(\d+)", text)
    assert numbers
    return (f"{key} {value}" for key, value in numbers if int(value) > 0)


def nvidia_stack(compiled: Any) -> Iterator[str]:
    """What the machine code uses of stack and local memory, if that is not zero."""
    cubin = compiled.metadata_group[f"{compiled.metadata.name}.cubin"]
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.findall(r"(STACK|LOCAL):(\d+)", text)
    assert numbers
    return (f"{key} {value}" for key, value in numbers if int(value) > 0)


def test_every_triton_kernel_is_compiled_by_some_workload():
    folder = Path(library.__file__).parent
    pattern = r"@triton\.jit(?:\([^)]*\))?(?:  # fmt: skip)?\ndef (_\w+_kernel)\("
    written = {
        name for path in folder.glob("*.py") for name in re.findall(pattern, path.read_text())
    }
    compiled = {launch.name for workload in WORKLOADS for launch in launches(workload)}
    assert written - compiled == set()
