"""One cycle: a random model is trained with and without interruptions, and shipped as a delta."""

from __future__ import annotations

import copy
import io
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conftest import CPU, number_of_threads
from saft_kernels import CooMask, SparseAdamW, SparseDelta, backends, select
from saft_kernels.delta import DeltaSwap, diff, extract
from tolerances import assert_close
from training import DTYPES, MODES, assert_unselected_unchanged, snapshot

#: Large enough that gradients which are zero but for rounding, as those of attention's key biases,
#: make no steps: their sign is that of the rounding, which the reference does otherwise.
EPS = 1e-3

#: Different sizes of models. torch keeps what it has compiled for each shape in half precision
#: (oneDNN's cache of primitives), some 5 MB for every new model: with ever new ones memory grows.
SIZES = 12

INTERRUPTIONS = ("none", "file", "exception", "detach", "deepcopy")


@dataclass(frozen=True)
class Setting:
    """What a cycle does; all of it follows from its seed."""

    seed: int
    dtype: torch.dtype
    mode: str
    density: float
    score: str
    threads: int
    instruction_set: str
    accumulate: int
    clip: float | None
    lr: float
    steps: int

    @classmethod
    def drawn(cls, seed: int) -> Setting:
        """At random."""
        draw = random.Random(seed)
        return cls(
            seed,
            draw.choice(DTYPES),
            draw.choice(MODES),
            10 ** draw.uniform(-2.5, 0),
            draw.choice(["random", "magnitude"]),
            draw.choice([1, 2, 7]),
            draw.choice(CPU).partition("-")[2],
            draw.choice([1, 1, 3]),
            draw.choice([None, None, 0.5]),
            10 ** draw.uniform(-4, -2),
            draw.randint(4, 14),
        )


class Block(nn.Module):
    """Attention, a linear layer and a normalisation, with what connects them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.norm(x + torch.tanh(self.linear(x)))


class Model(nn.Module):
    """Tokens and a picture, for a class each."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        heads = draw.choice([1, 2])
        width = heads * 4 * draw.randint(2, 10)
        self.embedding = nn.Embedding(draw.randint(20, 400), width)
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(draw.randint(1, 3))))
        self.head = nn.Linear(width, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor, picture: Tensor) -> Tensor:
        seen = self.conv(picture).flatten(2).mean(2, keepdim=True).transpose(1, 2)
        return (
            self.head(self.blocks(torch.cat([seen, self.embedding(tokens)], 1)).mean(1))
            * self.scale
        )


class Interrupted(Exception):
    """What stops a step half way."""


class Run:
    """A model in training."""

    def __init__(self, setting: Setting, base: nn.Module, mask: CooMask) -> None:
        self.setting, self.base, self.mask = setting, base, mask
        self.model = copy.deepcopy(base)
        self.optimizer = self.attached()

    def attached(self) -> SparseAdamW:
        """An optimizer of the present model."""
        setting = self.setting
        return SparseAdamW(
            self.model, self.mask, gradients=setting.mode, lr=setting.lr, weight_decay=0.1, eps=EPS
        )

    def loss(self, step: int, micro: int) -> Tensor:
        """Of a batch that depends on the numbers only."""
        generator = torch.Generator().manual_seed(1000 * step + micro)
        rows = self.model.get_parameter("embedding.weight").shape[0]
        tokens = torch.randint(rows, (6, 4), generator=generator)
        picture = torch.randn(6, 3, 9, 9, generator=generator).to(self.setting.dtype)
        labels = torch.randint(5, (6,), generator=generator)
        return nn.functional.cross_entropy(self.model(tokens, picture).float(), labels)

    def step(self, step: int) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        for micro in range(self.setting.accumulate):
            (self.loss(step, micro) / self.setting.accumulate).backward()
        if self.setting.clip is not None:
            self.optimizer.clip_grad_norm_(self.setting.clip)
        self.optimizer.step()

    def finish(self) -> nn.Module:
        """The model without the optimizer's hooks."""
        self.optimizer.detach()
        return self.model

    # Interruptions ----------------------------------------------------------------------------

    def none(self, step: int) -> None:
        """Nothing happens."""

    def file(self, step: int) -> None:
        """Everything goes to a file and comes back in new objects."""
        buffer = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, buffer)
        self.optimizer.detach()
        buffer.seek(0)
        saved: dict[str, Any] = torch.load(buffer, weights_only=True)
        self.model = copy.deepcopy(self.base)
        self.model.load_state_dict(saved["model"])
        self.optimizer = self.attached()
        self.optimizer.load_state_dict(saved["optimizer"])

    def exception(self, step: int) -> None:
        """A step fails in backward, half of its gradients made."""

        def fail(*_: Any) -> None:
            raise Interrupted

        handle = self.model.blocks[0].register_full_backward_hook(fail)
        try:
            self.step(step)
        except Interrupted:
            return
        finally:
            handle.remove()
        raise AssertionError("the step was not interrupted")

    def detach(self, step: int) -> None:
        """Another optimizer takes over."""
        state = self.optimizer.state_dict()
        self.optimizer.detach()
        self.optimizer = self.attached()
        self.optimizer.load_state_dict(state)

    def deepcopy(self, step: int) -> None:
        """Model and optimizer are copied, and the copies go on."""
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))


