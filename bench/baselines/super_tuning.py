"""Super-Tuning (arXiv 2607.09287) on the MLPs, by the ``peft`` library.

Of each MLP weight it trains the entries of the largest magnitude, the same share of every layer:
nothing that depends on data. As with SHiRA, peft adapts linear layers only, what is trained are
differences to the pretrained weights, and weight decay pulls towards these.

State and gradients of the optimizer are compact; what costs is the layer: forward scatters the
differences into a copy of every adapted weight, with its indices widened to int64, and backward
makes the dense gradient of that copy.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from saft_kernels import CooMask

from . import Loss, Step, step_of
from .peft_adapters import adapt

COVERS = "the largest 0.1% of each c_fc and c_proj"

#: What ``peft.SupertuningConfig`` is given.
OPTIONS: dict[str, Any] = {"sparsity": 0.999, "target_modules": ["c_fc", "c_proj"]}


def super_tuning(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train the largest entries and nothing else; the mask is not used.

    Raises:
        MeasurementError: if peft is not installed, or has no Super-Tuning.
    """
    return step_of(adapt(model, "SupertuningConfig", **OPTIONS), model, loss)
