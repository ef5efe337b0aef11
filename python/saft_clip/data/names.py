"""What data sets and their files are called in tables, records and pages."""

from __future__ import annotations

from collections.abc import Sequence


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
