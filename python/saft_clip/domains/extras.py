"""Optional packages of the extras, imported only when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from saft_clip.errors import MissingExtraError


def require(
    module: str, package: str, *, extra: str = "demo", why: str = "the built-in image domains"
) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: dotted name of the module.
        package: name of the package that holds it, as the user would install it.
        extra: of this package that brings it along.
        why: what needs it.

    Raises:
        MissingExtraError: if it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{why} need the package {package}, which cannot be imported "
            f"({error}): install the {extra} extra, pip install 'saft-kernels[{extra}]'"
        ) from error
