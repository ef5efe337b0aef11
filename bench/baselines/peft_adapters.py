"""What the baselines by ``peft`` share: adapters in a frozen model, and AdamW over them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ..harness import require
from ..memory import MeasurementError
from ..models import ADAMW

#: Parts of the names of all adapters, and of those that are zero before the first step.
_ADAPTERS = ("lora_", "shira_", "supertuning_")
_ZERO_AT_FIRST = ("lora_B", "shira_weight", "supertuning_values")


def adapt(model: nn.Module, config: str, **options: Any) -> torch.optim.Optimizer:
    """Put adapters into the model, freeze everything else, and set AdamW up for them.

    Args:
        model: changed in place.
        config: name of a configuration class of peft.
        options: of that.

    Raises:
        MeasurementError: if peft is not installed, or too old to have that class.
    """
    try:  # only where it is needed: peft takes seconds to import and brings much with it
        peft: Any = importlib.import_module("peft")
        make = getattr(peft, config)
    except (ImportError, AttributeError) as error:
        raise MeasurementError(
            f"this baseline needs peft.{config}, which cannot be imported ({error}); "
            "run `pip install -r requirements.txt`"
        ) from error
    try:
        peft.inject_adapter_in_model(make(**options), model)
    except ValueError as error:  # the model has none of the layers
        raise MeasurementError(f"peft finds no layer to adapt in this model ({error})") from error
    adapters = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(adapters, fused=True, **ADAMW)


def require_trained(model: nn.Module) -> None:
    """An adapter has moved, of those that are zero before the first step."""
    zero = [p for name, p in model.named_parameters() if any(key in name for key in _ZERO_AT_FIRST)]
    require(any(bool(param.count_nonzero()) for param in zero), "no adapter was trained")


def pretrained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, by the names they had before peft wrapped their layers."""
    return {
        name.replace(".base_layer", ""): param
        for name, param in model.named_parameters()
        if not any(key in name for key in _ADAPTERS)
    }
