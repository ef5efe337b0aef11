"""One model that takes on one delta after another."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from saft_kernels import ops
from saft_kernels.delta import DeltaSwap, SparseDelta
from saft_kernels.errors import DeltaError
from saft_kernels.mask import CooMask
from small_deltas import (
    assert_same_bits,
    change_one_bit,
    make_base,
    make_mask,
    on_meta,
    tune,
    tuned_pair,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def another_delta(seed: int) -> tuple[nn.Module, SparseDelta]:
    """Other entries of the same base, some of which every delta has."""
    base = make_base()
    generator = torch.Generator().manual_seed(seed)
    indices = {}
    for name, param in base.named_parameters():
        if param.numel() > 8:
            own = torch.randperm(param.numel() - 3, generator=generator)[:5] + 3
            indices[name] = torch.cat([torch.arange(3), own])
    mask = CooMask.from_indices(base, indices)
    tuned = tune(copy.deepcopy(base), mask)
    for name, param in tuned.named_parameters():
        if name in mask:
            with torch.no_grad():
                ops.scatter_(param, mask[name], torch.full((8,), float(seed)))
    return tuned, SparseDelta.capture(tuned, mask, base)


def test_every_change_gives_the_tuned_model_and_none_the_base() -> None:
    base, tuned, delta = tuned_pair()
    known = [(base, None), (tuned, delta), another_delta(2), another_delta(3)]
    model = make_base()
    swap = DeltaSwap(model)
    for i in (1, 2, 2, 3, 1, 0, 0, 3, 2, 0):
        expected, wanted = known[i]
        swap.to(wanted)
        assert swap.current is wanted
        assert_same_bits(model, expected)


def test_a_change_reads_and_writes_entries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first delta no fingerprint is computed, whatever comes."""
    (_, first), (_, second) = another_delta(2), another_delta(3)
    model = make_base()
    swap = DeltaSwap(model)
    swap.prepare(first)
    assert swap.current is None
    assert_same_bits(model, make_base())

    def fail(*_: Any) -> Any:
        raise AssertionError("the base was read")

    for name in ("fingerprint", "fingerprints"):
        monkeypatch.setattr(f"saft_kernels.delta.base.{name}", fail)
    for delta in (first, second, None, second):
        swap.to(delta)
    with pytest.raises(AssertionError, match="the base was read"):
        DeltaSwap(make_base()).to(first)


def test_a_model_that_is_not_the_base_is_refused_unless_it_is_said_to_be() -> None:
    _, delta = another_delta(2)
    model = make_base()
    change_one_bit(model, "decoder.bias")
    before = copy.deepcopy(model)
    with pytest.raises(DeltaError, match=r"not the base .*'decoder.bias' has other values"):
        DeltaSwap(model).to(delta)
    assert_same_bits(model, before)
    swap = DeltaSwap(model, verify=False)
    swap.to(delta)
    swap.to(None)
    assert_same_bits(model, before)


def test_a_delta_of_another_base_is_refused_and_the_current_one_stays() -> None:
    tuned, delta = another_delta(2)
    other = make_base()
    change_one_bit(other, "norm.weight")
    mask = make_mask(other)
    stranger = SparseDelta.capture(tune(copy.deepcopy(other), mask), mask, other)
    model = make_base()
    swap = DeltaSwap(model)
    swap.to(delta)
    with pytest.raises(DeltaError, match=r"different bases: 'norm.weight' is not the same in both"):
        swap.to(stranger)
    assert swap.current is delta
    assert_same_bits(model, tuned)


def test_a_model_that_was_written_to_meanwhile_is_refused() -> None:
    (_, first), (_, second) = another_delta(2), another_delta(3)
    model = make_base()
    swap = DeltaSwap(model)
    swap.to(first)
    with torch.no_grad():
        model.embedding.weight[0, 0] = 99.0  # entry 0, of every delta here
    before = copy.deepcopy(model)
    for wanted in (second, None):
        with pytest.raises(DeltaError, match=r"'embedding.weight' was written to after"):
            swap.to(wanted)
        assert_same_bits(model, before)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_error_half_way_leaves_the_current_delta(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tuned, first), (_, second) = another_delta(2), another_delta(3)
    model = make_base()
    swap = DeltaSwap(model)
    swap.to(first)
    scatter_ = ops.scatter_
    wrote = 2 * len(list(first.items()))
    for fails_at in range(1, wrote + 1):
        calls = 0

        def failing(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            scatter_(*arguments)
            if calls == fails_at:  # noqa: B023 - it runs within this round
                raise error

        monkeypatch.setattr(ops, "scatter_", failing)
        with pytest.raises(type(error)):
            swap.to(second)
        monkeypatch.setattr(ops, "scatter_", scatter_)
        assert swap.current is first
        assert_same_bits(model, tuned)
    swap.to(second)


def test_deltas_are_forgotten_with_their_last_user() -> None:
    _, delta = another_delta(2)
    swap = DeltaSwap(make_base())
    swap.prepare(delta)
    assert len(swap._prepared) == 1
    del delta
    gc.collect()
    assert len(swap._prepared) == 0


def test_meta_models_are_refused() -> None:
    _, delta = another_delta(2)
    with pytest.raises(DeltaError, match="on the meta device"):
        DeltaSwap(on_meta(torch.float32)).to(delta)
