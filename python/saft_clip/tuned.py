"""A fine-tuned model from what a run has written: the pretrained one with a delta or an adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from saft_clip.adapter_file import load_adapter
from saft_clip.config import DEFAULT_PRETRAINED
from saft_clip.evaluate import Scores, zero_shot_scores
from saft_clip.methods.dense import restored
from saft_clip.models import ClipModel, load_model
from saft_kernels.delta import SparseDelta

DEFAULT_MODEL = "ViT-B-16"


def load_tuned(
    model: str | None,
    pretrained: str | None,
    *,
    delta: Path | None = None,
    adapter: Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    force_quick_gelu: bool = False,
) -> tuple[ClipModel, Callable[..., Scores]]:
    """Load a model, change it, and say how it classifies.

    Args:
        model: of open_clip, or saft-tiny; None for that of the delta or the adapter.
        pretrained: tag or file of its weights; None for its default, or what the delta says.
        delta: file to apply; not with an adapter.
        adapter: file of what was trained beside the model.
        device: where it goes.
        precision: that it will be evaluated in.
        force_quick_gelu: build it with QuickGELU; so it is where the delta or adapter says so.

    Returns:
        The model, and a function of class prompts (and ``show_progress``) for
        :func:`saft_clip.evaluate.evaluate`.

    Raises:
        ModelError: if there is no such model or weights.
        DeltaError: if the delta is broken or was made for other weights.
        CheckpointError: likewise, of the adapter.
    """
    change = None if delta is None else SparseDelta.load(delta)
    beside = None if adapter is None else load_adapter(adapter)
    texts = change.metadata if change is not None else beside.texts if beside is not None else {}
    if model is None:
        model = texts.get("model")
        pretrained = pretrained or texts.get("pretrained")
    model = model or DEFAULT_MODEL
    clip = load_model(
        model,
        pretrained or DEFAULT_PRETRAINED.get(model),
        device=device,
        precision=precision,
        force_quick_gelu=force_quick_gelu or texts.get("force_quick_gelu") == "yes",
    )
    if change is not None:
        change.apply_(clip.model)
    if beside is not None:
        return clip, restored(beside, clip, device, precision, f"the adapter {adapter}").scores
    return clip, functools.partial(zero_shot_scores, clip.model, device=device)
