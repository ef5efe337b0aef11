"""LoRA (Hu et al. 2022) of rank 8 by the ``peft`` library: on MLPs, and on MLPs and attention.

peft wraps ``nn.MultiheadAttention`` in a layer that adds the adapters to the weights before its
forward pass and takes them off afterwards. Such a layer is none that the text tower could run
without padding, so the text tower's are merged, by peft's own code, around the whole loss: LoRA
encodes the same tokens as every other method here. The image tower's are left to peft.

Merging costs LoRA what it costs any user of peft: the dense gradient of every attention weight. It
also moves the pretrained attention weights by roundings once the adapters are not zero, and peft
0.21 adds ``out_proj``'s adapter twice in the forward pass; neither changes what a step takes. LoRA
on the MLPs alone has none of this, and is the faster one.

Layers see their tokens in two dimensions, as in :mod:`.frozen` and for its reason. Only linear
layers and attention in transformer blocks are adapted, under the names that open_clip and timm give
them: of a ResNet, nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from saft_kernels import CooMask

from . import Loss, Step, step_of
from .frozen import flat_linear
from .peft_adapters import adapt

COVERS = "adapters of rank 8, not the mask"

#: What ``peft.LoraConfig`` is given beside the layers.
OPTIONS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}

#: What linear layers of transformer blocks are called by open_clip and timm.
MLP = ("c_fc", "c_proj", "fc1", "fc2")
ATTENTION = ("qkv", "proj")


def lora(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train adapters of MLPs and attention and nothing else; the mask is not used.

    Raises:
        MeasurementError: if peft is not installed, or finds none of these layers in the model.
    """
    layers = [*linear_layers(model, (*MLP, *ATTENTION)), *attention_layers(model)]
    optimizer = adapt(model, "LoraConfig", **OPTIONS, target_modules=layers)
    blocks = text_blocks(model)

    def merged_loss(model: nn.Module) -> Tensor:
        with merged(blocks), flat_linear():
            return loss(model)

    return step_of(optimizer, model, merged_loss)


def lora_of_mlps(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train adapters of MLPs and nothing else; the mask is not used.

    Raises:
        MeasurementError: if peft is not installed, or finds none of these layers in the model.
    """
    layers = linear_layers(model, MLP)
    optimizer = adapt(model, "LoraConfig", **OPTIONS, target_modules=layers)

    def flat_loss(model: nn.Module) -> Tensor:
        with flat_linear():
            return loss(model)

    return step_of(optimizer, model, flat_loss)


def linear_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Full names of the linear layers that are called so."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    ]


def attention_layers(model: nn.Module) -> list[str]:
    """Full names of torch's own attention layers."""
    return [n for n, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]


def text_blocks(model: nn.Module) -> list[Any]:
    """The blocks of the text tower."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, ResidualAttentionBlock) and not name.startswith("visual.")
    ]


@contextmanager
def merged(blocks: Sequence[Any]) -> Iterator[None]:
    """Let the attention of these blocks be torch's own, with peft's adapters in its weights."""
    wrapped = [block.attn for block in blocks]
    try:
        for block in blocks:
            block.attn.merge()
            block.attn = block.attn.base_layer
        yield
    finally:
        for block, attention in zip(blocks, wrapped, strict=True):
            block.attn = attention
            attention.unmerge()
