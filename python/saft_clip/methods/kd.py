"""Knowledge distillation from the pretrained model: its answers are not to be forgotten."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saft_clip.batches import Batches
from saft_clip.evaluate import embed_classes, image_features
from saft_clip.methods.base import prompt_logits
from saft_clip.methods.full import Full
from saft_clip.models import autocast


class Distillation(Full):
    """``cross-entropy + penalty * T^2 * KL(pretrained || own)``, answers softened by T.

    Hinton et al. 2015, Section 2: the factor T^2 keeps the gradient's size when T changes. The
    teacher is the pretrained model, asked about the same images and classes.
    """

    name = "kd"

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Keep the pretrained image encoder and class embeddings."""
        super().prepare(batches, folder)
        with torch.no_grad(), autocast(self.config.precision, self.device):
            self._classes = embed_classes(self.model, self.tokens).float()
        self._teacher = copy.deepcopy(self.model).eval().requires_grad_(False)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy and the distillation."""
        assert self.config.penalty is not None
        assert self.config.temperature is not None
        images, labels = images.to(self.device), labels.to(self.device)
        precision = self.config.precision
        logits = prompt_logits(self.model, images, self.tokens, precision)
        scale: Any = self._teacher.logit_scale
        with torch.no_grad():
            with autocast(precision, self.device):
                features = image_features(self._teacher, images)
            teacher = scale.exp() * features @ self._classes.T
        own = F.cross_entropy(logits, labels)
        temperature = self.config.temperature
        return own + self.config.penalty * distillation_loss(logits, teacher, temperature)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || own)`` of logits [B, C] softened by the temperature T, mean over B."""
    own, other = ((x / temperature).log_softmax(-1) for x in (logits, teacher))
    return temperature**2 * F.kl_div(own, other, log_target=True, reduction="batchmean")
