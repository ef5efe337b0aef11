"""What data sets and their files are called in tables, records and pages."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


def printable(text: str) -> str:
    """The text with ``\\udcff`` in place of each byte of a file name that is not UTF-8.

    Python keeps such a byte as a lone surrogate, which opens the file but cannot be encoded.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def distinct_names(specs: Sequence[str], names: Sequence[str]) -> list[str]:
    """What to call data sets side by side: two folders may have the same name.

    Args:
        specs: what the user named, N of them.
        names: their N names, see :class:`saft_clip.data.ImageDataset`.

    Returns:
        Each one's name, or its whole spec where another has that name; :func:`printable`.
    """
    return [
        printable(name if names.count(name) == 1 else spec)
        for spec, name in zip(specs, names, strict=True)
    ]


@dataclass(frozen=True)
class ClassMatch:
    """Which classes of two data sets have the same name.

    Attributes:
        pairs: (position in the first, position in the second) of each shared class, in the order of
            the second's.
        only_first: names of the first that the second lacks, as they are written there.
        only_other: names of the second that the first lacks.
    """

    pairs: tuple[tuple[int, int], ...]
    only_first: tuple[str, ...]
    only_other: tuple[str, ...]


def match_classes(first: Sequence[str], other: Sequence[str]) -> ClassMatch:
    """Compare the classes of two data sets by name, such as a training set and a shifted one.

    Case, underscores, hyphens and surrounding or repeated spaces make no difference. Where a data
    set has one name twice, the first class of that name stands for both.

    Args:
        first: names of the classes that are trained on.
        other: names of the classes of the other data set.
    """
    known = _positions(first)
    found = _positions(other)
    return ClassMatch(
        tuple((known[name], position) for name, position in found.items() if name in known),
        tuple(name for name in first if plain_name(name) not in found),
        tuple(name for name in other if plain_name(name) not in known),
    )


def _positions(names: Sequence[str]) -> dict[str, int]:
    positions: dict[str, int] = {}
    for position, name in enumerate(names):
        positions.setdefault(plain_name(name), position)
    return positions


def plain_name(name: str) -> str:
    """A class name without what may differ between two ways to write it."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(folded.replace("_", " ").replace("-", " ").split())
