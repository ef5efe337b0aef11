"""What methods with a linear classifier, in place of class prompts, have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.adapter_file import ADAPTER, save_adapter
from saft_clip.batches import Batches
from saft_clip.evaluate import Scores, embed_classes, image_features
from saft_clip.methods.base import about
from saft_clip.methods.dense import Dense
from saft_clip.models import autocast
from saft_clip.prompts import ClassPrompts

HEAD = "adapter.head"


class WithHead(Dense):
    """Classifies by ``exp(logit_scale) * (image features) @ head.T``, features of unit length.

    The head starts as the class embeddings, so that the first answers are the zero-shot ones
    (Wortsman et al. 2022, Section 3). Classes that were not trained on have no row in it; they are
    scored by their prompts, and stand beside the rows of those that were.
    """

    artefact = ADAPTER

    head: nn.Parameter

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Make the head and the optimizer."""
        self.start_head(batches, folder)
        super().prepare(batches, folder)

    def start_head(self, batches: Batches, folder: Path | None) -> None:
        """Make the head of the class embeddings."""
        with torch.no_grad(), autocast(self.config.precision, self.device):
            self.head = nn.Parameter(embed_classes(self.model, self.tokens).float())

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Become what another run has trained; no prompt of its classes is needed for that."""
        one = self.prompts.tokenizer([self.prompts.names[0]])[:, None].to(self.device)
        with torch.no_grad():
            size = embed_classes(self.model, one).shape[1]
        shape = len(self.prompts.names), size
        self.head = nn.Parameter(torch.zeros(shape, device=self.device))
        super().restore(values)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy."""
        with autocast(self.config.precision, self.device):
            features = image_features(self.model, images.to(self.device))
        return F.cross_entropy(self.logits(features), labels.to(self.device))

    def logits(self, features: Tensor) -> Tensor:
        """[B, C] of normalised features [B, E]."""
        scale: Any = self.model.logit_scale
        return scale.exp() * features.float() @ self.head.T

    def scores(self, prompts: ClassPrompts, *, show_progress: bool = False) -> Scores:
        """By the rows of classes that were trained on, and the prompts of others."""
        known = {name: row for row, name in enumerate(self.prompts.names)}
        others = [i for i, name in enumerate(prompts.names) if name not in known]
        rows = torch.empty(len(prompts.names), self.head.shape[1], device=self.device)
        for i, name in enumerate(prompts.names):
            if name in known:
                rows[i] = self.head[known[name]]
        if others:
            tokens = prompts.tokens[others].to(self.device)
            rows[others] = embed_classes(self.model, tokens, show_progress=show_progress).float()

        def scores(images: Tensor) -> Tensor:
            features = image_features(self.model, images.to(self.device))
            with torch.autocast(features.device.type, enabled=False):
                return features @ rows.T

        return scores

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write everything that was trained, and the names of the classes."""
        return save_adapter(folder / self.artefact, self.params, about(self), self.prompts)
