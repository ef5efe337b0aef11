"""Triton kernels: compile ahead of time for a given GPU generation and run in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cache import cache_dir
from .errors import CompileError
from .launch import LaunchOptions, address
from .module import Module

_DTYPES = {
    "float16": "fp16", "float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "bool": "i1",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64",
    "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
}  # fmt: skip

Grid = int | Sequence[int] | Callable[[dict[str, Any]], int | Sequence[int]]


def _signature_type(value: Any) -> Any:
    """Triton's name for the type of an argument; a tuple of names for a tuple."""
    if isinstance(value, tuple):
        return tuple(_signature_type(item) for item in value)
    if hasattr(value, "data_ptr") or isinstance(value, np.ndarray):
        return "*" + _DTYPES[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return "i32"
        return "i64" if value < 2**63 else "u64"
    if isinstance(value, float):
        return "fp32"
    if value is None:
        return "constexpr"
    raise TypeError(f"cannot pass {type(value).__name__} to a Triton kernel")


def _is_divisible(value: Any) -> bool:
    """Whether Triton's just-in-time compiler would assume divisibility by 16."""
    if isinstance(value, (bool, float, tuple)) or value is None:
        return False
    return (value if isinstance(value, int) else address(value)) % 16 == 0


def _flat(values: Sequence[Any]) -> list[Any]:
    """The values, those of tuples one by one, as a kernel takes them."""
    return [
        item for value in values for item in (_flat(value) if isinstance(value, tuple) else [value])
    ]


def specialise(
    fn: Any, values: Mapping[str, Any], enabled: bool = True
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What Triton's own launcher makes of the arguments of a launch.

    Args:
        fn: a @triton.jit function.
        values: parameter -> argument.
        enabled: False compiles nothing but constexpr and None in.

    Returns:
        (signature, constexprs, arguments that are multiples of 16).
    """
    constexprs: dict[str, Any] = {}
    signature: dict[str, Any] = {}
    divisible: list[str] = []
    for param in fn.params:
        value = values[param.name]
        is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        fold = is_one and enabled and not param.do_not_specialize
        if param.is_constexpr or value is None or fold:
            constexprs[param.name] = value
            continue
        signature[param.name] = param.annotation_type or _signature_type(value)
        aligns = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if enabled and aligns and _is_divisible(value):
            divisible.append(param.name)
    return signature, constexprs, divisible


@dataclass
class TritonKernel:
    """An ahead-of-time compiled Triton kernel."""

    name: str
    ptx: str
    module: Module
    num_warps: int
    shared: int
    scratch_bytes: int
    arguments: list[str]

    def launch(self, grid: int | Sequence[int], args: Sequence[Any], **options: Any) -> None:
        """Runs the kernel; `args` are the values of `self.arguments`."""
        function = self.module.kernel(self.name)
        blocks = int(np.prod(np.atleast_1d(grid)))
        args = _flat(args)
        hidden: list[Any] = [None] * (len(function.params) - len(args))
        if self.scratch_bytes and hidden:
            hidden[0] = np.zeros(self.scratch_bytes * blocks, np.uint8)
        block = 32 * self.num_warps
        self.module.launch(self.name, grid, block, [*args, *hidden], self.shared, **options)


def compile_triton(
    fn: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    sm: int = 80,
    divisible: Sequence[str] = (),
    **compile_options: Any,
) -> TritonKernel:
    """Compiles a @triton.jit function for `sm`.

    signature: argument -> Triton type such as "*fp32" or "i32"; divisible: names of arguments that
    are multiples of 16; compile_options: num_warps, num_stages ...
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = dict(constexprs or {})
    full = {n: "constexpr" if n in constexprs else signature[n] for n in fn.arg_names}
    attributes = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(fn=fn, signature=full, constexprs=constexprs, attrs=attributes)
    with triton.knobs.cache.scope():  # Triton's own cache goes by content too
        triton.knobs.cache.dir = str(cache_dir() / "triton")
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=compile_options)
    metadata = compiled.metadata
    if getattr(metadata, "num_ctas", 1) != 1:
        raise CompileError("ptxsim does not run block clusters")
    return TritonKernel(
        metadata.name,
        compiled.asm["ptx"],
        Module(compiled.asm["ptx"]),
        metadata.num_warps,
        metadata.shared,
        getattr(metadata, "global_scratch_size", 0) or 0,
        [n for n in fn.arg_names if full[n] != "constexpr"],
    )


class SimulatedTriton:
    """`SimulatedTriton(fn, sm=80)[grid](x, y, n, BLOCK=128, num_warps=4)`.

    Arguments are specialised as by Triton's own launcher (divisibility by 16, integers equal to
    1), unless `specialise` is false.  Keyword arguments that are no kernel parameters go to the
    compiler (num_warps, num_stages) or, if they are LaunchOptions fields, to the launch.
    """

    def __init__(self, fn: Any, sm: int = 80, specialise: bool = True) -> None:
        self.fn = fn
        self.sm = sm
        self.specialise = specialise
        self._kernels: dict[Any, TritonKernel] = {}
        self.last: TritonKernel | None = None

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """The launcher for a grid (an int, a tuple, or a function of the meta-parameters)."""
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Values of the kernel's parameters, launch options, compiler options."""
        names = self.fn.arg_names
        values = dict(zip(names, args, strict=False))
        launch: dict[str, Any] = {}
        compile_: dict[str, Any] = {}
        for key, value in kwargs.items():
            is_option = key in LaunchOptions.names()
            target = values if key in names else launch if is_option else compile_
            target[key] = value
        for param in self.fn.params:
            if param.name not in values and param.has_default:
                values[param.name] = param.default
        if missing := [n for n in names if n not in values]:
            raise TypeError(f"missing kernel arguments {missing}")
        return values, launch, compile_

    def _launch(self, grid: Grid, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values, launch_options, compile_options = self._bind(args, kwargs)
        signature, constexprs, divisible = specialise(self.fn, values, self.specialise)
        key = repr((constexprs, signature, divisible, compile_options))
        if key not in self._kernels:
            self._kernels[key] = compile_triton(
                self.fn, signature, constexprs, self.sm, divisible, **compile_options
            )
        kernel = self.last = self._kernels[key]
        shape = grid(values) if callable(grid) else grid
        kernel.launch(shape, [values[n] for n in kernel.arguments], **launch_options)
