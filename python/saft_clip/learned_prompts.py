"""Text features of prompts whose first words are learned vectors, and of prompts in every block.

Such prompts have no tokens to pack (:mod:`saft_clip.text_tower`), so they are encoded as they are,
but for what stands behind the last one's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.errors import ConfigError
from saft_clip.text_tower import ends_of_text, padding_reason, tower_of
from saft_kernels.untrusted import shown

#: What learned vectors start from, where their number allows it (CoCoOp, MaPLe).
WORDS = "a photo of a"

#: Tokens of a prompt beside context and name: start, full stop, end; and one of the name.
_AROUND = 4


class PromptFrame:
    """Prompts of C classes, ``X X X <name>.``, in which the words X are to be replaced.

    Args:
        model: an open_clip model, on its device.
        names: of the classes.
        tokenizer: list of P texts -> int64 [P, L].
        words: what stands in front of the name; its first tokens are those that are learned.
        context: how many of them.

    Raises:
        ConfigError: if the text tower is of another kind than CLIP's, or a name is too long for so
            many words.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        tokenizer: Callable[[list[str]], Tensor],
        words: str,
        context: int,
    ) -> None:
        reason = padding_reason(model)
        if reason is not None:
            raise ConfigError(f"prompts cannot be learned for this model: {reason}")
        tower = tower_of(model)
        self.model = model
        self.context = context
        room = len(tower.positional_embedding)
        if context > room - _AROUND:
            raise ConfigError(
                f"--context {context} leaves no room for a class name in the {room} tokens of a "
                f"prompt of this model: give at most {room - _AROUND}"
            )
        texts = [f"{words} {name}." for name in names]
        tokens = tokenizer(texts).to(tower.positional_embedding.device)
        too_long = _first_cut(model, tokenizer, texts, tokens)
        if too_long is not None:
            raise ConfigError(
                f"the class name {shown(names[too_long])!r} is too long for {context} learned "
                f"words in {room} tokens: give a lower --context"
            )
        self.ends = ends_of_text(model, tokens)
        length = int(self.ends.max()) + 1
        with torch.no_grad():
            self.embedded = tower.token_embedding(tokens[:, :length]).detach()

    def first_words(self) -> Tensor:
        """The embeddings of what stands where vectors are learned: [context, D]."""
        return self.embedded[0, 1 : 1 + self.context].clone()

    def filled(self, vectors: Tensor) -> Tensor:
        """The prompts with learned vectors: [C, L, D] from [context, D]."""
        own = vectors.to(self.embedded.dtype).expand(len(self.embedded), -1, -1)
        rest = self.embedded[:, 1 + self.context :]
        return torch.cat([self.embedded[:, :1], own, rest], dim=1)

    def encode(self, vectors: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Normalised text features, float32 [C, E].

        Args:
            vectors: [context, D], in place of the first words.
            deep: [context, D] for each of the next blocks, in place of what came out there.
        """
        return encode_embedded(self.model, self.filled(vectors), self.ends, deep)


def _first_cut(
    model: nn.Module, tokenizer: Callable[..., Tensor], texts: Sequence[str], tokens: Tensor
) -> int | None:
    """The first text whose tokens are more than there is room for; None if all are whole."""
    room = tokens.shape[1]
    full = (ends_of_text(model, tokens) == room - 1).nonzero().flatten().tolist()
    for which in full:  # a text that is cut ends there too
        longer = tokenizer([texts[which]], context_length=2 * room)
        if int(ends_of_text(model, longer)) >= room:
            return int(which)
    return None


def encode_embedded(
    model: nn.Module, x: Tensor, ends: Tensor, deep: Sequence[Tensor] = ()
) -> Tensor:
    """Normalised text features of prompts that are embedded already; differentiable.

    Args:
        model: an open_clip model that :func:`saft_clip.text_tower.padding_reason` has nothing
            against.
        x: [P, L, D], without positions.
        ends: int64 [P], where each prompt is read out.
        deep: for the blocks from the second one on, [M, D] that take the place of the M positions
            behind the first.

    Returns:
        float32 [P, E].
    """
    tower: Any = tower_of(model)
    transformer = tower.transformer
    length = x.shape[1]
    dtype = transformer.get_cast_dtype()
    x = (x + tower.positional_embedding[:length]).to(dtype)
    mask = tower.attn_mask[:length, :length]
    for depth, block in enumerate(transformer.resblocks):
        if 1 <= depth <= len(deep):
            vectors = deep[depth - 1].to(x.dtype)
            own = vectors.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1 + len(vectors) :]], dim=1)
        x = block(x, attn_mask=mask)
    x = tower.ln_final(x)[torch.arange(len(x), device=x.device), ends]
    projection = tower.text_projection
    if isinstance(projection, nn.Module):
        x = projection(x)
    elif projection is not None:
        x = x @ projection
    return F.normalize(x.float(), dim=-1)
