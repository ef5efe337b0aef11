"""Arithmetic, logic, comparison and conversion instructions."""

from __future__ import annotations

from .codegen import CPP_TYPE, FLOATS, UINT, FunctionEmitter, emitter
from .errors import UnsupportedError
from .parser import TYPE_SIZE, Instruction, split_operands

_ROUNDING = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
_PACKED = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "min": "fmin_num({0}, {1})",
    "max": "fmax_num({0}, {1})",
    "min.NaN": "fmin_nan({0}, {1})",
    "max.NaN": "fmax_nan({0}, {1})",
    "fma": "fma_odd({0}, {1}, {2})",
    "ex2": "std::exp2({0})",
    "tanh": "std::tanh({0})",
}
_INT_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_FLOAT_COMPARE = {
    "eq": "{0} == {1}",
    "ne": "ordered_ne({0}, {1})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "equ": "!ordered_ne({0}, {1})",
    "neu": "{0} != {1}",
    "ltu": "!({0} >= {1})",
    "leu": "!({0} > {1})",
    "gtu": "!({0} <= {1})",
    "geu": "!({0} < {1})",
    "num": "!(std::isnan({0}) || std::isnan({1}))",
    "nan": "(std::isnan({0}) || std::isnan({1}))",
}


def _type(ins: Instruction) -> str:
    return ins.mods[-1]


def _sources(e: FunctionEmitter, ins: Instruction, type_: str | None = None) -> list[str]:
    """Typed values of all operands but the first, flushed if the instruction says .ftz."""
    type_ = type_ or _type(ins)
    return [e.read(text, type_, ins.has("ftz")) for text in ins.operands[1:]]


def result(e: FunctionEmitter, ins: Instruction, value: str, type_: str | None = None) -> str:
    """Assignment of the destination, flushed if the instruction says .ftz."""
    return e.write(ins.operands[0], type_ or _type(ins), value, ins.has("ftz"))


def rounded(ins: Instruction, value: str) -> str:
    """`value` in the rounding mode of the instruction, then saturated if it says .sat."""
    mode = ins.first(("rz", "rm", "rp"))
    if mode:
        value = f"with_rounding({_ROUNDING[mode]}, [&] {{ return {value}; }})"
    return f"saturate({value})" if ins.has("sat") else value


def _unsigned(e: FunctionEmitter, text: str, type_: str) -> str:
    return f"{UINT[TYPE_SIZE[type_]]}({e.raw(text, type_)})"


def _is_packed(ins: Instruction) -> bool:
    return bool(ins.mods) and ins.mods[-1] in ("f16x2", "bf16x2")


def _packed(e: FunctionEmitter, ins: Instruction) -> str:
    """Two f16 or bf16 operations in one register."""
    type_ = _type(ins)[:-2]
    halves = []
    for half in (0, 1):
        args = [
            f"{type_}_to_f32(uint16_t({e.raw(text, 'b32')} >> {16 * half}))"
            for text in ins.operands[1:]
        ]
        value = _PACKED[f"{ins.op}.NaN" if ins.has("NaN") else ins.op].format(*args)
        if ins.has("sat"):
            value = f"saturate({value})"
        if ins.has("relu"):
            value = f"fmax_nan<double>({value}, 0)"
        halves.append(f"uint32_t(to_{type_}({value}))")
    return e.set(ins.operands[0], f"{halves[0]} | {halves[1]} << 16")


def _carry_chain(
    e: FunctionEmitter, ins: Instruction, op: str, x: str, y: str, carry_in: bool
) -> str:
    """add/sub with carry out (in t.carry) and, if asked for, carry in."""
    type_ = _type(ins)
    sign = "+" if op == "add" else "-"
    cin = "t.carry" if carry_in else "0"
    code = (
        f"auto wide = (unsigned __int128){x} {sign} (unsigned __int128){y} {sign} {cin}; "
        f"{e.set(ins.operands[0], f'{UINT[TYPE_SIZE[type_]]}(wide)')}"
    )
    if ins.has("cc"):
        code += f" t.carry = uint32_t(wide >> {8 * TYPE_SIZE[type_]}) & 1;"
    return code


