"""What a user names: data, and behind it ``#gaussian_noise:3`` and ``#base`` or ``#new``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

#: What a data set's classes can be divided into.
HALVES = ("base", "new")

#: Starts the name of a built-in domain.
BUILTIN = "builtin:"

#: Starts the name of a data set of torchvision's, ``torchvision:NAME:ROOT``.
TORCHVISION = "torchvision:"

#: Stands between a file and what else belongs to it: the folder of a split file's images, the
#: column of a CSV file.
SEPARATOR = "::"

_CORRUPTION = re.compile(r"[a-z_]+:\d+")


@dataclass(frozen=True)
class Spec:
    """A spec in its parts.

    Attributes:
        source: where the data are.
        corruption: ``gaussian_noise:3``, or empty.
        half: ``base`` or ``new``, or empty.
    """

    source: str
    corruption: str = ""
    half: str = ""

    @property
    def whole(self) -> str:
        """The same data with all their classes."""
        return f"{self.source}#{self.corruption}" if self.corruption else self.source


def parse_spec(spec: str) -> Spec:
    """Take a spec apart; its endings may come in either order, each once."""
    source, corruption, half = spec, "", ""
    while True:
        rest, mark, ending = source.rpartition("#")
        if mark and ending in HALVES and not half:
            source, half = rest, ending
        elif mark and _CORRUPTION.fullmatch(ending) and not corruption:
            source, corruption = rest, ending
        else:
            return Spec(source, corruption, half)


def resolved(source: str) -> tuple[str, ...]:
    """The same for every way to write where the same data are: links and dots are followed."""
    if source.startswith(BUILTIN):
        return (source,)
    if source.startswith(TORCHVISION):
        name, _, root = source.removeprefix(TORCHVISION).partition(":")
        return TORCHVISION, name, _real(root)
    return tuple(map(_real, source.split(SEPARATOR)))


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
