"""Sampled mode on every implementation: each kind of layer, training, and no step that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saft_kernels import CooMask, attach, index_values, reference, sampled_linear
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


class Projection(nn.Module):
    """``x @ weight``, as CLIP's towers end."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.projection


class Attention(nn.Module):
    """Fused attention to itself and to others."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] + self.attention(x, y, y)[0]


@dataclass
class Case:
    """A small model and its inputs, on one device."""

    model: nn.Module
    inputs: tuple[Tensor, ...]

    def loss(self) -> Tensor:
        out = self.model(*self.inputs)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device)
        return (out * weights.view(out.shape)).sum() + out.square().sum()

    def mask(self) -> CooMask:
        """Every eleventh entry of every parameter."""
        return CooMask.from_indices(
            self.model,
            {
                name: torch.arange(1, p.numel(), 11, device=p.device)
                for name, p in self.model.named_parameters()
                if p.numel() > 1
            },
        )


def images() -> tuple[Tensor]:
    return (torch.randn(3, 4, 9, 7),)


KINDS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "linear": lambda: (nn.Linear(24, 16), (torch.randn(5, 9, 24),)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), 2, 1), images()),
    "conv2d, channels last": lambda: (
        nn.Conv2d(4, 6, (3, 2), 2, 1).to(memory_format=torch.channels_last),
        (images()[0].to(memory_format=torch.channels_last),),
    ),
    "embedding": lambda: (nn.Embedding(30, 8, padding_idx=2), (torch.randint(0, 30, (5, 9)),)),
    "embedding, int32 tokens": lambda: (nn.Embedding(30, 8), (torch.randint(30, (50,)).int(),)),
    "attention": lambda: (Attention(), (torch.randn(3, 9, 8), torch.randn(3, 5, 8))),
    "projection": lambda: (Projection(), (torch.randn(20, 9),)),
    "streamed": lambda: (nn.LayerNorm(24), (torch.randn(5, 24),)),
}


def case(kind: str, device: torch.device, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    model, inputs = KINDS[kind]()
    moved = [x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs]
    return Case(model.to(device, dtype), tuple(moved))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_gets_the_dense_gradient_at_its_indices(device, kind):
    c = case(kind, device)
    mask = c.mask()
    c.loss().backward()
    expected = {n: reference.gather(p.grad, mask[n]) for n, p in c.model.named_parameters()}
    with attach(c.model, mask) as sparse:
        c.loss().backward()
        assert not sparse.streamed
        for name, leaf in sparse.named_parameters():
            assert_close(leaf.grad, expected[name], "double_model")


@pytest.mark.parametrize("kind", ["linear", "conv2d", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, kind, dtype):
    """Against the dense gradient under the same autocast, which is rounded to ``dtype``."""
    c = case(kind, device, torch.float32)
    mask = c.mask()

    def backward() -> None:
        with torch.autocast(device.type, dtype):
            loss = c.loss()
        loss.backward()

    backward()
    expected = {n: reference.gather(p.grad, mask[n]) for n, p in c.model.named_parameters()}
    with attach(c.model, mask) as sparse:
        backward()
        for name, leaf in sparse.named_parameters():
            scale = expected[name].abs().max()
            assert_close(leaf.grad / scale, expected[name] / scale, "rounded_gradient")


# Steps that wait for nothing ----------------------------------------------------------------------

#: What reads a value of a tensor, or makes a tensor of values of the host.
WAITS = ("_local_scalar_dense", "item", "nonzero", "unique", "equal", "is_nonzero", "lift_fresh")


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which the CPU would wait for a GPU, or the GPU for the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.split("::")[1]
        assert not name.strip("_").startswith(tuple(w.strip("_") for w in WAITS)), name
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """On a GPU torch itself refuses to wait; anywhere, no index vector may be checked."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an index vector was checked again")

    checks = [name for name in vars(index_values) if name.startswith("_check_")]
    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        for name in checks:
            patch.setattr(index_values, name, refuse)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_after_the_first_waits(device, kind):
    c = case(kind, device, torch.float32)
    with attach(c.model, c.mask()) as sparse:
        optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            c.loss().backward()
            optimizer.step()

        step()
        before = [leaf.detach().clone() for leaf in sparse.parameters()]
        with nothing_waits(device):
            step()
            step()
        for leaf, value in zip(sparse.parameters(), before, strict=True):
            assert not torch.equal(leaf, value)


def test_sampled_linear_does_not_wait_after_the_first_call(device):
    x, weight = torch.randn(20, 24, device=device), torch.randn(16, 24, device=device)
    indices = torch.arange(0, 384, 11, device=device)
    values = weight.view(-1)[indices].requires_grad_(True)

    def step() -> None:
        sampled_linear(x, weight, None, values, indices).sum().backward()

    step()
    with nothing_waits(device):
        step()


def test_waiting_is_noticed():
    with nothing_waits(torch.device("cpu")):
        x = torch.ones(3)
        for wait in (lambda: x.sum().item(), lambda: x.unique(), lambda: x.nonzero()):
            with pytest.raises(AssertionError):
                wait()
        with pytest.raises(AssertionError, match="checked again"):
            index_values.require_columns(torch.zeros(3, dtype=torch.int32), 5, "columns")
