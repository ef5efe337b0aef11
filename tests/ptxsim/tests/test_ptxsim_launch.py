"""Packed parameters, parameters by value, module variables, and how kernels end early."""

import ctypes
import struct
from pathlib import Path

import numpy as np
import pytest

import ptxsim
from ptxsim.cuda_support import nvcc

SOURCE = Path(__file__).with_name("launch.cu")
pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="module", params=[80, 90])
def module(request):
    return ptxsim.load_cuda(SOURCE, sm=request.param)


def ints(n=64):
    return np.zeros(n, np.int32)


class Tensors(ctypes.Structure):
    _fields_ = [
        ("pointer", ctypes.c_void_p * 300),
        ("length", ctypes.c_int * 300),
        ("scale", ctypes.c_float),
    ]


@pytest.fixture
def tensors(rng):
    arrays = [rng.standard_normal(1 + i % 8).astype(np.float32) for i in range(300)]
    packed = Tensors(scale=2.0)
    for i, x in enumerate(arrays):
        packed.pointer[i], packed.length[i] = x.ctypes.data, len(x)
    return arrays, packed


# ---------------------------------------------------------------- packed parameters
def test_parameter_layout(module):
    layout = [(p.offset, p.size) for p in module.parameters("mixed")]
    assert layout == [(0, 1), (8, 8), (16, 2), (24, 8), (32, 8)]
    assert [(p.offset, p.size) for p in module.parameters("by_value")] == [(0, 3608), (3608, 8)]


def test_launch_raw(module):
    o = np.zeros(4, np.float32)
    params = bytearray(module.kernel("mixed").param_bytes)
    values = (-3, 0.25, -7, o.ctypes.data, 1 << 33)
    for code, value, param in zip("bdhQq", values, module.parameters("mixed"), strict=True):
        struct.pack_into(code, params, param.offset, value)
    module.launch_raw("mixed", 1, (1, 1, 1), bytes(params), ranges=[(o.ctypes.data, o.nbytes)])
    assert o.tolist() == [-3, 0.25, -7, 2.0**33]
    with pytest.raises(ptxsim.KernelError, match="global memory access out of bounds"):
        module.launch_raw("mixed", 1, 1, bytes(params), ranges=[(o.ctypes.data, 12)])
    with pytest.raises(ptxsim.KernelError, match="global memory access out of bounds"):
        module.launch_raw("mixed", 1, 1, bytes(params))
    with pytest.raises(TypeError, match="takes 40 bytes, got 39"):
        module.launch_raw("mixed", 1, 1, bytes(params[:39]))


def test_launch_raw_takes_options_and_shared_memory(module):
    o = ints()
    params = struct.pack("Q", o.ctypes.data)
    ranges = [(o.ctypes.data, o.nbytes)]
    module.launch_raw("takes_shared", 1, 64, params, 256, ranges, order="rev", races=False)
    assert o.all()
    with pytest.raises(ptxsim.KernelError, match="shared memory access out of bounds"):
        module.launch_raw("takes_shared", 1, 64, params, 252, ranges)
    with pytest.raises(ptxsim.KernelError, match="race between blocks"):
        module.launch_raw("takes_shared", 2, 64, params, 256, ranges, races=True)


# ---------------------------------------------------------------- parameters by value
@pytest.mark.parametrize("order", ["fwd", "rev", "random"])
def test_struct_indexed_by_the_kernel(module, tensors, order):
    arrays, packed = tensors
    o = np.zeros((300, 8), np.float32)
    module.launch("by_value", 300, 32, [packed, o], extra=arrays, order=order)
    for x, row in zip(arrays, o, strict=True):
        assert row[: len(x)].tolist() == (2 * x).tolist()


def test_parameter_through_a_generic_address(module, tensors):
    arrays, packed = tensors
    other = np.frombuffer(bytes(packed), np.uint8).copy()
    other[3600:3604] = np.float32(3).reshape(1).view(np.uint8)
    o = np.zeros(64, np.float32)
    module.launch("either", 1, 64, [packed, other, o], extra=arrays)
    assert o.tolist() == [x[0] * np.float32(2 + i % 2) for i, x in enumerate(arrays[:64])]


