"""Methods of fine-tuning: one file each, one registry.

To add one, write a subclass of :class:`~saft_clip.methods.base.Method` in a file of its own and
list it here.
"""

from __future__ import annotations

import difflib

from saft_clip.errors import ConfigError
from saft_clip.methods.base import Method
from saft_clip.methods.full import Full
from saft_clip.methods.saft import Saft

__all__ = ["METHODS", "Method", "find_method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (Saft, Full)}


def find_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ConfigError: if there is none; the message names them all.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"there is no --method {name!r}: {hint}the methods are {', '.join(METHODS)}"
        )
    return METHODS[name]
