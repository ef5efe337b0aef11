"""Branches, calls, barriers, warp collectives and matrix instructions."""

from __future__ import annotations

import re

from .codegen import FunctionEmitter, emitter, mangle
from .errors import UnsupportedError
from .parser import Instruction, split_operands


@emitter("bra")
def emit_bra(e: FunctionEmitter, ins: Instruction) -> str:
    """Branch."""
    return e.jump(ins.operands[0])


@emitter("brx")
def emit_brx(e: FunctionEmitter, ins: Instruction) -> str:
    """Indexed branch."""
    cases = " ".join(
        f"case {i}: {e.jump(name)}" for i, name in enumerate(e.targets[ins.operands[1]])
    )
    index = e.raw(ins.operands[0], "u32")
    return f'switch (uint32_t({index})) {{ {cases} default: trap(t, "brx.idx out of range"); }}'


@emitter("ret", "exit")
def emit_return(e: FunctionEmitter, ins: Instruction) -> str:
    """End of a function or thread."""
    return "return;" if ins.op == "ret" or e.function.is_entry else "exit_thread();"


@emitter("trap", "brkpt")
def emit_trap(e: FunctionEmitter, ins: Instruction) -> str:
    """Abort the launch."""
    return f'trap(t, "{ins.op}");'


@emitter("nanosleep")
def emit_nanosleep(e: FunctionEmitter, ins: Instruction) -> str:
    """Lets other threads run."""
    return "poll(t, 1);"


@emitter("call")
def emit_call(e: FunctionEmitter, ins: Instruction) -> str:
    """Calls of functions in the module; vprintf is silent, __assertfail fails the launch."""
    rest = list(ins.operands)
    returns: list[str] = []
    if rest[0].startswith("("):
        returns = split_operands(rest.pop(0)[1:-1])
    name = rest.pop(0)
    args = split_operands(rest[0][1:-1]) if rest else []
    pointers = [_parameter(e, text) for text in returns + args]
    if name == "vprintf":
        return f"store_as<int32_t>({pointers[0]}, 0);"
    if name == "__assertfail":
        types = ("uint64_t", "uint64_t", "uint32_t", "uint64_t")
        values = [f"load_as<{t}>({p})" for t, p in zip(types, pointers, strict=False)]
        return f"assert_failed(t, {', '.join(values)});"
    if name not in e.symbols.functions:
        raise UnsupportedError(ins.text)
    e.calls.append(name)
    return f"func_{mangle(name)}({', '.join(['t', *pointers])});"


def _parameter(e: FunctionEmitter, text: str) -> str:
    pointer = e.param_pointer(f"[{text}]")
    if pointer is None:
        raise UnsupportedError("argument in a register")
    return pointer


# ---------------------------------------------------------------- barriers
@emitter("bar", "barrier")
def emit_barrier(e: FunctionEmitter, ins: Instruction) -> str:
    """bar.sync, bar.arrive, bar.red, bar.warp.sync."""
    if ins.has("warp"):
        return f"warp_sync(t, {e.raw(ins.operands[0], 'u32')});"
    operands = list(ins.operands)
    dest = predicate = ""
    if ins.has("red"):
        dest = operands.pop(0)
        predicate = e.raw(operands.pop(), "pred")
    ident = e.raw(operands[0], "u32") if operands else "0"
    count = e.raw(operands[1], "u32") if len(operands) > 1 else "0"
    if ins.has("arrive"):
        return f"barrier_arrive(t, {ident}, {count});"
    if not ins.has("sync", "red"):
        raise UnsupportedError(ins.text)
    aligned = str(ins.op == "bar" or ins.has("aligned")).lower()
    head = f"barrier_sync(t, {ident}, {count}, {e.site()}, {aligned}"
    if not ins.has("red"):
        return f"{head});"
    if ins.has("and"):
        return e.write(dest, "pred", f"{head}, !({predicate})) == 0")
    value = f"{head}, bool({predicate}))"
    if ins.has("or"):
        return e.write(dest, "pred", f"{value} != 0")
    return e.write(dest, "u32", value)


# ---------------------------------------------------------------- warp collectives
def _require_sync(ins: Instruction) -> None:
    if not ins.has("sync"):
        raise UnsupportedError(ins.text)


@emitter("activemask")
def emit_activemask(e: FunctionEmitter, ins: Instruction) -> str:
    """A legal answer: every thread runs on its own."""
    return e.write(ins.operands[0], "u32", "lanemask_eq(t)")


@emitter("shfl")
def emit_shfl(e: FunctionEmitter, ins: Instruction) -> str:
    """shfl.sync."""
    _require_sync(ins)
    mode = ins.mods[1].capitalize()
    value, b, c, mask = (f"uint32_t({e.raw(text, 'u32')})" for text in ins.operands[1:5])
    call = f"shfl(t, Shfl::{mode}, {mask}, {value}, {b}, {c})"
    return _value_and_predicate(e, ins.operands[0], call)


