"""Writing files so that a crash, a full disk or an error never leaves half a file behind."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from saft_kernels.errors import FileWriteError

_ADVICE = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some space or write to another disk",
    errno.EFBIG: "write to a disk that allows files of this size",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to",
    errno.EPERM: "choose a folder that can be written to",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EEXIST: "choose a path that is not a file",
    errno.EISDIR: "choose a path that is not a folder",
}


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace a file in one step: it holds the old content or all of the new one, never a part.

    Yields the path of an empty temporary file in a hidden folder beside ``path``; write the content
    to it inside the block. On leaving the block it is flushed to the disk and renamed to ``path``.
    On any exception it is removed and the old file stays as it was. A symbolic link is followed,
    and an existing file keeps its permissions. A process that is killed leaves at most the hidden
    folder ``.<name>.<random>.tmp`` behind, see :func:`remove_leftovers`.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        FileWriteError: if the folder cannot be written to, the disk is full, or anything else that
            the operating system refuses inside the block; the message says what to do about it.
    """
    target = Path(os.path.realpath(path))
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary = hidden / target.name
    try:
        mode = _create(temporary, target)
        yield temporary
        _flush(temporary, mode)
        os.replace(temporary, target)
        _flush_folder(target.parent)
    except FileWriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise explain_refusal(error, path) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove what a process that was killed in :func:`atomic_write` has left in a folder.

    Call it only where no other process is writing.

    Args:
        folder: need not exist.
        names: patterns (``fnmatch``) of the names of the files that were being written.
    """
    for name in names:
        for hidden in Path(folder).glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
            shutil.rmtree(hidden, ignore_errors=True)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Find out before long work, not after it, that a file cannot be written.

    Raises:
        FileWriteError: if it is a folder, or its folder is missing or cannot be written to.
    """
    file = Path(path)
    if file.is_dir():
        raise FileWriteError(f"{file} cannot be written: it is a folder; name a file in it")
    if not file.parent.is_dir():
        raise FileWriteError(f"{file} cannot be written: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise FileWriteError(f"{file} cannot be written: the folder {file.parent} is read-only")


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and its parents, unless it exists, and find out whether it can be written to.

    Call it before long work, not after it.

    Raises:
        FileWriteError: if the operating system refuses; the message says what to do about it.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise explain_refusal(error, path) from error


def explain_refusal(
    error: OSError | SafetensorError, path: str | os.PathLike[str]
) -> FileWriteError:
    """The error that says what the operating system refused, of what path, and what to do."""
    number = error.errno if isinstance(error, OSError) else _os_error(str(error))
    reason = os.strerror(number) if number else str(error)
    advice = _ADVICE.get(number or 0, "write to another place")
    explained = FileWriteError(f"{os.fspath(path)} could not be written ({reason}): {advice}")
    explained.errno = number
    return explained


def sort_metadata(path: str | os.PathLike[str]) -> None:
    """Put the metadata of a safetensors file in alphabetical order, in place.

    safetensors writes them in random order; sorted, the same content always gives the same bytes.

    Args:
        path: a file that safetensors has just written.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise ValueError(f"the header of {path} would grow into its data")
        file.seek(8)
        file.write(text.ljust(size))


def _create(temporary: Path, target: Path) -> int:
    """Make the temporary file and return the permissions that the final one shall have."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    os.mkdir(temporary.parent)  # a writer may put files of its own beside, as safetensors does
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        existing = target if target.exists() else temporary
        return stat.S_IMODE(existing.stat().st_mode)
    finally:
        os.close(descriptor)


def _flush(temporary: Path, mode: int) -> None:
    # A writer may have put a file of its own, with other permissions, in place of the one made
    # here.
    os.chmod(temporary, mode)
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    # The rename itself must survive a power cut; file systems that cannot flush a folder say so.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(message: str) -> int | None:
    """The operating system's error number in a message of safetensors, which raises no OSError."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found.group(1)) if found else None
