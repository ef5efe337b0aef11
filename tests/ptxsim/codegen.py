"""A PTX function -> C++.

Every PTX function becomes one C++ function.  Registers are local variables that hold raw bits
(`bool` for predicates); an instruction becomes one C++ block.  What a single instruction means is
written in the ``isa_*`` modules, which register emitters with :func:`emitter`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedError
from .parser import (
    IDENT,
    TYPE_SIZE,
    BranchTargets,
    Directive,
    Function,
    Instruction,
    Label,
    Scope,
    Variable,
)

UINT = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
CPP_TYPE = {
    "u8": "uint8_t", "s8": "int8_t", "b8": "uint8_t",
    "u16": "uint16_t", "s16": "int16_t", "b16": "uint16_t",
    "u32": "uint32_t", "s32": "int32_t", "b32": "uint32_t",
    "u64": "uint64_t", "s64": "int64_t", "b64": "uint64_t",
    "f32": "float", "f64": "double",
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64")

# Modifiers that may appear; anything else makes the kernel unsupported instead of wrong.
KNOWN_MODIFIERS = {
    *TYPE_SIZE, "pred",
    # rounding, saturation, width
    "rn", "rna", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "noftz", "sat", "satfinite",
    "relu", "NaN", "approx", "full", "lo", "hi", "wide", "cc", "wrap", "clamp", "shiftamt", "range",
    # comparisons, classes, operations
    "eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
    "ls", "hs", "finite", "infinite", "notanumber", "number", "normal", "subnormal",
    "and", "or", "xor", "add", "min", "max", "exch", "cas", "inc", "dec", "popc",
    # warps and barriers
    "sync", "aligned", "uni", "warp", "red", "arrive", "all", "any", "ballot",
    "up", "down", "bfly", "idx", "l", "r",
    # memory
    "global", "shared", "local", "param", "const", "to", "v2", "v4", "v8", "nc",
    "volatile", "relaxed", "acquire", "release", "acq_rel", "weak", "sc", "mmio",
    "gpu", "sys", "cta", "cl", "gl", "proxy", "alias",
    "ca", "cg", "cs", "cv", "lu", "wb", "wt", "L1", "L2", "fractional",
    "evict_last", "evict_normal", "evict_first",
    "async", "commit_group", "wait_group", "wait_all", "launch_dependents", "wait",
    # matrices
    "row", "col", "m8n8", "x1", "x2", "x4", "trans",
    "m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32",
}  # fmt: skip

Emit = Callable[["FunctionEmitter", Instruction], str]
_EMITTERS: dict[str, Emit] = {}


def emitter(*ops: str) -> Callable[[Emit], Emit]:
    """Registers a function as the emitter of the given opcodes."""

    def register(function: Emit) -> Emit:
        for op in ops:
            _EMITTERS[op] = function
        return function

    return register


def mangle(name: str) -> str:
    """A C++ identifier for a PTX name."""
    return "r_" + name.replace("%", "").replace("$", "_D")


def immediate(text: str, type_: str) -> str:
    """Raw bits of a literal, as wide as `type_`."""
    text = text.strip()
    negative = text.startswith("-")
    digits = text.lstrip("-+")
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", digits):
        value = int(digits[2:], 16) ^ (0x80000000 if negative else 0)
        return f"0x{value:x}u"
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", digits):
        value = int(digits[2:], 16) ^ (1 << 63 if negative else 0)
        return f"0x{value:x}ull"
    if re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?", digits):
        digits = digits.rstrip("uU")
        octal = re.fullmatch(r"0[0-7]+", digits)
        value = int(digits, 8 if octal else 0)
        size = TYPE_SIZE.get(type_, 8)
        value = (-value if negative else value) & ((1 << 8 * size) - 1)
        return f"{value}{'ull' if size == 8 else 'u'}"
    if re.fullmatch(r"[\d.]+([eE][+-]?\d+)?", digits):
        return f"bits<{'double' if type_ == 'f64' else 'float'}>({text})"
    raise UnsupportedError(f"operand {text}")


@dataclass(frozen=True)
class Symbols:
    """What the functions of a module refer to by name."""

    variables: Mapping[str, int]  # .global and .const variables: place in the module's memory
    shared: Mapping[str, Variable]
    functions: Container[str]


class FunctionEmitter:
    """Translates one function; also the interface the instruction emitters use.

    After `emit`: `calls` and `shared_used` name what the function needs besides itself, and
    `stack_bytes` estimates the size of its frame.
    """

    def __init__(self, symbols: Symbols, function: Function) -> None:
        self.symbols = symbols
        self.function = function
        self.registers: dict[tuple[str, Scope], tuple[str, str]] = {}
        self.params: dict[tuple[str, Scope], str] = {}
        self.locals: dict[str, str] = {}
        self.stack_bytes = 0
        self.shared: dict[str, Variable] = dict(symbols.shared)
        self.shared_used: dict[str, Variable] = {}
        self.calls: list[str] = []
        self.targets: dict[str, list[str]] = {}
        self.labels: dict[tuple[str, Scope], str] = {}
        self.passed: set[str] = set()
        self.scope: Scope = ()
        self.declarations: list[str] = []
        self.code: list[str] = []
        self.sites = 0
        self.uses: Counter[str] = Counter()
        self._own_params: dict[str, str] = {}
        for i, param in enumerate(function.params):
            base = f"params + {param.offset}" if function.is_entry else f"arg{i}"
            self._own_params[param.name] = base
        for i, param in enumerate(function.returns):
            self._own_params[param.name] = f"ret{i}"

    # ------------------------------------------------------------ operands
    def _lookup(self, table: dict[tuple[str, Scope], Any], name: str) -> Any:
        for depth in range(len(self.scope), -1, -1):
            found = table.get((name, self.scope[:depth]))
            if found is not None:
                return found
        return None

    def register(self, name: str) -> tuple[str, str]:
        """C++ name and PTX type of a register."""
        found = self._lookup(self.registers, name.strip())
        if found is None:
            raise UnsupportedError(f"register {name}")
        return found

    def jump(self, name: str) -> str:
        """Statement that goes to a label; jumps back count, so that endless loops are noticed."""
        label = self._lookup(self.labels, name)
        if label is None:
            raise UnsupportedError(f"label {name}")
        return f"{'loop(t); ' if label in self.passed else ''}goto {label};"

    def is_used(self, name: str) -> bool:
        """Whether the register appears anywhere besides the instruction that sets it."""
        return self.uses[name] > 1

    def site(self) -> int:
        """A number that identifies the current instruction."""
        self.sites += 1
        return self.sites

    def _special(self, name: str) -> str | None:
        match = re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", name)
        if match:
            place = {
                "tid": "t.tid",
                "ntid": "t.block->dim",
                "ctaid": "t.block->idx",
                "nctaid": "t.block->grid",
            }[match.group(1)]
            return f"uint32_t({place}.{match.group(2)})"
        match = re.fullmatch(r"%lanemask_(lt|le|eq|gt|ge)", name)
        if match:
            return f"lanemask_{match.group(1)}(t)"
        return {
            "%laneid": "uint32_t(t.lane())",
            "%warpid": "uint32_t(t.warp())",
            "%nwarpid": "uint32_t((t.block->dim.count() + 31) / 32)",
            "%smid": "0u",
            "%nsmid": "1u",
            "%gridid": "0u",
            "%clock": "0u",
            "%clock_hi": "0u",
            "%clock64": "0ull",
            "%globaltimer": "0ull",
            "%globaltimer_lo": "0u",
            "%globaltimer_hi": "0u",
            "%dynamic_smem_size": "uint32_t(t.block->shared_size - t.block->static_shared)",
            "%total_smem_size": "uint32_t(t.block->shared_size)",
            "%cluster_ctarank": "0u",
            "%cluster_nctarank": "1u",
            "WARP_SZ": "32u",
        }.get(name)

    def raw(self, text: str, type_: str) -> str:
        """Raw-bits expression of an operand that is read as `type_`."""
        text = text.strip()
        if text.startswith("!"):
            return f"!{self.raw(text[1:], type_)}"
        found = self._lookup(self.registers, text)
        if found:
            return found[0]
        special = self._special(text)
        if special:
            return special
        if text in self.shared:
            self.shared_used[text] = self.shared[text]
            return f"uint64_t(shared_{mangle(text)})"
        if text in self.locals:
            return f"(uint64_t({self.locals[text]}) - t.stack)"
        if text in self.symbols.variables:
            return f"uint64_t(t.block->globals + {self.symbols.variables[text]})"
        if text in self._own_params:
            return f"uint64_t({self._own_params[text]})"
        match = re.fullmatch(rf"({IDENT})\s*([+-]\s*\d+)", text)
        if match and not match.group(1)[0].isdigit():
            return f"({self.raw(match.group(1), type_)} {match.group(2)})"
        return immediate(text, type_)

    def read(self, text: str, type_: str, ftz: bool = False) -> str:
        """Typed value of an operand (f16 and bf16 are widened to float)."""
        raw = self.raw(text, type_)
        if type_ == "pred":
            return raw
        if type_ in ("f32", "f64"):
            value = f"as<{CPP_TYPE[type_]}>({raw})"
            return f"ftz({value})" if ftz and type_ == "f32" else value
        if type_ in ("f16", "bf16"):
            return f"{type_}_to_f32({raw})"
        return f"{CPP_TYPE[type_]}({raw})"

    def write(self, dest: str, type_: str, value: str, ftz: bool = False) -> str:
        """Assignment of a typed value to a register."""
        if dest.strip() == "_":
            return f"(void)({value});"
        name, reg_type = self.register(dest)
        if type_ == "pred":
            return f"{name} = ({value});"
        if type_ == "f32":
            return f"{name} = bits<float>({'ftz' if ftz else ''}({value}));"
        if type_ == "f64":
            return f"{name} = bits<double>({value});"
        if type_ in ("f16", "bf16"):
            return f"{name} = to_{type_}({value});"
        if TYPE_SIZE[reg_type] > TYPE_SIZE[type_] and type_[0] == "s":
            wide = UINT[TYPE_SIZE[reg_type]]
            return f"{name} = {wide}(int64_t({CPP_TYPE[type_]}({value})));"
        return f"{name} = {CPP_TYPE[type_]}({value});"

    def set(self, dest: str, value: str) -> str:
        """Assignment of raw bits (or a bool, for a predicate)."""
        return "" if dest.strip() == "_" else f"{self.register(dest)[0]} = {value};"

    def _split_address(self, text: str) -> tuple[str, int]:
        text = text.strip()
        if not (text.startswith("[") and text.endswith("]")):
            raise UnsupportedError(f"address {text}")
        base = text[1:-1].strip()
        match = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", base)
        if match:
            return match.group(1).strip(), int(match.group(2), 0)
        return base, 0

    def address(self, text: str) -> str:
        """Integer expression of `[base + offset]`."""
        base, offset = self._split_address(text)
        value = f"uint64_t({self.raw(base, 'u64')})"
        return f"{value} + ({offset}ll)" if offset else value

    def param_pointer(self, text: str) -> str | None:
        """C++ pointer expression of `[param + offset]`; None if the address is in a register."""
        base, offset = self._split_address(text)
        place = self._lookup(self.params, base) or self._own_params.get(base)
        if place is None and self._lookup(self.registers, base) is None:
            raise UnsupportedError(f"parameter {base}")
        return f"{place} + {offset}" if place else None

    # ------------------------------------------------------------ directives
    def _declare_registers(self, type_: str, names: str) -> None:
        for item in names.split(","):
            match = re.fullmatch(rf"({IDENT})\s*<(\d+)>", item.strip())
            if match:
                expanded = [f"{match.group(1)}{i}" for i in range(int(match.group(2)))]
            else:
                expanded = [item.strip()]
            if type_ != "pred" and TYPE_SIZE[type_] not in UINT:
                raise UnsupportedError(f".reg .{type_}")
            cpp = "bool" if type_ == "pred" else UINT[TYPE_SIZE[type_]]
            for name in expanded:
                unique = mangle(name) + "".join(f"_{n}" for n in self.scope)
                self.registers[name, self.scope] = (unique, type_)
                if name in self.uses or len(expanded) == 1:
                    self.declarations.append(f"{cpp} {unique}{{}};")

    def _directive(self, directive: Directive) -> None:
        self.scope = directive.scope
        text = directive.text
        match = re.match(r"\.reg \.(\w+)\s+(.*)", text)
        if match:
            self._declare_registers(match.group(1), match.group(2))
            return
        match = re.match(
            rf"\.(local|shared|param) (?:\.align (\d+) )?\.(\w+) ({IDENT})\s*((?:\[\d+\])*)$", text
        )
        if not match:
            if text.startswith(".pragma"):
                return
            raise UnsupportedError(f"directive {text}")
        space, align_text, type_, name, dims = match.groups()
        count = 1
        for dim in re.findall(r"\d+", dims):
            count *= int(dim)
        size = count * TYPE_SIZE[type_]
        align = int(align_text or TYPE_SIZE[type_])
        if space == "shared":
            self.shared[name] = Variable(name, "shared", type_, align, count, [])
            return
        unique = f"{space}_{mangle(name)}" + "".join(f"_{n}" for n in self.scope)
        self.declarations.append(f"alignas({max(align, 16)}) uint8_t {unique}[{max(size, 1)}];")
        if space == "local":
            self.locals[name] = unique
            self.stack_bytes += size + 16
        else:
            self.params[name, self.scope] = unique

    # ------------------------------------------------------------ whole function
    def _instruction(self, ins: Instruction) -> None:
        self.scope = ins.scope
        emit = _EMITTERS.get(ins.op)
        if emit is None:
            raise UnsupportedError(ins.text)
        for mod in ins.mods:
            if mod.split("::")[0] not in KNOWN_MODIFIERS or "::cluster" in mod:
                raise UnsupportedError(f"{ins.text}  [modifier .{mod}]")
        try:
            code = emit(self, ins)
        except UnsupportedError as error:
            note = str(error)
            raise UnsupportedError(note if ins.text in note else f"{ins.text}  [{note}]") from None
        except (KeyError, TypeError, IndexError, ValueError, StopIteration) as error:
            raise UnsupportedError(f"{ins.text}  [{type(error).__name__}: {error}]") from None
        guard = ""
        if ins.guard:
            guard = f"if ({'!' if ins.guard_negated else ''}{self.register(ins.guard)[0]}) "
        self.code.append(f"{guard}{{ {code} }}")

    def signature(self) -> str:
        """Declaration of the C++ function."""
        name = mangle(self.function.name)
        if self.function.is_entry:
            return f'extern "C" KERNEL void kernel_{name}(const uint8_t* params, Thread& t)'
        args = ["Thread& t"]
        args += [f"uint8_t* ret{i}" for i in range(len(self.function.returns))]
        args += [f"uint8_t* arg{i}" for i in range(len(self.function.params))]
        return f"static void func_{name}({', '.join(args)})"

    def emit(self) -> str:
        """C++ source of the function."""
        for statement in self.function.body:
            if isinstance(statement, Label):
                clean = re.sub(r"\W", "_", statement.name)
                key = (statement.name, statement.scope)
                self.labels[key] = f"L{len(self.labels)}_{clean}"
            elif isinstance(statement, BranchTargets):
                self.targets[statement.name] = statement.labels
            elif isinstance(statement, Instruction):
                self.uses.update(re.findall(IDENT, statement.text))
        for statement in self.function.body:
            if isinstance(statement, Label):
                label = self.labels[statement.name, statement.scope]
                self.passed.add(label)
                self.code.append(f"{label}:;")
            elif isinstance(statement, Directive):
                self._directive(statement)
            elif isinstance(statement, Instruction):
                self._instruction(statement)
        self.stack_bytes += 16 * len(self.declarations)
        body = "\n".join("  " + line for line in (*self.declarations, *self.code, "return;"))
        return f"{self.signature()} {{\n{body}\n}}\n"