def trained(setting: Setting, base: nn.Module, mask: CooMask, disturb: bool) -> nn.Module:
    """The model after all steps, with something happening before each of them, or nothing."""
    run = Run(setting, base, mask)
    draw = random.Random(setting.seed + 1)
    for step in range(setting.steps):
        if disturb:
            happens: Callable[[int], None] = getattr(run, draw.choice(INTERRUPTIONS))
            happens(step)
        run.step(step)
    return run.finish()


def require_same_bits(one: nn.Module, other: nn.Module, what: str) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)), (
            f"{what}: {name}"
        )


def run_cycle(setting: Setting, folder: Path, done: Counter[str]) -> None:
    """Do it; raises AssertionError where a result is wrong.

    Args:
        setting: what.
        folder: for files; they are overwritten.
        done: what was done and checked, counted.
    """
    torch.manual_seed(setting.seed)
    base = Model(random.Random(setting.seed % SIZES)).to(setting.dtype)
    mask = select(base, density=setting.density, score=setting.score, seed=setting.seed)  # type: ignore[arg-type]
    before = snapshot(base)
    isa = backends.use_cpu_isa(setting.instruction_set)
    with number_of_threads(setting.threads), backends.use_backend("cpu"), isa:
        plain = trained(setting, base, mask, disturb=False)
        disturbed = trained(setting, base, mask, disturb=True)
    done["steps"] += 2 * setting.steps * setting.accumulate
    require_same_bits(plain, disturbed, "interrupted")
    assert_unselected_unchanged(plain, before, mask)
    assert_unselected_unchanged(base, before, CooMask.from_indices(base, dict(mask.items())))
    done["interrupted runs equal bit for bit"] += 1
    if setting.dtype == torch.float32:
        with number_of_threads(1), backends.use_backend("reference"):
            expected = trained(setting, base, mask, disturb=False)
        for name, param in plain.named_parameters():
            assert_close(param.detach(), expected.get_parameter(name).detach(), "adamw_trajectory")
        done["runs equal to the reference"] += 1
    _ship(base, plain, mask, folder)
    done["deltas"] += 1


def _ship(base: nn.Module, tuned: nn.Module, mask: CooMask, folder: Path) -> None:
    """The delta through a file, onto another copy and off it, beside an extracted one."""
    file = folder / "delta.safetensors"
    captured = SparseDelta.capture(tuned, mask, base.state_dict())
    captured.save(file, originals=True)
    loaded = SparseDelta.load(file)
    model = copy.deepcopy(base)
    loaded.apply_(model)
    require_same_bits(model, tuned, "applied")
    loaded.revert_(model)
    require_same_bits(model, base, "reverted")
    found = extract(tuned, base).delta
    swap = DeltaSwap(model)
    for delta in (loaded, found, None, loaded.scale(0.5), found):
        swap.to(delta)
    require_same_bits(model, tuned, "swapped")
    total = diff(loaded, found).total
    assert total.different == total.only_second == 0, "extracted"
