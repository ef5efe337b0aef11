"""Class prompts: templates, tokens and text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.errors import DataError
from saft_clip.text_tower import encode_packed, packings, padding_reason

DEFAULT_TEMPLATES = ("a photo of a {}.",)

#: Tokens per call of the text encoder: bounds the memory of evaluating many templates.
TOKEN_BATCH = 256 * 77


def resolve_templates(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Turn what a user names into prompt templates; every one holds ``{}`` for the class name.

    Args:
        spec: ``openai`` (the 80 templates of Radford et al. 2021 for ImageNet) or ``simple`` (their
            7 best), both as open_clip ships them; a template such as ``"a sketch of a {}."``; a
            text file with one template per line (empty lines and lines starting with ``#`` are
            skipped); or a sequence of these.

    Raises:
        DataError: if nothing of that name exists, a file holds no template, or a template has no
            ``{}``.
    """
    if not isinstance(spec, str):
        if not spec:
            raise DataError("the list of prompt templates is empty")
        return tuple(template for item in spec for template in resolve_templates(item))
    if spec in ("openai", "simple"):
        return _shipped(spec)
    if "{" in spec:
        return _checked([spec], "the template")
    try:
        lines = Path(spec).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"there are no prompt templates {spec!r}: give openai, simple, a template that holds "
            "{}, or a text file with one template per line"
        ) from None
    stripped = (line.strip() for line in lines)
    return _checked([line for line in stripped if line and not line.startswith("#")], spec)


def _shipped(name: str) -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES if name == "openai" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in templates)


def _checked(templates: Sequence[str], source: str) -> tuple[str, ...]:
    if not templates:
        raise DataError(
            f"{source} holds no prompt template; write one per line, {{}} for the class"
        )
    for template in templates:
        if "{}" not in template:
            raise DataError(
                f"the prompt template {template!r} has no {{}} where the class name goes ({source})"
            )
    return tuple(templates)


@dataclass(frozen=True)
class ClassPrompts:
    """C classes and what is said of them.

    Attributes:
        names: C names, as they appear in the text.
        templates: T templates with ``{}`` for the name.
        tokenizer: of the model: a list of P texts -> int64 [P, L].
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    tokenizer: Callable[[list[str]], Tensor]

    @cached_property
    def tokens(self) -> Tensor:
        """Every template for every class, int64 [C, T, L]; made when it is first asked for."""
        return class_prompts(self.names, self.templates, self.tokenizer)


def class_prompts(
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor],
) -> Tensor:
    """Tokenize every template for every class.

    Args:
        class_names: C names, as they shall appear in the text.
        templates: T templates with ``{}`` for the name.
        tokenizer: of the model: a list of P texts -> int64 [P, L].

    Returns:
        int64 [C, T, L].
    """
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    return tokenizer(texts).view(len(class_names), len(templates), -1)


def encode_prompts(model: nn.Module, tokens: Tensor) -> Tensor:
    """Normalised text embeddings of tokenized prompts; differentiable.

    Causal text towers work on no padding, and on a beginning that all prompts share only once
    (:mod:`saft_clip.text_tower`); others encode the prompts as they are.

    Args:
        model: an open_clip model.
        tokens: int64 [P, L], on the model's device.

    Returns:
        [P, E], unit length; float32, whatever autocast is in force.
    """
    encode_text: Any = model.encode_text
    if padding_reason(model) is None:
        batches = [
            encode_packed(model, packing) for packing in packings(model, tokens, TOKEN_BATCH)
        ]
    else:
        size = max(1, TOKEN_BATCH // tokens.shape[1])
        batches = [encode_text(batch) for batch in tokens.split(size)]
    return F.normalize(torch.cat(batches).float(), dim=-1)
