"""Full fine-tuning by the AdamW of ``bitsandbytes``, whose moments have 8 bits.

The moments of each parameter of 4,096 entries or more are stored in one byte each, scaled by blocks
of 256 (Dettmers et al. 2022, arXiv 2110.02861); smaller parameters keep theirs in fp32. That saves
6 of the 8 bytes of state per parameter and none of the gradients, which are dense. On a CPU,
bitsandbytes 0.50 widens the moments of a parameter to fp32, steps in plain torch and rounds them
again: correct, but slower than torch's fused AdamW.

A step computes in fp32 and rounds the moments at its end, so that the first one is AdamW's exactly
and only later ones differ. bitsandbytes is in no requirements file: nothing else here needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from saft_kernels import CooMask

from ..memory import MeasurementError
from ..models import ADAMW, candidates
from . import Loss, Step, step_of

COVERS = "every parameter"

_SMALLEST = 4096  # entries; smaller parameters have fp32 moments


def adamw8bit(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """Train everything; the mask is not used.

    Raises:
        MeasurementError: if bitsandbytes is not installed, or cannot take a step on this device.
    """
    params = list(candidates(model).values())
    make = _load(params[0].device)
    return step_of(make(params, **ADAMW), model, loss)


def _load(device: torch.device) -> Any:
    """The optimizer's class, after it took a step; older ones cannot take any on a CPU."""
    scratch = nn.Parameter(torch.zeros(_SMALLEST, device=device))
    scratch.grad = torch.ones_like(scratch)
    try:
        make: Any = importlib.import_module("bitsandbytes").optim.AdamW8bit
        make([scratch]).step()
    except Exception as error:  # whatever a native library that does not fit this machine raises
        reason = " ".join(str(error).split())
        raise MeasurementError(
            f"this baseline needs an 8-bit AdamW that runs on {device}, and bitsandbytes has none "
            f"({reason}); run `pip install --no-deps 'bitsandbytes>=0.50'`"
        ) from error
    return make
