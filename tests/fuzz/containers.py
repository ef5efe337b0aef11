"""A safetensors file taken apart, and put together again however wrong its parts are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fuzz import trees
from fuzz.trees import Object

#: Bytes of an element, by the name of its dtype in the file.
SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4},
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8},
}


@dataclass
class Stored:
    """A tensor in a file."""

    name: Any
    dtype: Any
    shape: Any
    data: bytes


@dataclass
class Container:
    """What a safetensors file holds.

    Attributes:
        texts: its metadata, text to text.
        tensors: in the order of their data.
        extra: further entries of the header.
    """

    texts: Object = field(default_factory=Object)
    tensors: list[Stored] = field(default_factory=list)
    extra: Object = field(default_factory=Object)

    def find(self, name: str) -> Stored | None:
        """The tensor of that name; the last one, as readers of JSON take what is there twice."""
        return next((each for each in reversed(self.tensors) if each.name == name), None)


def split(content: bytes) -> tuple[Object, bytes]:
    """Header and data.

    Raises:
        ValueError: if the content is no such file.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("no safetensors file")
    header = trees.parse(content[8 : 8 + size])
    if not isinstance(header, Object):
        raise ValueError("no safetensors file")
    return header, content[8 + size :]


def parse(content: bytes) -> Container:
    """Take a file apart.

    Raises:
        ValueError: if it is no safetensors file, or a tensor lies outside its data.
    """
    header, data = split(content)
    container = Container()
    for name, entry in header.pairs():
        if name == "__metadata__":
            container.texts = entry if isinstance(entry, Object) else Object()
        else:
            container.tensors.append(_stored(name, entry, data))
    return container


def _stored(name: str, entry: Any, data: bytes) -> Stored:
    fields = trees.plain(entry)
    try:
        begin, end = fields["data_offsets"]
        return Stored(name, fields["dtype"], fields["shape"], data[begin:end])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError("no safetensors file") from error


def header_of(container: Container) -> tuple[Object, bytes]:
    """The header that describes the parts, and their data."""
    header = Object([["__metadata__", container.texts], *container.extra])
    position = 0
    for tensor in container.tensors:
        end = position + len(tensor.data)
        entry = [
            ["dtype", tensor.dtype],
            ["shape", tensor.shape],
            ["data_offsets", [position, end]],
        ]
        header.append([tensor.name, Object(entry)])
        position = end
    return header, b"".join(tensor.data for tensor in container.tensors)


def join(header: Any, data: bytes, *, aligned: bool = True, claim: int | None = None) -> bytes:
    """A file of a header and data.

    Args:
        header: any tree.
        data: what follows it.
        aligned: let the data begin at a multiple of eight, as safetensors does.
        claim: the size of the header that the file names; None: the right one.
    """
    text = trees.dump(header).encode("utf-8", "surrogatepass")
    if aligned:
        text = text.ljust(math.ceil(len(text) / 8) * 8)
    size = len(text) if claim is None else claim
    return size.to_bytes(8, "little") + text + data


def assemble(container: Container) -> bytes:
    """Put the parts together; offsets and sizes are right, if dtypes and shapes are."""
    return join(*header_of(container))
