"""Two deltas of one base, entry by entry."""

from __future__ import annotations

import pytest
import torch

from saft_kernels.delta import SparseDelta, diff, extract
from saft_kernels.errors import DeltaError

BASE = {"a": torch.arange(6.0), "b": torch.ones(2, 2), "c": torch.zeros(3)}


def delta_of(changes: dict[str, dict[int, float]], **metadata: str) -> SparseDelta:
    tuned = {name: tensor.clone() for name, tensor in BASE.items()}
    for name, entries in changes.items():
        for index, value in entries.items():
            tuned[name].view(-1)[index] = value
    return extract(tuned, BASE, metadata=metadata).delta


FIRST = {"a": {0: 5.0, 1: 7.0, 4: -1.0}, "b": {3: 2.0}}
SECOND = {"a": {1: 7.0, 4: -2.0, 5: 0.0}, "c": {0: 1.0}}


def test_every_entry_is_counted_once() -> None:
    found = diff(delta_of(FIRST), delta_of(SECOND))
    assert {name: vars(counted) for name, counted in found.parameters.items()} == {
        "a": {"only_first": 1, "only_second": 1, "same": 1, "different": 1},
        "b": {"only_first": 1, "only_second": 0, "same": 0, "different": 0},
        "c": {"only_first": 0, "only_second": 1, "same": 0, "different": 0},
    }
    assert vars(found.total) == {"only_first": 2, "only_second": 2, "same": 1, "different": 1}
    assert not found.total.equal


def test_distance_is_that_of_the_models() -> None:
    first, second = delta_of(FIRST), delta_of(SECOND)
    models = []
    for delta in (first, second):
        model = {name: tensor.clone() for name, tensor in BASE.items()}
        delta.apply_(model)
        models.append(torch.cat([tensor.flatten() for tensor in model.values()]))
    assert diff(first, second).distance == pytest.approx(float((models[0] - models[1]).norm()))
    assert diff(second, first).distance == diff(first, second).distance


def test_distance_needs_the_base_where_one_leaves_an_entry_alone(tmp_path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, changes in zip(files, (FIRST, SECOND), strict=True):
        delta_of(changes).save(file)
    first, second = map(SparseDelta.load, files)
    assert diff(first, second).distance is None
    other = delta_of({name: dict.fromkeys(entries, 9.0) for name, entries in FIRST.items()})
    assert diff(first, other).distance is not None  # the same entries
    for delta in (first, second):
        delta.learn_originals(BASE)
    known = diff(delta_of(FIRST), delta_of(SECOND)).distance
    assert diff(first, second).distance == known


def test_a_delta_and_itself() -> None:
    delta = delta_of(FIRST)
    found = diff(delta, delta)
    assert found.total.equal
    assert (found.total.same, found.distance, found.metadata) == (4, 0, {})


def test_nan_equals_itself_and_zero_does_not_equal_minus_zero() -> None:
    nan = float("nan")
    one, two = delta_of({"a": {0: -0.0, 1: nan}}), delta_of({"a": {0: 5.0, 1: nan}})
    counted = diff(one, two).total
    assert (counted.same, counted.different) == (1, 1)


def test_metadata_that_differ() -> None:
    found = diff(delta_of(FIRST, seed="1", lr="2"), delta_of(FIRST, seed="3", score="x", lr="2"))
    assert found.metadata == {"seed": ("1", "3"), "score": (None, "x")}


def test_other_bases_are_refused() -> None:
    other = {name: tensor + 1 for name, tensor in BASE.items()}
    with pytest.raises(DeltaError, match="different bases: 'a'"):
        diff(delta_of(FIRST), extract(other, other).delta)
