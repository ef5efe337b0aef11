"""Loads, stores, atomics, cp.async, address conversion and cache hints."""

from __future__ import annotations

from .codegen import CPP_TYPE, UINT, FunctionEmitter, emitter
from .errors import UnsupportedError
from .parser import TYPE_SIZE, Instruction, split_operands

_SPACES = {
    "global": "Global",
    "shared": "Shared",
    "local": "Local",
    "const": "Global",
    "param": "Param",
}
_STRONG = ("volatile", "relaxed", "acquire", "release", "mmio")
_DEVICE_SCOPE = ("gpu", "sys")


def _space(ins: Instruction) -> str:
    return f"Space::{_SPACES.get(ins.first(tuple(_SPACES)) or '', 'Generic')}"


def _vector(ins: Instruction) -> int:
    return int((ins.first(("v2", "v4", "v8")) or "v1")[1:])


def _elements(text: str, count: int) -> list[str]:
    parts = split_operands(text[1:-1]) if text.startswith("{") else [text]
    if len(parts) != count:
        raise UnsupportedError(f"{text}: {count} elements expected")
    return parts


def _extended(e: FunctionEmitter, dest: str, type_: str, value: str) -> str:
    """Assignment of a loaded element; signed types extend to wider registers."""
    if dest == "_":
        return ""
    name, reg_type = e.register(dest)
    if type_[0] == "s" and TYPE_SIZE[reg_type] > TYPE_SIZE[type_]:
        return f"{name} = {UINT[TYPE_SIZE[reg_type]]}(int64_t({CPP_TYPE[type_]}({value})));"
    return f"{name} = {value};"


def _device(ins: Instruction) -> str:
    """Whether other blocks take part in the order that a strong load or store makes."""
    device = ins.has(*_DEVICE_SCOPE) or (ins.has("volatile") and not _is_shared(ins))
    return str(device).lower()


def _acquires(ins: Instruction) -> str:
    return str(ins.has("acquire", "acq_rel")).lower()


def _is_shared(ins: Instruction) -> bool:
    return ins.first(("shared",)) is not None


@emitter("ld", "ldu")
def emit_load(e: FunctionEmitter, ins: Instruction) -> str:
    """ld; cache operators and eviction priorities have no effect."""
    count = _vector(ins)
    dests = _elements(ins.operands[0], count)
    type_ = ins.mods[-1]
    code = f"{UINT[TYPE_SIZE[type_]]} v[{count}]; "
    own_param = e.param_pointer(ins.operands[1]) if ins.first(("param",)) else None
    if own_param:
        code += f"std::memcpy(v, {own_param}, sizeof v); "
    else:
        strong = ins.has(*_STRONG)
        access = "StrongRead" if strong else "ReadOnly" if ins.has("nc") else "Read"
        template = f"load_vector<{_space(ins)}, Access::{access}>"
        code += f"{template}(t, {e.address(ins.operands[1])}, {e.site()}, v); "
        if strong:
            code += f"thread_observe(t, {_device(ins)}, {_acquires(ins)}); "
    return code + " ".join(_extended(e, d, type_, f"v[{i}]") for i, d in enumerate(dests))


@emitter("st")
def emit_store(e: FunctionEmitter, ins: Instruction) -> str:
    """st."""
    count = _vector(ins)
    type_ = ins.mods[-1]
    raw = UINT[TYPE_SIZE[type_]]
    values = [f"{raw}({e.raw(x, type_)})" for x in _elements(ins.operands[1], count)]
    code = f"{raw} v[{count}] = {{{', '.join(values)}}}; "
    own_param = e.param_pointer(ins.operands[0]) if ins.first(("param",)) else None
    if own_param:
        return f"{code}std::memcpy({own_param}, v, sizeof v);"
    strong = ins.has(*_STRONG)
    access = "StrongWrite" if strong else "Write"
    if ins.has("release"):
        code += f"thread_release(t, {_device(ins)}); "
    if strong and _device(ins) == "true":
        code += "thread_publish(t); "
    template = f"store_vector<{_space(ins)}, Access::{access}>"
    return f"{code}{template}(t, {e.address(ins.operands[0])}, {e.site()}, v);"


_ATOMIC = {
    "add": "T(o + v)",
    "min": "v < o ? v : o",
    "max": "o < v ? v : o",
    "and": "T(o & v)",
    "or": "T(o | v)",
    "xor": "T(o ^ v)",
    "exch": "v",
    "inc": "o >= v ? T(0) : T(o + 1)",
    "dec": "o == 0 || o > v ? v : T(o - 1)",
}
_ATOMIC_HALF = {"add": "{0} + {1}", "min": "fmin_num({0}, {1})", "max": "fmax_num({0}, {1})"}


def _atomic_element(e: FunctionEmitter, ins: Instruction, op: str, value: str, ptr: str) -> str:
    """Expression that performs one atomic and yields the old raw bits."""
    type_ = ins.mods[-1] if ins.mods[-1] in TYPE_SIZE else ins.first(list(TYPE_SIZE))
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        half = type_.removesuffix("x2")
        raw = UINT[TYPE_SIZE[type_]]
        body = _ATOMIC_HALF[op].format(f"{half}_to_f32(x)", f"{half}_to_f32(y)")
        return (
            f"rmw_packed<{raw}>({ptr}, {raw}({e.raw(value, type_)}), "
            f"[](uint16_t x, uint16_t y) {{ return to_{half}({body}); }})"
        )
    cpp = CPP_TYPE[type_]
    if op == "cas":
        compare = e.read(value, type_)
        swap = e.read(ins.operands[3 if ins.op == "atom" else 2], type_)
        body = f"[&](T o) {{ return bits<T>(o) == bits<T>({compare}) ? T({swap}) : o; }}"
        return f"[&] {{ using T = {cpp}; return rmw<T>({ptr}, {body}); }}()"
    if cpp in ("float", "double") and op not in ("add", "min", "max", "exch"):
        raise UnsupportedError(ins.text)
    result = _ATOMIC[op]
    if type_ == "f32" and op == "add" and ins.first(("global",)):
        result = "ftz(ftz(o) + ftz(v))"  # unlike in shared memory
    body = f"[=](T o) -> T {{ return {result}; }}"
    return (
        f"[&] {{ using T = {cpp}; T v = {e.read(value, type_)}; return rmw<T>({ptr}, {body}); }}()"
    )