@emitter("add", "sub")
def emit_add_sub(e: FunctionEmitter, ins: Instruction) -> str:
    """add, sub in all types, .sat.s32 and .cc."""
    if _is_packed(ins):
        return _packed(e, ins)
    type_ = _type(ins)
    sign = "+" if ins.op == "add" else "-"
    a, b = _sources(e, ins)
    if type_ in FLOATS:
        return result(e, ins, rounded(ins, f"{a} {sign} {b}"))
    if ins.has("sat"):
        return result(e, ins, f"sat_s32(int64_t({a}) {sign} int64_t({b}))")
    x, y = (_unsigned(e, text, type_) for text in ins.operands[1:3])
    if ins.has("cc"):
        return _carry_chain(e, ins, ins.op, x, y, False)
    return result(e, ins, f"{UINT[TYPE_SIZE[type_]]}({x} {sign} {y})")


@emitter("addc", "subc")
def emit_add_carry(e: FunctionEmitter, ins: Instruction) -> str:
    """addc, subc."""
    x, y = (_unsigned(e, text, _type(ins)) for text in ins.operands[1:3])
    return _carry_chain(e, ins, ins.op[:3], x, y, True)


@emitter("mul", "mad", "fma")
def emit_mul(e: FunctionEmitter, ins: Instruction) -> str:
    """mul, mad (.lo .hi .wide, .cc), fma."""
    if _is_packed(ins):
        return _packed(e, ins)
    type_ = _type(ins)
    if ins.op == "mad" and ins.has("cc"):
        return emit_mad_carry(e, ins)
    if type_ in FLOATS:
        args = _sources(e, ins)
        if len(args) == 2:
            return result(e, ins, rounded(ins, f"{args[0]} * {args[1]}"))
        fma = "fma_odd" if type_ in ("f16", "bf16") else "std::fma"
        value = rounded(ins, f"{fma}({', '.join(args)})")
        return result(e, ins, f"fmax_nan<double>({value}, 0)" if ins.has("relu") else value)
    if ins.has("sat"):
        raise UnsupportedError(ins.text)
    size = TYPE_SIZE[type_]
    out_type = type_
    if ins.has("wide"):
        out_type = type_[0] + str(16 * size)
        unsigned = UINT[2 * size]
        a, b = (f"{unsigned}({v})" for v in _sources(e, ins)[:2])
        value = f"{a} * {b}"
    elif ins.has("hi"):
        a, b = _sources(e, ins)[:2]
        unsigned = UINT[size]
        value = f"mul_hi<{CPP_TYPE[type_]}>({a}, {b})"
    else:
        unsigned = UINT[max(size, 4)]
        a, b = (f"{unsigned}({e.raw(text, type_)})" for text in ins.operands[1:3])
        value = f"{a} * {b}"
    if ins.op == "mad":
        value = f"{unsigned}({value}) + {unsigned}({e.raw(ins.operands[3], out_type)})"
    return result(e, ins, f"{UINT[TYPE_SIZE[out_type]]}({value})", out_type)


@emitter("madc")
def emit_mad_carry(e: FunctionEmitter, ins: Instruction) -> str:
    """mad.cc, madc."""
    type_ = _type(ins)
    unsigned = UINT[TYPE_SIZE[type_]]
    if ins.has("hi"):
        a, b = _sources(e, ins)[:2]
        product = f"{unsigned}(mul_hi<{CPP_TYPE[type_]}>({a}, {b}))"
    else:
        a, b = (_unsigned(e, text, type_) for text in ins.operands[1:3])
        product = f"{unsigned}({a} * {b})"
    third = _unsigned(e, ins.operands[3], type_)
    return _carry_chain(e, ins, "add", product, third, ins.op == "madc")


