"""No fine-tuning: the pretrained model as it is, the mark that every method is measured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saft_clip.batches import Batches
from saft_clip.errors import CheckpointError
from saft_clip.methods.base import Method, about
from saft_kernels.delta import extract


class ZeroShot(Method):
    """Classification by the class prompts alone (Radford et al. 2021); the result is no change."""

    name = "zero-shot"
    artefact = "delta.safetensors"

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Freeze everything."""
        for param in self.model.parameters():
            param.requires_grad_(False)

    @property
    def trained(self) -> Mapping[str, int]:
        """Nothing."""
        return {}

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """There is no gradient."""
        return torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state.

        Raises:
            CheckpointError: if it is another method's.
        """
        if state:
            raise CheckpointError("it is the checkpoint of another method")

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write a delta that changes nothing."""
        path = folder / self.artefact
        extract(self.model, base(), metadata=about(self)).delta.save(path)
        return path
