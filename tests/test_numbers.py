"""NaN, infinity, overflow and denormals: what they do, and that they never spread.

An entry that is not finite makes its own weight NaN, as in torch.optim.AdamW, and no other; a
``GradScaler``, ``select`` and ``saft finetune`` notice it first. Unselected entries keep their bits
whatever happens.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import training
from conftest import number_of_threads
from saft_kernels import backends, ops
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import NonFiniteGradientError, SelectionError
from saft_kernels.fingerprint import same_bits
from saft_kernels.mask import CooMask
from saft_kernels.optim import SparseAdamW
from saft_kernels.select import number_of_entries, select
from saft_kernels.selected_grad import SelectedGrad
from training import (
    DTYPES,
    MODES,
    SELECTED,
    assert_unselected_unchanged,
    backward,
    loss_of,
    make_optimizer,
    selected_bits,
    small_mask,
    small_model,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BROKEN = [math.nan, math.inf, -math.inf]
TINY = 2.0**-149  # the smallest denormal of fp32

#: The entry that tests break, as a position among the selected ones of a parameter.
NAME, PLACE = "branch.weight", 5


def state_of(optimizer: SparseAdamW, name: str) -> dict[str, Tensor]:
    (group,) = optimizer.param_groups
    found: dict[str, Tensor] = optimizer.state[group["params"][group["param_names"].index(name)]]
    return found


def give_gradients(model: nn.Module) -> None:
    """The same at each call, whatever the weights are by now."""
    for name in SELECTED:
        param = model.get_parameter(name)
        values = torch.linspace(-1, 1, param.numel()).view(param.shape)
        param.grad = values.to(param.dtype)


def break_gradient(model: nn.Module, value: float) -> None:
    grad = model.get_parameter(NAME).grad
    assert grad is not None
    if isinstance(grad, SelectedGrad):
        grad.values()[PLACE] = value
    else:
        grad.view(-1)[small_mask(model)[NAME][PLACE]] = value


def break_outside(param: nn.Parameter, selected: Tensor, value: float) -> None:
    """From now on, gradients of this parameter are broken where nothing is selected."""
    param.register_hook(lambda grad: grad.where(selected, value))


def assert_only_one_differs(
    broken: tuple[nn.Module, SparseAdamW], sound: tuple[nn.Module, SparseAdamW]
) -> None:
    """Weights and state are the same bits everywhere but at the broken entry, where all is NaN."""
    (model, optimizer), (twin, plain) = broken, sound
    index = int(small_mask(model)[NAME][PLACE])
    for name, param in model.named_parameters():
        weight, expected = param.detach().reshape(-1), twin.get_parameter(name).detach().reshape(-1)
        if name == NAME:
            assert weight[index].isnan()
            weight, expected = weight.clone(), expected.clone()
            weight[index] = expected[index] = 0
        assert torch.equal(weight, expected), name
    for name in SELECTED:
        for key, value in state_of(optimizer, name).items():
            other = state_of(plain, name)[key].clone()
            if name == NAME and value.is_floating_point() and value.dim():
                assert not value[PLACE].isfinite()
                value = value.clone()
                value[PLACE] = other[PLACE] = 0
            assert torch.equal(value, other), (name, key)


# The optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_broken_gradient_breaks_its_own_entry_only(
    mode: str, dtype: torch.dtype, value: float
) -> None:
    pairs = []
    for broken in (True, False):
        model = small_model(dtype)
        before = snapshot(model)
        optimizer = make_optimizer(model, mode)
        backward(model, 0)
        if broken:
            break_gradient(model, value)
        optimizer.step()
        give_gradients(model)
        optimizer.step()
        assert_unselected_unchanged(model, before, small_mask(model))
        pairs.append((model, optimizer))
    assert_only_one_differs(*pairs)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_selected_may_be_broken(mode: str, value: float) -> None:
    """Gradients outside the mask are never read; a norm to clip by does not know of them."""
    norms, weights = [], []
    for broken in (True, False):
        model = small_model()
        # In sampled mode there are no such gradients, and torch has nothing to call.
        for name, bits in selected_bits(model, small_mask(model)).items() if broken else ():
            break_outside(model.get_parameter(name), bits, value)
        optimizer = make_optimizer(model, mode)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            norms.append(optimizer.clip_grad_norm_(0.01, error_if_nonfinite=True))
            optimizer.step()
        weights.append(snapshot(model))
    assert norms[:3] == norms[3:]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("mode", MODES)
def test_whose_broken_gradients_a_grad_scaler_sees(mode: str) -> None:
    """All that there are: in dense mode those of unselected entries are among them."""
    model = small_model()
    optimizer = make_optimizer(model, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    break_outside(model.branch.weight, selected_bits(model, small_mask(model))[NAME], math.nan)
    before = snapshot(model)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    skipped = mode == "dense"
    assert scaler.get_scale() == (4.0 if skipped else 8.0)
    assert int(state_of(optimizer, "scale")["step"]) == (0 if skipped else 1)
    assert torch.equal(model.scale, before["scale"]) == skipped


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("mode", MODES)
def test_a_broken_input_breaks_what_is_selected_only(mode: str, value: float) -> None:
    """Weights of the embedding stand for an input: with them every gradient is NaN."""
    model = small_model()
    model.embedding.weight.data[:, ::2] = value
    before, mask = snapshot(model), small_mask(model)
    bits = {name: param.view(torch.int32).clone() for name, param in before.items()}
    optimizer = make_optimizer(model, mode)
    backward(model, 0)
    optimizer.step()
    for name, selected in selected_bits(model, mask).items():
        now = model.get_parameter(name).detach().view(torch.int32)
        assert torch.equal(now[~selected], bits[name][~selected]), name
    assert model.branch.weight.detach().reshape(-1)[mask["branch.weight"].long()].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_leaves_no_trace(mode: str) -> None:
    """A run with a broken batch in between is the run without it, a scale of two apart."""
    weights = []
    for steps in ([0, "broken", 2, "broken", 3], [0, 2, 3]):
        model = small_model()
        optimizer = make_optimizer(model, mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in steps:
            optimizer.zero_grad()
            loss = loss_of(model, 0 if step == "broken" else int(step))
            scaler.scale(loss * math.inf if step == "broken" else loss).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 1024.0 / 2 ** steps.count("broken")
        assert int(state_of(optimizer, "scale")["step"]) == 3
        weights.append([*snapshot(model).values(), *state_of(optimizer, NAME).values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_state_breaks_its_own_entry_only(
    dtype: torch.dtype, value: float, key: str
) -> None:
    """It can be saved and loaded as any other."""
    pairs = []
    for broken in (True, False):
        model = small_model(dtype)
        optimizer = make_optimizer(model, "dense")
        saved = copy.deepcopy(optimizer.state_dict())
        if broken:
            (group,) = saved["param_groups"]
            saved["state"][group["param_names"].index(NAME)][key][PLACE] = value
        optimizer.load_state_dict(saved)
        assert not broken or not state_of(optimizer, NAME)[key][PLACE].isfinite()
        give_gradients(model)
        optimizer.step()
        pairs.append((model, optimizer))
    (model, optimizer), (twin, _) = pairs
    index = int(small_mask(model)[NAME][PLACE])
    for name, param in model.named_parameters():
        differs = (param.detach() != twin.get_parameter(name)).reshape(-1).nonzero().flatten()
        assert differs.tolist() in ([], [index] if name == NAME else [])
    weight = model.get_parameter(NAME).detach().reshape(-1)[index]
    if (key, value) == ("exp_avg_sq", math.inf):
        assert weight.isfinite()  # divided by infinity, a step is none
    else:
        assert not weight.isfinite()


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_weight_stays_alone(dtype: torch.dtype, value: float) -> None:
    model, twin = small_model(dtype), small_model(dtype)
    index = int(small_mask(model)[NAME][PLACE])
    model.get_parameter(NAME).data.view(-1)[index] = value
    for each in (model, twin):
        optimizer = make_optimizer(each, "dense")
        give_gradients(each)
        for _ in range(3):
            optimizer.step()
    for name, param in model.named_parameters():
        ours, theirs = param.detach().reshape(-1), twin.get_parameter(name).detach().reshape(-1)
        differs = (ours != theirs).nonzero().flatten().tolist()
        assert differs == ([index] if name == NAME else [])
    assert not model.get_parameter(NAME).detach().view(-1)[index].isfinite()


# fp16 ---------------------------------------------------------------------------------------------


def test_an_fp16_weight_that_overflows_comes_back_from_its_exact_value(
    device: torch.device,
) -> None:
    """65,520 is the first number that fp16 rounds to infinity."""
    weight = torch.tensor([65_504.0, 1.0], device=device).half()
    master = torch.tensor([65_519.0, 1.0], device=device)
    m, v, step = (torch.zeros(n, device=device) for n in (2, 2, 1))
    seen = []
    for gradient in (-1.0, -1.0, 1.0, 1.0, 1.0, 1.0):
        ops.sparse_adamw_(
            [weight], torch.full((2,), gradient, device=device),
            [torch.arange(2, dtype=torch.int32, device=device)], m, v, step,
            lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, master=master,
        )  # fmt: skip
        seen.append(weight[0].item())
    assert master.tolist() == [65_517.0, -1.0]
    assert seen == [math.inf, math.inf, math.inf, 65_504.0, 65_504.0, 65_504.0]


def test_an_fp16_optimizer_does_not_take_an_overflow_for_a_change_from_outside() -> None:
    model = nn.Linear(1, 1, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(65_504.0)
    mask = CooMask.from_indices(model, {"weight": torch.tensor([0])})
    optimizer = SparseAdamW(model, mask, lr=20.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    for gradient, expected in ((-1.0, math.inf), (1.0, 65_504.0)):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        assert model.weight.item() == expected
    assert optimizer.state[model.weight]["master"].item() == 65_504.0


@pytest.mark.parametrize("mode", MODES)
def test_a_grad_scaler_finds_the_scale_at_which_fp16_does_not_overflow(mode: str) -> None:
    model = small_model(torch.float16)
    before = snapshot(model)
    optimizer = make_optimizer(model, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    taken = 0
    for _ in range(60):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        scale, weights = scaler.get_scale(), snapshot(model)
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        taken += not skipped
        if skipped:
            assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        assert int(state_of(optimizer, "scale")["step"]) == taken
        if taken == 3:
            break
    assert taken == 3
    assert scaler.get_scale() < 2.0**40
    assert all(param.isfinite().all() for param in model.parameters())
    assert_unselected_unchanged(model, before, small_mask(model))


def zero_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Its outputs are finite, whatever its inputs are."""
    model = nn.Linear(3, 1, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    return model


def test_an_fp16_gradient_that_overflows_is_not_selected_from() -> None:
    data = [torch.full((1, 3), 300.0).half()]
    with pytest.raises(NonFiniteGradientError, match="'weight'") as caught:
        select(zero_linear(torch.float16), lambda m, b: (m(b) * 300).float().sum(), data, 0.5)
    assert caught.value.parameter == "weight"


def test_a_squared_gradient_that_overflows_is_named() -> None:
    """The gradient, 1e20, is a number; its square is none in fp32."""
    model, data = zero_linear(), [torch.tensor([[1.0, 1e20, 1.0]])]
    assert select(model, lambda m, b: m(b).sum(), data, 0.5)["weight"].tolist() == [1]
    with pytest.raises(NonFiniteGradientError, match=r"'weight' .* at flat index 1"):
        select(model, lambda m, b: m(b).sum(), data, 0.5, "fisher")


@pytest.mark.parametrize("score", ["mean_grad", "fisher"])
def test_a_selection_that_fails_leaves_the_model_as_it_was(score: Any) -> None:
    model = small_model()
    before, flags = snapshot(model), [param.requires_grad for param in model.parameters()]
    batches = [training.batch(step) for step in range(3)]

    def loss(model: nn.Module, batch: Any, last: float) -> Tensor:
        found = nn.functional.cross_entropy(model(batch[0]), batch[1])
        broken = torch.equal(batch[0][:1], batches[2][0][:1])
        return found * last if broken else found

    with pytest.raises(NonFiniteGradientError, match="the loss of batch"):
        select(model, lambda m, b: loss(m, b, math.nan), batches, 0.01, score)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(param.grad is None for param in model.parameters())
    select(model, lambda m, b: loss(m, b, 1.0), batches, 0.01, score)


# Denormals ----------------------------------------------------------------------------------------


def tiny_step(device: torch.device, dtype: torch.dtype, compact: bool) -> list[Tensor]:
    """A step in which nearly everything is a denormal, or becomes one."""
    n = 4099
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([TINY, 2.0**-140, 2.0**-127, 2.0**-120, 2.0**-100, 2.0**-70])
    numbers = torch.randn(3, n, generator=generator) * scales[torch.arange(n) % len(scales)]
    m, v, beyond = (row.clone().to(device) for row in numbers)
    own = torch.randn(2, n, generator=generator) * torch.finfo(dtype).smallest_normal
    weight, gradient = (row.clone() for row in own.to(device, dtype))
    exact = None if dtype == torch.float32 else weight.float() + beyond
    index = torch.arange(n, dtype=torch.int32, device=device)
    step = torch.zeros(1, device=device)
    ops.sparse_adamw_(
        [weight], gradient.float() if compact else [gradient], [index], m, v.abs_(), step,
        lr=1e-30, eps=1e-35, weight_decay=0.1, master=exact,
    )  # fmt: skip
    return [weight, m, v, *([] if exact is None else [exact])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_not_flushed(device: torch.device, dtype: torch.dtype) -> None:
    """Equal to the specification within a few of the smallest steps that there are."""
    found = tiny_step(device, dtype, compact=False)
    again = tiny_step(device, dtype, compact=True)
    assert all(same_bits(a, b).all() for a, b in zip(found, again, strict=True))
    with backends.use_backend("reference"):
        expected = tiny_step(device, dtype, compact=False)
    for ours, theirs in zip(found, expected, strict=True):
        step = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2 * step)
    # The weight and the first moment; of a denormal of fp16, that is none of fp32.
    for value in found[: 1 if dtype == torch.float16 else 2]:
        small = value.abs() < torch.finfo(value.dtype).smallest_normal
        assert (small & (value != 0)).sum() > 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_the_same_bits_on_every_instruction_set(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    outcomes = []
    for isa in backends.cpu_isas():
        for threads in (1, 3):
            with backends.use_cpu_isa(isa), number_of_threads(threads):
                outcomes.append(tiny_step(cpu, dtype, compact=True))
    for outcome in outcomes[1:]:
        assert all(same_bits(a, b).all() for a, b in zip(outcome, outcomes[0], strict=True))


def test_denormal_gradients_are_selected_from() -> None:
    model = small_model()
    batches = [training.batch(step) for step in range(2)]

    def loss(model: nn.Module, batch: Any, scale: float) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * scale

    masks = [select(model, lambda m, b: loss(m, b, 1.0), batches, 0.001)]
    masks += [select(model, lambda m, b: loss(m, b, 2.0**-126), batches, 0.001)]
    assert masks[0].fingerprint == masks[1].fingerprint


# Deltas -------------------------------------------------------------------------------------------

ODD = [math.nan, math.inf, -math.inf, -0.0, TINY, -TINY, 2.0**-127, 65_520.0, 3e38]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_holds_every_number_there_is(dtype: torch.dtype, tmp_path: Any) -> None:
    """In what it changes, in what it changes it from, and beside it: bit for bit."""
    model = nn.Linear(40, 9, bias=False).to(dtype)
    odd = torch.tensor(ODD).to(dtype)
    with torch.no_grad():
        model.weight[:, 0] = odd  # not selected
        model.weight[:, 1] = odd  # selected, and other numbers before than after
        model.weight[:, 2] = 1.0
    mask = CooMask.from_indices(
        model, {"weight": torch.arange(9 * 40).view(9, 40)[:, 1:3].reshape(-1)}
    )
    base = copy.deepcopy(model)
    with torch.no_grad():
        model.weight[:, 1] = odd.flip(0)
        model.weight[:, 2] = odd
    SparseDelta.capture(model, mask, base).save(tmp_path / "delta.safetensors")
    delta, other = SparseDelta.load(tmp_path / "delta.safetensors"), copy.deepcopy(base)
    delta.apply_(other)
    assert same_bits(other.weight, model.weight).all()
    delta.revert_(other)
    assert same_bits(other.weight, base.weight).all()


# One entry, and none ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_entry_from_selection_to_delta(mode: str, dtype: torch.dtype, tmp_path: Any) -> None:
    model = small_model(dtype)
    base, before = copy.deepcopy(model), snapshot(model)
    numel = sum(param.numel() for param in model.parameters())
    batches = [training.batch(step) for step in range(2)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    mask = select(model, loss, batches, 1 / numel)
    assert mask.nnz == 1
    assert mask.fingerprint == select(model, loss, batches, 1.99 / numel).fingerprint
    mask.save(tmp_path / "mask.safetensors")
    optimizer = SparseAdamW(
        model, CooMask.load(tmp_path / "mask.safetensors"), lr=0.1, gradients=mode
    )
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    optimizer.detach()
    assert_unselected_unchanged(model, before, mask)
    delta = SparseDelta.capture(model, mask, base)
    delta.save(tmp_path / "delta.safetensors")
    assert delta.nnz == 1
    SparseDelta.load(tmp_path / "delta.safetensors").apply_(base)
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model.named_parameters())
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("score", ["mean_grad", "fisher", "random", "magnitude"])
def test_no_entry_is_refused_and_nothing_read(score: Any) -> None:
    model = small_model()
    numel = sum(param.numel() for param in model.parameters())

    def unused(*arguments: Any) -> Tensor:
        raise AssertionError

    with pytest.raises(SelectionError, match="selects no entry; use at least"):
        select(model, unused, [0], 0.99 / numel, score)
    assert number_of_entries(1 / numel, numel) == 1
