"""Recording Triton's launches instead of running them, to compile each for other GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ptxsim.triton_support import specialise
from saft_kernels.triton import launch
from simulated.triton import SimulatedTriton


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        signature: (argument, Triton type) of what is passed when it runs.
        constants: (argument, value) of what is compiled in.
        divisible: arguments that are multiples of 16.
        options: (name, value) for the compiler.
    """

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.fn.__name__)

    def compile(self, target: Any) -> Any:
        """Triton's result for a ``GPUTarget``."""
        import triton
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        constants = dict(self.constants)
        signature = dict.fromkeys(constants, "constexpr") | dict(self.signature)
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs=constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible},
        )
        return triton.compile(source, target=target, options=dict(self.options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches of operations on CPU tensors; nothing runs, results are undefined."""
    found: list[Launch] = []

    def record(kernel: Any, blocks: int, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        found.append(Launch(kernel, *specialised(kernel, arguments, options)))

    with SimulatedTriton(sm=80).active(), mock.patch.object(launch, "run", record):
        yield found


def specialised(
    kernel: Any, arguments: Sequence[Any], options: dict[str, Any]
) -> tuple[tuple[Any, ...], ...]:
    """Signature, constants, divisible arguments and compiler options of a launch."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False))
    values |= {name: value for name, value in options.items() if name in names}
    signature, constants, divisible = specialise(kernel, values)
    compiler = ((name, value) for name, value in options.items() if name not in names)
    return tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(compiler)
