"""Masks: what loads has sound indices, and a model is trained exactly there or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fuzz import mutations, trees
from fuzz.choices import Choices
from fuzz.containers import Container, parse
from fuzz.oracles import check_indices, refusals, require, untouched
from fuzz.targets.base import SafetensorsTarget
from saft_kernels import CooMask, attach
from saft_kernels.errors import DeltaFormatError
from saft_kernels.layout import index_dtype
from small_deltas import make_base, make_mask

_WIDTHS = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


def seal(container: Container) -> None:
    """Give a mask file the fingerprint of what it holds."""
    shapes = trees.plain(trees.parse(container.texts.get("shapes")))
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(_header(container, name, shapes[name]))
    container.texts.put("fingerprint", digest.hexdigest())


def _header(container: Container, name: str, shape: Any) -> bytes:
    stored = container.find(name)
    if stored is None:
        return json.dumps([name, shape, 0, "torch.int32"]).encode()
    width = _WIDTHS[stored.dtype]
    count = len(stored.data) // width.itemsize
    header = [name, shape, count, f"torch.int{8 * width.itemsize}"]
    return json.dumps(header).encode() + stored.data


class MaskTarget(SafetensorsTarget):
    """``CooMask.load``, and all that is done with a mask."""

    name = "mask"
    weight = 40

    def __init__(self) -> None:
        self._model = make_base()

    def make_seeds(self) -> list[bytes]:
        """Masks of a small model, of huge parameters, of a single entry."""
        large = {"a": (1 << 31,), "b": (1 << 20, 1 << 20), "c": (2, 0), "d": (), "é": (7,)}
        chosen = {n: torch.tensor([0, math.prod(large[n]) - 1]).unique() for n in "abd"}
        masks = [
            make_mask(self._model),
            CooMask({n: i.to(index_dtype(math.prod(large[n]))) for n, i in chosen.items()}, large),
            CooMask.from_indices(self._model, {"scale": torch.tensor([0])}),
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.safetensors"
            files = []
            for mask in masks:
                mask.save(path)
                files.append(path.read_bytes())
        return files

    def seal(self, container: Container) -> None:
        """Put the fingerprint right."""
        seal(container)

    def change(self, choices: Choices, container: Container) -> None:
        """A third of the time, change the shapes."""
        text = container.texts.get("shapes")
        if isinstance(text, str) and choices.one_in(3):
            container.texts.put("shapes", mutations.change_json(choices, text))
        else:
            super().change(choices, container)

    def read(self, path: Path) -> str:
        """Load, look at, save, and attach to a model."""
        with refusals(path, of=(DeltaFormatError,)) as refused:
            mask = CooMask.load(path)
        if refused:
            return "DeltaFormatError"
        _check(mask, parse(path.read_bytes()))
        again = path.with_name("again.safetensors")
        mask.save(again)
        require(CooMask.load(again) == mask, "saved and loaded, it is another mask")
        with untouched(self._model), refusals(None) as unfit:
            mask.check(self._model)
            _attach(mask, self._model)
        return "accepted, fits no model here" if unfit else "accepted"


def _check(mask: CooMask, container: Container) -> None:
    require(len(mask) > 0, "the mask selects nothing")
    for name, indices in mask.items():
        check_indices(name, indices, math.prod(mask.shapes[name]))
        stored = container.find(name)
        require(stored is not None and stored.data == indices.numpy().tobytes(), "other indices")
    held = {tensor.name for tensor in container.tensors if tensor.data}
    require(held == set(mask), "indices of a parameter were dropped")


def _attach(mask: CooMask, model: nn.Module) -> None:
    with attach(model, mask) as sparse:
        count = sum(param.numel() for param in sparse.parameters())
        require(count == mask.nnz, "other entries are trained than the mask has")
