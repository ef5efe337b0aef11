"""Every error the application raises on purpose: one clear sentence each, never a traceback."""

from __future__ import annotations

from saft_kernels.errors import SaftError


class ConfigError(SaftError, ValueError):
    """A setting is out of range, contradicts another, or is not known."""


class ModelError(SaftError, ValueError):
    """A model cannot be had: unknown name or tag, no network, weights of another architecture."""


class CheckpointError(SaftError, ValueError):
    """A checkpoint file is broken, cut short, or belongs to another run or model."""


class LockedError(SaftError, RuntimeError):
    """Another process is writing into the folder."""


class WorkerError(SaftError, RuntimeError):
    """A process that loads images has died."""


class OutOfMemoryError(SaftError, MemoryError):
    """There was not enough memory for what was asked."""


class TrialError(SaftError, RuntimeError):
    """A process that ran a part of the work has died."""


class DataError(SaftError, ValueError):
    """A data set is missing, empty, malformed, or too small for what was asked."""


class HubError(SaftError, RuntimeError):
    """The Hugging Face hub refuses, cannot be reached, or has no such file."""


class UnreadableImageError(DataError):
    """An image file cannot be read; ``path`` names it."""

    def __init__(self, path: str, reason: str) -> None:
        """Name the file and say why it cannot be read."""
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str]]:
        """Data loading processes send it to the main one."""
        return type(self), (self.path, self.reason)


class MissingExtraError(SaftError, ImportError):
    """A package of an extra is needed and not installed."""
