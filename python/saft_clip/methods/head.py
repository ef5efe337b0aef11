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
from saft_clip.errors import CheckpointError
from saft_clip.evaluate import Scores, embed_classes, scores_of
from saft_clip.methods.base import about
from saft_clip.methods.dense import Dense
from saft_clip.models import autocast, fingerprint_of
from saft_clip.prompts import ClassPrompts

HEAD = "adapter.head"


class WithHead(Dense):
    """Classifies by ``(image features) @ head.T``, features of unit length.

    The head starts as ``exp(logit_scale)`` times the class embeddings, so that the first answers
    are the zero-shot ones (Wortsman et al. 2022, Section 3, and their code). Classes that were not
    trained on have no row in it; they are scored by their prompts, times as much, and stand beside
    the rows of those that were.
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
            classes = embed_classes(self.model, self.tokens).float()
        self.head = nn.Parameter(self._scale() * classes)

    def _scale(self) -> Tensor:
        scale: Any = self.model.logit_scale
        return scale.detach().exp()

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Become what another run has trained; no prompt of its classes is needed for that."""
        one = self.prompts.tokenizer(["x"])[:, None].to(self.device)
        with torch.no_grad():
            shape = len(self.prompts.names), embed_classes(self.model, one).shape[1]
        head = values.get(HEAD)
        if head is None or tuple(head.shape) != shape:
            raise CheckpointError(f"its classifier {HEAD!r} must have the shape {list(shape)}")
        self.head = nn.Parameter(torch.zeros(shape, device=self.device))
        super().restore(values)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy."""
        with autocast(self.config.precision, self.device):
            features = self.image_features(images)
        return F.cross_entropy(self.logits(features), labels.to(self.device))

    def logits(self, features: Tensor) -> Tensor:
        """[B, C] of normalised features [B, E]."""
        return features.float() @ self.head.T

    def scores(self, prompts: ClassPrompts, *, show_progress: bool = False) -> Scores:
        """By the rows of classes that were trained on, and the prompts of others."""
        return scores_of(self.image_features, self._rows(prompts, show_progress) / self._scale())

    def _rows(self, prompts: ClassPrompts, show_progress: bool) -> Tensor:
        """The head for any classes: [C, E]."""
        if prompts.names == self.prompts.names:  # two of which may have one name
            return self.head
        known = {name: row for row, name in enumerate(self.prompts.names)}
        others = [i for i, name in enumerate(prompts.names) if name not in known]
        rows = torch.empty(len(prompts.names), self.head.shape[1], device=self.device)
        for i, name in enumerate(prompts.names):
            if name in known:
                rows[i] = self.head[known[name]]
        if others:
            tokens = prompts.tokens[others].to(self.device)
            found = embed_classes(self.model, tokens, show_progress=show_progress)
            rows[others] = self._scale() * found.float()
        return rows

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write everything that was trained, and the names of the classes."""
        texts = about(self) | {"base": fingerprint_of(base())}
        return save_adapter(folder / self.artefact, self.params, texts, self.prompts)
