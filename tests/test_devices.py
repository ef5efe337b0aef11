"""Everything is where the model is, and steps wait for nothing: without a GPU, on "meta" tensors.

A meta tensor has a device of its own and no values. What mixes devices fails, and so does whatever
needs a value on the host, as ``item()``, ``bool()`` and ``nonzero()`` do: on a GPU that would wait.
tests/test_gpu.py looks at the same on a real GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from saft_clip import text_tower
from saft_clip.batches import Batches
from saft_clip.methods.base import prompt_loss
from saft_clip.models import load_model
from saft_clip.prompts import class_prompts, encode_prompts
from saft_kernels import attach, backends, entry, gradient_pass, index_values, plan, reference
from saft_kernels.fingerprint import fingerprints
from saft_kernels.flat_state import FlatState
from saft_kernels.gradient_pass import GradientSelection, cut_into_chunks
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.plan import LinearPlan
from saft_kernels.streams import is_capturing
from saft_kernels.topk import StreamingTopK
from training import MODES, SELECTED, SmallModel

pytestmark = pytest.mark.usefixtures("one_thread")

META = torch.device("meta")

#: What looks at the values of an index vector.
CHECKS = [name for name in vars(index_values) if name.startswith("_check_")]
assert len(CHECKS) >= 3


def fail(*arguments: Any) -> None:
    raise AssertionError("an index vector was checked again")


class OneDevice(TorchDispatchMode):
    """No operation gets tensors of two devices, nor moves any, but for numbers and the first copy.

    Attributes:
        moved: from where to where tensors were copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = {tensor.device.type for tensor in tensors if tensor.dim()}
        assert len(found) <= 1 or func is torch.ops.aten.copy_.default, f"{func} mixes {found}"
        result = func(*args, **kwargs or {})
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = args[-1].device.type, result.device.type
            if len(set(devices)) > 1:
                self.moved.append(devices)
        return result


def without_values(planner: Any) -> Callable[..., Any]:
    """Makes a plan as ``planner.of`` does, of the first entries, and moves it."""
    make = planner.of

    def of(*arguments: Any, **options: Any) -> Any:
        first = [torch.arange(a.numel()) if isinstance(a, Tensor) else a for a in arguments]
        with _disable_current_modes():
            made = make(*first, **options)
        parts = vars(made).items()
        return dataclasses.replace(
            made, **{name: each.to(META) for name, each in parts if isinstance(each, Tensor)}
        )

    return of


@contextmanager
def pretended_gpu() -> Iterator[tuple[OneDevice, list[str]]]:
    """Meta tensors take the way of a GPU's; what is moved, and which index vectors are checked."""
    checked: list[str] = []
    planners = [each for each in vars(plan).values() if hasattr(each, "of")]
    assert LinearPlan in planners
    with (
        mock.patch.object(backends, "resolve", return_value="cuda"),
        mock.patch.object(backends, "kernels", return_value=torch.ops.saft_kernels),
        mock.patch.object(entry, "_crowded_in", return_value=frozenset()),  # reads values
        mock.patch.multiple(
            index_values, **{n: lambda *a, n=n, **k: checked.append(n) for n in CHECKS}
        ),
        ExitStack() as patches,
        OneDevice() as devices,
    ):
        for planner in planners:
            patches.enter_context(mock.patch.object(planner, "of", without_values(planner)))
        yield devices, checked


def make_mask() -> CooMask:
    model = SmallModel()
    indices = {
        name: torch.randperm(model.get_parameter(name).numel())[:count]
        for name, count in SELECTED.items()
    }
    return CooMask.from_indices(model, indices)


def make_model(dtype: torch.dtype = torch.float32) -> SmallModel:
    with META:
        return SmallModel().to(dtype)


def take_steps(model: SmallModel, optimizer: SparseAdamW) -> None:
    tokens = torch.zeros(6, dtype=torch.int64, device=META)
    for _ in range(2):  # accumulated
        model(tokens).float().square().mean().backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()