def _value_and_predicate(e: FunctionEmitter, dest: str, call: str) -> str:
    value, *predicate = (d.strip() for d in dest.split("|"))
    code = f"auto s = {call}; {e.set(value, 's.out')}"
    return code + (" " + e.set(predicate[0], "s.pred") if predicate else "")


@emitter("vote")
def emit_vote(e: FunctionEmitter, ins: Instruction) -> str:
    """vote.sync."""
    _require_sync(ins)
    dest, predicate, mask = ins.operands
    args = f"(t, {e.raw(mask, 'u32')}, {e.raw(predicate, 'pred')})"
    if ins.has("ballot"):
        return e.write(dest, "u32", "ballot" + args)
    return e.set(dest, f"vote_{ins.first(('any', 'all', 'uni'))}{args}")


@emitter("match")
def emit_match(e: FunctionEmitter, ins: Instruction) -> str:
    """match.any.sync, match.all.sync."""
    _require_sync(ins)
    dest, value, mask = ins.operands
    args = f"(t, {e.raw(mask, 'u32')}, {e.raw(value, ins.mods[-1])})"
    if ins.mods[0] == "any":
        return e.set(dest, "match_any" + args)
    return _value_and_predicate(e, dest, "match_all" + args)


_REDUX = {
    "and.b32": "And", "or.b32": "Or", "xor.b32": "Xor", "add.u32": "Add", "add.s32": "Add",
    "min.u32": "MinU", "max.u32": "MaxU", "min.s32": "MinS", "max.s32": "MaxS",
    "min.f32": "MinF", "max.f32": "MaxF", "min.NaN.f32": "MinNan", "max.NaN.f32": "MaxNan",
}  # fmt: skip


@emitter("redux")
def emit_redux(e: FunctionEmitter, ins: Instruction) -> str:
    """redux.sync on integers and f32."""
    _require_sync(ins)
    dest, value, mask = ins.operands
    operation = _REDUX[".".join(ins.mods[1:])]
    call = f"redux(t, Redux::{operation}, {e.raw(mask, 'u32')}, {e.raw(value, 'b32')})"
    return e.set(dest, call)


# ---------------------------------------------------------------- matrix instructions
def _registers(e: FunctionEmitter, text: str) -> list[str]:
    parts = split_operands(text[1:-1]) if text.startswith("{") else [text]
    return [f"uint32_t({e.raw(part, 'b32')})" for part in parts]


def _outputs(e: FunctionEmitter, text: str, array: str) -> str:
    parts = split_operands(text[1:-1]) if text.startswith("{") else [text]
    return " ".join(e.set(part, f"{array}[{i}]") for i, part in enumerate(parts))


@emitter("ldmatrix", "stmatrix")
def emit_matrix_copy(e: FunctionEmitter, ins: Instruction) -> str:
    """ldmatrix and stmatrix of 8x8 b16 matrices."""
    if not ins.has("m8n8") or not ins.has("b16"):
        raise UnsupportedError(ins.text)
    count = int((ins.first(("x1", "x2", "x4")) or "x1")[1:])
    shape = f"{count}, {str(ins.has('trans')).lower()}"
    if ins.op == "ldmatrix":
        dest, source = ins.operands
        code = f"uint32_t v[{count}]; ldmatrix(t, {shape}, {e.address(source)}, v); "
        return code + _outputs(e, dest, "v")
    dest, source = ins.operands
    values = ", ".join(_registers(e, source))
    return f"uint32_t v[] = {{{values}}}; stmatrix(t, {shape}, {e.address(dest)}, v);"


_MAX_K = {"f16": 16, "bf16": 16, "tf32": 8, "s8": 32, "u8": 32}


@emitter("mma")
def emit_mma(e: FunctionEmitter, ins: Instruction) -> str:
    """mma.sync.aligned.m16n8k* on f16, bf16, tf32 and 8-bit integers."""
    shape = next((m for m in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", m)), "")
    d_type, a_type, b_type, c_type = ins.mods[-4:]
    if not shape.startswith("m16n8k") or a_type not in _MAX_K or b_type not in _MAX_K:
        raise UnsupportedError(ins.text)
    depth = int(shape.removeprefix("m16n8k"))
    if d_type != c_type or depth > _MAX_K[a_type] or depth * 4 < _MAX_K[a_type]:
        raise UnsupportedError(ins.text)
    d, a, b, c = ins.operands
    arrays = " ".join(
        f"uint32_t {name}[] = {{{', '.join(_registers(e, text))}}};"
        for name, text in (("a", a), ("b", b), ("c", c))
    )
    elements = ", ".join(f"Elem::{name.upper()}" for name in (a_type, b_type))
    call = f"mma_m16n8(t, {depth}, {elements}, Acc::{d_type.upper()}, a, b, c, d);"
    return f"{arrays} uint32_t d[4]; {call} {_outputs(e, d, 'd')}"
