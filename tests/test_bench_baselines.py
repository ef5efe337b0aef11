"""The baselines: each trains what it says and nothing else; what if a library is missing."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import baselines, correctness
from bench.baselines import Method
from bench.baselines.adamw8bit import adamw8bit
from bench.baselines.frozen import frozen
from bench.baselines.full_adamw import full_adamw
from bench.baselines.index_and_hook import index_and_hook
from bench.baselines.lora import (
    ATTENTION,
    MLP,
    attention_layers,
    linear_layers,
    lora,
    lora_of_mlps,
    merged,
    text_blocks,
)
from bench.baselines.masked_adamw import masked_adamw
from bench.baselines.peft_adapters import pretrained, require_trained
from bench.baselines.sampled_addmm import pattern, sampled_addmm
from bench.baselines.shira import shira
from bench.baselines.sparse_adam import first_step, sparse_adam
from bench.baselines.super_tuning import OPTIONS, super_tuning
from bench.baselines.topk import concatenated, topk
from bench.cases import clip_step
from bench.cases.clip_step import Way
from bench.harness import WrongResultError
from bench.memory import MeasurementError
from bench.models import ADAMW, SMOKE, Task, candidates, make_task, uniform_entries, workload
from bench.outcome import Memory
from bench.registry import CASES, run_case
from saft_clip.text_tower import padding_reason

pytestmark = pytest.mark.usefixtures("small_limits", "one_thread")

FOLDER = Path(baselines.__file__).parent

#: Methods that train the mask's entries and nothing else.
OF_THE_MASK = [masked_adamw, index_and_hook, sparse_adam]
BY_PEFT = [lora, lora_of_mlps, shira, super_tuning]
OF_EVERYTHING = [full_adamw, adamw8bit]


@pytest.fixture
def task() -> Task:
    """The tiny model, for its user to change, and a batch."""
    shared = workload(SMOKE).task
    return replace(shared, model=copy.deepcopy(shared.model))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so large that each lowers the loss, and decay that no tolerance hides."""
    monkeypatch.setitem(ADAMW, "lr", 1e-4)
    monkeypatch.setitem(ADAMW, "weight_decay", 2.0)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the library's optimizers, for the baseline only: peft looks for the library."""
    optim = SimpleNamespace(AdamW8bit=torch.optim.AdamW)
    loader = SimpleNamespace(import_module=lambda name: SimpleNamespace(optim=optim))
    monkeypatch.setattr(baselines.adamw8bit, "importlib", loader)
    return optim


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


# What they train ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("method", OF_THE_MASK)
def test_entries_of_the_mask_are_trained_and_no_others(method: Method, task: Task) -> None:
    before, mask = weights_of(task.model), workload(SMOKE).masks["uniform"]
    step = method(task.model, mask, task.loss)
    losses = [step().item() for _ in range(4)]
    assert losses[0] == pytest.approx(workload(SMOKE).loss, rel=1e-5)
    assert losses[3] < losses[2] < losses[1] < losses[0]
    after = dict(task.model.named_parameters())
    correctness.require_untouched(after, before, mask)
    assert all(not torch.equal(after[name], before[name]) for name in mask)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("method", [masked_adamw, index_and_hook])
def test_their_rule_is_that_of_the_package(method: Method, task: Task) -> None:
    mask, other = workload(SMOKE).masks["uniform"], copy.deepcopy(task.model)
    for step in (method(task.model, mask, task.loss), clip_step.streamed(other, mask, task.loss)):
        for _ in range(3):
            step()
    require_same_entries(task.model, other)


def require_same_entries(model: nn.Module, other: nn.Module) -> None:
    """At the uniform mask, where the gradient is more than roundings, and eps counts for little."""
    work, params, others = workload(SMOKE), candidates(model), candidates(other)
    for name, indices in work.masks["uniform"].items():
        sure = indices[work.gradients[name].view(-1)[indices].abs() > 1e-4]
        actual, wanted = (each[name].detach().view(-1)[sure] for each in (params, others))
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0.02 * ADAMW["lr"], msg=name)