@emitter("mul24", "mad24")
def emit_mul24(e: FunctionEmitter, ins: Instruction) -> str:
    """mul24.lo, mad24.lo."""
    if not ins.has("lo"):
        raise UnsupportedError(ins.text)
    kind = "int64_t" if _type(ins) == "s32" else "uint64_t"
    cast = CPP_TYPE[_type(ins)]
    a, b = (f"{kind}({cast}({e.raw(x, 'u32')} << 8) >> 8)" for x in ins.operands[1:3])
    third = f" + {kind}({e.raw(ins.operands[3], 'u32')})" if ins.op == "mad24" else ""
    return result(e, ins, f"uint32_t({a} * {b}{third})")


@emitter("div")
def emit_div(e: FunctionEmitter, ins: Instruction) -> str:
    """Division; .approx and .full are computed exactly rounded."""
    a, b = _sources(e, ins)
    if _type(ins) in FLOATS:
        return result(e, ins, rounded(ins, f"{a} / {b}"))
    return result(e, ins, f"int_div<{CPP_TYPE[_type(ins)]}>({a}, {b})")


@emitter("rem")
def emit_rem(e: FunctionEmitter, ins: Instruction) -> str:
    """Integer remainder."""
    a, b = _sources(e, ins)
    return result(e, ins, f"int_rem<{CPP_TYPE[_type(ins)]}>({a}, {b})")


@emitter("min", "max")
def emit_min_max(e: FunctionEmitter, ins: Instruction) -> str:
    """min, max (also three-operand f32, .NaN, .relu)."""
    if _is_packed(ins):
        return _packed(e, ins)
    type_ = _type(ins)
    if type_ not in FLOATS:
        if type_ not in CPP_TYPE:
            raise UnsupportedError(ins.text)
        a, b = _sources(e, ins)
        value = f"std::{ins.op}<{CPP_TYPE[type_]}>({a}, {b})"
        return result(e, ins, f"std::max<int32_t>({value}, 0)" if ins.has("relu") else value)
    function = f"f{ins.op}_{'nan' if ins.has('NaN') else 'num'}"
    value, *rest = _sources(e, ins)
    for operand in rest:
        value = f"{function}({value}, {operand})"
    return result(e, ins, value)


@emitter("abs", "neg")
def emit_abs_neg(e: FunctionEmitter, ins: Instruction) -> str:
    """abs, neg."""
    if _is_packed(ins):
        return _packed(e, ins)
    type_ = _type(ins)
    (a,) = _sources(e, ins)
    if type_ in FLOATS:
        return result(e, ins, f"-{a}" if ins.op == "neg" else f"std::fabs({a})")
    negated = f"{UINT[TYPE_SIZE[type_]]}(0 - {_unsigned(e, ins.operands[1], type_)})"
    if ins.op == "neg":
        return result(e, ins, negated)
    return result(e, ins, f"({a} < 0 ? {negated} : {_unsigned(e, ins.operands[1], type_)})")


@emitter("and", "or", "xor")
def emit_logic(e: FunctionEmitter, ins: Instruction) -> str:
    """Bitwise and predicate logic."""
    a, b = _sources(e, ins)
    sign = {"and": "&", "or": "|", "xor": "^"}[ins.op]
    value = f"{a} {sign} {b}"
    return result(e, ins, f"bool({value})" if _type(ins) == "pred" else value)


@emitter("not", "cnot")
def emit_not(e: FunctionEmitter, ins: Instruction) -> str:
    """not, cnot."""
    (a,) = _sources(e, ins)
    if ins.op == "cnot":
        return result(e, ins, f"{a} == 0")
    return result(e, ins, f"!{a}" if _type(ins) == "pred" else f"~{a}")


@emitter("shl", "shr")
def emit_shift(e: FunctionEmitter, ins: Instruction) -> str:
    """Shifts; amounts are clamped to the width."""
    value, _ = ins.operands[1:3]
    amount = f"uint32_t({e.raw(ins.operands[2], 'u32')})"
    if ins.op == "shl":
        return result(e, ins, f"shift_left({_unsigned(e, value, _type(ins))}, {amount})")
    return result(e, ins, f"shift_right({e.read(value, _type(ins))}, {amount})")


