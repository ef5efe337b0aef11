"""One process at a time may write into a folder.

The lock is the operating system's (``flock``) on a hidden file in the folder, and so it ends with
the process that holds it, whatever ended that; what the file says of its holder is for people.
"""

from __future__ import annotations

import fcntl
import os
import platform
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from saft_clip.console import warn
from saft_clip.errors import LockedError
from saft_kernels.files import explain_refusal

NAME = ".saft-lock"


class RunLock:
    """Keeps other processes from writing into a folder, from :meth:`acquire` to :meth:`release`.

    Args:
        folder: that is locked; it must exist when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, unless this object holds it already.

        Raises:
            LockedError: if another process holds it (or another lock of this one).
            FileWriteError: if the folder cannot be written to.
        """
        while self._descriptor is None:
            descriptor = self._open()
            try:
                self._lock(descriptor)
                if self._is_in_place(descriptor):
                    self._descriptor = descriptor
                    _held.add(self)
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def release(self) -> None:
        """Give the lock up, if it is held, and remove its file."""
        if self._descriptor is None:
            return
        try:
            with suppress(OSError):  # before it is unlocked: what others then make is another file
                self._path.unlink()
        finally:  # Ctrl-C and torch's dead processes may be noticed anywhere
            self.let_go()

    def let_go(self) -> None:
        """Close the file and leave it where it is."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> RunLock:
        """Nothing is locked yet: the folder may have to be made first."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise explain_refusal(error, self.folder) from error

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{self.folder} is in use: {_holder(descriptor)} is writing to it; wait until that "
                "has ended, or give another --output"
            ) from None
        except OSError as error:  # some network file systems know no locks
            warn(
                f"{self.folder} cannot be locked ({error.strerror}): make sure that no other "
                "process writes to it"
            )
        with suppress(OSError):  # a full disk keeps nobody from the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def _is_in_place(self, descriptor: int) -> bool:
        """Whether nobody removed the file between its being opened and locked."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except OSError:
            return False


def _holder(descriptor: int) -> str:
    with suppress(OSError):
        text = os.pread(descriptor, 300, 0).decode(errors="replace")
        if text.startswith("process ") and text.endswith("\n"):
            return " ".join(text.split())
    return "another process"


_held: set[RunLock] = set()


def _let_go_of_all() -> None:
    for lock in list(_held):
        lock.let_go()


# A process that loads images would keep the lock of a run that is gone, until it notices that.
os.register_at_fork(after_in_child=_let_go_of_all)