@pytest.mark.usefixtures("fast")
def test_masked_step_is_that_of_the_specification(task: Task) -> None:
    work = workload(SMOKE)
    mask, params = work.masks["uniform"], candidates(task.model)
    expected = correctness.reference_step(params, work.gradients, mask)
    masked_adamw(task.model, mask, task.loss)()
    correctness.require_stepped(params, expected, mask)


@pytest.mark.usefixtures("fast")
def test_sparse_adam_decays_nothing(task: Task) -> None:
    work = workload(SMOKE)
    mask, params = work.masks["uniform"], candidates(task.model)
    expected = first_step(params, work.gradients, mask)
    decayed = correctness.reference_step(params, work.gradients, mask)
    sparse_adam(task.model, mask, task.loss)()
    correctness.require_stepped(params, expected, mask)
    with pytest.raises(WrongResultError, match="not where one AdamW step leads"):
        correctness.require_stepped(params, decayed, mask)


def test_sparse_adam_is_adam_on_the_entries(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAMW, "weight_decay", 0.0)
    mask, other = workload(SMOKE).masks["uniform"], copy.deepcopy(task.model)
    for step in (sparse_adam(task.model, mask, task.loss), index_and_hook(other, mask, task.loss)):
        for _ in range(3):
            step()
    require_same_entries(task.model, other)


@pytest.mark.usefixtures("fast", "bitsandbytes")
@pytest.mark.parametrize("method", OF_EVERYTHING)
def test_everything_is_trained(method: Method, task: Task) -> None:
    work, before = workload(SMOKE), weights_of(task.model)
    mask, params = work.masks["uniform"], candidates(task.model)
    expected = correctness.reference_step(params, work.gradients, mask)
    step = method(task.model, mask, task.loss)
    loss = step().item()
    correctness.require_stepped(params, expected, mask)
    for name, gradient in work.gradients.items():
        assert not gradient.any() or not torch.equal(params[name], before[name]), name
    assert step().item() < loss == pytest.approx(work.loss, rel=1e-5)


