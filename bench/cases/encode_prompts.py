"""The text tower on ImageNet's class prompts, forward and backward: packed against padded.

The padded contender is open_clip's ``encode_text``. The activations of 1,000 prompts of 77 tokens
do not fit into the memory of a small machine, so it goes through them a hundred at a time, with a
backward pass each; that changes no gradient and hardly its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from saft_clip.models import load_model
from saft_clip.prompts import class_prompts
from saft_clip.text_tower import Packing, encode_packed, ends_of_text

from ..bars import held_to
from ..correctness import require_same_gradients
from ..flops import Flops
from ..harness import Contender, Effort, measure, require
from ..models import Setting, require_clip
from ..outcome import BASELINE, OURS, Outcome
from ..ratios import times_faster

PADDED_BATCH = 100


def run(setting: Setting) -> Outcome:
    """All weights trained, so that both compute every gradient."""
    require_clip(setting)
    torch.manual_seed(0)
    clip = load_model(setting.model, setting.pretrained)
    names = open_clip.IMAGENET_CLASSNAMES
    if setting.small:
        names = names[:20]
    tokens = class_prompts(names, ["a photo of a {}."], clip.tokenizer).flatten(0, 1)
    model = clip.model.train()
    weights = torch.randn(len(tokens), _features(model, tokens[:1]).shape[1])

    def padded() -> None:
        for batch, weight in zip(
            tokens.split(PADDED_BATCH), weights.split(PADDED_BATCH), strict=True
        ):
            (_features(model, batch) * weight).sum().backward()

    def packed() -> None:
        packing = Packing.of(tokens, ends_of_text(model, tokens))
        (encode_packed(model, packing) * weights).sum().backward()

    expected: dict[str, Tensor] = {}

    def check_padded(run: Callable[[], Any]) -> None:  # it takes long, and is the specification
        expected.update(_gradients(model, run))
        finite = all(gradient.isfinite().all() for gradient in expected.values())
        require(finite, "a gradient is not finite")

    ways = (
        ("encode_text, padded", padded, check_padded, BASELINE),
        ("packed, shared prefix", packed, _check(model, expected), OURS),
    )
    contenders = [_contender(*way, model) for way in ways]
    group = f"{len(tokens):,} class prompts, forward and backward"
    effort = Effort(60.0, 3, 7, warm_up=0) if setting.kernels.seconds else setting.kernels
    timings = measure(group, contenders, effort)
    slow, fast = timings.values()
    what = f"text tower on {len(tokens):,} class prompts, packed against padded"
    return Outcome([slow, fast], [held_to("prompts/packed", times_faster(what, slow, fast))])


def _contender(
    name: str,
    run: Callable[[], Any],
    check: Callable[[Callable[[], Any]], None],
    role: str,
    model: nn.Module,
) -> Contender:
    """It reads the text tower's weights forward and backward, and writes their gradients."""
    flops = Flops()
    text = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("visual."))
    needs = flops.needs(3 * text)
    return Contender(name, run, flops.checked(check), needs=needs, role=role)


def _features(model: Any, tokens: Tensor) -> Tensor:
    features: Tensor = model.encode_text(tokens)
    return features


def _gradients(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    run()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _check(model: nn.Module, expected: dict[str, Tensor]) -> Callable[[Callable[[], Any]], None]:
    def check(run: Callable[[], Any]) -> None:
        require_same_gradients(_gradients(model, run), expected)

    return check
