"""SparseAdamW on GPUs: the host waits for nothing, and a CUDA graph can capture every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CPU
from gpu_modes import GPU, GPU_MODES
from saft_kernels import index_values, ops
from saft_kernels.selected_grad import SelectedGrad
from training import DTYPES, MODES, SmallModel, loss_of, make_optimizer, small_model
from waiting import NoWaiting

pytestmark = pytest.mark.usefixtures("one_thread")

ON_GPU = pytest.mark.parametrize("device", GPU, indirect=True)
EVERYWHERE = [*((CPU[-1], mode) for mode in MODES), *GPU_MODES]


def model_on(device: torch.device, dtype: torch.dtype) -> SmallModel:
    return small_model(dtype).to(device)


Step = Callable[[SmallModel, Any, int], None]


def plain(model: SmallModel, optimizer: Any, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()


def clipped(model: SmallModel, optimizer: Any, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()


def accumulated(model: SmallModel, optimizer: Any, step: int) -> None:
    loss_of(model, step).backward()
    plain(model, optimizer, step + 1)


class Scaled:
    """A step under a GradScaler."""

    def __init__(self) -> None:
        self._scaler: Any = None

    def __call__(self, model: SmallModel, optimizer: Any, step: int) -> None:
        if self._scaler is None:
            self._scaler = torch.amp.GradScaler(model.scale.device.type, init_scale=8.0)
        self._scaler.scale(loss_of(model, step)).backward()
        self._scaler.step(optimizer)
        self._scaler.update()


@pytest.mark.parametrize(("device", "mode"), EVERYWHERE, indirect=["device"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("take", [plain, clipped, accumulated, Scaled()])
def test_a_step_waits_for_nothing(
    device: torch.device, mode: str, dtype: torch.dtype, take: Step
) -> None:
    if isinstance(take, Scaled) and (device.type, dtype) == ("cuda", torch.bfloat16):
        pytest.skip("torch's GradScaler knows no bf16 gradients on a GPU")
    model = model_on(device, dtype)
    optimizer = make_optimizer(model, mode)
    take(model, optimizer, 0)
    for step in (1, 2):  # in step 1 some parameters get no gradient, which has not been seen before
        optimizer.zero_grad()
        with NoWaiting():
            take(model, optimizer, step)
    assert optimizer.state[model.scale]["step"] == 3


def test_what_waits_is_noticed() -> None:
    x = torch.ones(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: torch.equal(x, x),
        lambda: x[x > 0],
        lambda: torch.tensor([1.0]),
    ):
        with NoWaiting(), pytest.raises(AssertionError, match="would wait"):
            wait()


# Index vectors are checked before a capture -------------------------------------------------------


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the vectors whose values are looked at from here on."""
    seen: list[int] = []
    look = index_values._check_increasing

    def record(indices: Tensor, *rest: Any) -> None:
        seen.append(indices.numel())
        look(indices, *rest)

    monkeypatch.setattr(index_values, "_check_increasing", record)
    return seen


@ON_GPU
@pytest.mark.parametrize("mode", ["dense", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_indices_are_looked_at_when_the_optimizer_is_made_and_never_again(
    device: torch.device, mode: str, dtype: torch.dtype, checks: list[int]
) -> None:
    model = model_on(device, dtype)
    optimizer = make_optimizer(model, mode)
    assert checks == [sum(len(s["indices"]) for s in optimizer.state.values())]
    for step in range(3):
        optimizer.zero_grad()
        clipped(model, optimizer, step)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.refresh_master_()
    plain(model, optimizer, 0)
    assert len(checks) == 1


def rising(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)


@ON_GPU
def test_parts_of_a_known_vector_are_known(device: torch.device, checks: list[int]) -> None:
    indices = torch.cat([rising(5, device), rising(3, device), rising(4, device)])
    params = [torch.zeros(n, device=device) for n in (5, 3, 4)]
    ops.check_indices(indices, [0, 5, 8, 12], params)
    ops.check_indices(indices[5:], [0, 3, 7], params[1:])
    ops.gather(params[1], indices[5:8])
    assert checks == [12]
    ops.gather(params[0], indices[5:8])  # another limit
    assert checks == [12, 3]


@ON_GPU
def test_a_vector_that_was_written_is_looked_at_again(
    device: torch.device, checks: list[int]
) -> None:
    indices, param = rising(4, device), torch.zeros(4, device=device)
    for _ in range(2):
        ops.gather(param, indices)
    indices[3] = 9
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lie within"):
            ops.gather(param, indices)
    assert checks == [4, 4, 4]


@ON_GPU
def test_what_failed_is_not_known_in_parts(device: torch.device) -> None:
    indices = torch.cat([rising(3, device), rising(3, device)])
    params = [torch.zeros(3, device=device), torch.zeros(2, device=device)]
    with pytest.raises(RuntimeError, match="lie within the 2 elements of the tensor"):
        ops.check_indices(indices, [0, 3, 6], params)
    with pytest.raises(RuntimeError, match="lie within"):
        ops.gather(params[1], indices[3:])


@ON_GPU
def test_a_vector_seen_in_another_dtype_is_another(device: torch.device) -> None:
    wide = torch.arange(4, device=device)
    param = torch.zeros(4, device=device)
    ops.gather(param, wide)
    with pytest.raises(RuntimeError, match="increase strictly"):
        ops.gather(param, wide.view(torch.int32)[:4])


@ON_GPU
def test_an_unknown_vector_cannot_be_captured_and_a_known_one_can(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Tensor) -> None:
        raise RuntimeError("cannot be captured")

    indices, param = rising(4, device), torch.zeros(4, device=device)
    ops.gather(param, indices)
    monkeypatch.setattr(index_values, "_refuse_capture", refuse)
    ops.gather(param, indices)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        ops.gather(param, indices.clone())


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Calls of torch.equal from here on."""
    seen: list[Any] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: seen.append(pair) or equal(*pair))
    return seen


def test_a_gradient_put_back_as_a_clone_is_not_compared_by_value(comparisons: list[Any]) -> None:
    model = small_model()
    optimizer = make_optimizer(model, "streamed")
    loss_of(model, 0).backward()
    assert isinstance(model.scale.grad, SelectedGrad)
    model.scale.grad = model.scale.grad.clone()
    optimizer.step()
    assert comparisons == []
    other = SelectedGrad(model.scale, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    model.scale.grad = other  # the same indices at another address
    optimizer.step()
    assert len(comparisons) == 1
