"""SAFT: train the d parameters with the largest mean gradient, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saft_clip.batches import Batches
from saft_clip.config import FinetuneConfig
from saft_clip.console import progress, say
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.methods.base import FROZEN, Method, about, adamw_options, saved_tensors
from saft_clip.models import ClipModel
from saft_clip.prompts import ClassPrompts
from saft_kernels import ops
from saft_kernels.delta import SparseDelta
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.select import Score, select


class Saft(Method):
    """Sparse adaptation (SAFT, Algorithm 1).

    Unless one is given, the mask is selected once, over the training images in order and without
    augmentation, with the training loss in the training precision, the model in eval mode. Then
    :class:`~saft_kernels.SparseAdamW` trains the selected entries. The result is a delta; with
    ``--alpha`` it is a share of what was trained (WiSE-FT, Wortsman et al. 2022, Eq. 1).
    """

    name = "saft"
    artefact = "delta.safetensors"
    takes_mask = True
    #: What ranks the entries; see :func:`saft_kernels.select`.
    score: ClassVar[Score] = "mean_grad"
    #: The trained entries.
    mask: CooMask

    def __init__(self, clip: ClipModel, prompts: ClassPrompts, config: FinetuneConfig) -> None:
        """Read the given mask, if there is one.

        Raises:
            ConfigError: if another optimizer than AdamW is asked for.
            MaskError: if the mask cannot be read or does not fit the model.
        """
        super().__init__(clip, prompts, config)
        if config.optimizer != "adamw":
            raise ConfigError(
                f"--method {self.name} steps with AdamW only, not --optimizer {config.optimizer}"
            )
        self._given = None if config.mask is None else CooMask.load(config.mask)
        if self._given is not None:
            self._given.parameters(self.model)

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Take the mask that was given or that the run has selected already, or select it."""
        file = folder / "mask.safetensors" if folder else None
        if file is not None and file.exists():
            mask = CooMask.load(file)
        else:
            mask = self._select(batches) if self._given is None else self._given
            if file is not None:
                mask.save(file)
        self._freeze_all_but(mask)
        self.mask = mask
        self.optimizer = SparseAdamW(
            self.model, mask, gradients=self.config.gradients, **adamw_options(self.config)
        )

    def _select(self, batches: Batches) -> CooMask:
        density = self.config.density
        assert not isinstance(density, str), "auto has been decided by now"
        self.model.eval()
        with progress("selecting", len(batches), unit="batches") as advance:
            mask = select(
                self.model,
                lambda model, batch: self.loss(*batch),
                batches,
                density=density,
                score=self.score,
                exclude=FROZEN,
                progress=lambda done, total, what: advance(),
                seed=self.config.seed,
            )
        say(f"selected {mask.nnz:,} of {mask.numel:,} parameters, in {len(mask)} tensors")
        return mask

    @property
    def trained(self) -> Mapping[str, int]:
        """The selected entries of each tensor."""
        return {name: indices.numel() for name, indices in self.mask.items()}

    def _freeze_all_but(self, mask: CooMask) -> None:
        for name, param in self.model.named_parameters():
            param.requires_grad_(name in mask)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the selected gradient."""
        optimizer: Any = self.optimizer
        return optimizer.clip_grad_norm_(max_norm)

    def state_dict(self) -> dict[str, Any]:
        """The selected values, the optimizer's state, and which mask they belong to."""
        values = {n: ops.gather(p, i) for n, p, i in self._selected()}
        return {
            "mask": self.mask.fingerprint,
            "values": values,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put everything back: all of it or nothing.

        Raises:
            CheckpointError: if it was saved with another mask, or is not what was saved.
            OptimizerStateError: likewise, of the optimizer.
        """
        if state.get("mask") != self.mask.fingerprint:
            raise CheckpointError(
                "the checkpoint was made with another mask than the run's mask.safetensors: put "
                "back the one that was there, or start again in another folder"
            )
        selected = self._selected()
        expected = {n: torch.empty(i.shape, dtype=p.dtype, device="meta") for n, p, i in selected}
        values = saved_tensors(state.get("values"), expected, "trained values")
        self.optimizer.load_state_dict(state.get("optimizer", {}))  # it too checks everything first
        for name, param, index in selected:
            ops.scatter_(param, index, values[name].to(param.device))

    def _selected(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        return [(n, p, i.to(p.device)) for n, p, i in self.mask.parameters(self.model)]

    def way(self, base: Callable[[], nn.Module]) -> Callable[[float], None]:
        """Averages of the selected entries, in double precision, rounded once."""
        first = dict(base().named_parameters())
        ends = [
            (
                param,
                index,
                ops.gather(first[name].to(param.device), index),
                ops.gather(param, index),
            )
            for name, param, index in self._selected()
        ]

        @torch.no_grad()
        def go(alpha: float) -> None:
            for param, index, before, after in ends:
                between = before.double() + alpha * (after.double() - before.double())
                ops.scatter_(param, index, after if alpha == 1 else between.to(param.dtype))

        return go

    def finish(self, base: Callable[[], nn.Module]) -> None:
        """Go back to ``--alpha`` of the way from the pretrained values."""
        assert self.config.alpha is not None
        if self.config.alpha != 1:
            self.way(base)(self.config.alpha)

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write the delta; capturing it makes sure that nothing outside the mask has changed."""
        path = folder / self.artefact
        score = self.score if self.config.mask is None else "a mask file's"
        texts = about(self) | {"score": score}
        SparseDelta.capture(self.model, self.mask, base(), texts).save(path)
        return path
