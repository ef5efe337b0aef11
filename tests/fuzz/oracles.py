"""What must hold, whatever a file holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saft_kernels import ops
from saft_kernels.errors import SaftError

#: A path, a reason, an advice and two names of 1,000 characters fit; a table does not.
LONGEST_MESSAGE = 2500


class Finding(AssertionError):
    """A loader did what it must not do."""


#: What guards have noticed; their errors may be caught on the way.
violations: list[str] = []


def forbid(sentence: str) -> None:
    """Raise a :class:`Finding`, and remember it."""
    violations.append(sentence)
    raise Finding(sentence)


def require(holds: bool, sentence: str) -> None:
    """Raise a :class:`Finding` unless something holds."""
    if not holds:
        raise Finding(sentence)


def check_message(error: SaftError, path: Path | None) -> None:
    """One sentence that can be shown: a line of bounded length, without control characters.

    Args:
        error: what the loader raised.
        path: the file that it must name; None if it need not.
    """
    text = str(error)
    require(bool(text.strip()), "the message is empty")
    require(len(text) <= LONGEST_MESSAGE, f"the message has {len(text):,} characters: {text[:200]}")
    require(text.isprintable(), f"the message holds control characters: {text!r}")
    if path is not None:
        require(str(path) in text, f"the message does not name the file: {text}")


def check_shown(text: str) -> None:
    """What is printed for people can be shown: no control character but the end of a line."""
    odd = {character for character in text if not character.isprintable()} - {"\n"}
    require(not odd, f"control characters are printed: {odd!r:.200}")


@contextmanager
def refusals(path: Path | None, *, of: tuple[type[SaftError], ...] = (SaftError,)) -> Iterator[Any]:
    """Let a refusal pass, once its message was checked; anything else goes on.

    Yields:
        a list that holds the error afterwards, if there was one.
    """
    caught: list[SaftError] = []
    try:
        yield caught
    except of as error:
        check_message(error, path)
        caught.append(error)


def check_indices(name: str, indices: Tensor, numel: int) -> None:
    """Indices as kernels rely on them: sorted, each once, in range, of the width that numel asks.

    Computed with NumPy, so that it shares nothing with what it checks.
    """
    array = indices.numpy().astype(np.int64)
    width = torch.int32 if numel < 2**31 else torch.int64
    require(indices.dtype == width, f"indices of {name!r} are {indices.dtype} for {numel} elements")
    require(array.ndim == 1, f"indices of {name!r} have shape {array.shape}")
    if array.size:
        require(bool((np.diff(array) > 0).all()), f"indices of {name!r} do not increase")
        require(array[0] >= 0 and array[-1] < numel, f"indices of {name!r} are out of range")


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Every bit of some tensors, by name."""
    return {name: _bytes(tensor.detach()) for name, tensor in tensors.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state_of(model: nn.Module) -> dict[str, bytes]:
    """Every bit of a model: parameters and buffers."""
    return bytes_of(model.state_dict())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model must have the same bits afterwards."""
    before = state_of(model)
    yield
    require(state_of(model) == before, "the model was changed, and should not have been")


def _guarded(operation: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(tensor: Tensor, indices: Tensor, *rest: Any) -> Any:
        array = indices.numpy()
        if array.size and not (array.min() >= 0 and array.max() < tensor.numel()):
            forbid(f"an index out of range reached {operation.__name__}")
        return operation(tensor, indices, *rest)

    return guarded


def guard_kernels() -> None:
    """From now on every index is compared with its tensor before a kernel sees it."""
    ops.gather = _guarded(ops.gather)
    ops.scatter_ = _guarded(ops.scatter_)


@contextmanager
def guarded_kernels() -> Iterator[None]:
    """The same, within the block only."""
    usual = ops.gather, ops.scatter_
    guard_kernels()
    try:
        yield
    finally:
        ops.gather, ops.scatter_ = usual


#: What no file may bring about: foreign code in a pickle, commands, connections, lost files.
_FORBIDDEN = (
    *("pickle.find_class", "ctypes.dlopen"),
    *("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "urllib.Request"),
)
_CHANGES = ("os.remove", "os.rename", "os.truncate", "os.mkdir", "os.rmdir")


def guard_process(*writable: Path) -> None:
    """From now on this process may run no foreign code, and change files only below these paths."""

    allowed = ("/dev/null", *map(str, writable))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            forbid(f"reading the file led to {event} {arguments!r:.200}")
        if event in _CHANGES or (event == "open" and _writes(*arguments)):
            where = arguments[0]
            if isinstance(where, str) and not where.startswith(allowed):
                forbid(f"reading the file led to {event} of {where!r:.200}")

    sys.addaudithook(hook)


def _writes(path: object, mode: str | None, flags: int) -> bool:
    return bool(mode and set(mode) & set("wax+")) or bool(flags & 0b11)
