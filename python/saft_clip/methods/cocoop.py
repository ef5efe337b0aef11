"""CoCoOp: learned words that a small network moves for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.evaluate import Scores
from saft_clip.learned_prompts import WORDS, PromptFrame, encode_embedded
from saft_clip.methods.coop import CoOp
from saft_clip.models import autocast
from saft_clip.prompts import TOKEN_BATCH, ClassPrompts

#: How much narrower the network is in the middle than an image's features.
_NARROWER = 16


class CoCoOp(CoOp):
    """``v_m(x) = v_m + pi``, pi = h(x), a network of two layers (Zhou et al. 2022, CVPR, Sec. 3.2).

    The vectors start as the words "a photo of a", or at random if there are not four. Every image
    has prompts of its own, so that an image costs as much text as there are classes.
    """

    name = "cocoop"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The context vectors and the network.

        Raises:
            ConfigError: if the model's text tower is of another kind than CLIP's.
        """
        found = super().trainable()
        words = self.first_words()
        if len(words) == len(WORDS.split()):
            self.context.data.copy_(words)
        size = self._feature_size()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.network = nn.Sequential(
                nn.Linear(size, max(1, size // _NARROWER)),
                nn.ReLU(),
                nn.Linear(max(1, size // _NARROWER), words.shape[1]),
            ).to(self.device)
        inner = self.network.named_parameters()
        return found | {f"adapter.network.{name}": param for name, param in inner}

    @torch.no_grad()
    def _feature_size(self) -> int:
        return self.frame_of(["x"]).encode(self.context).shape[1]

    @property
    def words(self) -> str:
        """Those of the original, if there are as many vectors."""
        return WORDS if self.config.context == len(WORDS.split()) else super().words

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy; nothing goes back into the image encoder."""
        scale: Any = self.model.logit_scale
        with autocast(self.config.precision, self.device):
            with torch.no_grad():
                features = self.image_features(images)
            cosines = self._cosines(features, self.frame)
        return F.cross_entropy(scale.exp() * cosines, labels.to(self.device))

    def scores(self, prompts: ClassPrompts, *, show_progress: bool = False) -> Scores:
        """By prompts that are each image's own."""
        frame = self.frame_of(prompts.names)
        size = max(1, TOKEN_BATCH // frame.embedded[..., 0].numel())  # images at a time

        def scores(images: Tensor) -> Tensor:
            features = self.image_features(images)
            return torch.cat([self._cosines(some, frame) for some in features.split(size)])

        return scores

    def _cosines(self, features: Tensor, frame: PromptFrame) -> Tensor:
        """float32 [B, C] of normalised features [B, E]."""
        moved = self.context + self.network(features)[:, None]
        prompts = torch.stack([frame.filled(vectors) for vectors in moved])
        ends = frame.ends.repeat(len(features))
        classes = encode_embedded(self.model, prompts.flatten(0, 1), ends)
        classes = classes.unflatten(0, prompts.shape[:2])
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("be,bce->bc", features, classes)
