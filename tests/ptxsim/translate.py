"""A parsed module -> C++ sources, each with a few kernels, and the memory of its variables."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from . import isa_arith, isa_control, isa_convert, isa_memory
from .codegen import FunctionEmitter, Symbols, immediate, mangle
from .errors import UnsupportedError
from .parser import TYPE_SIZE, Function, Program, Variable

_EMITTERS = (isa_arith, isa_control, isa_convert, isa_memory)  # imported to register themselves

# Kernels are compiled together until their PTX is this long: long enough that starting the compiler
# does not dominate, short enough that a test compiles little beyond the kernel it asks for.
_UNIT_CHARACTERS = 12_000
_GAP = 64  # bytes between module variables, so that running past the end of one is noticed


def align_up(value: int, align: int) -> int:
    """Rounds `value` up to a multiple of `align`."""
    return (value + align - 1) // align * align


class Variables:
    """The .global and .const variables of a module: one piece of memory."""

    def __init__(self, variables: list[Variable]) -> None:
        self.by_name = {v.name: v for v in variables if v.space != "shared"}
        self.offsets: dict[str, int] = {}
        self.size = 0
        for variable in self.by_name.values():
            self.offsets[variable.name] = align_up(self.size, max(variable.align, 16))
            self.size = self.offsets[variable.name] + variable.size + _GAP

    def image(self, address: int) -> bytes:
        """Initial content of the memory when it lies at `address`."""
        data = bytearray(self.size)
        for name, variable in self.by_name.items():
            width = TYPE_SIZE[variable.type]
            for i, text in enumerate(variable.init):
                value = self._value(text, variable.type, address)
                place = self.offsets[name] + i * width
                data[place : place + width] = value.to_bytes(width, "little")
        return bytes(data)

    def _value(self, text: str, type_: str, address: int) -> int:
        match = re.fullmatch(r"(?:generic\(([\w$]+)\)|([\w$]+))(?:\+(\d+))?", text)
        name = match and (match.group(1) or match.group(2))
        if name in self.offsets:
            return address + self.offsets[name] + int(match.group(3) or 0)
        return int(immediate(text, type_).rstrip("ul"), 0)


@dataclass(frozen=True)
class Kernel:
    """A translated kernel."""

    source: str
    static_shared: int
    stack_bytes: int


class Translation:
    """C++ for the kernels of a program, made when asked for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.variables = Variables(program.variables)
        self._functions = {f.name: f for f in program.functions}
        self._symbols = Symbols(
            self.variables.offsets,
            {v.name: v for v in program.variables if v.space == "shared"},
            self._functions,
        )
        self._kernels: dict[str, Kernel | UnsupportedError] = {}

    def kernel(self, function: Function) -> Kernel:
        """The translated kernel, or an UnsupportedError."""
        found = self._kernels.get(function.name)
        if found is None:
            try:
                found = self._translate(function)
            except UnsupportedError as error:
                found = error
            self._kernels[function.name] = found
        if isinstance(found, UnsupportedError):
            raise UnsupportedError(f"{function.name}: unsupported: {found}")
        return found

    def _translate(self, kernel: Function) -> Kernel:
        """The kernel and what it calls, in a namespace of its own.

        Functions are translated once per kernel, because the place of shared variables depends on
        the kernel.
        """
        if (kernel.count("reqnctapercluster") or 1) > 1:
            raise UnsupportedError("clusters")
        emitters: dict[str, FunctionEmitter] = {}
        bodies: list[str] = []
        todo = [kernel]
        while todo:
            function = todo.pop()
            if function.name in emitters:
                continue
            emitter = emitters[function.name] = FunctionEmitter(self._symbols, function)
            try:
                bodies.append(emitter.emit())
            except UnsupportedError as error:
                where = "" if function is kernel else f"  [in {function.name}]"
                raise UnsupportedError(f"{error}{where}") from None
            todo += [self._functions[name] for name in emitter.calls]
        shared = {n: v for e in emitters.values() for n, v in e.shared_used.items()}
        constants, static_shared = _shared_layout(list(shared.values()))
        prototypes = [f"{e.signature()};" for e in emitters.values()]
        source = "\n".join(
            [f"namespace in_{mangle(kernel.name)} {{", *constants, *prototypes, *bodies, "}"]
        )
        return Kernel(source, static_shared, sum(e.stack_bytes for e in emitters.values()))

    @functools.cached_property
    def _units(self) -> dict[str, list[Function]]:
        """Kernel -> the kernels it is compiled with."""
        units: dict[str, list[Function]] = {}
        size = _UNIT_CHARACTERS
        unit: list[Function] = []
        for kernel in self.program.kernels:
            if size + len(kernel.text) > _UNIT_CHARACTERS:
                unit, size = [], 0
            unit.append(kernel)
            size += len(kernel.text)
            units[kernel.name] = unit
        return units

    def unit(self, kernel: Function) -> str:
        """C++ source with the kernel and its neighbours."""
        parts = ['#include "kernel.h"', "using namespace ptx;"]
        for neighbour in self._units[kernel.name]:
            try:
                parts.append(self.kernel(neighbour).source)
            except UnsupportedError:
                continue
        return "\n".join(parts)


def _shared_layout(variables: list[Variable]) -> tuple[list[str], int]:
    """Constants with the offset of each shared variable; size of the static part."""
    offset = 0
    lines: list[str] = []
    for variable in variables:
        if variable.count is not None:
            offset = align_up(offset, variable.align)
            lines.append(f"constexpr uint32_t shared_{mangle(variable.name)} = {offset};")
            offset += variable.size
    dynamic = [v for v in variables if v.count is None]
    if dynamic:
        offset = align_up(offset, 128)
    lines += [f"constexpr uint32_t shared_{mangle(v.name)} = {offset};" for v in dynamic]
    return lines, offset
