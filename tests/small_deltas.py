"""A small model, a mask, and a delta of the two, which the tests of deltas share."""

from __future__ import annotations

import copy

import torch
from torch import nn

from saft_kernels import ops
from saft_kernels.delta import SparseDelta
from saft_kernels.fingerprint import same_bits
from saft_kernels.mask import CooMask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Model(nn.Module):
    """Weights of several layouts and dtypes, a tied pair, a buffer, a scalar."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.decoder = nn.Linear(8, 20)
        self.decoder.weight = self.embedding.weight
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.BatchNorm1d(8)
        self.to(dtype)
        self.conv.to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(2.0))  # fp32 whatever the rest is
        transposed = torch.randn(5, 7, dtype=dtype).t()
        self.projection = nn.Parameter(transposed)


def on_meta(dtype: torch.dtype) -> Model:
    """The model without its values."""
    with torch.device("meta"):
        return Model(dtype)


SELECTED = {"embedding.weight": 30, "conv.weight": 20, "conv.bias": 1, "projection": 9, "scale": 1}


def make_base(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(dtype)


def make_mask(model: nn.Module) -> CooMask:
    generator = torch.Generator().manual_seed(1)
    indices = {}
    for name, count in SELECTED.items():
        chosen = torch.randperm(model.get_parameter(name).numel(), generator=generator)[:count]
        indices[name] = chosen.sort().values.to(torch.int32)
    return CooMask.from_indices(model, indices)


def tune(model: nn.Module, mask: CooMask) -> nn.Module:
    """Change every selected entry, one of them to NaN and one to -0.0."""
    for name, indices in mask.items():
        param = model.get_parameter(name)
        values = ops.gather(param, indices)
        changed = torch.arange(1, len(values) + 1, dtype=torch.float64).to(param.dtype) * 0.37
        changed[:2] = torch.tensor([float("nan"), -0.0], dtype=param.dtype)[: len(changed)]
        with torch.no_grad():
            ops.scatter_(param, indices, changed)
    return model


def tuned_pair(dtype: torch.dtype = torch.float32) -> tuple[Model, nn.Module, SparseDelta]:
    base = make_base(dtype)
    mask = make_mask(base)
    tuned = tune(copy.deepcopy(base), mask)
    return base, tuned, SparseDelta.capture(tuned, mask, base, {"note": "a test"})


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.named_parameters(), b.parameters(), strict=True):
        assert mine.dtype == theirs.dtype
        assert same_bits(mine, theirs).all(), name


def differs(a: nn.Module, b: nn.Module) -> bool:
    return not all(
        same_bits(x, y).all() for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


def change_one_bit(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        flat = model.get_parameter(name).view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(100.0))