def test_large_parameters(module):
    o = ints()
    x = np.arange(8188, dtype=np.int32)
    block = struct.pack("Q", o.ctypes.data) + x.tobytes()
    module.launch("large", 1, 64, [block, 129], extra=[o])
    assert o.tolist() == list(range(0, 64 * 129, 129))
    with pytest.raises(ptxsim.KernelError, match="parameter access out of bounds"):
        module.launch("large", 1, 64, [block, 131], extra=[o])


# ---------------------------------------------------------------- early ends
def test_assert(module):
    o = ints()
    module.launch("checked", 1, 64, [o, 64])
    assert o.all()
    line = 1 + SOURCE.read_text().split("assert(int")[0].count("\n")
    message = rf"assertion failed: .*< limit && \"an index in range\" at .*launch\.cu:{line} in "
    with pytest.raises(ptxsim.KernelError, match=message + r".*checked.*thread \(40,0,0\)"):
        module.launch("checked", 1, 64, [o, 40])


def test_trap(module):
    with pytest.raises(ptxsim.KernelError, match=r"traps: trap, block \(0,0,0\) thread \(3,0,0\)"):
        module.launch("traps", 1, 64, [ints()])


@pytest.mark.parametrize("order", ["fwd", "rev"])
def test_exit_inside_a_function(module, order):
    o = ints()
    module.launch("exits", 1, 64, [o], order=order)
    assert o.tolist() == [1, 2, 3, 0, *range(5, 65)]


def test_printf_is_silent(module, capfd):
    o = ints()
    module.launch("prints", 1, 64, [o])
    assert o.all()
    assert capfd.readouterr().out == ""


def test_nanosleep_lets_others_run(module):
    module.launch("sleeps", 1, 2, [ints(1)], timeout=5)


@pytest.mark.parametrize("name", ["sleeps_for_ever", "loops_for_ever"])
def test_endless_loops_are_reported(module, name):
    args = [ints()] * len(module.parameters(name))
    with pytest.raises(ptxsim.KernelError, match="timeout"):
        module.launch(name, 1, 2, args, timeout=0.2)


# ---------------------------------------------------------------- limits, as on a GPU
def test_launch_limits(module):
    o = ints(1024)
    module.launch("at_most_64", 1, 64, [o])
    bad = r"invalid launch configuration"
    with pytest.raises(ptxsim.KernelError, match=rf"{bad}: 65 threads .* at most 64"):
        module.launch("at_most_64", 1, 65, [o])
    for grid, block in [(0, 64), (1, 0), (1, 1025), ((1, 65536), 64), (1, (1, 1, 65))]:
        with pytest.raises(ptxsim.KernelError, match=bad):
            module.launch("takes_shared", grid, block, [o], 4096)
    with pytest.raises(ptxsim.KernelError, match=rf"{bad}: 262144 bytes of shared memory"):
        module.launch("takes_shared", 1, 64, [o], 1 << 18)


# ---------------------------------------------------------------- variables and functions
def test_shared_memory_inside_a_function(module):
    o = ints()
    module.launch("shares", 1, 64, [o], order="random")
    assert o.tolist() == [(i + 2) % 64 for i in range(64)]


def test_structs_and_local_arrays(module):
    o = np.arange(64, dtype=np.float32)
    module.launch("rows", 1, 64, [o], order="rev")
    assert o.tolist() == [i * sum(k * 7 & 15 for k in range(i & 15, 16)) for i in range(64)]


def test_module_variables(module):
    fresh = ptxsim.Module(ptxsim.compile_ptx(SOURCE, module.sm))
    o = ints(1)
    for want in (6, 7):  # kept from launch to launch, but not shared with another module
        fresh.launch("counts", 1, 1, [o, 1])
        assert o[0] == want
    fresh.launch("counts", 1, 1, [o, 0])
    assert o[0] == 7
    address, size = fresh.variable("counter")
    assert ctypes.string_at(address, size) == struct.pack("i", 8)
    ctypes.memmove(address, struct.pack("i", 100), 4)
    fresh.launch("counts", 1, 1, [o, 1])
    assert o[0] == 101


def test_past_the_end_of_a_variable(module):
    module.launch("past_variable", 1, 1, [ints(), 0])
    with pytest.raises(ptxsim.KernelError, match="out of bounds"):
        module.launch("past_variable", 1, 1, [ints(), 1])
