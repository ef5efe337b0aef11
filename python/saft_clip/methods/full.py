"""Full fine-tuning: every parameter of both encoders, the baseline that SAFT is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saft_clip.batches import Batches
from saft_clip.methods.base import Method, adamw_options
from saft_kernels.files import atomic_write


class Full(Method):
    """``torch.optim.AdamW`` over all parameters of both encoders, weight decay on all of them."""

    name = "full"
    title = "full fine-tuning"
    artefact = "model.safetensors"

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Make the optimizer; there is nothing to decide."""
        self.optimizer = torch.optim.AdamW(
            self.encoder_parameters(), fused=True, **adamw_options(self.config)
        )

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the whole gradient."""
        return torch.nn.utils.clip_grad_norm_(self.encoder_parameters(), max_norm)

    def state_dict(self) -> dict[str, Any]:
        """All parameters, and the optimizer's state."""
        return {
            "values": dict(self.model.named_parameters()),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put everything back."""
        for name, param in self.model.named_parameters():
            param.copy_(state["values"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write the whole model, in a form that ``--pretrained`` takes."""
        path = folder / self.artefact
        # Clones: safetensors refuses tensors that share memory, as tied weights do.
        weights = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        with atomic_write(path) as temporary:
            save_file(weights, temporary, {"format": "pt"})
        return path
