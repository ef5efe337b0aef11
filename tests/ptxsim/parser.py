"""PTX text -> :class:`Program`: module variables, functions and their statements."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from .errors import PtxError, UnsupportedError

TYPE_SIZE = {
    "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8,
    "b128": 16,
}  # fmt: skip

IDENT = r"[\w$%]+"
Scope = tuple[int, ...]

_SIGNATURE = r"(?P<name>[\w$]+)\s*(?P<params>\([^)]*\))?(?P<attributes>[^{;]*?)\s*(?P<end>[{;])"
_ENTRY = re.compile(r"\.entry\s+" + _SIGNATURE)
_FUNC = re.compile(r"\.func\s*(?:(?P<returns>\([^)]*\))\s*)?" + _SIGNATURE)
_LINKAGE = r"(?:\.(?:visible|weak|extern|common)\s+)*"
_CODE = re.compile(_LINKAGE + r"\.(?:entry|func)\b[^;{]*([{;])")
_SECTION = re.compile(r"\.section\s+\S+\s*\{")
_VARIABLE = re.compile(
    rf"({_LINKAGE})\.(global|const|shared)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    rf"\.(\w+)\s+({IDENT})\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_PARAM = re.compile(
    r"\s*\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(.*?)([\w$%]+)\s*(?:\[(\d+)\])?\s*$",
    re.DOTALL,
)
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_GUARD = re.compile(rf"@(!?)({IDENT})\s+(.*)", re.DOTALL)


@dataclass(frozen=True)
class Param:
    """A kernel or function parameter; `offset` is its place in the parameter block."""

    name: str
    type: str
    offset: int
    size: int
    is_array: bool


@dataclass(frozen=True)
class Variable:
    """A .global, .const or .shared variable; count None: extern .shared array."""

    name: str
    space: str
    type: str
    align: int
    count: int | None
    init: list[str]

    @property
    def size(self) -> int:
        """Bytes; none for an extern .shared array."""
        return TYPE_SIZE[self.type] * (self.count or 0)


@dataclass(frozen=True)
class Label:
    """A branch target."""

    name: str
    scope: Scope


@dataclass(frozen=True)
class Directive:
    """A directive inside a function body (.reg, .shared, .local, .param, .pragma ...)."""

    text: str
    scope: Scope


@dataclass(frozen=True)
class BranchTargets:
    """A .branchtargets list, used by brx.idx."""

    name: str
    labels: list[str]


@dataclass(frozen=True)
class Instruction:
    """`@guard op.mods operands;`"""

    op: str
    mods: list[str]
    operands: list[str]
    scope: Scope
    text: str
    guard: str | None = None
    guard_negated: bool = False

    def has(self, *mods: str) -> bool:
        """True if any of `mods` is among the instruction's modifiers."""
        return any(m in self.mods for m in mods)

    def first(self, choices: tuple[str, ...] | list[str], default: str | None = None) -> str | None:
        """The first modifier that is one of `choices` (ignoring a `::suffix`)."""
        for mod in self.mods:
            base = mod.split("::")[0]
            if base in choices:
                return base
        return default


Statement = Label | Directive | BranchTargets | Instruction


@dataclass
class Function:
    """A .entry (kernel) or .func."""

    name: str
    params: list[Param]
    returns: list[Param]
    is_entry: bool
    attributes: str
    text: str

    @functools.cached_property
    def body(self) -> list[Statement]:
        """The parsed statements; parsed when asked for, since a module may hold many kernels."""
        return _parse_body(self.text)

    @property
    def param_bytes(self) -> int:
        """Size of the parameter block."""
        return max((p.offset + p.size for p in self.params), default=0)

    def count(self, directive: str) -> int | None:
        """The product of what a directive such as .maxntid names."""
        match = re.search(rf"\.{directive}\s+([\d\s,]+)", self.attributes)
        return math.prod(map(int, match.group(1).split(","))) if match else None


@dataclass
class Program:
    """A parsed PTX module."""

    sm: int
    variables: list[Variable]
    functions: list[Function]
    kernels: list[Function]


def split_operands(text: str) -> list[str]:
    """Splits on commas that are not inside brackets."""
    parts: list[str] = []
    depth = 0
    current = ""
    for char in text:
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def _strip(source: str) -> str:
    """Removes comments, debug information and module directives."""
    text = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(
        r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", text, flags=re.MULTILINE
    )
    while match := _SECTION.search(text):
        text = text[: match.start()] + text[text.index("}", match.end()) + 1 :]
    return text


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("unbalanced braces in PTX")


