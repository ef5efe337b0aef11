"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) with random entries, by the ``peft`` library.

Of each MLP weight of m x n it trains m + n entries, as many numbers as LoRA of rank 1 has: 0.1% of
a ViT-B/16. peft adapts linear layers only: neither attention nor convolutions, embeddings, norms
and biases. It takes a mask per layer too, of exactly this many entries in each, so that the masks
here do not fit it.

What it trains are differences, so that weight decay pulls towards the pretrained weights. State and
gradients of the optimizer are compact; what costs is the layer: forward copies every adapted weight
and adds the differences as a COO tensor, and backward makes the dense gradient of that copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels import CooMask

from . import Loss, Step, step_of
from .peft_adapters import adapt

COVERS = "random entries of c_fc and c_proj"

#: What ``peft.ShiraConfig`` is given.
OPTIONS: dict[str, Any] = {"r": 1, "target_modules": ["c_fc", "c_proj"]}


def shira(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train what SHiRA draws and nothing else; the mask is not used.

    Raises:
        MeasurementError: if peft is not installed, or has no SHiRA.
    """

    def quiet_loss(model: nn.Module) -> Tensor:
        # torch warns of every COO tensor, peft's too, until somebody says whether to check it.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            return loss(model)

    return step_of(adapt(model, "ShiraConfig", **OPTIONS), model, quiet_loss)
