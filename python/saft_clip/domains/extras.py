"""Optional packages of the ``demo`` extra, imported only when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from saft_clip.errors import MissingExtraError


def require(module: str, package: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: dotted name of the module.
        package: name of the package that holds it, as the user would install it.

    Raises:
        MissingExtraError: if it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"the built-in image domains need the package {package}, which cannot be imported "
            f"({error}): install the demo extra, pip install 'saft-kernels[demo]'"
        ) from error
