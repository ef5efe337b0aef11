"""CLIPood: margins by meaning, and an average over the whole way that training took."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.batches import Batches
from saft_clip.errors import CheckpointError
from saft_clip.evaluate import embed_classes
from saft_clip.methods.base import saved_tensors
from saft_clip.methods.dense import Dense
from saft_clip.models import autocast


class Clipood(Dense):
    """Trains the image encoder by margin metric softmax; the result is a Beta moving average.

    Shu et al. 2023: the loss is their Eq. 3, the average their Eq. 5, over all steps of the run,
    the pretrained weights among them. Class embeddings are fixed.
    """

    name = "clipood"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The image encoder."""
        return self.image_parameters()

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Start the average with the pretrained weights."""
        super().prepare(batches, folder)
        self._average = {name: param.detach().clone() for name, param in self.params.items()}
        self._weights = 0.0  # of the weights that are in the average; what is first is not yet

    @cached_property
    def _classes(self) -> Tensor:
        with torch.no_grad(), autocast(self.config.precision, self.device):
            return embed_classes(self.model, self.tokens).float()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Margin metric softmax."""
        with autocast(self.config.precision, self.device):
            features = self.image_features(images)
        scale: Any = self.model.logit_scale
        margin = self.config.margin
        assert margin is not None
        return margin_loss(features, labels.to(self.device), self._classes, scale.exp(), margin)

    @torch.no_grad()
    def after_step(self, done: int, total: int) -> None:
        """Take the weights into the average."""
        assert self.config.beta is not None
        if done == 1:
            self._weights = beta_density(0.5 / (total + 1), self.config.beta)
        weight = beta_density((done + 0.5) / (total + 1), self.config.beta)
        self._weights += weight
        share = weight / self._weights if self._weights else 1.0  # densities too small for a float
        for name, param in self.params.items():
            self._average[name].lerp_(param, share)

    @torch.no_grad()
    def finish(self, base: Callable[[], nn.Module]) -> None:
        """The average is the result."""
        for name, param in self.params.items():
            param.copy_(self._average[name])

    def state_dict(self) -> dict[str, Any]:
        """What is trained, the optimizer's state, and the average."""
        return {**super().state_dict(), "average": self._average, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put everything back: all of it or nothing.

        Raises:
            CheckpointError: if this is not what was saved of this model.
        """
        average = saved_tensors(state.get("average"), self.params, "average")
        weights = state.get("weights")
        if not isinstance(weights, float) or not 0 <= weights < float("inf"):
            raise CheckpointError("the weight of its average is impossible")
        super().load_state_dict(state)
        for name, value in self._average.items():
            value.copy_(average[name])
        self._weights = weights


def margin_loss(
    features: Tensor, labels: Tensor, classes: Tensor, scale: Tensor, margin: float
) -> Tensor:
    """Cross-entropy in which a class must be beaten by more, the less it means the same.

    The logit of class c for an image of class y is ``scale * (<f, t_c> + margin * (1 - <t_y,
    t_c>))`` (Shu et al. 2023, Eq. 3).

    Args:
        features: float32 [B, E], unit length.
        labels: int64 [B].
        classes: float32 [C, E], unit length.
        scale: one number, the inverse temperature.
        margin: lambda.
    """
    apart = 1 - classes[labels] @ classes.T
    return F.cross_entropy(scale * (features.float() @ classes.T + margin * apart), labels)


def beta_density(x: float, b: float) -> float:
    """The density of Beta(b, b) at x in (0, 1)."""
    constant = math.lgamma(2 * b) - 2 * math.lgamma(b)
    return math.exp(constant + (b - 1) * (math.log(x) + math.log1p(-x)))
