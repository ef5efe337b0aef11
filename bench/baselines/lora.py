"""LoRA (Hu et al. 2022) of rank 8 on the MLPs and the attention, by the ``peft`` library.

peft wraps ``nn.MultiheadAttention`` in a layer that adds the adapters to the weights before its
forward pass and takes them off afterwards. Such a layer is none that the text tower could run
without padding, so the text tower's are merged, by peft's own code, around the whole loss: LoRA
encodes the same tokens as every other method here. The image tower's are left to peft.

Merging costs LoRA what it costs any user of peft: the dense gradient of every attention weight. It
also moves the pretrained attention weights by roundings once the adapters are not zero, and peft
0.21 adds ``out_proj``'s adapter twice in the forward pass; neither changes what a step takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from saft_kernels import CooMask

from . import Loss, Step, step_of
from .peft_adapters import adapt

COVERS = "adapters of rank 8, not the mask"

#: What ``peft.LoraConfig`` is given.
OPTIONS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["c_fc", "c_proj", "attn"],
}

#: The same layers as timm's transformers call them.
TIMM_TARGETS = ["fc1", "fc2", "qkv", "proj"]


def lora(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train adapters and nothing else; the mask is not used.

    Raises:
        MeasurementError: if peft is not installed, or finds none of these layers in the model.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = OPTIONS["target_modules"] if "c_fc" in names else TIMM_TARGETS
    optimizer = adapt(model, "LoraConfig", **{**OPTIONS, "target_modules": targets})
    blocks = text_blocks(model)

    def merged_loss(model: nn.Module) -> Tensor:
        with merged(blocks):
            return loss(model)

    return step_of(optimizer, model, merged_loss)


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
