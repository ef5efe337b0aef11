"""Composed and scaled deltas against the same arithmetic on dense weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saft_kernels.delta import SparseDelta, compose, overlap
from saft_kernels.errors import DeltaError
from saft_kernels.fingerprint import same_bits
from saft_kernels.mask import CooMask
from small_deltas import assert_same_bits, change_one_bit, make_base, tuned_pair

pytestmark = pytest.mark.usefixtures("one_thread")


def vector(*values: float) -> nn.ParameterDict:
    """A model of one parameter, and one that no delta changes."""
    weights = torch.tensor(values, dtype=torch.float32)
    return nn.ParameterDict({"w": nn.Parameter(weights), "still": nn.Parameter(torch.ones(3))})


def delta_of(base: nn.ParameterDict, changes: dict[int, float], **metadata: str) -> SparseDelta:
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for index, change in changes.items():
            tuned["w"][index] += change
    mask = CooMask.from_indices(base, {"w": torch.tensor(sorted(changes))})
    return SparseDelta.capture(tuned, mask, base, metadata)


def weights_with(base: nn.ParameterDict, delta: SparseDelta) -> list[float]:
    model = copy.deepcopy(base)
    delta.apply_(model)
    return [round(value, 6) for value in model["w"].tolist()]


BASE = (10.0, 20.0, 30.0, 40.0, 50.0)
ONE = {0: 1.0, 1: 2.0, 2: -3.0}
TWO = {1: 4.0, 2: 5.0, 3: -6.0}


def two() -> tuple[nn.ParameterDict, list[SparseDelta]]:
    base = vector(*BASE)
    return base, [delta_of(base, each) for each in (ONE, TWO)]


# Composing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("sum", {}, [11, 26, 32, 34, 50]),
        ("sum", {"weights": [1, 0.5]}, [11, 24, 29.5, 37, 50]),
        ("mean", {}, [10.5, 23, 31, 37, 50]),
        ("mean", {"weights": [3, 1]}, [10.75, 22.5, 29, 38.5, 50]),
        # of -3 and 5 the sum is positive: 5 alone; elsewhere the mean of what is there
        ("ties", {}, [11, 23, 35, 34, 50]),
        # weights decide the sign: 3 * -3 + 5 < 0
        ("ties", {"weights": [3, 1]}, [11, 22.5, 27, 34, 50]),
        # the two largest of each: -3, 2 and -6, 5
        ("ties", {"keep": 0.67}, [10, 22, 35, 34, 50]),
        ("dare", {"drop": 0.0}, [11, 26, 32, 34, 50]),
    ],
)
def test_hand_computed_compositions(rule: str, options: dict, expected: list[float]) -> None:  # type: ignore[type-arg]
    base, deltas = two()
    assert weights_with(base, compose(deltas, rule, **options)) == expected


def test_dare_drops_changes_and_rescales_the_others() -> None:
    base = vector(*[0.0] * 4000)
    deltas = [delta_of(base, dict.fromkeys(range(4000), change)) for change in (1.0, 100.0)]
    composed = compose(deltas, "dare", drop=0.75, seed=3)
    found = torch.tensor(weights_with(base, composed))
    assert set(found.tolist()) == {0.0, 4.0, 400.0, 404.0}
    for change in (4, 400):  # each kept with probability 1/4, whatever became of the other
        kept = ((found == change) | (found == 404)).double().mean()
        assert 0.22 < kept < 0.28
    assert composed.nnz == int((found != 0).sum())
    again = compose(deltas, "dare", drop=0.75, seed=3)
    assert weights_with(base, again) == found.tolist()
    assert weights_with(base, compose(deltas, "dare", drop=0.75, seed=4)) != found.tolist()


CHANGES = st.dictionaries(
    st.integers(0, 4), st.floats(-8, 8, width=16).filter(bool), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CHANGES, min_size=1, max_size=4), st.sampled_from(["sum", "mean", "ties"]))
def test_any_deltas_as_the_dense_arithmetic(changes: list[dict[int, float]], rule: str) -> None:
    base = vector(*BASE)
    dense = torch.zeros(len(changes), 5, dtype=torch.float64)
    for row, each in zip(dense, changes, strict=True):
        for index, change in each.items():  # as it is after it was added in fp32
            row[index] = float(torch.tensor(BASE[index]) + change) - BASE[index]
    total = dense.sum(0)
    if rule == "mean":
        total = total / len(changes)
    elif rule == "ties":
        agree = (dense.sign() == total.sign()) & (total != 0)
        total = torch.where(agree.any(0), (dense * agree).sum(0) / agree.sum(0).clamp(min=1), 0)
    expected = (torch.tensor(BASE, dtype=torch.float64) + total).float()
    composed = compose([delta_of(base, each) for each in changes], rule)
    model = copy.deepcopy(base)
    composed.apply_(model)
    assert torch.equal(model["w"].data, expected)
    composed.revert_(model)
    assert_same_bits(model, base)


def test_a_composition_is_a_delta_like_any_other(tmp_path: Path) -> None:
    base = vector(*BASE)
    deltas = [delta_of(base, ONE, model="m", data="a"), delta_of(base, TWO, model="m", data="b")]
    composed = compose(deltas, "mean", weights=[2, 1])
    composed.save(tmp_path / "d.safetensors", originals=True)
    loaded = SparseDelta.load(tmp_path / "d.safetensors")
    assert weights_with(base, loaded) == weights_with(base, composed)
    assert loaded.metadata["model"] == "m"
    assert "data" not in loaded.metadata
    how = json.loads(loaded.metadata["composed"])
    assert how["rule"] == "mean"
    assert [(source["data"], source["weight"]) for source in how["sources"]] == [("a", 2), ("b", 1)]
    assert loaded.density == pytest.approx(4 / 8)
    nested = compose([loaded, deltas[0]])
    assert nested.nnz == 4


def test_what_cancels_out_is_left_out() -> None:
    base, (one, _) = two()
    opposite = delta_of(base, {0: -1.0})
    composed = compose([one, opposite])
    assert [indices.tolist() for _, indices, _ in composed.items()] == [[1, 2]]
    nothing = compose([delta_of(base, {0: 1.0}), opposite])
    assert nothing.nnz == 0
    assert weights_with(base, nothing) == list(BASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_delta_composed_is_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(30, 20, dtype=dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight[::3] *= 1.5
    mask = CooMask.from_indices(base, {"weight": torch.arange(600)})
    delta = SparseDelta.capture(tuned, mask, base)
    exact = dtype != torch.float64  # in which it is computed
    for rule in ("sum", "mean", "ties"):
        model = copy.deepcopy(base)
        compose([delta], rule).apply_(model)
        tolerance = 0 if exact else 1e-15
        torch.testing.assert_close(model.weight, tuned.weight, rtol=tolerance, atol=tolerance)


def test_changes_that_are_not_finite_are_refused() -> None:
    _, _, delta = tuned_pair()  # one entry of each becomes NaN
    for work in (compose, overlap):
        with pytest.raises(DeltaError, match=r"changes 'scale' to or from NaN or infinity"):
            work([delta])


BAD: list[tuple[dict[str, object], str]] = [
    ({"rule": "median"}, "there is no rule 'median'; choose one of sum, mean, ties, dare"),
    ({"weights": [1]}, "there are 2 deltas and 1 weights"),
    ({"weights": [1, float("inf")]}, "weights must be finite"),
    ({"rule": "mean", "weights": [1, -1]}, "must not add up to 0"),
    ({"rule": "ties", "keep": 0.0}, "keep must be above 0"),
    ({"rule": "dare", "drop": 1.0}, "drop must be 0 or more and below 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(DeltaError, match=message):
        compose(two()[1], **options)  # type: ignore[arg-type]


def test_no_deltas_and_unknown_originals_are_refused(tmp_path: Path) -> None:
    _, (one, other) = two()
    other.save(tmp_path / "d.safetensors")
    for deltas, message in (
        ([], "there are no deltas"),
        ([one, SparseDelta.load(tmp_path / "d.safetensors")], "original values are not known"),
    ):
        for work in (compose, overlap):
            with pytest.raises(DeltaError, match=message):
                work(deltas)


def test_deltas_of_other_bases_are_refused() -> None:
    _, _, delta = tuned_pair()
    other = make_base()
    change_one_bit(other, "conv.bias")
    stranger = SparseDelta.capture(
        copy.deepcopy(other), CooMask.from_indices(other, {"scale": torch.tensor([0])}), other
    )
    for work in (compose, overlap):
        with pytest.raises(DeltaError, match=r"different bases: 'conv.bias' is not the same"):
            work([delta, stranger])


# Overlap ------------------------------------------------------------------------------------------


def test_overlap_says_where_deltas_meet_and_in_which_direction() -> None:
    base, deltas = two()
    found = overlap([*deltas, delta_of(base, {2: -1.0, 4: 1.0})])
    assert found.nnz == (3, 3, 2)
    assert found.shared == ((3, 2, 1), (2, 3, 1), (1, 1, 2))
    assert found.agree == ((3, 1, 1), (1, 3, 0), (1, 0, 2))
    (where,) = found.parameters
    assert (where.name, where.entries, where.shared, where.conflicts) == ("w", 5, 2, 1)


# Scaling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1 / 3, 0.9, 1.0, -0.5, 1.7])
def test_scaling_is_the_interpolation_of_the_two_models(dtype: torch.dtype, alpha: float) -> None:
    """WiSE-FT on dense weights, in double precision, rounded once; 0 and 1 to the bit."""
    base, tuned, delta = tuned_pair(dtype)
    model = make_base(dtype)
    delta.scale(alpha).apply_(model)
    if alpha in (0, 1):
        assert_same_bits(model, tuned if alpha else base)
        return
    pairs = zip(base.named_parameters(), tuned.parameters(), model.parameters(), strict=True)
    for (name, before), after, found in pairs:
        expected: Tensor = ((1 - alpha) * before.double() + alpha * after.double()).to(found.dtype)
        outside = same_bits(before, after)  # where both are the same
        expected = torch.where(outside, before, expected)
        same = same_bits(expected, found) | (expected.isnan() & found.isnan())
        assert same.all(), name
    assert delta.scale(alpha).metadata["alpha"] == repr(alpha)


def test_scaling_leaves_the_delta_as_it_is_and_keeps_the_way_back() -> None:
    base, _, delta = tuned_pair()
    before: Sequence[tuple[str, Tensor, Tensor]] = [
        (name, indices.clone(), values.clone()) for name, indices, values in delta.items()
    ]
    half = delta.scale(0.5)
    model = make_base()
    half.apply_(model)
    half.revert_(model)
    assert_same_bits(model, base)
    for (_, indices, values), (_, i, v) in zip(delta.items(), before, strict=True):
        assert torch.equal(indices, i)
        assert same_bits(values, v).all()


def test_scaling_needs_the_originals_and_a_number(tmp_path: Path) -> None:
    _, _, delta = tuned_pair()
    with pytest.raises(DeltaError, match="alpha must be a finite number, not nan"):
        delta.scale(float("nan"))
    delta.save(tmp_path / "d.safetensors")
    with pytest.raises(DeltaError, match="original values are not known"):
        SparseDelta.load(tmp_path / "d.safetensors").scale(0.5)