@pytest.mark.usefixtures("fast")
def test_bitsandbytes_keeps_moments_of_eight_bits(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("bitsandbytes")
    original, made = library.optim.AdamW8bit, []

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(library.optim, "AdamW8bit", make)
    work = workload(SMOKE)
    mask, params = work.masks["uniform"], candidates(task.model)
    expected = correctness.reference_step(params, work.gradients, mask)
    step = adamw8bit(task.model, mask, task.loss)
    losses = [step().item()]
    correctness.require_stepped(params, expected, mask)
    losses.append(step().item())
    assert losses[1] < losses[0]
    kinds = {
        param.numel() >= 4096: state["state1"].dtype for param, state in made[-1].state.items()
    }
    assert kinds == {True: torch.uint8, False: torch.float32}


def test_floor_is_the_step_without_weight_gradients(task: Task) -> None:
    full = copy.deepcopy(task.model)
    step = frozen(task.model, workload(SMOKE).masks["uniform"], task.loss)
    floor = gradients_of_first_layers(task.model, step)
    expected = gradients_of_first_layers(full, lambda: backward(task.loss(full)))
    assert all(param.grad is None for param in task.model.parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(floor[name], gradient, msg=name)


def backward(loss: Tensor) -> None:
    loss.backward()


def gradients_of_first_layers(model: nn.Module, step: Callable[[], Any]) -> dict[str, Tensor]:
    """The gradients of their outputs, where those of all other layers come together."""
    gradients: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in ("visual.conv1", "token_embedding"):

        def watch(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            output.register_hook(lambda gradient: gradients.update({name: gradient}))

        modules[name].register_forward_hook(watch)
    step()
    return gradients


def test_products_of_the_floor_have_two_dimensions(task: Task) -> None:
    class Batched(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen += func is torch.ops.aten.bmm.default
            return func(*args, **(kwargs or {}))

    def products(step: Callable[[], Any]) -> int:
        with Batched() as mode:
            step()
        return mode.seen

    model = copy.deepcopy(task.model).requires_grad_(False)
    model.visual.conv1.register_forward_hook(lambda m, i, y: y.requires_grad_())  # type: ignore[union-attr]
    plain = products(lambda: backward(task.loss(model)))
    floor = products(frozen(task.model, workload(SMOKE).masks["uniform"], task.loss))
    assert plain > floor == 0  # else torch has no such product any more, and nothing needs doing


def test_floor_leaves_torch_as_it_was(task: Task) -> None:
    original = F.linear

    def failing(model: nn.Module) -> Tensor:
        assert F.linear is not original
        raise KeyError

    with pytest.raises(KeyError):
        frozen(task.model, workload(SMOKE).masks["uniform"], failing)()
    assert F.linear is original


def test_lora_trains_adapters_and_nothing_else(task: Task) -> None:
    before = {name: param.detach().clone() for name, param in task.model.named_parameters()}
    step = lora(task.model, workload(SMOKE).masks["uniform"], task.loss)
    with pytest.raises(WrongResultError, match="no adapter was trained"):
        require_trained(task.model)
    assert step().item() == pytest.approx(workload(SMOKE).loss, rel=1e-5)
    require_trained(task.model)
    assert pretrained(task.model).keys() == before.keys()
    correctness.require_untouched(pretrained(task.model), before, None)
    trained = [name for name, param in task.model.named_parameters() if param.requires_grad]
    blocks = 2 * sum(isinstance(m, ResidualAttentionBlock) for m in task.model.modules())
    assert len(trained) == 4 * blocks  # in_proj, out_proj, c_fc, c_proj: two matrices each
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(("model", "mlps", "others"), [("saft-tiny", 2, 1), ("test_vit", 2, 2)])
def test_lora_adapts_mlps_and_attention_of_every_block(model: str, mlps: int, others: int) -> None:
    task = make_task(model, 2, 2)
    kinds = (ResidualAttentionBlock, timm.models.vision_transformer.Block)
    blocks = sum(isinstance(module, kinds) for module in task.model.modules())
    assert blocks
    found = linear_layers(task.model, MLP)
    attention = [*linear_layers(task.model, ATTENTION), *attention_layers(task.model)]
    assert (len(found), len(attention)) == (mlps * blocks, others * blocks)
    modules = dict(task.model.named_modules())
    assert not any(isinstance(modules[name], nn.Conv2d) for name in (*found, *attention))


def test_lora_of_a_model_without_such_layers(task: Task) -> None:
    with pytest.raises(MeasurementError, match="peft finds no layer to adapt"):
        lora(nn.Sequential(nn.Linear(2, 2)), workload(SMOKE).masks["uniform"], task.loss)


def test_lora_of_mlps_trains_these(task: Task) -> None:
    before = weights_of(task.model)
    step = lora_of_mlps(task.model, workload(SMOKE).masks["uniform"], task.loss)
    assert step().item() == pytest.approx(workload(SMOKE).loss, rel=1e-5)
    require_trained(task.model)
    correctness.require_untouched(pretrained(task.model), before, None)
    trained = [name for name, param in task.model.named_parameters() if param.requires_grad]
    assert trained
    assert all("lora_" in name and (".c_fc." in name or ".c_proj." in name) for name in trained)


def test_floor_computes_the_gradients_of_all_inputs(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detached(model: nn.Module) -> Tensor:
        return task.loss(model).detach().requires_grad_()

    step = frozen(task.model, workload(SMOKE).masks["uniform"], task.loss)
    step()
    step()
    with pytest.raises(WrongResultError, match="did not get to the first layers"):
        frozen(task.model, workload(SMOKE).masks["uniform"], detached)()


def test_lora_on_packed_prompts_is_that_of_peft(task: Task) -> None:
    lora(task.model, workload(SMOKE).masks["uniform"], task.loss)
    adapters = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    for adapter in adapters.values():
        nn.init.normal_(adapter, std=0.02)
    blocks = text_blocks(task.model)
    assert padding_reason(task.model) is not None
    expected = task.loss(task.model)
    wanted = torch.autograd.grad(expected, list(adapters.values()))
    with merged(blocks):
        assert padding_reason(task.model) is None
        loss = task.loss(task.model)
    actual = torch.autograd.grad(loss, list(adapters.values()))
    assert abs(loss - workload(SMOKE).loss) > 1e-3  # the adapters do something
    torch.testing.assert_close(loss, expected)
    for name, gradient, other in zip(adapters, actual, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6, msg=name)
    assert padding_reason(task.model) is not None


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("method", [shira, super_tuning])
def test_entries_by_peft_take_the_first_step_of_adamw(method: Method, task: Task) -> None:
    work, before = workload(SMOKE), weights_of(task.model)
    step = method(task.model, work.masks["uniform"], task.loss)
    with pytest.raises(WrongResultError, match="no adapter was trained"):
        require_trained(task.model)
    loss = step().item()
    assert loss == pytest.approx(work.loss, rel=1e-5)
    require_trained(task.model)
    assert pretrained(task.model).keys() == before.keys()
    correctness.require_untouched(pretrained(task.model), before, None)
    trained = [name for name, param in task.model.named_parameters() if param.requires_grad]
    differences = adapted_entries(task.model)
    assert len(trained) == len(differences) > 0
    for name, (flat, values) in differences.items():
        assert name.endswith(("c_fc.weight", "c_proj.weight"))
        gradient = work.gradients[name].view(-1)[flat]
        sure = gradient.abs() > correctness.ROUNDING * work.gradients[name].abs().max()
        torch.testing.assert_close(
            values[sure], -ADAMW["lr"] * gradient[sure].sign(), rtol=0, atol=0.05 * ADAMW["lr"]
        )
    assert step().item() < loss


def adapted_entries(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Flat indices and trained differences, by the name of the weight."""
    found = {}
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(module, "shira_weight"):
            rows, columns = layer.shira_indices["default"].long()
            flat, values = rows * layer.in_features + columns, layer.shira_weight["default"]
        elif hasattr(module, "supertuning_values"):
            flat = layer.supertuning_indices["default"].long()
            values = layer.supertuning_values["default"]
        else:
            continue
        found[f"{name}.weight"] = flat, values.detach()
    return found


def test_shira_draws_as_many_entries_as_lora_of_rank_one(task: Task) -> None:
    weights = weights_of(task.model)
    shira(task.model, workload(SMOKE).masks["uniform"], task.loss)
    for name, (flat, _) in adapted_entries(task.model).items():
        assert len(flat.unique()) == len(flat) == sum(weights[name].shape)


def test_super_tuning_takes_the_largest_entries_of_each_weight(task: Task) -> None:
    weights = weights_of(task.model)
    super_tuning(task.model, workload(SMOKE).masks["uniform"], task.loss)
    for name, (flat, _) in adapted_entries(task.model).items():
        size = weights[name].view(-1).abs()
        count = int((1 - OPTIONS["sparsity"]) * size.numel())
        assert len(flat) == count > 0
        assert size[flat].min() == size.topk(count).values.min()


# What is missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_PEFT)
def test_without_peft_they_say_so_in_one_sentence(
    method: Method, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MeasurementError, match=r"needs peft\.\w+Config, .*pip install") as error:
        method(task.model, workload(SMOKE).masks["uniform"], task.loss)
    assert "\n" not in str(error.value)


def test_peft_without_super_tuning_is_one_sentence(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", ModuleType("peft"))  # as one too old
    with pytest.raises(MeasurementError, match=r"needs peft\.SupertuningConfig.*pip install"):
        super_tuning(task.model, workload(SMOKE).masks["uniform"], task.loss)


def test_without_bitsandbytes_it_says_so_in_one_sentence(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MeasurementError, match=r"runs on cpu.*pip install.*bitsandbytes") as error:
        adamw8bit(task.model, workload(SMOKE).masks["uniform"], task.loss)
    assert "\n" not in str(error.value)


def test_bitsandbytes_that_cannot_step_here_is_one_sentence(
    task: Task, bitsandbytes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoKernel(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise NotImplementedError("no kernel for\nthis device")

    monkeypatch.setattr(bitsandbytes, "AdamW8bit", NoKernel)
    with pytest.raises(MeasurementError, match=r"runs on cpu.*no kernel.*pip install") as error:
        adamw8bit(task.model, workload(SMOKE).masks["uniform"], task.loss)
    assert "\n" not in str(error.value)


def test_peft_is_loaded_by_the_baseline_only() -> None:
    code = "import sys, bench.__main__; sys.exit('peft' in sys.modules)"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# Single operations --------------------------------------------------------------------------------


def test_topk_baseline_splits_by_parameter() -> None:
    mean = {
        "a": torch.tensor([[0.0, -9.0], [2.0, 0.0]]),
        "b": torch.zeros(3),
        "c": torch.tensor([5.0]),
    }
    chosen = topk(concatenated(mean), mean, 3)
    assert {name: index.tolist() for name, index in chosen.items()} == {"a": [1, 2], "c": [0]}


def test_sampled_addmm_is_the_gradient_at_the_entries() -> None:
    x, dy = torch.randn(50, 7), torch.randn(50, 9)
    flat = uniform_entries(9, 7, 20)
    actual = sampled_addmm(pattern(flat, 9, 7), dy, x)
    torch.testing.assert_close(actual, (dy.t() @ x).view(-1)[flat])


# What is said of them -----------------------------------------------------------------------------


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of whole steps is measured in test_bench.py."""
    monkeypatch.setattr(clip_step, "peak_memory", lambda *_, **__: Memory(peak=1 << 20))


@pytest.mark.usefixtures("no_processes")
def test_methods_without_their_library_are_left_out_of_the_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for library in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, library, None)
    record = run_case(CASES["clip_step"], SMOKE)
    assert record["refused"] is None
    missing = (*clip_step.ADAPTERS, clip_step.ADAMW_8BIT)
    reasons = {f["what"]: f["note"] for f in record["figures"] if f["what"].endswith(" measured")}
    assert reasons.keys() == {f"{name} measured" for name in missing}
    assert all("pip install" in reason for reason in reasons.values())
    names = [timing["name"] for timing in record["timings"]]
    assert not any(name.startswith(missing) for name in names)
    assert any(name.startswith(clip_step.FLOOR) for name in names)


@pytest.mark.usefixtures("no_processes", "bitsandbytes")
@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        (clip_step.MASKED, frozen, "not where one AdamW step leads"),
        (clip_step.MASKED, full_adamw, "changed outside the mask"),
        (clip_step.SPARSE_ADAM, frozen, "not where one AdamW step leads"),
        (clip_step.SPARSE_ADAM, index_and_hook, "not where one AdamW step leads"),  # it decays,
        (clip_step.ADAMW_8BIT, frozen, "not where one AdamW step leads"),
        (clip_step.SHIRA, frozen, "no adapter was trained"),
        (clip_step.SUPER_TUNING, full_adamw, "no adapter was trained"),
    ],
)
def test_method_that_trains_something_else_is_refused(
    name: str, method: Method, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(clip_step.WAYS, name, Way(method))
    refused = run_case(CASES["clip_step"], SMOKE)["refused"]
    assert f"{name} is not timed" in refused
    assert reason in refused


@pytest.mark.parametrize("name", [clip_step.FULL, *clip_step.ALL_SAMPLED])
def test_step_in_bf16_that_trains_nothing_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = clip_step.with_concentrated_mask(workload(SMOKE), SMOKE.density)
    bf16 = replace(work.task, precision="amp_bf16")
    step = clip_step.contender(name, work, bf16)
    step.check(step.run)
    monkeypatch.setitem(clip_step.WAYS, name, replace(clip_step.WAYS[name], method=frozen))
    step = clip_step.contender(name, work, bf16)
    with pytest.raises(WrongResultError, match="of the entries with larger gradients"):
        step.check(step.run)


def test_readme_lists_every_baseline() -> None:
    text = (FOLDER / "README.md").read_text()
    files = [path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py"]
    assert all(name in text for name in files)


@pytest.mark.parametrize("method", [*OF_THE_MASK, *OF_EVERYTHING, *BY_PEFT, frozen])
def test_baseline_says_what_it_covers(method: Method) -> None:
    covers = importlib.import_module(method.__module__).COVERS
    assert (covers == "") == (method in (masked_adamw, index_and_hook))
    assert covers in [way.covers for way in clip_step.WAYS.values() if way.method is method]