def _parse_params(text: str) -> list[Param]:
    params: list[Param] = []
    offset = 0
    for part in text.strip().strip("()").split(","):
        if not part.strip():
            continue
        match = _PARAM.match(part)
        if not match:
            raise UnsupportedError(f"parameter {part.strip()}")
        align_text, type_, _, name, count = match.groups()
        align = int(align_text or TYPE_SIZE[type_])
        size = TYPE_SIZE[type_] * int(count or 1)
        offset = (offset + align - 1) // align * align
        params.append(Param(name, type_, offset, size, count is not None))
        offset += size
    return params


def _parse_instruction(text: str, scope: Scope) -> Instruction:
    guard = None
    negated = False
    body = text
    if match := _GUARD.match(text):
        negated = bool(match.group(1))
        guard = match.group(2)
        body = match.group(3)
    match = re.match(r"([\w.:]+)\s*(.*)$", body)
    if not match:
        raise UnsupportedError(text)
    op, *mods = match.group(1).split(".")
    operands = split_operands(match.group(2))
    return Instruction(op, mods, operands, scope, text, guard, negated)


def _parse_body(text: str) -> list[Statement]:
    statements: list[Statement] = []
    scope: Scope = ()
    scopes = 0
    pos = 0
    space = re.compile(r"\s*")
    while True:
        pos = space.match(text, pos).end()
        if pos >= len(text):
            return statements
        if text[pos] == "{":
            scopes += 1
            scope = (*scope, scopes)
            pos += 1
            continue
        if text[pos] == "}":
            scope = scope[:-1]
            pos += 1
            continue
        if match := _LABEL.match(text, pos):
            pos = match.end()
            targets = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(text, pos)
            if targets:
                statements.append(BranchTargets(match.group(1), split_operands(targets.group(1))))
                pos = targets.end()
            else:
                statements.append(Label(match.group(1), scope))
            continue
        end = text.index(";", pos)
        line = re.sub(r"\s+", " ", text[pos:end]).strip()
        pos = end + 1
        if line.startswith("."):
            statements.append(Directive(line, scope))
        elif line:
            statements.append(_parse_instruction(line, scope))


def _parse_variable(text: str) -> Variable | None:
    match = _VARIABLE.match(text)
    if not match or match.group(4) not in TYPE_SIZE:  # textures and the like: no name, no use
        return None
    linkage, space, align, type_, name, dims, init = match.groups()
    values = [v for v in re.split(r"[\s,{}]+", init or "") if v]
    count: int | None = 1
    unsized = False
    for dim in re.findall(r"\[\s*(\d*)\s*\]", dims):
        unsized = unsized or not dim
        count *= int(dim or 1)
    if space == "shared" and (unsized or "extern" in linkage):
        count = None
    elif unsized:
        count = max(len(values), 1)
    return Variable(name, space, type_, int(align or TYPE_SIZE[type_]), count, values)


def _functions(text: str, pattern: re.Pattern[str], is_entry: bool) -> list[Function]:
    functions: list[Function] = []
    for match in pattern.finditer(text):
        if match["end"] == ";":
            continue
        body = text[match.end() : _closing_brace(text, match.end() - 1)]
        params = _parse_params(match["params"] or "")
        returns = [] if is_entry else _parse_params(match["returns"] or "")
        functions.append(
            Function(match["name"], params, returns, is_entry, match["attributes"], body)
        )
    return functions


def _outside_functions(text: str) -> str:
    parts: list[str] = []
    pos = 0
    for match in _CODE.finditer(text):
        if match.start() < pos:
            continue
        parts.append(text[pos : match.start()])
        is_body = match.group(1) == "{"
        pos = (_closing_brace(text, match.end() - 1) if is_body else match.end() - 1) + 1
    return "".join([*parts, text[pos:]])


def parse(source: str) -> Program:
    """Parses a PTX module as written by nvcc or Triton."""
    text = _strip(source)
    statements = map(str.strip, _outside_functions(text).split(";"))
    target = re.search(r"^\s*\.target\s+sm_(\d+)", source, re.MULTILINE)
    return Program(
        int(target.group(1)) if target else 0,
        [v for v in map(_parse_variable, statements) if v],
        _functions(text, _FUNC, is_entry=False),
        _functions(text, _ENTRY, is_entry=True),
    )
