"""Reading files that somebody else may have made: what they claim is bounded before it is believed.

Whoever makes a hostile file can make its checksums right, too. So everything in it is checked, and
what of it ends up in a message is cut short and cannot steer a terminal.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import safetensors

#: The most that the header of a safetensors file may take. Parsed JSON takes many times the memory
#: of its text; real headers have about 120 bytes per parameter.
MAX_HEADER = 1 << 25

#: The most characters of a parameter's name, as messages show it.
MAX_NAME = 1000

#: What is written here has a bracket in ten characters or more; short texts may have any number.
_CHARACTERS_PER_BRACKET = 6
_BRACKETS = 1000

#: A string in JSON, or what begins as one and has no end; found without ever going back.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)

_MAX_SHOWN = 300
_MAX_QUOTED = 100


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file whose header is of a bearable size.

    Yields:
        what ``safetensors.safe_open`` gives.

    Raises:
        OSError: if it cannot be read, or is no file but a folder, a pipe or a device.
        SafetensorError: if it is broken, or its header too large.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
        reason = os.strerror(kind) if kind == errno.EISDIR else "it is no regular file"
        raise OSError(kind, reason, os.fspath(path))
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise safetensors.SafetensorError(f"it claims a header of {size:,} bytes")
    with safetensors.safe_open(os.fspath(path), framework="pt") as opened:
        yield opened


def require_plain_archive(path: str | os.PathLike[str]) -> None:
    """Refuse an archive with compressed parts: torch and NumPy write none; any size may come out.

    Raises:
        ValueError: if it has such parts, or parts that lie within others.
        Exception: of several kinds, if it is no archive.
    """
    with ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != ZIP_STORED for part in parts):
        raise ValueError("a part of it is compressed")
    if sum(part.file_size for part in parts) > os.path.getsize(path):
        raise ValueError("its parts overlap")


def parse_json(text: str) -> Any:
    """Parse JSON of any origin, in at most some 25 bytes of memory for each of its characters.

    Raises:
        ValueError: if it is none, is nested too deeply, holds a number with too many digits, or
            consists of hardly anything but brackets: an empty list takes 80 bytes.
    """
    most = _BRACKETS + len(text) // _CHARACTERS_PER_BRACKET
    if _brackets(text) > most and _brackets(_STRING.sub("", text)) > most:
        raise ValueError("it consists of brackets")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _brackets(text: str) -> int:
    return text.count("[") + text.count("{")


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file; False for what cannot be a path at all."""
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def is_name(text: object) -> bool:
    """Whether this can be the name of a parameter, of a length that messages can show."""
    return isinstance(text, str) and len(text) <= MAX_NAME and len(repr(text)) <= MAX_NAME + 2


def near_matches(name: str, known: Iterable[str]) -> str:
    """The hint "; did you mean ...?" with known names that resemble ``name``; empty without any."""
    if len(name) > MAX_NAME:
        return ""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def quoted(text: str | None) -> str:
    """Text of a file as a message shows it: in quotes, cut short."""
    return repr(text if text is None else text[:_MAX_QUOTED])


def shown(value: object, most: int = _MAX_SHOWN) -> str:
    """Text of unknown origin in one line of at most ``most`` characters, all of them printable."""
    line = " ".join(str(value)[: 4 * most].split())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return safe if len(safe) <= most else f"{safe[: most - 1]}…"


def reason(error: BaseException) -> str:
    """The first sentence of an error that somebody else's code or file has brought about."""
    text = str(error).strip() or type(error).__name__
    return shown(text.splitlines()[0].partition(". ")[0].rstrip("."))
