"""A fine-tuned CLIP as other programs load it: open_clip's weights, or a folder of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from open_clip.transformer import (
    LayerNorm,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from saft_clip.errors import ModelError
from saft_clip.models import ClipModel
from saft_kernels.delta import save_weights
from saft_kernels.files import atomic_write, make_folder


def save_open_clip(model: nn.Module, path: Path) -> None:
    """Write a file that ``--pretrained`` of open_clip, CLIP_benchmark and ``saft`` takes.

    Raises:
        FileWriteError: if it cannot be written.
    """
    save_weights(path, model.state_dict())


def save_transformers(clip: ClipModel, folder: Path) -> None:
    """Write a folder that ``transformers.CLIPModel.from_pretrained`` loads.

    ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``. The tokenizer is that
    of ``openai/clip-vit-base-patch32``, and is not copied.

    Raises:
        ModelError: if transformers' CLIP has no such architecture.
        FileWriteError: if a file cannot be written.
    """
    model: Any = clip.model
    _require_plain(clip)
    state = model.state_dict()
    make_folder(folder)
    save_weights(folder / "model.safetensors", dict(_converted(state)))
    _write_json(folder / "config.json", _config(model))
    _write_json(folder / "preprocessor_config.json", _preprocessor(model))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# What fits ----------------------------------------------------------------------------------------


def _require_plain(clip: ClipModel) -> None:
    """OpenAI's architecture and nothing else: what transformers calls CLIP."""
    model: Any = clip.model
    reason = next(_obstacles(model), None)
    if reason is not None:
        raise ModelError(
            f"{clip.name} is no model that transformers' CLIP can be: {reason}; export it for "
            "open_clip"
        )


def _obstacles(model: Any) -> Iterator[str]:
    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer):
        yield "its image tower is no ViT of open_clip's"
        return
    if not isinstance(getattr(model, "transformer", None), Transformer):
        yield "its text tower is no plain transformer"
        return
    if (visual.pool_type, model.text_pool_type) != ("tok", "argmax"):
        yield "its towers pool otherwise"
    if visual.attn_pool is not None:
        yield "its image tower pools by attention"
    if visual.proj is None or not isinstance(model.text_projection, nn.Parameter):
        yield "a tower has no projection, or one with a bias"
    if not isinstance(visual.ln_pre, LayerNorm | nn.LayerNorm):
        yield "its image tower has no first normalisation"
    for tower in (visual.transformer, model.transformer):
        if not all(type(block) is ResidualAttentionBlock for block in tower.resblocks):
            yield "its blocks are not CLIP's"
        elif not all(isinstance(block.ls_1, nn.Identity) for block in tower.resblocks):
            yield "its blocks scale their layers"
    if getattr(model, "logit_bias", None) is not None:
        yield "it has a bias of logits"


# Names --------------------------------------------------------------------------------------------

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}

_OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}

#: Which transformers multiplies with from the other side.
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}

_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}


def _converted(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under transformers' name for it."""
    for name, tensor in state.items():
        if name in _OUTSIDE:
            yield _OUTSIDE[name], tensor
        elif name in _TRANSPOSED:
            yield _TRANSPOSED[name], tensor.t()
        else:
            yield from _of_block(name, tensor)


def _of_block(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix = next(prefix for prefix in _TOWERS if name.startswith(prefix))
    number, _, rest = name.removeprefix(prefix).partition(".")
    layer, _, kind = rest.rpartition(".")
    block = f"{_TOWERS[prefix]}{number}."
    if rest.startswith("attn.in_proj_"):  # the three products that open_clip does in one
        kind = rest.removeprefix("attn.in_proj_")
        for which, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{block}self_attn.{which}_proj.{kind}", part
    else:
        yield f"{block}{_BLOCK[layer]}.{kind}", tensor


# Configuration ------------------------------------------------------------------------------------


def _config(model: Any) -> dict[str, Any]:
    visual, text = model.visual, model.transformer
    size, _ = visual.image_size
    patch, _ = visual.patch_size
    vocabulary = model.token_embedding.num_embeddings
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.text_projection.shape[1],
        "logit_scale_init_value": model.logit_scale.item(),
        "vision_config": {
            "model_type": "clip_vision_model",
            **_tower(visual.transformer, model.text_projection.shape[1]),
            "image_size": size,
            "patch_size": patch,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **_tower(text, model.text_projection.shape[1]),
            "vocab_size": vocabulary,
            "max_position_embeddings": model.positional_embedding.shape[0],
            # The last two tokens of CLIP's tokenizer begin and end a text.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
    }


def _tower(tower: Any, projection: int) -> dict[str, Any]:
    block = tower.resblocks[0]
    return {
        "hidden_size": block.ln_1.weight.numel(),
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
        "layer_norm_eps": block.ln_1.eps,
        "projection_dim": projection,
    }


def _preprocessor(model: Any) -> dict[str, Any]:
    visual = model.visual
    height, width = visual.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(visual.image_mean),
        "image_std": list(visual.image_std),
    }