@emitter("shf")
def emit_funnel_shift(e: FunctionEmitter, ins: Instruction) -> str:
    """shf.l, shf.r with .wrap or .clamp."""
    a, b, n = (e.raw(text, "u32") for text in ins.operands[1:4])
    amount = f"({n}) & 31" if ins.has("wrap") else f"std::min<uint32_t>({n}, 32)"
    name = "funnel_left" if ins.mods[0] == "l" else "funnel_right"
    return result(e, ins, f"{name}({a}, {b}, {amount})")


_SIMPLE = {
    "lop3": ("lop3({0}, {1}, {2}, {3})", ("b32",) * 4, "b32"),
    "prmt": ("prmt({0}, {1}, {2})", ("b32",) * 3, "b32"),
    "bfe": ("bfe<{c}>({0}, {1}, {2})", ("", "u32", "u32"), ""),
    "bfi": ("bfi<{c}>({0}, {1}, {2}, {3})", ("", "", "u32", "u32"), ""),
    "popc": ("std::popcount({0})", ("",), "u32"),
    "clz": ("std::countl_zero({0})", ("",), "u32"),
    "brev": ("bit_reverse({0})", ("",), ""),
    "sad": ("({0} > {1} ? {0} - {1} : {1} - {0}) + {2}", ("",) * 3, ""),
    "copysign": ("std::copysign({1}, {0})", ("", ""), ""),
}


@emitter(*_SIMPLE)
def emit_simple(e: FunctionEmitter, ins: Instruction) -> str:
    """Instructions that are one call of a function in runtime/math.h."""
    template, types, out = _SIMPLE[ins.op]
    type_ = _type(ins)
    if ins.op == "prmt" and len(ins.mods) != 1:
        raise UnsupportedError(ins.text)
    if ins.op == "lop3" and len(ins.operands) != 5:
        raise UnsupportedError(ins.text)
    args = [e.read(text, t or type_) for text, t in zip(ins.operands[1:], types, strict=True)]
    return result(e, ins, template.format(*args, c=CPP_TYPE[type_]), out or type_)


@emitter("bfind")
def emit_bfind(e: FunctionEmitter, ins: Instruction) -> str:
    """Position of the most significant non-sign bit."""
    (a,) = _sources(e, ins)
    return result(e, ins, f"bfind({a}, {str(ins.has('shiftamt')).lower()})", "u32")


@emitter("bmsk")
def emit_bmsk(e: FunctionEmitter, ins: Instruction) -> str:
    """Bit mask."""
    a, b = _sources(e, ins)
    return result(e, ins, f"bmsk({a}, {b}, {str(ins.has('clamp')).lower()})", "u32")


@emitter("dp4a")
def emit_dp4a(e: FunctionEmitter, ins: Instruction) -> str:
    """Four-byte dot product."""
    kinds = ["int8_t" if m == "s32" else "uint8_t" for m in ins.mods]
    args = ", ".join(e.raw(text, "b32") for text in ins.operands[1:4])
    return e.set(ins.operands[0], f"dp4a<{kinds[0]}, {kinds[1]}>({args})")


def _comparison(e: FunctionEmitter, ins: Instruction, type_: str) -> str:
    a = e.read(ins.operands[1], type_, ins.has("ftz"))
    b = e.read(ins.operands[2], type_, ins.has("ftz"))
    if type_ in FLOATS:
        return f"({_FLOAT_COMPARE[ins.mods[0]].format(a, b)})"
    return f"({a} {_INT_COMPARE[ins.mods[0]]} {b})"


