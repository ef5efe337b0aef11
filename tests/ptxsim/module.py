"""Modules: kernels by name, compiled when they are first launched."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .cache import kernel_library
from .codegen import mangle
from .errors import KernelError, UnsupportedError
from .launch import array_range, dim3, encode, is_array, options_with, run, runtime
from .parser import Function, Param, parse
from .translate import Translation

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)
_SHARED_LIMITS = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB
_MAX_PARAM_BYTES = 32764


class Module:
    """A PTX module, run by translation to native code.

    Kernels with unsupported instructions do not keep the others from running: they raise
    UnsupportedError when asked for, or at load when named in `require`.  `unsupported` lists them.
    Variables of the module keep their values from launch to launch.
    """

    def __init__(self, ptx: str, require: Iterable[str] = ()) -> None:
        program = parse(ptx)
        self.sm = program.sm
        self._translation = Translation(program)
        self._kernels = {f.name: f for f in program.kernels}
        self._entry_points: dict[str, int] = {}
        variables = self._translation.variables
        self._memory = (ctypes.c_uint8 * (variables.size + 256))()
        self._base = (ctypes.addressof(self._memory) + 255) & ~255
        ctypes.memmove(self._base, variables.image(self._base), variables.size)
        for name in require:
            self._translation.kernel(self.kernel(name))

    # ------------------------------------------------------------ what there is
    @property
    def kernels(self) -> list[str]:
        """Names of all kernels, supported or not."""
        return list(self._kernels)

    @functools.cached_property
    def unsupported(self) -> dict[str, str]:
        """Kernels that cannot be translated, and why."""
        reasons: dict[str, str] = {}
        for name, function in self._kernels.items():
            try:
                self._translation.kernel(function)
            except UnsupportedError as error:
                reasons[name] = str(error)
        return reasons

    def kernel(self, name: str) -> Function:
        """The kernel of that name; a plain name also finds its C++-mangled form."""
        if name not in self._kernels:
            pattern = re.compile(rf"^_Z.*(?<!\d){len(name)}{re.escape(name)}")
            found = [k for k in self._kernels if pattern.match(k)]
            if len(found) != 1:
                raise KeyError(f"kernel {name}: {len(found)} matches in {self.kernels}")
            name = found[0]
        return self._kernels[name]

    def parameters(self, name: str) -> list[Param]:
        """The parameters of a kernel: name, type, offset and size in the parameter block."""
        return list(self.kernel(name).params)

    def variable(self, name: str) -> tuple[int, int]:
        """Address and size in bytes of a __device__ or __constant__ variable."""
        variables = self._translation.variables
        return self._base + variables.offsets[name], variables.by_name[name].size

    # ------------------------------------------------------------ launches
    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
        **options: Any,
    ) -> None:
        """Runs a kernel on CPU arrays, in place.

        args: torch tensors, numpy arrays, ints, floats, None, or bytes / ctypes structures for
        parameters passed by value.  shared: bytes of dynamic shared memory.  options: fields of
        :class:`LaunchOptions`.
        """
        kernel = self.kernel(name)
        if len(args) != len(kernel.params):
            expected = [f"{p.type} {p.name}" for p in kernel.params]
            raise TypeError(f"{name} takes {len(expected)} arguments {expected}, got {len(args)}")
        params = bytearray(kernel.param_bytes)
        for value, param in zip(args, kernel.params, strict=True):
            params[param.offset : param.offset + param.size] = encode(value, param)
        ranges = [array_range(a) for a in args if is_array(a)]
        self.launch_raw(kernel.name, grid, block, bytes(params), shared, ranges, **options)

    def launch_raw(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        params: bytes,
        shared_bytes: int = 0,
        ranges: Sequence[tuple[int, int]] = (),
        **options: Any,
    ) -> None:
        """Runs a kernel as cudaLaunchKernel does.

        params: the parameter block, laid out as `parameters(name)` says.  ranges: address and size
        in bytes of the memory that the kernel may access, each as one array.
        """
        opt = options_with(options)
        kernel = self.kernel(name)
        if len(params) != kernel.param_bytes:
            raise TypeError(f"{name} takes {kernel.param_bytes} bytes, got {len(params)}")
        translated = self._translation.kernel(kernel)
        grid, block = dim3(grid, _GRID_LIMITS), dim3(block, _BLOCK_LIMITS)
        self._check_limits(kernel, block, translated.static_shared + shared_bytes)
        try:
            run(
                self._entry_point(kernel),
                grid,
                block,
                params,
                self._base,
                (translated.static_shared, shared_bytes),
                translated.stack_bytes,
                [*ranges, *map(array_range, opt.extra), *self._variable_ranges],
                opt,
            )
        except KernelError as error:
            raise KernelError(f"{kernel.name}: {error}") from None

    def _check_limits(self, kernel: Function, block: tuple[int, int, int], shared: int) -> None:
        """Refuses what a GPU refuses to launch."""
        threads = block[0] * block[1] * block[2]
        limit = kernel.count("maxntid") or 1024
        exact = kernel.count("reqntid") or threads
        if threads > limit or threads != exact:
            raise KernelError(
                f"{kernel.name}: invalid launch configuration: {threads} threads per block, "
                f"compiled for {exact if threads != exact else f'at most {limit}'}"
            )
        if shared > 1024 * _SHARED_LIMITS.get(self.sm, 227):
            raise KernelError(
                f"{kernel.name}: invalid launch configuration: {shared} bytes of shared memory"
            )
        if kernel.param_bytes > _MAX_PARAM_BYTES:
            raise KernelError(f"{kernel.name}: {kernel.param_bytes} bytes of parameters")

    def _entry_point(self, kernel: Function) -> int:
        """Address of the compiled kernel."""
        if kernel.name not in self._entry_points:
            runtime()  # the library needs it
            library = ctypes.CDLL(str(kernel_library(self._translation.unit(kernel))))
            function = getattr(library, f"kernel_{mangle(kernel.name)}")
            self._entry_points[kernel.name] = ctypes.cast(function, ctypes.c_void_p).value
        return self._entry_points[kernel.name]

    @functools.cached_property
    def _variable_ranges(self) -> list[tuple[int, int]]:
        return [self.variable(name) for name in self._translation.variables.offsets]
