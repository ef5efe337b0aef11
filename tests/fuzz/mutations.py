"""Other bytes, other headers, other tensors: what a file may be made of."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from fuzz import trees
from fuzz.choices import Choices
from fuzz.containers import SIZES, Container, Stored, header_of, join
from fuzz.trees import Object

DTYPES = (*SIZES, "F4", "F6_E2M3", "F6_E3M2", "U4", "f32", "", "Q8")

#: Sizes that a header may claim.
_CLAIMS = (0, 1, 2, 7, 8, 1 << 10, 1 << 20, 1 << 25, (1 << 25) + 1, 100_000_000, 1 << 31, 1 << 62)

#: Bit patterns of float32: zeros, ones, subnormal, infinities, NaNs.
_FLOATS = (0, 0x80000000, 0x3F800000, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF)


def change_bytes(choices: Choices, content: bytes) -> bytes:
    """Set, insert, remove, repeat or cut off some bytes."""
    at = choices.integer(0, len(content))
    size = choices.pick([1, 1, 1, 2, 3, 4, 8, 16, 64])
    kind = choices.integer(0, 7)
    if kind == 0 and at < len(content):
        bit = 1 << choices.integer(0, 7)
        return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + choices.data(size) + content[at + size :]
    if kind == 2:
        return content[:at] + choices.data(size) + content[at:]
    if kind == 3:
        return content[:at] + content[at + size :]
    if kind == 4:
        return content[:at]
    if kind == 5:
        return content[:at] + content[at : at + size] * choices.integer(2, 9) + content[at + size :]
    if kind == 6:
        return content + choices.data(size)
    pattern = choices.pick([b"\0", b"\xff", b"\x7f", b"\x80", b"9", b'"', b"[", b"{"])
    return content[:at] + pattern * size + content[at + size :]


def change_text(choices: Choices, text: str) -> str:
    """The same for text."""
    return change_bytes(choices, text.encode("utf-8", "surrogatepass")).decode("latin-1")


def change_json(choices: Choices, text: str | bytes) -> str:
    """Another JSON text; if it is none, or seldom, changed as text."""
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    if choices.one_in(8):
        return change_text(choices, text)
    try:
        tree = trees.parse(text)
    except (ValueError, RecursionError):
        return change_text(choices, text)
    return trees.dump(trees.mutate(choices, tree))


#: Text that takes most memory for its length once it is parsed.
_BLOATED = (
    *("[]", '""', "{}", '{"":0}', "1e9", "99999", '"ā"', '"😀"', '"ab"', "null", "[[]]"),
    *('["a",[],"float32",[],"00000000000000000000000000000000",0]', '"\\u0101"', '{"a":{"b":{}}}'),
)


def bloated_json(choices: Choices, size: int) -> str:
    """JSON of about so many bytes: a list, or an object with as many keys."""
    item = choices.pick(_BLOATED)
    count = size // (len(item.encode()) + 1)
    if choices.one_in(2):
        return "[" + ",".join([item] * count) + "]"
    return "{" + ",".join(f'"{i}":{item}' for i in range(count // 2)) + "}"


def bloat(choices: Choices, container: Container, size: int) -> None:
    """Make something in a file large: a text, the number of texts or of tensors, a shape, data."""
    kind = choices.integer(0, 5)
    keys = [str(pair[0]) for pair in container.texts.pairs()]
    if kind <= 1 and keys:
        container.texts.put(choices.pick(keys), bloated_json(choices, size))
    elif kind == 2:
        container.texts.extend([str(i), ""] for i in range(size // 10))
    elif kind == 3:
        dtype = choices.pick(["U8", "I32", "F32"])
        container.tensors.extend(Stored(f"t{i}", dtype, [0], b"") for i in range(size // 60))
    elif kind == 4:
        container.tensors.append(Stored("deep", "F32", [1] * (size // 2), bytes(4)))
    elif container.tensors:
        tensor = choices.pick(container.tensors)
        width = SIZES.get(str(tensor.dtype), 1)
        tensor.data = (tensor.data or b"\0") * (size // max(1, len(tensor.data)))
        tensor.data = tensor.data[: len(tensor.data) // width * width]
        tensor.shape = [len(tensor.data) // width]


def change_tensors(choices: Choices, container: Container) -> None:
    """Change a tensor, or add, repeat, rename, reorder or leave out one."""
    if not container.tensors:
        container.tensors.append(Stored("a", "F32", [1], bytes(4)))
        return
    tensor = choices.pick(container.tensors)
    choices.pick(_TENSOR_CHANGES)(choices, container, tensor)


def _other_values(choices: Choices, container: Container, tensor: Stored) -> None:
    tensor.data = change_bytes(choices, tensor.data)[: len(tensor.data)].ljust(
        len(tensor.data), b"\0"
    )


def _odd_number(choices: Choices, container: Container, tensor: Stored) -> None:
    size = SIZES.get(tensor.dtype, 1) if isinstance(tensor.dtype, str) else 1
    number = choices.pick([0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), *_FLOATS])
    at = choices.integer(0, max(0, len(tensor.data) // size - 1)) * size
    data = struct.pack("<Q", number % 2**64)[:size]
    tensor.data = (tensor.data[:at] + data + tensor.data[at + size :])[: len(tensor.data)]


def _resize(choices: Choices, container: Container, tensor: Stored) -> None:
    """More or fewer elements, and a shape that says so."""
    size = SIZES.get(tensor.dtype, 1) if isinstance(tensor.dtype, str) else 1
    count = max(0, len(tensor.data) // size + choices.pick([-1, 1, 2, -2, -1000, 64]))
    tensor.data = tensor.data[: count * size].ljust(count * size, b"\0")
    tensor.shape = [count]


def _reshape(choices: Choices, container: Container, tensor: Stored) -> None:
    count = math.prod(tensor.shape) if all(map(_is_size, tensor.shape)) else 1
    odd = [[1, count], [count, 1], [1] * 70 + [count], [2**32, 2**32], [2**63, 2], [0], [], [-1]]
    tensor.shape = choices.pick([*odd, [count, 0], [count + 1], [2**64], [count / 1]])


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size <= 2**64


def _retype(choices: Choices, container: Container, tensor: Stored) -> None:
    """Another dtype, and often the shape that fits it."""
    tensor.dtype = choices.pick(DTYPES)
    if tensor.dtype in SIZES and not choices.one_in(3):
        size = SIZES[tensor.dtype]
        tensor.data = tensor.data[: len(tensor.data) // size * size]
        tensor.shape = [len(tensor.data) // size]


def _rename(choices: Choices, container: Container, tensor: Stored) -> None:
    names = [other.name for other in container.tensors]
    odd = ["", "a", "__metadata__", "x" * 2000, "\0", "\x1b[2J", "é", "日本", "a\nb", "0", "-1"]
    tensor.name = choices.pick([*names, *odd])


def _repeat(choices: Choices, container: Container, tensor: Stored) -> None:
    name = choices.pick([tensor.name, f"{tensor.name}2"])
    container.tensors.append(Stored(name, tensor.dtype, tensor.shape, tensor.data))


def _leave_out(choices: Choices, container: Container, tensor: Stored) -> None:
    container.tensors.remove(tensor)


def _exchange(choices: Choices, container: Container, tensor: Stored) -> None:
    other = choices.pick(container.tensors)
    tensor.data, other.data = other.data, tensor.data
    tensor.dtype, other.dtype = other.dtype, tensor.dtype
    tensor.shape, other.shape = other.shape, tensor.shape


def _reorder(choices: Choices, container: Container, tensor: Stored) -> None:
    container.tensors.remove(tensor)
    container.tensors.insert(choices.integer(0, len(container.tensors)), tensor)


_TENSOR_CHANGES: tuple[Callable[[Choices, Container, Stored], None], ...] = (
    *(_other_values, _other_values, _odd_number, _odd_number, _resize, _reshape, _retype),
    *(_rename, _repeat, _leave_out, _exchange, _reorder),
)


def change_texts(choices: Choices, container: Container) -> None:
    """Change the metadata as a whole: a key, a value, one more, one less, one twice."""
    changed = trees.mutate(choices, container.texts)
    container.texts = changed if isinstance(changed, Object) else Object([["format", changed]])


def write(choices: Choices, container: Container) -> bytes:
    """A file of the parts: mostly a proper one, whose header is sometimes wrong, too."""
    header, data = header_of(container)
    if choices.one_in(6):
        header = trees.mutate(choices, header)
    if choices.one_in(12):
        data = change_bytes(choices, data)
    claim = choices.pick(_CLAIMS) if choices.one_in(50) else None
    content = join(header, data, aligned=not choices.one_in(6), claim=claim)
    return change_bytes(choices, content) if choices.one_in(6) else content
