"""Every error this project raises on purpose.

Each message says what was wrong, where, and what to do. All of them derive from :class:`SaftError`,
so that an application can turn any of them into one sentence; each also derives from the built-in
exception that a caller would expect.
"""

from __future__ import annotations


class SaftError(Exception):
    """Base class of every error raised on purpose by ``saft_kernels`` and ``saft_clip``."""


class BackendUnavailableError(SaftError, RuntimeError):
    """A backend or instruction set was asked for explicitly and cannot be used here."""


class SelectionError(SaftError, ValueError):
    """Nothing can be selected: a bad density, no data, no candidate parameter, an empty mask."""


class NonFiniteGradientError(SaftError, ArithmeticError):
    """A gradient (or a loss) holds NaN or infinity; ``parameter`` names where, if it is known."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class MaskError(SaftError, ValueError):
    """A mask is malformed or does not fit the model it is used with."""


class DeltaError(SaftError, RuntimeError):
    """A delta cannot be applied or reverted here: another base, another model, a wrong order."""


class DeltaFormatError(SaftError, ValueError):
    """A delta or mask file is broken, cut short, hostile, or of an unknown version."""


class WeightsFileError(SaftError, ValueError):
    """A file of weights cannot be read: broken, cut short, or with more than tensors in it."""


class OptimizerStateError(SaftError, ValueError):
    """An optimizer state does not belong to this model and mask."""


class FileWriteError(SaftError, OSError):
    """A file could not be written; whatever was there before is untouched."""


class OptimizerError(SaftError, ValueError):
    """An optimizer was set up or used in a way that it cannot serve."""


class SelectedGradientError(SaftError, RuntimeError):
    """Something needs a whole gradient of which only the selected entries were kept."""
