"""CoOp: the words in front of the class name are vectors that are learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.adapter_file import ADAPTER, save_adapter
from saft_clip.evaluate import Scores, scores_of
from saft_clip.learned_prompts import PromptFrame
from saft_clip.methods.base import about
from saft_clip.methods.dense import Dense
from saft_clip.models import autocast, fingerprint_of
from saft_clip.prompts import ClassPrompts

#: The deviation of vectors that start at random, as CoOp has it.
DEVIATION = 0.02


class CoOp(Dense):
    """``[V]1 [V]2 ... [V]M <class>.`` with M vectors for all classes (Zhou et al. 2022, Sec. 3.2).

    Unified context, the class name at the end, vectors drawn from a normal distribution with the
    deviation 0.02. Templates have no influence. Both encoders stay what they are.
    """

    name = "coop"
    artefact = ADAPTER

    def trainable(self) -> dict[str, nn.Parameter]:
        """The context vectors.

        Raises:
            ConfigError: if the model's text tower is of another kind than CLIP's.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        start = DEVIATION * torch.randn(self.first_words().shape, generator=generator)
        self.context = nn.Parameter(start.to(self.device))
        return {"adapter.context": self.context}

    def check_classes(self, names: Sequence[str]) -> None:
        """Make sure that every name fits behind the context.

        Raises:
            ConfigError: naming the one that does not.
        """
        self.frame_of(names)

    @property
    def words(self) -> str:
        """What stands in front of the names until it is replaced."""
        assert self.config.context is not None
        return " ".join(["X"] * self.config.context)

    def frame_of(self, names: Sequence[str]) -> PromptFrame:
        """The prompts of any classes, to be filled."""
        assert self.config.context is not None
        tokenizer = self.prompts.tokenizer
        return PromptFrame(self.model, names, tokenizer, self.words, self.config.context)

    def first_words(self) -> Tensor:
        """The embeddings of the words that are replaced: [context, D]."""
        return self.frame_of(["x"]).first_words()

    @cached_property
    def frame(self) -> PromptFrame:
        """The prompts of the classes that are trained on."""
        return self.frame_of(self.prompts.names)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy; nothing goes back into the image encoder."""
        scale: Any = self.model.logit_scale
        with autocast(self.config.precision, self.device):
            with torch.no_grad():
                features = self.image_features(images)
            classes = self.frame.encode(self.context)
        logits = scale.exp() * features @ classes.T
        return F.cross_entropy(logits, labels.to(self.device))

    def scores(self, prompts: ClassPrompts, *, show_progress: bool = False) -> Scores:
        """By the learned context, in front of any names."""
        return scores_of(self.image_features, self.frame_of(prompts.names).encode(self.context))

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write what was learned."""
        texts = about(self) | {"base": fingerprint_of(base())}
        return save_adapter(folder / self.artefact, self.params, texts, self.prompts)
