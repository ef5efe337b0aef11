"""What a run found, as ``results.json``: accuracy, sizes, trained values by block, environment."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saft_clip.auto_density import DENSITY_TRIALS
from saft_clip.errors import CheckpointError
from saft_clip.forms import (
    Form,
    is_count,
    is_name,
    is_number,
    is_positive,
    is_text,
    one_of,
    optional,
    require_form,
)
from saft_clip.methods import find
from saft_clip.methods.base import BESIDE, FROZEN, Method
from saft_clip.metrics import EVALUATION, WHEN
from saft_clip.run_folder import read_json

#: Kinds of parameters, in the order in which reports show them.
KINDS = ("attention", "mlp", "norm", "embedding", "other")

_BLOCK = re.compile(r"\.(?:resblocks|blocks|layers|layer|stages)\.?(\d+)\.")
_STEM = re.compile(r"embed|conv1|bn1|conv2|bn2|conv3|bn3|ln_pre|norm_pre|cls_token|stem|patch")
_KIND_OF = (
    ("norm", re.compile(r"(^|\.)(ln_\w+|norm\w*|bn\d|layer_?norm\w*|\w+_norm)\.", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|attnpool")),
    ("mlp", re.compile(r"mlp|\.fc\d|intermediate|\.output\.dense")),
    ("embedding", re.compile(r"embed|cls_token|patch|^visual\.conv1\.")),
)


#: What pages and tables use of ``results.json``.
_FORM: Form = {
    **{"method": is_text, "model": is_text, "pretrained": optional(is_text)},
    **{"parameters": is_positive, "trained": is_count, "model_bytes": is_count},
    **{"artefact": is_name, "artefact_bytes": is_positive, "evaluations": [EVALUATION]},
    "blocks": [
        {
            **{"encoder": one_of("image", "text"), "block": is_name, "kind": one_of(*KINDS)},
            **{"trained": is_count, "parameters": is_count},
        }
    ],
    **{"seconds": {str: is_number}, "environment": {str: is_text}},
    "density_trials": DENSITY_TRIALS,
    "cost": {"step_seconds": optional(is_number), "peak_memory_bytes": optional(is_count)},
}


def read_results(path: Path) -> dict[str, Any]:
    """What :func:`summarize` gave, from a run's folder.

    Raises:
        CheckpointError: if the file is missing, broken, or not what this release writes.
    """
    results: dict[str, Any] = read_json(path)
    if isinstance(results, dict):
        results.setdefault("density_trials", [])  # which releases before had not
    require_form(results, _FORM, str(path))
    specs = {when: set[str]() for when in WHEN}
    for line in results["evaluations"]:
        specs[line["when"]].add(line["spec"])
    if specs["before"] != specs["after"]:
        raise CheckpointError(f"{path} is broken: data were evaluated before or after only")
    return results


def summarize(
    method: Method,
    artefact: Path,
    lines: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    peak_memory: int | None,
) -> dict[str, Any]:
    """Collect the results of a finished run.

    Args:
        method: after training.
        artefact: the file it wrote.
        lines: the run's record.
        seconds: what took how long.
        peak_memory: bytes, of preparation and training; None if nobody knows.
    """
    found: list[Any] = [line.get("seconds") for line in lines if line["kind"] == "train"]
    steps = [value for value in found if is_number(value)]  # releases before had none
    state = method.model.state_dict()
    return {
        "method": find(method.name).title,
        "model": method.clip.name,
        "pretrained": method.clip.pretrained,
        "parameters": sum(p.numel() for p in method.encoder_parameters().values()),
        "trained": sum(method.trained.values()),
        "model_bytes": sum(value.nbytes for value in state.values()),
        "artefact": artefact.name,
        "artefact_bytes": artefact.stat().st_size,
        "blocks": count_blocks(method.model, method.trained),
        "evaluations": [line for line in lines if line["kind"] == "evaluation"],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "cost": {
            "step_seconds": statistics.median(steps) if steps else None,
            "peak_memory_bytes": peak_memory,
        },
        "environment": environment(method.device),
    }


def count_blocks(model: nn.Module, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """The number of trained values in each block of each encoder, by kind (SAFT, Fig. 6).

    Args:
        model: an open_clip model.
        numbers: of trained values in each tensor; those beside the encoders' blocks do not count.

    Returns:
        Dicts of ``encoder`` (image or text), ``block`` (``in``, a number from 1, or ``out``),
        ``kind`` (one of :data:`KINDS`), ``trained`` and ``parameters``; in the order of the data's
        way through the model.
    """
    trained: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    for name, param in model.named_parameters():
        if name not in FROZEN:
            parameters[locate(name)] += param.numel()
    for name, number in numbers.items():
        if name not in FROZEN and not name.startswith(BESIDE):
            trained[locate(name)] += number
    return [
        {
            "encoder": encoder,
            "block": block,
            "kind": kind,
            "trained": trained[encoder, block, kind],
            "parameters": parameters[encoder, block, kind],
        }
        for encoder, block, kind in sorted(parameters, key=_along_the_data)
    ]


def locate(name: str) -> tuple[str, str, str]:
    """(encoder, block, kind) of an open_clip parameter, from its name."""
    encoder = "image" if name.startswith("visual.") else "text"
    kind = next((kind for kind, pattern in _KIND_OF if pattern.search(name)), "other")
    block = _BLOCK.search(name)
    if block is not None:
        # Residual stages (layer1) count from 1 in their names already, transformer blocks from 0.
        number = int(block.group(1)) + (0 if re.search(r"\.layer\d", name) else 1)
        return encoder, str(number), kind
    return encoder, "in" if _STEM.search(name) else "out", kind


def _along_the_data(place: tuple[str, str, str]) -> tuple[str, float, int]:
    encoder, block, kind = place
    position = {"in": 0.0, "out": float("inf")}.get(block)
    return encoder, float(block) if position is None else position, KINDS.index(kind)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for people."""
    found = {"python": platform.python_version()}
    for package in ("torch", "open_clip_torch", "saft-kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found["threads"] = str(torch.get_num_threads())
    return found
