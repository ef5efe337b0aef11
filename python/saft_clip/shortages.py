"""What is said when memory runs out, here or in a process that loads images."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import torch

from saft_clip.errors import OutOfMemoryError, WorkerError
from saft_kernels.errors import SaftError

_LESS = "close other programs, or give fewer --workers or a smaller --batch-size"


@contextmanager
def explained_shortages() -> Iterator[None]:
    """Turn what Python and torch raise into one sentence, inside the block.

    It must be around all that happens while images are loaded, cleaning up included: torch notices
    in a signal handler that a loading process has died, and so raises wherever the program happens
    to be.

    Raises:
        WorkerError: if a process that loads images has died.
        OutOfMemoryError: if memory could not be had, here or in such a process.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        explained = None if isinstance(error, SaftError) else _explain(error)
        if explained is None:
            raise
        raise explained from error


def is_shortage(error: BaseException) -> bool:
    """Whether something failed for want of memory or file descriptors, not by its own fault."""
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return True
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or re.search(_NO_MEMORY, str(error)) is not None


#: What torch's allocator for the CPU and PIL's decoders call it, and the system itself.
_NO_MEMORY = "can't allocate memory|[Oo]ut of memory|Cannot allocate memory"


def _explain(error: Exception) -> SaftError | None:
    text = str(error)
    if "shared memory" in text:
        return WorkerError(
            f"there is no shared memory left for images (/dev/shm): {_LESS}, or make it larger"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return OutOfMemoryError(
            "there are too many open files: give fewer --workers, or raise the limit (ulimit -n)"
        )
    if text.startswith("DataLoader worker") or _lost_connection(error):
        signal = re.search(r"killed by signal: ([\w ]+)", f"{text} {error.__cause__}")
        how = f"was killed ({signal.group(1)})" if signal else "has died"
        return WorkerError(
            f"a process that loads images {how}, as happens when memory runs out: {_LESS}"
        )
    if is_shortage(error):
        where = " in a process that loads images" if "DataLoader worker" in text else ""
        return OutOfMemoryError(f"memory ran out{where}: {_LESS}")
    return None


def _lost_connection(error: Exception) -> bool:
    """Whether a process went away while it was sending: torch has not noticed yet that it died."""
    if not isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return any(module.startswith("multiprocessing.") for module in modules)