@emitter("atom", "red")
def emit_atomic(e: FunctionEmitter, ins: Instruction) -> str:
    """atom and red, scalar and vector (.v2 .v4 .v8, packed halves)."""
    op = ins.first((*_ATOMIC, "cas"))
    type_ = ins.first(list(TYPE_SIZE))
    if op is None or type_ is None or TYPE_SIZE[type_] not in (2, 4, 8):
        raise UnsupportedError(ins.text)
    count = _vector(ins)
    size = TYPE_SIZE[type_]
    has_result = ins.op == "atom"
    operands = ins.operands[1:] if has_result else ins.operands
    dests = _elements(ins.operands[0], count) if has_result else ["_"] * count
    values = _elements(operands[1], count)
    observed = any(d != "_" and e.is_used(d) for d in dests)
    device = str(not ins.has("cta") and not _is_shared(ins)).lower()
    code = ""
    if ins.has("release", "acq_rel"):
        code += f"thread_release(t, {device}); "
    if device == "true":
        code += "thread_publish(t); "
    code += (
        f"uint8_t* p = pointer<{_space(ins)}>"
        f"(t, {e.address(operands[0])}, {size * count}, Access::Atomic, {e.site()}); "
    )
    for i, (dest, value) in enumerate(zip(dests, values, strict=True)):
        place = f"p + {i * size}" if i else "p"
        code += f"auto old{i} = {_atomic_element(e, ins, op, value, place)}; (void)old{i}; "
        if dest != "_":
            code += f"{e.set(dest, f'old{i}')} "
    if observed:
        code += f"thread_observe(t, {device}, {_acquires(ins)}); "
    if observed or op in ("cas", "exch"):  # the thread may be spinning
        code += "poll(t, 64);"
    return code


@emitter("cp")
def emit_cp(e: FunctionEmitter, ins: Instruction) -> str:
    """cp.async with commit, wait_group and wait_all."""
    if ins.mods[0] != "async":
        raise UnsupportedError(ins.text)
    if ins.mods[1] == "commit_group":
        return "cp_async_commit(t);"
    if ins.mods[1] == "wait_group":
        return f"cp_async_wait_group(t, {e.raw(ins.operands[0], 'u32')});"
    if ins.mods[1] == "wait_all":
        return "cp_async_wait_all(t);"
    if ins.mods[1] not in ("ca", "cg"):
        raise UnsupportedError(ins.text)
    dst, src = (e.address(text) for text in ins.operands[:2])
    size = int(ins.operands[2], 0)
    source_size = str(size)
    if len(ins.operands) > 3 and not ins.has("L2::cache_hint"):
        if ins.operands[3] in e.uses and _is_predicate(e, ins.operands[3]):
            source_size = f"({e.raw(ins.operands[3], 'pred')} ? 0 : {size})"
        else:
            source_size = e.raw(ins.operands[3], "u32")
    elif len(ins.operands) > 4:
        source_size = e.raw(ins.operands[3], "u32")
    return f"cp_async(t, {dst}, {src}, {size}, uint32_t({source_size}));"


def _is_predicate(e: FunctionEmitter, text: str) -> bool:
    try:
        return e.register(text.lstrip("!"))[1] == "pred"
    except UnsupportedError:
        return False


@emitter("cvta")
def emit_cvta(e: FunctionEmitter, ins: Instruction) -> str:
    """Shared and local addresses are offsets, all others are generic addresses already."""
    dest, source = ins.operands
    value = e.raw(source, "u64")
    space = ins.first(("shared", "local"))
    if space:
        base = {"shared": "reinterpret_cast<uint64_t>(t.block->shared)", "local": "t.stack"}[space]
        value = f"uint64_t({value}) {'-' if 'to' in ins.mods else '+'} {base}"
    return e.set(dest, value)


@emitter("isspacep")
def emit_isspacep(e: FunctionEmitter, ins: Instruction) -> str:
    """Which space a generic address belongs to."""
    address = f"uint64_t({e.raw(ins.operands[1], 'u64')})"
    test = {s: f"is_{s}_address(t, {address})" for s in ("shared", "local", "param")}
    test["global"] = f"!({' || '.join(test.values())})"
    return e.set(ins.operands[0], test[ins.mods[0].split("::")[0]])


@emitter("membar", "fence")
def emit_fence(e: FunctionEmitter, ins: Instruction) -> str:
    """Fences order accesses for the race detectors."""
    if ins.has("proxy"):
        return ""
    return f"thread_fence(t, {str(ins.has('gl', *_DEVICE_SCOPE)).lower()});"


@emitter(
    "prefetch", "prefetchu", "discard", "applypriority", "pmevent", "griddepcontrol", "setmaxnreg"
)
def emit_nothing(e: FunctionEmitter, ins: Instruction) -> str:
    """Hints without effect on results."""
    return ""


@emitter("createpolicy")
def emit_createpolicy(e: FunctionEmitter, ins: Instruction) -> str:
    """Cache policies are ignored."""
    return e.set(ins.operands[0], "0")
