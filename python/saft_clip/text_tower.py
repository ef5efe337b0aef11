"""Causal text towers without the padding, exactly.

A tokenizer pads every prompt to the context length (77 tokens in CLIP, few of which a class prompt
needs). In a causal tower that reads out at the end-of-text token, nothing behind that token has any
influence, and nothing in front of it depends on what is behind. So the prompts are packed end to
end without padding, and what they all begin with ("a photo of a") is computed once: its keys and
values serve every prompt, and autograd adds up its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, Transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from saft_kernels.once import once


@dataclass(frozen=True)
class Packing:
    """Prompts end to end: the shared prefix, then what follows it in each, shorter ones first.

    Attributes:
        tokens: int64 [N].
        positions: int64 [N], of the tokens in their prompts.
        prefix: length of the shared prefix.
        groups: (number of prompts, length of each behind the prefix), in order.
        ends: int64 [P], where in ``tokens`` each prompt ends, in the order of the prompts.
    """

    tokens: Tensor
    positions: Tensor
    prefix: int
    groups: list[tuple[int, int]]
    ends: Tensor

    @classmethod
    def of(cls, tokens: Tensor, ends: Tensor) -> Packing:
        """Pack prompts.

        Args:
            tokens: int64 [P, L], P > 0.
            ends: int64 [P], the index of each prompt's last token that counts.
        """
        lengths, order = (ends + 1).sort(stable=True)
        shared = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
        prefix = min(int(shared), int(lengths[0]) - 1)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        chosen = (place >= prefix) & (place < lengths[:, None])  # row by row
        suffixes, counts = lengths.unique_consecutive(return_counts=True)
        last = prefix + (lengths - prefix).cumsum(0) - 1
        return cls(
            torch.cat([tokens[0, :prefix], tokens[order][chosen]]),
            torch.cat([place[:prefix], place.expand_as(chosen)[chosen]]),
            prefix,
            list(zip(counts.tolist(), (suffixes - prefix).tolist(), strict=True)),
            torch.empty_like(last).scatter_(0, order, last),
        )


def packings(model: nn.Module, tokens: Tensor, size: int) -> list[Packing]:
    """The prompts in batches of at most ``size`` tokens, packed.

    Args:
        model: an open_clip model that :func:`padding_reason` has nothing against.
        tokens: int64 [P, L], on its device. The prompts of a training run are the same in each
            step, and on a GPU packing them waits for it: the result is kept.
        size: but a batch has one prompt at least.
    """
    tower = tower_of(model)
    what = "packings", size, _pool_type(tower), _end_of_text(tower)
    return once(tokens, what, lambda: list(_pack(model, tokens, size)))


def _pack(model: nn.Module, tokens: Tensor, size: int) -> Iterator[Packing]:
    ends = ends_of_text(model, tokens)
    counts = _counts((ends + 1).tolist(), size)
    for batch in zip(tokens.split(counts), ends.split(counts), strict=True):
        yield Packing.of(*batch)


def _counts(lengths: Sequence[int], size: int) -> list[int]:
    """How many prompts in a row make up a batch of ``size`` tokens at most, but one at least."""
    counts, room = [0], size
    for length in lengths:
        if length > room and counts[-1]:
            counts.append(0)
            room = size
        counts[-1] += 1
        room -= length
    return counts


def padding_reason(model: nn.Module) -> str | None:
    """Why the prompts of a model cannot be packed; None if they can."""
    tower = tower_of(model)
    transformer: Any = getattr(tower, "transformer", None)
    if type(transformer) is not Transformer:
        return f"its text tower is a {type(tower).__name__} of another kind"
    if getattr(tower, "cls_emb", None) is not None:
        return "its text tower reads out at a class token behind the padding"
    if _pool_type(tower) not in ("argmax", "eos"):
        return f"its text tower reads out at {_pool_type(tower)!r}, not at the end of the text"
    if not _is_causal(getattr(tower, "attn_mask", None)):
        return "its text tower is bidirectional, so that padding has an influence"
    if any(_is_unusual(block) for block in transformer.resblocks):
        return "the blocks of its text tower are unusual or have hooks"
    return None


def tower_of(model: nn.Module) -> Any:
    """What holds a model's text tower: a module of its own, or the model itself."""
    text = getattr(model, "text", None)
    return text if isinstance(text, TextTransformer) else model


