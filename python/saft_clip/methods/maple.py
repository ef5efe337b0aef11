"""MaPLe: learned prompts in the blocks of both encoders, an image's made from a text's."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.errors import ConfigError
from saft_clip.evaluate import Scores, scores_of
from saft_clip.learned_prompts import WORDS
from saft_clip.methods.coop import DEVIATION, CoOp
from saft_clip.models import autocast
from saft_clip.prompts import ClassPrompts
from saft_clip.text_tower import tower_of


class MaPLe(CoOp):
    """Deep prompts coupled by linear layers (Khattak et al. 2023, Sections 3.2 and 3.3).

    In the first ``--depth`` blocks of the text encoder, ``--context`` vectors P_i stand behind the
    start token, and F_i(P_i) behind the patches in the image encoder, where F_i is a linear layer.
    In the first block they stand in place of the first words of "a photo of a", from which they
    start if there are no more. What comes out of a block in these places is replaced in the next
    one. The encoders' own weights stay what they are.
    """

    name = "maple"

    def trainable(self) -> dict[str, nn.Parameter]:
        """Text prompts of each depth, and the layers that make image prompts of them.

        Raises:
            ConfigError: if the encoders are of other kinds than CLIP's transformers, or have fewer
                blocks.
        """
        words = self.first_words()  # which asks for a text tower of CLIP's kind
        depth = self._checked_depth()
        visual: Any = self.model.visual
        width = visual.transformer.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            drawn = [DEVIATION * torch.randn_like(words) for _ in range(depth)]
            starts = [words if self.words == WORDS else drawn[0], *drawn[1:]]
            layers = [nn.Linear(words.shape[1], width) for _ in range(depth)]
        self.vectors = nn.ParameterList([nn.Parameter(s.to(self.device)) for s in starts])
        self.couplings = nn.ModuleList(layers).to(self.device)
        self._hook(visual)
        found = {f"adapter.context.{i}": vectors for i, vectors in enumerate(self.vectors)}
        inner = self.couplings.named_parameters()
        return found | {f"adapter.coupling.{name}": param for name, param in inner}

    def _checked_depth(self) -> int:
        depth = self.config.depth
        assert depth is not None
        visual: Any = self.model.visual
        if type(visual) is not VisionTransformer:
            raise ConfigError(
                "--method maple needs an image encoder that is open_clip's vision transformer; "
                f"that of {self.clip.name} is a {type(visual).__name__}"
            )
        blocks = len(visual.transformer.resblocks)
        blocks = min(blocks, len(tower_of(self.model).transformer.resblocks))
        if depth > blocks:
            raise ConfigError(
                f"--depth {depth} is more than the {blocks} blocks of {self.clip.name}: give at "
                f"most {blocks}"
            )
        return depth

    @property
    def words(self) -> str:
        """Those of the original, if there are no more vectors."""
        assert self.config.context is not None
        return WORDS if self.config.context <= len(WORDS.split()) else super().words

    def _hook(self, visual: Any) -> None:
        """Let blocks find the image prompts behind the patches, while there are any."""
        self._image_prompts: list[Tensor] = []

        def append(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = inputs
            if self._image_prompts:
                x = torch.cat([x, self._image_prompts[0].to(x.dtype).expand(len(x), -1, -1)], dim=1)
            return (x, *rest)

        def replace(depth: int) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                x, *rest = inputs
                if self._image_prompts:
                    vectors = self._image_prompts[depth].to(x.dtype)
                    own = vectors.expand(len(x), -1, -1)
                    x = torch.cat([x[:, : -len(vectors)], own], dim=1)
                return (x, *rest)

            return hook

        def take_off(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
            # Whatever an encoder pools, it pools no prompts.
            return x[:, : -len(self._image_prompts[0])] if self._image_prompts else x

        visual.ln_pre.register_forward_pre_hook(append)
        for depth, block in enumerate(visual.transformer.resblocks):
            if 1 <= depth < len(self.vectors):
                block.register_forward_pre_hook(replace(depth))
        visual.transformer.register_forward_hook(take_off)

    def image_features(self, images: Tensor) -> Tensor:
        """Normalised features with prompts in the image encoder, made of the text prompts."""
        pairs = zip(self.couplings, self.vectors, strict=True)
        self._image_prompts = [layer(vectors) for layer, vectors in pairs]
        try:
            return super().image_features(images)
        finally:
            self._image_prompts = []

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy."""
        scale: Any = self.model.logit_scale
        with autocast(self.config.precision, self.device):
            features = self.image_features(images)
            classes = self.frame.encode(self.vectors[0], list(self.vectors)[1:])
        logits = scale.exp() * features @ classes.T
        return F.cross_entropy(logits, labels.to(self.device))

    def scores(self, prompts: ClassPrompts, *, show_progress: bool = False) -> Scores:
        """With prompts in both encoders, for any names."""
        classes = self.frame_of(prompts.names).encode(self.vectors[0], list(self.vectors)[1:])
        return scores_of(self.image_features, classes)
