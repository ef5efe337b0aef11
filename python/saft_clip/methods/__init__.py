"""Methods of fine-tuning: one file each, one registry.

To add one, write a subclass of :class:`~saft_clip.methods.base.Method` in a file of its own and
list it here. A method is imported when it is used: some need packages that others do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from saft_clip.errors import ConfigError
from saft_kernels.untrusted import near_matches, shown

if TYPE_CHECKING:
    from saft_clip.methods.base import Method

__all__ = ["METHODS", "MethodEntry", "find", "find_method"]


@dataclass(frozen=True)
class MethodEntry:
    """What is known of a method before it is imported.

    Attributes:
        name: what ``--method`` calls it.
        title: what pages call it.
        does: what it trains, in one line.
        where: its module here and its class.
        defaults: settings whose defaults are its own, among them those that only it has.
        trains: whether there is anything to train.
        selects: whether it selects entries, so that ``--density`` has a say.
        source: where the definition and the defaults come from.
    """

    name: str
    title: str
    does: str
    where: tuple[str, str]
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True
    selects: bool = False


_SAFT = "SAFT, arXiv 2407.03036"

#: All of CoOp's family step with SGD (Dassl's options); warm-up is linear here, constant there.
_SGD = {"optimizer": "sgd", "wd": 5e-4}

_ENTRIES = (
    MethodEntry(
        "zero-shot", "zero-shot", "nothing",
        ("zero_shot", "ZeroShot"), "Radford et al. 2021", trains=False,
    ),
    MethodEntry(
        "saft", "SAFT", "the entries with the largest mean gradient",
        ("saft", "Saft"), _SAFT, {"alpha": 1.0}, selects=True,
    ),
    MethodEntry(
        "saft-fisher", "SAFT†", "the entries with the largest Fisher information",
        ("saft_fisher", "SaftFisher"), f"{_SAFT}, Eq. 7; Sung et al. 2021", {"alpha": 1.0},
        selects=True,
    ),
    MethodEntry(
        "random", "random entries", "entries drawn at random",
        ("random", "RandomEntries"), f"{_SAFT}, Table 4", {"alpha": 1.0}, selects=True,
    ),
    MethodEntry(
        "magnitude", "smallest weights", "the entries with the smallest absolute values",
        ("magnitude", "SmallestWeights"), f"{_SAFT}, Table 4", {"alpha": 1.0}, selects=True,
    ),
    MethodEntry(
        "full", "full fine-tuning", "all parameters of both encoders",
        ("full", "Full"), _SAFT, {"alpha": 1.0},
    ),
    MethodEntry(
        "visual", "image encoder", "all parameters of the image encoder",
        ("visual", "Visual"), f"{_SAFT}, Table 10", {"alpha": 1.0},
    ),
    MethodEntry(
        "text", "text encoder", "all parameters of the text encoder",
        ("text", "Text"), f"{_SAFT}, Table 10", {"alpha": 1.0},
    ),
    MethodEntry(
        "bitfit", "BitFit", "biases",
        ("bitfit", "BitFit"), "Ben Zaken et al. 2022", {"alpha": 1.0, "lr": 1e-4},
    ),
    MethodEntry(
        "lora", "LoRA", "low-rank changes of attention and MLP weights",
        ("lora", "Lora"), "Hu et al. 2022 (their GPT-2 settings)",
        {"rank": 4, "lora_alpha": 32.0, "lr": 2e-4, "wd": 0.01},
    ),
    MethodEntry(
        "lp", "linear probe", "a linear classifier on image features",
        ("lp", "LinearProbe"), "Radford et al. 2021; Wortsman et al. 2022 for its start",
        {"lr": 1e-3},
    ),
    MethodEntry(
        "lp-ft", "LP-FT", "first a linear classifier, then it and the image encoder",
        ("lp_ft", "LpFt"), "Kumar et al. 2022",
        {"probe_epochs": 10, "probe_lr": 1e-3},
    ),
    MethodEntry(
        "wise-ft", "WiSE-FT", "image encoder and classifier, averaged with the pretrained ones",
        ("wise_ft", "WiseFt"), "Wortsman et al. 2022", {"alpha": 0.5, "lr": 3e-5},
    ),
    MethodEntry(
        "flyp", "FLYP", "both encoders, by the contrastive loss on images and captions",
        ("flyp", "Flyp"), "Goyal et al. 2023", {"alpha": 1.0, "lr": 1e-5},
    ),
    MethodEntry(
        "clipood", "CLIPood", "the image encoder, with margins by meaning, averaged over its steps",
        ("clipood", "Clipood"), "Shu et al. 2023",
        {"margin": 0.3, "beta": 0.5, "batch_size": 36},
    ),
    MethodEntry(
        "l2sp", "L2-SP", "everything, near the pretrained weights (squared distance)",
        ("l2sp", "L2SP"), "Li et al. 2018", {"alpha": 1.0, "penalty": 0.1, "wd": 0.0},
    ),
    MethodEntry(
        "l1sp", "L1-SP", "everything, near the pretrained weights (absolute distance)",
        ("l1sp", "L1SP"), "Li et al. 2018", {"alpha": 1.0, "penalty": 1e-4, "wd": 0.0},
    ),
    MethodEntry(
        "kd", "distillation", "everything, with answers near the pretrained model's",
        ("kd", "Distillation"), "Hinton et al. 2015",
        {"alpha": 1.0, "penalty": 1.0, "temperature": 2.0},
    ),
    MethodEntry(
        "coop", "CoOp", "the context vectors of the prompts",
        ("coop", "CoOp"), "Zhou et al. 2022 (IJCV)",
        {**_SGD, "lr": 2e-3, "epochs": 50, "context": 16},
    ),
    MethodEntry(
        "cocoop", "CoCoOp", "context vectors and a network that moves them for each image",
        ("cocoop", "CoCoOp"), "Zhou et al. 2022 (CVPR)",
        {**_SGD, "lr": 2e-3, "batch_size": 1, "context": 4},
    ),
    MethodEntry(
        "maple", "MaPLe", "prompts in the blocks of both encoders, an image's made from a text's",
        ("maple", "MaPLe"), "Khattak et al. 2023",
        {**_SGD, "lr": 3.5e-3, "epochs": 5, "batch_size": 4, "context": 2, "depth": 9},
    ),
)  # fmt: skip

METHODS: dict[str, MethodEntry] = {entry.name: entry for entry in _ENTRIES}


def find(name: str) -> MethodEntry:
    """What is known of the method of that name.

    Raises:
        ConfigError: if there is none; the message names them all.
    """
    if name not in METHODS:
        hint = near_matches(str(name), METHODS) or ":"
        raise ConfigError(
            f"there is no --method {shown(repr(name))}{hint} the methods are {', '.join(METHODS)}"
        )
    return METHODS[name]


def find_method(name: str) -> type[Method]:
    """The class of the method of that name.

    Raises:
        ConfigError: if there is none.
    """
    module, kind = find(name).where
    found: type[Method] = getattr(import_module(f"{__name__}.{module}"), kind)
    return found
