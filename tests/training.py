"""A small model, a mask and a training loop that the optimizer tests share.

As a script it continues a run in a process of its own: ``python training.py FOLDER``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["dense", "streamed", "sampled"]
STEPS = 60


class SmallModel(nn.Module):
    """Linear, convolution, normalisation, an embedding, and a branch that some steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 18)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.LayerNorm(54)
        self.branch = nn.Linear(54, 54)
        self.untouched = nn.Linear(54, 54)
        self.head = nn.Linear(54, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor, branch: bool = True) -> Tensor:
        x = self.embedding(tokens).view(-1, 2, 3, 3)
        x = self.norm(torch.tanh(self.conv(x)).flatten(1))
        x = self.untouched(x) + x
        if branch:
            x = x + torch.tanh(self.branch(x))
        return self.head(x) * self.scale


#: parameter name -> how many of its entries are selected, less than a tenth of any weight that has
#: a sampled product; the others have none
SELECTED = {
    "embedding.weight": 40,
    "conv.weight": 10,
    "conv.bias": 2,
    "norm.weight": 7,
    "branch.weight": 250,
    "head.weight": 25,
    "head.bias": 5,
    "scale": 1,
}


def small_model(dtype: torch.dtype = torch.float32) -> SmallModel:
    """The same weights at every call, one of them in channels_last."""
    torch.manual_seed(0)
    model = SmallModel().to(dtype)
    model.conv = model.conv.to(memory_format=torch.channels_last)
    return model


def small_mask(model: nn.Module) -> CooMask:
    generator = torch.Generator().manual_seed(1)
    indices = {}
    for name, count in SELECTED.items():
        size = model.get_parameter(name).numel()
        chosen = torch.randperm(size, generator=generator)[:count].sort().values
        indices[name] = chosen.to(torch.int32)
    return CooMask.from_indices(model, indices)


def selected_bits(model: nn.Module, mask: CooMask) -> dict[str, Tensor]:
    """A boolean tensor per parameter: True where the mask selects."""
    bits = {}
    for name, param in model.named_parameters():
        flat = torch.zeros(param.numel(), dtype=torch.bool)
        if name in mask:
            flat[mask[name].long()] = True
        bits[name] = flat.view(param.shape)
    return bits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_unselected_unchanged(model: nn.Module, before: dict[str, Tensor], mask: CooMask) -> None:
    for name, selected in selected_bits(model, mask).items():
        now = model.get_parameter(name).detach()
        assert torch.equal(now[~selected], before[name][~selected]), name


def batch(step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    tokens = torch.randint(0, 12, (16,), generator=generator)
    return tokens, torch.randint(0, 5, (16,), generator=generator)


def loss_of(model: nn.Module, step: int, micro: int = 0) -> Tensor:
    """The branch takes no part in every third step, so its parameters get no gradient there."""
    device = next(model.parameters()).device
    tokens, labels = (numbers.to(device) for numbers in batch(step, micro))
    logits = model(tokens, branch=step % 3 != 1).float()
    return nn.functional.cross_entropy(logits, labels)


def backward(model: nn.Module, step: int, accumulate: int = 1) -> None:
    for micro in range(accumulate):
        (loss_of(model, step, micro) / accumulate).backward()


def make_optimizer(model: nn.Module, mode: str, **options: Any) -> SparseAdamW:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return SparseAdamW(model, small_mask(model), gradients=mode, **options)


def train(model: nn.Module, optimizer: SparseAdamW, scheduler: Any, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        scheduler.step()


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def resumable(dtype: torch.dtype, mode: str) -> tuple[SmallModel, SparseAdamW, Any]:
    model = small_model(dtype)
    optimizer = make_optimizer(model, mode)
    return model, optimizer, cosine(optimizer)


def checkpoint_path(folder: Path, dtype: torch.dtype, mode: str) -> Path:
    return folder / f"{str(dtype).removeprefix('torch.')}-{mode}.pt"


def continue_runs(folder: Path) -> None:
    """Take up every run saved in ``folder``, finish it, and save what came out beside it."""
    for dtype, mode in product(DTYPES, MODES):
        path = checkpoint_path(folder, dtype, mode)
        saved = torch.load(path, weights_only=True)
        model, optimizer, scheduler = resumable(dtype, mode)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        train(model, optimizer, scheduler, range(saved["step"], STEPS))
        result = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(result, path.with_suffix(".done"))


if __name__ == "__main__":
    continue_runs(Path(sys.argv[1]))
