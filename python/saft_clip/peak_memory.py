"""How much memory a run needs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory from now on: of tensors on a GPU, else of the whole process.

    Args:
        device: what a model trains on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # where the peak cannot be set back, it is the process's
                _CLEAR.write_text("5")

    def bytes(self) -> int | None:
        """The peak so far; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            return None
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), None)
