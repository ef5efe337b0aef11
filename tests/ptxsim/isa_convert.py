"""Conversions."""

from __future__ import annotations

from .codegen import CPP_TYPE, FLOATS, FunctionEmitter, emitter
from .errors import UnsupportedError
from .isa_arith import result, rounded
from .parser import TYPE_SIZE, Instruction


def _convert_packed(e: FunctionEmitter, ins: Instruction, dest: str) -> str:
    if ins.has("satfinite"):
        raise UnsupportedError(ins.text)
    element = dest[:-2]
    suffix = "_rz" if ins.has("rz") else ""
    halves = []
    for text in (ins.operands[2], ins.operands[1]):
        value = e.read(text, "f32")
        if ins.has("relu"):
            value = f"fmax_nan({value}, 0.0f)"
        halves.append(f"uint32_t(f32_to_{element}{suffix}({value}))")
    return e.set(ins.operands[0], f"{halves[0]} | {halves[1]} << 16")


def _convert_float(e: FunctionEmitter, ins: Instruction, dest: str, value: str) -> str:
    """Float to float."""
    integral = ins.first(("rni", "rzi", "rmi", "rpi"))
    if integral:
        name = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[integral]
        value = f"std::{name}({value})"
    if ins.has("relu"):
        value = f"fmax_nan<decltype({value})>({value}, 0)"
    if dest in ("f16", "bf16") and ins.has("rz", "rm", "rp"):
        if not ins.has("rz") or ins.mods[-1] != "f32":
            raise UnsupportedError(ins.text)
        return e.set(ins.operands[0], f"f32_to_{dest}_rz({value})")
    if dest == "f32" and ins.mods[-1] == "f64":
        value = f"float({value})"
    return result(e, ins, rounded(ins, value), dest)


@emitter("cvt")
def emit_cvt(e: FunctionEmitter, ins: Instruction) -> str:
    """Conversions among integer and floating-point types up to 64 bits, and to tf32."""
    dest, source = ins.mods[-2:]
    if dest in ("f16x2", "bf16x2") and source == "f32":
        return _convert_packed(e, ins, dest)
    if dest == "tf32" and source == "f32" and not ins.has("relu", "satfinite", "rz"):
        name = "to_tf32_rna" if ins.has("rna") else "to_tf32_rn"
        return e.set(ins.operands[0], f"{name}({e.read(ins.operands[1], 'f32')})")
    known = {*FLOATS, *CPP_TYPE}
    if dest not in known or source not in known or ins.has("satfinite"):
        raise UnsupportedError(ins.text)
    value = e.read(ins.operands[1], source, ins.has("ftz"))
    if source in FLOATS and dest in FLOATS:
        return _convert_float(e, ins, dest, value)
    if source in FLOATS:
        name = {"rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}.get(
            ins.first(("rni", "rzi", "rmi", "rpi")) or "", "trunc"
        )
        return result(e, ins, f"float_to_int<{CPP_TYPE[dest]}>(std::{name}({value}))", dest)
    if dest in FLOATS:
        wide = CPP_TYPE.get(dest) or ("to_f64_odd" if TYPE_SIZE[source] == 8 else "double")
        return result(e, ins, rounded(ins, f"{wide}({value})"), dest)
    if ins.has("sat"):
        value = f"clamp_int<{CPP_TYPE[dest]}>({value})"
    return result(e, ins, value, dest)