def _pool_type(tower: Any) -> str:
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")))


def _is_causal(mask: Any) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False

    def look() -> bool:
        return torch.equal(mask == 0, torch.ones_like(mask, dtype=torch.bool).tril())

    return once(mask, "causal", look)


def _is_unusual(block: nn.Module) -> bool:
    attention: Any = getattr(block, "attn", None)
    return (
        type(block) is not ResidualAttentionBlock
        or not _is_plain_attention(attention)
        or attention.dropout > 0
        or attention.in_proj_weight is None
        or attention.bias_k is not None
        or attention.add_zero_attn
        or hasattr(block, "ln_1_kv")
        or any(m._forward_hooks or m._forward_pre_hooks for m in (block, attention))
    )


def _is_plain_attention(attention: Any) -> bool:
    """Whether it is torch's, be its weights parametrized (as LoRA's are)."""
    if not isinstance(attention, nn.MultiheadAttention):
        return False
    return parametrize.type_before_parametrizations(attention) is nn.MultiheadAttention


def ends_of_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """The index of each prompt's end-of-text token, where its features are read out, int64 [P]."""
    tower = tower_of(model)
    if _pool_type(tower) == "argmax":
        return tokens.argmax(dim=-1)
    return tokens.eq(_end_of_text(tower)).int().argmax(dim=-1)


def _end_of_text(tower: Any) -> Any:
    return getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))


def encode_packed(model: nn.Module, packing: Packing) -> Tensor:
    """The text features of packed prompts: ``model.encode_text`` without the padding.

    Args:
        model: an open_clip model that :func:`padding_reason` has nothing against.
        packing: of P prompts.

    Returns:
        [P, E], not normalised.
    """
    tower = tower_of(model)
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(packing.tokens).to(dtype)
    x = x + tower.positional_embedding[packing.positions].to(dtype)
    saves_memory = tower.transformer.grad_checkpointing and torch.is_grad_enabled()
    last = len(tower.transformer.resblocks) - 1
    for depth, block in enumerate(tower.transformer.resblocks):
        read = packing.ends if depth == last else None
        if saves_memory:
            x = checkpoint(_block, block, x, packing, read, use_reentrant=False)
        else:
            x = _block(block, x, packing, read)
    x = tower.ln_final(x)
    projection: Any = tower.text_projection
    if projection is None:
        return x
    result: Tensor = projection(x) if isinstance(projection, nn.Module) else x @ projection
    return result


def _block(block: Any, x: Tensor, packing: Packing, read: Tensor | None) -> Tensor:
    """A residual block; behind its attention only the tokens that are read, if not all are."""
    attended = _attention(block.attn, block.ln_1(x), packing)
    if read is not None:
        x, attended = x[read], attended[read]
    projection = block.attn.out_proj
    x = x + block.ls_1(F.linear(attended, projection.weight, projection.bias))
    result: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return result


def _attention(attention: Any, x: Tensor, packing: Packing) -> Tensor:
    """``nn.MultiheadAttention`` within every prompt, without its output projection.

    The prefix's keys and values serve all prompts.
    """
    heads: int = attention.num_heads
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)  # [heads, N, head size]
    # One cut for all groups: its backward joins their gradients in one pass.
    lengths = [count * length for count, length in packing.groups]
    (q0, *qs), (k0, *ks), (v0, *vs) = (t.split([packing.prefix, *lengths], 1) for t in (q, k, v))
    parts = []
    if packing.prefix:
        shared = F.scaled_dot_product_attention(q0[None], k0[None], v0[None], is_causal=True)
        parts.append(_joined(shared))
    for (count, length), q, k, v in zip(packing.groups, qs, ks, vs, strict=True):
        own_q, own_k, own_v = (t.unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v))
        keys, values = (
            torch.cat([prefix.expand(count, -1, -1, -1), own], dim=2)
            for prefix, own in ((k0, own_k), (v0, own_v))
        )
        mask = torch.ones(length, packing.prefix + length, dtype=torch.bool, device=x.device).tril(
            packing.prefix
        )
        parts.append(_joined(F.scaled_dot_product_attention(own_q, keys, values, attn_mask=mask)))
    return torch.cat(parts)


def _joined(x: Tensor) -> Tensor:
    """[prompts, heads, tokens, head size] -> [prompts * tokens, width]."""
    return x.transpose(1, 2).flatten(0, 1).flatten(1)
