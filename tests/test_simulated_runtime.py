"""The simulated CUDA runtime refuses the launches that a GPU refuses."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ptxsim.cuda_support import nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")

SOURCE = Path(__file__).parent / "simulated" / "cudart.cpp"

#: Of ``cudaError_t``.
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9
#: That of ``cudaFuncAttributeMaxDynamicSharedMemorySize``.
SHARED_BYTES = 8

STUB, OTHER_STUB = ctypes.create_string_buffer(1), ctypes.create_string_buffer(1)


class Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime by itself: in the library of the launchers its functions are hidden."""
    library = tmp_path_factory.mktemp("cudart") / "libcudart.so"
    options = ["-shared", "-Xcompiler=-fPIC", "-std=c++20", "-cudart=none"]
    subprocess.run([str(nvcc()), *options, str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def runtime(compiled: Path) -> ctypes.CDLL:
    """The runtime with two kernels, which do nothing."""
    library = ctypes.CDLL(str(compiled))
    kernel = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4, ctypes.c_uint)(lambda *_: 0)
    library.saft_simulated_launch_with(kernel)
    library.kernel = kernel  # must live as long as it may be called
    for stub in (STUB, OTHER_STUB):
        library.__cudaRegisterFunction(None, stub, None, b"kernel", 0, *[None] * 5)
        library.cudaFuncSetAttribute(stub, SHARED_BYTES, 0)
    return library


@pytest.fixture
def launch(runtime: ctypes.CDLL) -> Callable[..., int]:
    """Launches a kernel; what the runtime says."""

    def run(grid: tuple[int, ...], block: tuple[int, ...], shared: int = 0, stub=STUB) -> int:
        bytes_ = ctypes.c_size_t(shared)
        said = runtime.cudaLaunchKernel(stub, Dim3(*grid), Dim3(*block), None, bytes_, None)
        assert runtime.cudaGetLastError() == said
        assert runtime.cudaGetLastError() == SUCCESS
        return said

    return run


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((2**31 - 1, 65535, 65535), (1024, 1, 1)),
        ((7, 1, 1), (4, 4, 64)),
        ((7, 1, 1), (1, 1024, 1)),
    ],
)
def test_what_a_gpu_can_launch_is_launched(launch, grid, block):
    assert launch(grid, block) == SUCCESS


@pytest.mark.parametrize("axis", range(3))
def test_nothing_can_be_launched_of_no_threads_or_blocks(launch, axis):
    none = [1, 1, 1]
    none[axis] = 0
    assert launch(none, (32, 1, 1)) == INVALID_CONFIGURATION
    assert launch((1, 1, 1), none) == INVALID_CONFIGURATION


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536)])
def test_a_grid_has_its_limits(launch, grid):
    assert launch(grid, (32, 1, 1)) == INVALID_CONFIGURATION


@pytest.mark.parametrize("block", [(1025, 1, 1), (32, 33, 1), (1, 1, 65), (2**31, 2, 1)])
def test_a_block_has_its_limits(launch, block):
    assert launch((1, 1, 1), block) == INVALID_CONFIGURATION


def test_much_shared_memory_must_be_asked_for(launch, runtime):
    one = (1, 1, 1)
    assert launch(one, one, 48 * 1024) == SUCCESS
    assert launch(one, one, 48 * 1024 + 1) == INVALID_VALUE
    assert runtime.cudaFuncSetAttribute(STUB, SHARED_BYTES, 64 * 1024) == SUCCESS
    assert launch(one, one, 64 * 1024) == SUCCESS
    assert launch(one, one, 64 * 1024 + 1) == INVALID_VALUE
    assert launch(one, one, 64 * 1024, OTHER_STUB) == INVALID_VALUE
    assert runtime.cudaFuncSetAttribute(STUB, SHARED_BYTES, 99 * 1024 + 1) == INVALID_VALUE
    assert runtime.cudaGetLastError() == INVALID_VALUE
