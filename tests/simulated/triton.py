"""The Triton backend on a simulated GPU."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kernel_coverage
import ptxsim
import simulated
from saft_kernels.triton import launch, library

#: The GPU that operations on CPU tensors run on now.
_active: SimulatedTriton | None = None


def kernels(folder: Path = Path(library.__file__).parent) -> set[str]:
    """Every ``triton.jit`` function that no other one uses, by its file and name."""
    functions = {
        f"{path.stem}.{node.name}": node
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)
    }
    used = {
        node.id
        for function in functions.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Name)
    }
    return {f"triton: {name}" for name, node in functions.items() if node.name not in used}


def _label(function: Any) -> str:
    return f"triton: {function.__module__.rpartition('.')[2]}.{function.__name__}"


@functools.cache
def _registered() -> torch.library.Library:
    """The operations, on CPU tensors."""
    made = library.library()
    for name, implementation in library.IMPLEMENTATIONS.items():
        made.impl(name, functools.partial(_run_on_active, implementation), "CPU")
    return made


def _run_on_active(implementation: Any, *arguments: Any) -> Any:
    assert _active is not None
    return _active.call(implementation, arguments)


@functools.cache
def _simulated(kernel: Any, sm: int) -> ptxsim.SimulatedTriton:
    return ptxsim.SimulatedTriton(kernel, sm=sm)


class SimulatedTriton:
    """Runs the operations of ``saft_kernels/triton`` on the PTX of GPU generation ``sm``.

    Args:
        sm: 80 or 90.
        order: in which threads and blocks run: ``fwd``, ``rev`` or ``random``.
        seed: of ``random``.

    Attributes:
        launches: names of the kernels that ran, in order.
    """

    def __init__(self, sm: int, order: str = "fwd", seed: int = 1) -> None:
        _registered()
        self.sm = sm
        self.options = {"order": order, "seed": seed, **simulated.CHECKS}
        self.launches: list[str] = []
        self._memory: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        """The operation of that name, as ``torch.ops.saft_kernels`` has it."""
        return getattr(library.operations(), name)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run operations on CPU tensors here."""
        global _active
        before, _active = _active, self
        with (
            mock.patch.object(launch, "run", self._run),
            mock.patch.object(launch, "new_empty", self._new_empty),
        ):
            yield
        _active = before

    def call(self, implementation: Any, arguments: Sequence[Any]) -> Any:
        """Call an operation, whose tensors are what its kernels may touch."""
        self._memory = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        return implementation(*arguments)

    def _run(
        self, kernel: Any, blocks: int, arguments: Sequence[Any], options: dict[str, Any]
    ) -> None:
        memory = [a for a in self._memory if a.numel()]
        options = {**options, **self.options, "extra": memory}
        try:
            _simulated(kernel, self.sm)[(blocks,)](*arguments, **options)
        except ptxsim.UnsupportedError as error:
            # tl.dot in bf16 and fp16 becomes wgmma from sm_90 on, which the simulator does not
            # have. It says so before anything runs; such a kernel runs as compiled for sm_80.
            if "wgmma" not in str(error):
                raise
            _simulated(kernel, 80)[(blocks,)](*arguments, **options)
        self.launches.append(kernel.fn.__name__)
        kernel_coverage.launched.add(_label(kernel.fn))

    def _new_empty(
        self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Poisoned memory: NaN in every floating type, -1 in every integer."""
        tensor = like.new_empty(shape, dtype=dtype)
        tensor.view(-1).view(torch.uint8).fill_(0xFF)
        self._memory.append(tensor)
        return tensor
