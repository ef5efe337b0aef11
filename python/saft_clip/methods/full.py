"""Full fine-tuning: every parameter of both encoders, the baseline that SAFT is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saft_clip.batches import Batches
from saft_clip.errors import CheckpointError
from saft_clip.methods.base import Method, adamw_options, saved_tensors
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
        """Put everything back: all of it or nothing.

        Raises:
            CheckpointError: if this is not what was saved of this model.
        """
        params = dict(self.model.named_parameters())
        values = saved_tensors(state.get("values"), params, "parameters")
        moments = self._saved_moments(state.get("optimizer"))
        for name, param in params.items():
            param.copy_(values[name])
        # The options are the settings', with which the run goes on.
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": own})

    def _saved_moments(self, saved: Any) -> dict[int, dict[str, Tensor]]:
        """AdamW's state of each parameter, by its number; torch itself takes any shapes."""
        found = saved.get("state") if isinstance(saved, Mapping) else None
        params = self.encoder_parameters()
        if not isinstance(found, Mapping) or not found.keys() <= set(range(len(params))):
            raise CheckpointError("it holds no optimizer state of this model")
        moments = {}
        for number, entry in found.items():
            like = dict.fromkeys(("exp_avg", "exp_avg_sq"), params[number])
            expected = {"step": torch.tensor(0.0), **like}
            moments[number] = saved_tensors(entry, expected, f"moments of parameter {number}")
            if not 0 <= float(moments[number]["step"]) < float("inf"):
                raise CheckpointError(f"the steps taken with parameter {number} are impossible")
        return moments

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write the whole model, in a form that ``--pretrained`` takes."""
        path = folder / self.artefact
        # Clones: safetensors refuses tensors that share memory, as tied weights do.
        weights = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        with atomic_write(path) as temporary:
            save_file(weights, temporary, {"format": "pt"})
        return path