def test_a_learning_rate_on_one_gpu_reaches_the_parameters_on_another() -> None:
    def model(*devices: str) -> nn.Module:
        return nn.ModuleList(nn.Linear(3, 2, device=device) for device in devices)

    chosen = {"0.weight": torch.tensor([1, 2]), "1.weight": torch.tensor([0])}
    mask = CooMask.from_indices(model("cpu", "cpu"), chosen)
    with (
        pretended_gpu(),
        mock.patch.object(FlatState, "adamw_", autospec=True) as step,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        spread = model("cuda:0", "cuda:1")
        for param in spread.parameters():
            param.grad = torch.zeros_like(param)
        SparseAdamW(spread, mask, lr=torch.empty((), device="cuda:0")).step()
    places = [(call.args[0].device, call.kwargs["lr"].device) for call in step.call_args_list]
    assert places == [(torch.device("cuda", i),) * 2 for i in range(2)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_stays_on_the_models_device(mode: str, dtype: torch.dtype) -> None:
    mask = make_mask()
    with pretended_gpu() as (devices, checked):
        model = make_model(dtype)
        optimizer = SparseAdamW(model, mask, gradients=mode)
        state = [tensor for each in optimizer.state.values() for tensor in each.values()]
        assert {tensor.device for tensor in state} == {META}
        take_steps(model, optimizer)
        assert ("meta", "cpu") not in devices.moved
        assert checked  # the first time
        devices.moved.clear()
        checked.clear()
        take_steps(model, optimizer)
        assert devices.moved == []
        assert checked == []
        optimizer.detach()


def test_other_optimizers_stay_there_too() -> None:
    mask = make_mask()
    with pretended_gpu() as (devices, checked):
        model = make_model()
        with attach(model, mask) as sparse:
            assert {leaf.device for leaf in sparse.parameters()} == {META}
            other = torch.optim.SGD(sparse.parameters(), lr=0.1)
            tokens = torch.zeros(6, dtype=torch.int64, device=META)
            for step in range(3):
                model(tokens).square().mean().backward()
                other.step()
                other.zero_grad()
                if step == 0:
                    devices.moved.clear()
                    checked.clear()
            assert devices.moved == []
            assert checked == []


def test_selection_accumulates_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ``select`` but the losses, which are looked at, and the result."""
    monkeypatch.setattr(gradient_pass, "_finite_value", lambda loss, number: 1.0)
    with pretended_gpu() as (devices, checked):
        model = make_model()
        params = dict(model.named_parameters())
        top = StreamingTopK(20, device=META, keys=list(params))
        devices.moved.clear()
        batches: Batches = [torch.zeros(6, dtype=torch.int64, device=META)] * 2  # type: ignore[assignment]
        scores = GradientSelection(model, lambda model, x: model(x).square().mean(), batches)
        scores.offer(cut_into_chunks(params, 10**6), top)
        assert devices.moved == []
        assert checked == []


@pytest.mark.parametrize("name", ["embedding.weight", "conv.weight", "head.weight", "norm.weight"])
def test_index_vectors_are_checked_once(name: str) -> None:
    """A check waits for the GPU. With values: the reference stands for a GPU's kernels."""
    model = SmallModel()
    mask = CooMask.from_indices(model, {name: torch.arange(3)})
    tokens = torch.arange(6) % 4
    with (
        mock.patch.object(backends, "resolve", return_value="cuda"),
        mock.patch.object(backends, "kernels", return_value=reference),
        attach(model, mask) as sparse,
    ):
        model(tokens).square().mean().backward()
        with mock.patch.multiple(index_values, **dict.fromkeys(CHECKS, fail)):
            model(tokens).square().mean().backward()
        (values,) = sparse.parameters()
        assert values.grad is not None
        assert bool(values.grad.any())


# The application ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_model("saft-tiny")


def test_a_capture_is_seen_on_the_gpu_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch, which is asked about the current GPU: here the first, while the second captures."""
    first, second = (torch.device("cuda", index) for index in (0, 1))
    current = [first]

    @contextmanager
    def switched(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == second)
    here, there = (Mock(spec=Tensor, is_cuda=True, device=device) for device in (first, second))
    assert not is_capturing(here)
    assert is_capturing(there)
    assert not is_capturing(torch.zeros(1))
    index_values._refuse_capture(here)
    with pytest.raises(RuntimeError, match="run the step once before capturing it"):
        index_values._refuse_capture(there)
    assert current == [first]


def test_prompts_are_packed_once(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing looks at the tokens, and so does asking whether the attention is causal."""
    tokens = class_prompts(["one", "twenty two"], ["a photo of {}."], clip.tokenizer)
    images, labels = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])

    def loss() -> Tensor:
        return prompt_loss(clip.model, images, labels, tokens, "fp32")

    size = clip.model.visual.image_size
    images = torch.zeros(2, 3, *((size, size) if isinstance(size, int) else size))
    first = loss()
    looks: list[str] = []
    monkeypatch.setattr(text_tower.Packing, "of", lambda *_: looks.append("packing"))
    monkeypatch.setattr(text_tower.torch, "equal", lambda *_: looks.append("causal"))
    assert torch.allclose(loss(), first)
    assert looks == []


def test_changed_prompts_are_packed_again(clip: Any) -> None:
    tokens = class_prompts(["one", "two", "three"], ["{}"], clip.tokenizer).flatten(0, 1)
    with torch.no_grad():
        before = encode_prompts(clip.model, tokens)
        tokens.copy_(tokens.flip(0).clone())
        after = encode_prompts(clip.model, tokens)
        part = encode_prompts(clip.model, tokens[1:])
    torch.testing.assert_close(after, before.flip(0))
    torch.testing.assert_close(part, after[1:])


def test_prompts_packed_for_evaluation_do_not_spoil_training(clip: Any) -> None:
    tokens = class_prompts(["one", "two"], ["{}"], clip.tokenizer).flatten(0, 1)
    with torch.inference_mode():
        encode_prompts(clip.model, tokens)
    encode_prompts(clip.model, tokens).sum().backward()
    clip.model.zero_grad()


def test_fingerprints_wait_for_the_stream_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in other threads, whose streams do not."""
    waited: list[Any] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.device = device

        def synchronize(self) -> None:
            waited.append(self.device)

    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    plain = torch.arange(5)
    assert fingerprints([plain.as_subclass(OnGpu), plain]) == fingerprints([plain, plain])
    assert waited == [torch.device("cpu")]


def test_mask_of_gpu_indices_is_looked_at_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy for each parameter, and no more waiting."""
    log: list[str] = []
    cpu = Tensor.cpu

    def copied(tensor: Tensor) -> Tensor:
        log.append("cpu")
        return cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", copied)
    mask = CooMask({"a": torch.arange(3, dtype=torch.int32)}, {"a": (5,)})
    assert log == ["cpu"]
    assert mask["a"].device.type == "cpu"