@emitter("setp")
def emit_setp(e: FunctionEmitter, ins: Instruction) -> str:
    """setp, also with a second destination and a boolean operand."""
    if _is_packed(ins):
        raise UnsupportedError(ins.text)
    compare = _comparison(e, ins, _type(ins))
    yes, no = "yes", "!yes"
    operator = {"and": "&", "or": "|", "xor": "^"}.get(ins.mods[1])
    if operator:
        third = e.raw(ins.operands[3], "pred")
        yes, no = (f"bool(({v}) {operator} ({third}))" for v in (yes, no))
    dests = [d.strip() for d in ins.operands[0].split("|")]
    code = f"bool yes = {compare}; bool first = {yes}, second = {no}; (void)second; "
    code += e.set(dests[0], "first")
    if len(dests) > 1:
        code += " " + e.set(dests[1], "second")
    return code


@emitter("set")
def emit_set(e: FunctionEmitter, ins: Instruction) -> str:
    """set: comparison result as an integer mask or 1.0f."""
    out = ins.mods[-2]
    compare = _comparison(e, ins, _type(ins))
    if len(ins.operands) != 3 or out not in ("u32", "s32", "f32"):
        raise UnsupportedError(ins.text)
    values = "1.0f : 0.0f" if out == "f32" else "~0u : 0u"
    return e.write(ins.operands[0], out, f"({compare} ? {values})")


@emitter("selp")
def emit_selp(e: FunctionEmitter, ins: Instruction) -> str:
    """Select by predicate."""
    a, b = (_unsigned(e, text, _type(ins)) for text in ins.operands[1:3])
    return e.set(ins.operands[0], f"{e.raw(ins.operands[3], 'pred')} ? {a} : {b}")


@emitter("slct")
def emit_slct(e: FunctionEmitter, ins: Instruction) -> str:
    """Select by sign."""
    type_ = ins.mods[-2]
    a, b = (_unsigned(e, text, type_) for text in ins.operands[1:3])
    return e.set(ins.operands[0], f"{e.read(ins.operands[3], _type(ins))} >= 0 ? {a} : {b}")


@emitter("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def emit_function(e: FunctionEmitter, ins: Instruction) -> str:
    """Elementary functions, computed with libm."""
    if _is_packed(ins):
        return _packed(e, ins)
    type_ = _type(ins)
    (a,) = _sources(e, ins)
    if ins.op == "rcp":
        return result(e, ins, rounded(ins, f"1 / {a}"))
    if ins.op == "rsqrt":
        return result(e, ins, f"{CPP_TYPE[type_]}(1.0 / std::sqrt(double({a})))")
    name = {"ex2": "exp2", "lg2": "log2"}.get(ins.op, ins.op)
    return result(e, ins, rounded(ins, f"std::{name}({a})"))


@emitter("testp")
def emit_testp(e: FunctionEmitter, ins: Instruction) -> str:
    """Classification of a float."""
    (a,) = _sources(e, ins)
    test = {
        "finite": "std::isfinite",
        "infinite": "std::isinf",
        "notanumber": "std::isnan",
        "number": "!std::isnan",
        "normal": "std::isnormal",
    }.get(ins.mods[0])
    if test:
        return e.set(ins.operands[0], f"{test}({a})")
    return e.set(ins.operands[0], f"std::fpclassify({a}) == FP_SUBNORMAL")


@emitter("mov")
def emit_mov(e: FunctionEmitter, ins: Instruction) -> str:
    """mov, also packing and unpacking of vectors."""
    dest, source = ins.operands
    type_ = _type(ins)
    if dest.startswith("{"):
        parts = split_operands(dest[1:-1])
        size = TYPE_SIZE[type_] // len(parts)
        code = f"auto whole = {e.raw(source, type_)}; "
        return code + " ".join(
            e.set(part, f"{UINT[size]}(whole >> {8 * size * i})") for i, part in enumerate(parts)
        )
    if source.startswith("{"):
        parts = split_operands(source[1:-1])
        size = TYPE_SIZE[type_] // len(parts)
        whole = UINT[TYPE_SIZE[type_]]
        terms = [
            f"{whole}({UINT[size]}({e.raw(part, f'b{8 * size}')})) << {8 * size * i}"
            for i, part in enumerate(parts)
        ]
        return e.set(dest, " | ".join(terms))
    return e.set(dest, e.raw(source, type_))
