"""Files of ``torch.save`` taken apart: the parts of a zip archive, the operations of a pickle."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from dataclasses import dataclass

from fuzz import mutations
from fuzz.choices import Choices


@dataclass
class Part:
    """A file in an archive."""

    name: str
    data: bytes
    method: int = zipfile.ZIP_STORED


def parts_of(content: bytes) -> list[Part]:
    """The parts of an archive.

    Raises:
        Exception: of many kinds, if it is none.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [Part(name, archive.read(name)) for name in archive.namelist()]


def join(parts: list[Part]) -> bytes:
    """An archive of these parts."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for part in parts:  # the same bytes each time: ZipInfo's date is 1980
            archive.writestr(zipfile.ZipInfo(part.name), part.data, compress_type=part.method)
    return target.getvalue()


#: What a pickle asks for by name: foreign code, and what makes tensors.
_NAMES = (
    *("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr"),
    *("builtins __import__", "subprocess Popen", "torch load", "torch.jit load", "pickle loads"),
    *("torch.storage _load_from_bytes", "torch.serialization load", "torch.hub load"),
    *("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch Tensor"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch Size"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_parameter"),
    *("torch FloatStorage", "torch BFloat16Storage", "torch.storage UntypedStorage"),
    *("torch.nn.parameter Parameter", "collections OrderedDict", "collections Counter"),
    *("builtins bytearray", "builtins set", "_codecs encode", "torch float8_e5m2", "a b"),
)

#: Whole pieces of pickles that do harm where they are executed, or try to.
_SNIPPETS = (
    b"cos\nsystem\n(S'touch /tmp/executed'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"c_codecs\nencode\n(S'a'\nS'zip'\ntR.",
    b"cbuiltins\nbytearray\n(I99999999999\ntR.",
    b"ccollections\nCounter\n(S'abc'\ntR.",
    b"ctorch\nSize\n((I99999999999\nttR.",
    b"(lp0\n0g0\ng0\na.",
    b"(" * 5000,
    b"]" * 5000 + b"a" * 4999 + b".",
)

_INTEGERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def change_pickle(choices: Choices, data: bytes) -> bytes:
    """Change, leave out, repeat or exchange operations, or put in what nobody should execute."""
    if choices.one_in(6):
        return choices.pick(_SNIPPETS)
    if choices.one_in(4):
        return mutations.change_bytes(choices, data)
    try:
        operations = _operations(data)
    except Exception:
        return mutations.change_bytes(choices, data)
    for _ in range(choices.integer(1, 3)):
        _change_operation(choices, operations)
    return b"".join(operations)


def _operations(data: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(data)]
    return [data[i:j] for i, j in zip(places, [*places[1:], len(data)], strict=True)]


def _change_operation(choices: Choices, operations: list[bytes]) -> None:
    at = choices.integer(0, len(operations) - 1)
    kind = choices.integer(0, 6)
    if kind == 0 and len(operations) > 1:
        del operations[at]
    elif kind == 1:
        operations.insert(at, operations[at])
    elif kind == 2:
        other = choices.integer(0, len(operations) - 1)
        operations[at], operations[other] = operations[other], operations[at]
    elif kind == 3:
        operations[at] = b"\x8a\x08" + struct.pack("<q", choices.pick(_INTEGERS))
    elif kind == 4:
        operations[at] = choices.pick(_SNIPPETS)[:-1]
    else:
        _change_argument(choices, operations, at)


def _change_argument(choices: Choices, operations: list[bytes], at: int) -> None:
    """Another name or another integer, at the next place where there is one."""
    for i in [*range(at, len(operations)), *range(at)]:
        if operations[i][:1] == b"c":
            operations[i] = b"c%s\n" % choices.pick(_NAMES).replace(" ", "\n").encode()
            return
        if operations[i][:1] in b"KMJ":
            operations[i] = b"\x8a\x08" + struct.pack("<q", choices.pick(_INTEGERS))
            return


def change_archive(choices: Choices, content: bytes) -> bytes:
    """Change a part, or add, repeat, rename, compress or leave out one."""
    parts = parts_of(content)
    for _ in range(choices.integer(1, 2)):
        if parts:
            _change_part(choices, parts)
    joined = join(parts)
    return mutations.change_bytes(choices, joined) if choices.one_in(6) else joined


def _change_part(choices: Choices, parts: list[Part]) -> None:
    pickles = [part for part in parts if part.name.endswith(".pkl")]
    if pickles and choices.one_in(2):
        pickles[0].data = change_pickle(choices, pickles[0].data)
        return
    part = choices.pick(parts)
    kind = choices.integer(0, 6)
    if kind == 0:
        parts.remove(part)
    elif kind == 1:
        parts.append(Part(part.name, part.data))
    elif kind == 2:
        part.name = choices.pick([*(each.name for each in parts), " ", "../a", "x" * 300, "a/b"])
    elif kind == 3:
        part.method = zipfile.ZIP_DEFLATED
        part.data += bytes(choices.pick([0, 1 << 16, 1 << 22]))
    elif kind == 4:
        part.data = part.data[: choices.integer(0, len(part.data))]
    else:
        part.data = mutations.change_bytes(choices, part.data)
