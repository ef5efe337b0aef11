"""FLYP: fine-tune like you pretrain, with the contrastive loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.config import FinetuneConfig
from saft_clip.errors import ConfigError
from saft_clip.methods.dense import Dense
from saft_clip.models import ClipModel, autocast
from saft_clip.prompts import ClassPrompts, encode_prompts


class Flyp(Dense):
    """The loss of CLIP's pretraining on images and captions of their classes (Goyal et al. 2023).

    The caption of an image is one of its class's prompts, drawn anew each time. Two images of one
    class in a batch are each other's negatives, as in the original. The temperature is trained
    too, as it was in pretraining.
    """

    name = "flyp"

    def __init__(self, clip: ClipModel, prompts: ClassPrompts, config: FinetuneConfig) -> None:
        """Refuse batches in which there is nothing to contrast.

        Raises:
            ConfigError: if a batch is one image.
        """
        super().__init__(clip, prompts, config)
        if config.batch_size < 2:
            raise ConfigError("--method flyp contrasts images: give a --batch-size of 2 or more")

    def trainable(self) -> dict[str, nn.Parameter]:
        """Both encoders and the temperature."""
        scale: Any = self.model.logit_scale
        return {**self.encoder_parameters(), "logit_scale": scale}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The symmetric contrastive loss over the batch (their Eq. 1; Radford et al. 2021)."""
        drawn = torch.randint(self.tokens.shape[1], labels.shape).to(self.device)
        captions = self.tokens[labels.to(self.device), drawn]
        with autocast(self.config.precision, self.device):
            features = self.image_features(images)
            texts = encode_prompts(self.model, captions)
        return contrastive_loss(features, texts, self.params["logit_scale"].exp())


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The mean cross-entropy of finding each image's text among all, and each text's image.

    Args:
        images: float32 [B, E], unit length.
        texts: float32 [B, E], unit length, in the same order.
        scale: one number.
    """
    logits = scale * images.float() @ texts.float().T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
