"""Launches: options, argument packing, and the call of the runtime."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .cache import runtime_library
from .errors import KernelError
from .parser import Param

_ORDERS = {"fwd": 0, "rev": 1, "random": 2}


@dataclass
class LaunchOptions:
    """How to run a launch; `ptxsim.defaults` holds the values used when none are given.

    order: resume order of threads and blocks: "fwd", "rev" or "random" (with `seed`).
    threads: OS threads that run blocks side by side.
    bounds: global accesses must hit a passed array (or `extra`, or a module variable).
    races: report unordered conflicting accesses of two blocks to a byte of global memory, and
        ld.global.nc of a byte that the kernel has written.
    shared_races: report unordered conflicting accesses of two threads of a block to a byte of
        shared memory.
    block_races: the same for global memory; blocks run on one OS thread then.
    allow_exited: barriers do not wait for threads that have exited.
    timeout: seconds after which a thread that still loops is reported.
    extra: further arrays that the kernel may access.
    """

    order: str = "fwd"
    seed: int = 1
    threads: int = 1
    bounds: bool = True
    races: bool = False
    shared_races: bool = False
    block_races: bool = False
    allow_exited: bool = False
    timeout: float = 60.0
    extra: Sequence[Any] = field(default_factory=tuple)

    @staticmethod
    def names() -> set[str]:
        """Names of all options."""
        return {f.name for f in fields(LaunchOptions)}


defaults = LaunchOptions()


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]


class _Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class _Options(ctypes.Structure):
    _fields_ = [
        ("order", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
        ("bounds", ctypes.c_uint32),
        ("races", ctypes.c_uint32),
        ("shared_races", ctypes.c_uint32),
        ("block_races", ctypes.c_uint32),
        ("allow_exited", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("params_size", ctypes.c_uint64),
        ("globals", ctypes.c_void_p),
        ("grid", _Dim3),
        ("block", _Dim3),
        ("static_shared", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint64),
        ("n_ranges", ctypes.c_uint64),
        ("ranges", ctypes.POINTER(_Range)),
        ("options", _Options),
    ]


@functools.cache
def runtime() -> ctypes.CDLL:
    """The loaded runtime."""
    library = ctypes.CDLL(str(runtime_library()))
    library.ptxsim_error.restype = ctypes.c_char_p
    return library


# ---------------------------------------------------------------- arguments
def is_array(value: Any) -> bool:
    """Whether `value` is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def address(array: Any) -> int:
    """Address of the first element."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def array_range(array: Any) -> tuple[int, int]:
    """Address and size in bytes of the memory that an array spans."""
    if isinstance(array, np.ndarray):
        itemsize, strides = array.itemsize, array.strides
    elif array.device.type == "cpu":
        itemsize = array.element_size()
        strides = tuple(s * itemsize for s in array.stride())
    else:
        raise ValueError("ptxsim takes CPU tensors")
    if 0 in array.shape:
        return address(array), 0
    steps = [(n - 1) * s for n, s in zip(array.shape, strides, strict=True)]
    low = sum(s for s in steps if s < 0)
    high = sum(s for s in steps if s > 0)
    return address(array) + low, high - low + itemsize


def encode(value: Any, param: Param) -> bytes:
    """Bytes of one kernel argument."""
    if value is None:
        value = 0
    if is_array(value):
        if param.size != 8 or param.is_array:
            raise TypeError(f"parameter {param.name} is not a pointer")
        value = address(value)
    if isinstance(value, (bytes, bytearray, ctypes.Structure)):
        data = bytes(value)
        if len(data) != param.size:
            raise TypeError(f"parameter {param.name} takes {param.size} bytes, got {len(data)}")
        return data
    if isinstance(value, np.floating) and value.nbytes == param.size:
        return value.tobytes()
    if isinstance(value, (float, np.floating)) or param.type in ("f32", "f64"):
        if param.type[0] in "us":
            raise TypeError(f"parameter {param.name} is an integer, got {value!r}")
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[param.size]
        return dtype(value).tobytes()
    value = int(value)
    bits = 8 * param.size
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise OverflowError(f"{value} does not fit parameter {param.name} ({param.size} bytes)")
    return (value & ((1 << bits) - 1)).to_bytes(param.size, "little")


def dim3(value: int | Sequence[int], limits: tuple[int, int, int]) -> tuple[int, int, int]:
    """Grid or block size with all three dimensions, checked against the limits of GPUs."""
    parts = [value] if isinstance(value, int) else list(value)
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"a grid or block has one to three dimensions, got {parts}")
    x, y, z = (*map(int, parts), 1, 1)[:3]
    for size, limit in zip((x, y, z), limits, strict=True):
        if not 1 <= size <= limit:
            raise KernelError(f"invalid launch configuration: {(x, y, z)} exceeds {limits}")
    return x, y, z


# ---------------------------------------------------------------- call
def options_with(overrides: dict[str, Any]) -> LaunchOptions:
    """The default options, with some replaced."""
    if unknown := set(overrides) - LaunchOptions.names():
        raise TypeError(f"unknown launch options {sorted(unknown)}")
    options = replace(defaults, **overrides)
    if options.order not in _ORDERS:
        raise ValueError(f"order is one of {list(_ORDERS)}, got {options.order!r}")
    if options.block_races and options.threads > 1:
        raise ValueError("block_races works with threads=1 only")
    return options


def run(
    kernel: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    params: bytes,
    module_memory: int,
    shared: tuple[int, int],
    stack_bytes: int,
    ranges: Sequence[tuple[int, int]],
    options: LaunchOptions,
) -> None:
    """Runs the kernel at address `kernel`; `shared`: bytes of static and of dynamic memory."""
    packed = (ctypes.c_uint64 * (len(params) // 8 + 4))()  # read in words, perhaps past the end
    ctypes.memmove(packed, params, len(params))
    native = _Launch(
        kernel,
        ctypes.addressof(packed),
        len(params),
        module_memory,
        _Dim3(*grid),
        _Dim3(*block),
        *shared,
        stack_bytes,
        len(ranges),
        (_Range * len(ranges))(*ranges),
        _Options(
            _ORDERS[options.order],
            options.threads,
            options.seed,
            options.timeout,
            options.bounds,
            options.races,
            options.shared_races,
            options.block_races,
            options.allow_exited,
        ),
    )
    if runtime().ptxsim_launch(ctypes.byref(native)):
        raise KernelError(runtime().ptxsim_error().decode(errors="replace"))
