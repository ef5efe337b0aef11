"""A delta of any two models: exact, or what changed most, and what it leaves out."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from saft_kernels.delta import SparseDelta, diff, extract, extraction, open_weights
from saft_kernels.errors import DeltaError, SelectionError
from saft_kernels.fingerprint import same_bits
from small_deltas import DTYPES, assert_same_bits, make_base, tuned_pair

pytestmark = pytest.mark.usefixtures("one_thread")


TWO = torch.zeros(2)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_everywhere(base: nn.Module, size: float = 0.1) -> nn.Module:
    """As full fine-tuning leaves it."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in tuned.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.add_(size * noise.to(param.dtype))
    return tuned


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are read in many pieces."""
    monkeypatch.setattr(extraction, "PIECE", 7)


# Exactly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_one_is_the_captured_one(dtype: torch.dtype) -> None:
    base, tuned, captured = tuned_pair(dtype)
    found = extract(tuned, base)
    total = diff(found.delta, captured).total
    assert total.equal
    assert total.same == captured.nnz
    assert (found.different, found.error, found.largest) == (captured.nnz, 0, 0)
    assert found.left_out == ()
    assert found.delta.density == captured.density


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fully_fine_tuned_model_comes_back_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(dtype)
    tuned = changed_everywhere(base)
    extract(tuned, base).delta.save(tmp_path / "delta.safetensors")
    delta = SparseDelta.load(tmp_path / "delta.safetensors")
    model = make_base(dtype)
    delta.apply_(model)
    assert_same_bits(model, tuned)
    delta.revert_(model)
    assert_same_bits(model, base)


def test_of_state_dicts_everything_in_them_is_covered() -> None:
    base = make_base()
    tuned = changed_everywhere(base)
    with torch.no_grad():
        tuned.norm.running_mean.add_(1)
    delta = extract(state(tuned), state(base)).delta
    assert set(delta.shapes) == set(base.state_dict())
    target = state(base)
    delta.apply_(target)
    for name, value in tuned.state_dict().items():
        assert same_bits(value, target[name]).all(), name
    model = make_base()
    with pytest.raises(DeltaError, match="tied"):  # copies of a state_dict are not tied any more
        delta.apply_(model)


def test_buffers_that_changed_are_applied_to_models_too() -> None:
    base = make_base()
    tuned = changed_everywhere(base)
    with torch.no_grad():
        tuned.norm.running_var.mul_(2)
    delta = extract(tuned, base).delta
    assert "norm.running_var" in delta.shapes
    assert "norm.running_mean" not in delta.shapes
    model = make_base()
    delta.apply_(model)
    assert_same_bits(model, tuned)
    assert torch.equal(model.norm.running_var, tuned.norm.running_var)
    delta.revert_(model)
    assert torch.equal(model.norm.running_var, base.norm.running_var)


def test_signs_of_zero_and_nan_are_differences_too() -> None:
    base = {"w": torch.tensor([0.0, float("nan"), 1.0, 2.0])}
    tuned = {"w": torch.tensor([-0.0, float("nan"), float("nan"), 2.0])}
    delta = extract(tuned, base).delta
    ((_, indices, values),) = delta.items()
    assert indices.tolist() == [0, 2]
    assert math.copysign(1, values[0].item()) == -1
    assert values[1].isnan()


def test_models_that_are_equal_give_an_empty_delta() -> None:
    base = make_base()
    found = extract(make_base(), base)
    assert (found.delta.nnz, found.different, found.error) == (0, 0, 0)
    assert extract({"a": torch.empty(0, 3)}, {"a": torch.empty(0, 3)}).delta.nnz == 0


def test_files_of_weights_are_compared_piece_by_piece(tmp_path: Path) -> None:
    base, tuned = torch.randn(2, 500, 7)
    tuned[3, 2] = 9
    save_file({"w": base}, tmp_path / "base.safetensors")
    torch.save({"state_dict": {"module.w": tuned}}, tmp_path / "tuned.pt")
    found = extract(
        open_weights(tmp_path / "tuned.pt"), open_weights(tmp_path / "base.safetensors"), 1e-3
    )
    differences = (tuned - base).abs().flatten()
    ((_, indices, values),) = found.delta.items()
    assert indices.tolist() == differences.topk(3).indices.sort().values.tolist()
    assert torch.equal(values, tuned.flatten()[indices.long()])


# What changed most --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_largest_differences_of_the_whole_model_are_kept(
    dtype: torch.dtype, density: float
) -> None:
    base = make_base(dtype)
    tuned = changed_everywhere(base)
    found = extract(tuned, base, density)
    pairs = list(zip(tuned.parameters(), base.parameters(), strict=True))
    flat = [(a.detach().double() - b.detach().double()).flatten() for a, b in pairs]
    differences = torch.cat(flat).abs()
    k = int(density * differences.numel())
    assert found.delta.nnz <= k
    assert found.delta.nnz >= min(k, int((differences > 0).sum()))
    kept = torch.cat(
        [(v.double() - found.delta.originals[n].double()) for n, _, v in found.delta.items()]
    )
    assert kept.abs().min() >= found.largest
    assert found.different == sum(int((~same_bits(a, b)).sum()) for a, b in pairs)
    rest = math.sqrt(max(float(differences.square().sum() - kept.square().sum()), 0.0))
    assert found.error == pytest.approx(rest / float(differences.norm()), abs=1e-6)
    model = make_base(dtype)
    found.delta.apply_(model)
    left = torch.cat(
        [
            (a.double() - b.double()).flatten()
            for a, b in zip(tuned.parameters(), model.parameters(), strict=True)
        ]
    )
    assert float(left.abs().max()) == pytest.approx(found.largest)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=40), st.floats(0.01, 1))
def test_any_differences(values: list[float], density: float) -> None:
    base = {"a": torch.zeros(len(values)), "b": torch.ones(3)}
    tuned = {"a": torch.tensor(values), "b": torch.ones(3)}
    k = math.floor(density * (len(values) + 3) + 1e-9)
    if not k:
        with pytest.raises(SelectionError):
            extract(tuned, base, density)
        return
    found = extract(tuned, base, density)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]
    wanted = sorted(i for i in order if not same_bits(tuned["a"][i], base["a"][i]))
    got = {name: indices.tolist() for name, indices, _ in found.delta.items()}
    assert got == ({"a": wanted} if wanted else {})


def test_half_of_the_error_is_half() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    tuned = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    found = extract(tuned, base, 0.25)
    assert found.error == pytest.approx(3 / 5)
    assert (found.largest, found.different, found.delta.nnz) == (3, 2, 1)


# Excluding, and what cannot be --------------------------------------------------------------------


def test_excluded_tensors_stay_as_in_the_base() -> None:
    base = make_base()
    tuned = changed_everywhere(base)
    found = extract(tuned, base, exclude=["conv.*", "scale"])
    names = {name for name, _, _ in found.delta.items()}
    assert not {"conv.weight", "conv.bias", "scale"} & names
    assert set(found.left_out) == {"conv.weight", "conv.bias", "scale"}
    assert found.error > 0
    assert found.different == sum(p.numel() for p in base.parameters())
    model = make_base()
    found.delta.apply_(model)
    assert torch.equal(model.conv.weight, base.conv.weight)
    assert torch.equal(model.projection, tuned.projection)


def test_whole_numbers_that_differ_are_refused_or_left_out() -> None:
    base = make_base()
    tuned = changed_everywhere(base)
    tuned.norm.num_batches_tracked += 5
    with pytest.raises(
        DeltaError, match=r"'norm.num_batches_tracked' differs and is int64.*exclude="
    ):
        extract(tuned, base)
    found = extract(tuned, base, exclude="*.num_batches_tracked")
    assert found.left_out == ("norm.num_batches_tracked",)
    model = make_base()
    found.delta.apply_(model)
    assert_same_bits(model, tuned)


@pytest.mark.parametrize(
    ("tuned", "base", "said"),
    [
        ({"a": TWO}, {"b": TWO}, "tuned model has no tensor 'b'"),
        ({"a": TWO, "b": TWO}, {"a": TWO}, "base has no tensor 'b'"),
        ({"a": torch.zeros(3)}, {"a": TWO}, r"\[3\] in the tuned model and float32 \[2\]"),
        ({"a": TWO.half()}, {"a": TWO}, "float16"),
        ({"a": TWO.to("meta")}, {"a": TWO}, "on the meta device"),
    ],
)
def test_models_that_do_not_belong_together(
    tuned: dict[str, Tensor], base: dict[str, Tensor], said: str
) -> None:
    with pytest.raises(DeltaError, match=said):
        extract(tuned, base)


def test_what_was_tied_must_stay_equal() -> None:
    shared = torch.randn(4)
    base = {"a": shared, "b": shared}
    same, other = torch.ones(4), torch.zeros(4)
    assert extract({"a": same, "b": same.clone()}, base).delta.nnz == 4
    with pytest.raises(DeltaError, match="'a' and 'b' are one tied tensor in the base"):
        extract({"a": same, "b": other}, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_ranking_of_what_is_not_finite(value: float) -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(2)}
    tuned = {"a": torch.tensor([0.0, value, 1.0, 0.0]), "b": torch.zeros(2)}
    with pytest.raises(DeltaError, match="'a' differs by NaN or infinity"):
        extract(tuned, base, 0.5)
    assert extract(tuned, base).delta.nnz == 2


def test_patterns_and_metadata_are_checked() -> None:
    base = {"weight": torch.zeros(2)}
    with pytest.raises(DeltaError, match="no tensor 'wieght' to exclude; did you mean"):
        extract(base, base, exclude="wieght")
    with pytest.raises(DeltaError, match="text to text"):
        extract(base, base, metadata={"lr": 3})  # type: ignore[dict-item]
    assert extract(base, base, metadata={"lr": "3"}).delta.metadata == {"lr": "3"}
