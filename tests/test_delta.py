"""Deltas: exact in both directions, picky about bases, unmoved by hostile files."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saft_kernels import files, ops
from saft_kernels.delta import SparseDelta
from saft_kernels.delta import file as delta_file
from saft_kernels.errors import (
    DeltaError,
    DeltaFormatError,
    FileWriteError,
    MaskError,
)
from saft_kernels.fingerprint import fingerprint, same_bits
from saft_kernels.mask import CooMask
from small_deltas import (
    DTYPES,
    SELECTED,
    Model,
    assert_same_bits,
    change_one_bit,
    differs,
    make_base,
    make_mask,
    tune,
    tuned_pair,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_gives_the_tuned_model_and_revert_the_base_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base, tuned, delta = tuned_pair(dtype)
    delta.save(tmp_path / "d.safetensors")
    loaded = SparseDelta.load(tmp_path / "d.safetensors")
    model = make_base(dtype)
    for _ in range(2):
        loaded.apply_(model)
        assert_same_bits(model, tuned)
        assert differs(model, base)
        loaded.revert_(model)
        assert_same_bits(model, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_captured_model_can_be_reverted(dtype: torch.dtype) -> None:
    base, tuned, delta = tuned_pair(dtype)
    delta.revert_(tuned)
    assert_same_bits(tuned, base)
    delta.apply_(tuned)
    assert differs(tuned, base)


def test_layouts_of_the_target_do_not_matter(tmp_path: Path) -> None:
    _, tuned, delta = tuned_pair()
    model = make_base()
    model.conv.to(memory_format=torch.contiguous_format)
    model.projection.data = model.projection.data.contiguous()
    delta.apply_(model)
    assert_same_bits(model, tuned)
    assert model.conv.weight.is_contiguous()


def test_the_base_may_be_given_as_a_state_dict() -> None:
    base = make_base()
    state = copy.deepcopy(base.state_dict())
    mask = make_mask(base)
    delta = SparseDelta.capture(tune(base, mask), mask, state)
    delta.revert_(base)
    assert_same_bits(base, make_base())


def test_an_open_clip_model(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
    }
    base = open_clip.CLIP(**config)
    mask = CooMask.from_indices(
        base, {name: torch.arange(0, p.numel(), 50) for name, p in base.named_parameters()}
    )
    tuned = tune(copy.deepcopy(base), mask)
    SparseDelta.capture(tuned, mask, base).save(tmp_path / "d.safetensors")
    model = copy.deepcopy(base)
    delta = SparseDelta.load(tmp_path / "d.safetensors")
    delta.apply_(model)
    assert_same_bits(model, tuned)
    delta.revert_(model)
    assert_same_bits(model, base)


def test_buffers_are_left_alone() -> None:
    base, _, delta = tuned_pair()
    base.norm.running_mean.fill_(3.0)
    delta.apply_(base)
    assert (base.norm.running_mean == 3.0).all()


# Contents and size --------------------------------------------------------------------------------


def test_what_a_delta_says_about_itself_survives_the_file(tmp_path: Path) -> None:
    base, tuned, delta = tuned_pair()
    delta.save(tmp_path / "d.safetensors")
    loaded = SparseDelta.load(tmp_path / "d.safetensors")
    mask = make_mask(base)
    assert loaded.nnz == mask.nnz == sum(SELECTED.values())
    assert loaded.nbytes == 8 * mask.nnz
    assert loaded.density == mask.density
    assert loaded.metadata == {"note": "a test"}
    assert loaded.created_by.startswith("saft-kernels ")
    assert loaded.shapes == {n: tuple(p.shape) for n, p in base.named_parameters()}
    found = {name: (indices, values) for name, indices, values in loaded.items()}
    for name, indices in mask.items():
        assert torch.equal(found[name][0], indices)
        assert same_bits(found[name][1], ops.gather(tuned.get_parameter(name), indices)).all()
    assert "nnz=61" in repr(loaded)


def test_the_file_takes_at_most_a_quarter_percent_of_the_model_at_density_0_001(
    tmp_path: Path,
) -> None:
    # As many parameters as a ViT-B/16, smaller ones: the table weighs more than in the real model.
    model = nn.ParameterDict(
        {f"block_{i}_weight": nn.Parameter(torch.zeros(100_000)) for i in range(302)}
    )
    index = torch.arange(0, 100_000, 1000, dtype=torch.int32)
    mask = CooMask.from_indices(model, {name: index for name, _ in model.named_parameters()})
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    SparseDelta.capture(tune(model, mask), mask, base).save(tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").stat().st_size <= 0.0025 * 4 * 302 * 100_000


def test_metadata_that_is_not_text_is_refused() -> None:
    base = make_base()
    with pytest.raises(DeltaError, match="metadata must map text to text"):
        SparseDelta.capture(base, make_mask(base), base, {"epochs": 3})  # type: ignore[dict-item]


# Capturing ----------------------------------------------------------------------------------------


def test_a_model_that_differs_outside_the_mask_is_not_captured() -> None:
    base = make_base()
    mask = make_mask(base)
    tuned = tune(copy.deepcopy(base), mask)
    outside = set(range(216)) - set(mask["conv.weight"].tolist())
    with torch.no_grad():
        ops.scatter_(tuned.conv.weight, torch.tensor([min(outside)]), torch.tensor([9.0]))
    with pytest.raises(
        DeltaError, match=r"'conv.weight' differs from the base at 1 entries outside"
    ):
        SparseDelta.capture(tuned, mask, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv.bias"), "no parameter 'conv.bias'"),
        (lambda state: state.update(scale=torch.ones(2)), r"'scale' is .* \[\] and in the base"),
        (lambda state: state.update(scale=state["scale"].half()), "'scale' is .*float16"),
    ],
)
def test_a_base_of_another_kind_is_refused(change: Callable[[Any], Any], message: str) -> None:
    base = make_base()
    state = dict(base.state_dict())
    change(state)
    with pytest.raises(DeltaError, match=message):
        SparseDelta.capture(make_base(), make_mask(base), state)


@pytest.mark.parametrize("alias", [lambda model: model, lambda model: model.state_dict()])
def test_a_base_that_was_trained_along_is_refused(alias: Callable[[Any], Any]) -> None:
    model = make_base()
    mask = make_mask(model)
    base = alias(model)
    tune(model, mask)
    with pytest.raises(DeltaError, match=r"is the model's own.*copy\.deepcopy"):
        SparseDelta.capture(model, mask, base)


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(MaskError, match="no parameter"):
        SparseDelta.capture(nn.Linear(2, 2), make_mask(make_base()), {})


# Wrong models, wrong order ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm.weight", "decoder.bias", "conv.bias"])
def test_another_base_is_refused_by_fingerprint(name: str) -> None:
    _, _, delta = tuned_pair()
    model = make_base()
    change_one_bit(model, name)
    before = copy.deepcopy(model)
    with pytest.raises(DeltaError, match=f"not the base .*'{name}' has other values"):
        delta.apply_(model)
    assert_same_bits(model, before)
    delta.apply_(model, verify=False)  # asked for


def untie(model: Model) -> None:
    model.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())


def tie(model: Model) -> None:
    model.norm.bias = model.norm.weight


UNFIT: dict[str, tuple[Callable[[Model], Any], str]] = {
    "missing": (lambda m: delattr(m, "projection"), "no parameter 'projection'"),
    "shape": (
        lambda m: setattr(m, "scale", nn.Parameter(torch.ones(2))),
        r"'scale' has shape \[2\], its base had \[\]",
    ),
    "dtype": (lambda m: m.conv.half(), r"'conv.weight' has dtype .*cast the model after applying"),
    "untied": (untie, "one tied parameter in its base, and two here"),
    "tied": (tie, "two parameters in its base, and one tied here"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_does_not_fit_is_refused(case: str, verify: bool) -> None:
    if case == "dtype" and not verify:
        pytest.skip("allowed, if it is said to be the base")
    change, message = UNFIT[case]
    _, _, delta = tuned_pair()
    model = make_base()
    change(model)
    with pytest.raises(DeltaError, match=message):
        delta.apply_(model, verify=verify)
    assert torch.equal(model.embedding.weight, make_base().embedding.weight)


def test_parameters_that_the_base_did_not_have_are_left_alone() -> None:
    _, _, delta = tuned_pair()
    model = make_base()
    model.classifier = nn.Linear(3, 3)
    before = copy.deepcopy(model.classifier)
    delta.apply_(model)
    assert_same_bits(model.classifier, before)


@pytest.mark.parametrize("verify", [True, False])
def test_applying_twice_is_refused(tmp_path: Path, verify: bool) -> None:
    _, tuned, delta = tuned_pair()
    delta.save(tmp_path / "d.safetensors")
    model = make_base()
    delta.apply_(model)
    for again in (delta, SparseDelta.load(tmp_path / "d.safetensors")):
        with pytest.raises(DeltaError, match="applied to this model already"):
            again.apply_(model, verify=verify)
    assert_same_bits(model, tuned)


def test_reverting_a_model_that_is_not_in_the_applied_state_is_refused() -> None:
    base, _, delta = tuned_pair()
    with pytest.raises(DeltaError, match="not applied to this model"):
        delta.revert_(base)
    delta.apply_(base)
    delta.revert_(base)
    with pytest.raises(DeltaError, match="not applied to this model"):
        delta.revert_(base)
    assert_same_bits(base, make_base())


def test_reverting_what_was_trained_further_is_refused() -> None:
    _, _, delta = tuned_pair()
    model = make_base()
    delta.apply_(model)
    change_one_bit(model, "norm.weight")  # outside the delta
    before = copy.deepcopy(model)
    with pytest.raises(DeltaError, match=r"'norm.weight' was changed outside the delta's entries"):
        delta.revert_(model)
    assert_same_bits(model, before)


def test_originals_come_from_the_file_if_they_were_saved(tmp_path: Path) -> None:
    base, tuned, delta = tuned_pair()
    delta.save(tmp_path / "without.safetensors")
    delta.save(tmp_path / "with.safetensors", originals=True)
    stranger = SparseDelta.load(tmp_path / "without.safetensors")
    with pytest.raises(DeltaError, match="original values are not known here"):
        stranger.revert_(tuned)
    with pytest.raises(DeltaError, match="original values are not known; apply the delta"):
        stranger.save(tmp_path / "again.safetensors", originals=True)
    SparseDelta.load(tmp_path / "with.safetensors").revert_(tuned)
    assert_same_bits(tuned, base)


@pytest.mark.parametrize("as_state", [True, False])
def test_originals_are_learnt_from_the_base(tmp_path: Path, as_state: bool) -> None:
    base, tuned, delta = tuned_pair()
    delta.save(tmp_path / "d.safetensors")
    loaded = SparseDelta.load(tmp_path / "d.safetensors")
    assert not loaded.knows_originals
    loaded.learn_originals(base.state_dict() if as_state else base)
    assert loaded.knows_originals
    for name, values in delta.originals.items():
        if values.numel():
            assert same_bits(loaded.originals[name], values).all()
    loaded.revert_(tuned)
    assert_same_bits(tuned, base)


def test_originals_are_learnt_from_nothing_else(tmp_path: Path) -> None:
    _, tuned, delta = tuned_pair()
    delta.save(tmp_path / "d.safetensors")
    loaded = SparseDelta.load(tmp_path / "d.safetensors")
    with pytest.raises(DeltaError, match="is applied to this model already"):
        loaded.learn_originals(tuned)
    other = make_base()
    change_one_bit(other, "conv.bias")
    with pytest.raises(DeltaError, match=r"'conv\.bias' has other values"):
        loaded.learn_originals(other)
    assert not loaded.knows_originals
    loaded.learn_originals(other, verify=False)
    assert loaded.knows_originals


def test_models_applied_to_without_verification_get_their_own_values_back() -> None:
    _, _, delta = tuned_pair()
    model = make_base()
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    before = copy.deepcopy(model)
    delta.apply_(model, verify=False)
    delta.revert_(model, verify=False)
    assert_same_bits(model, before)


def test_a_delta_keeps_no_model_alive() -> None:
    _, _, delta = tuned_pair()
    model = make_base()
    delta.apply_(model)
    seen = len(delta._applied)
    del model
    gc.collect()
    assert (seen, len(delta._applied)) == (1, 0)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", [1, 2, 4, 5])
def test_an_error_half_way_restores_the_model(
    monkeypatch: pytest.MonkeyPatch, fails_at: int, error: BaseException
) -> None:
    _, _, delta = tuned_pair()
    model = make_base()
    scatter_, calls = ops.scatter_, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        scatter_(*args)
        if calls == fails_at:
            raise error

    monkeypatch.setattr(ops, "scatter_", failing)
    with pytest.raises(type(error)):
        delta.apply_(model)
    assert_same_bits(model, make_base())
    calls = -1000
    delta.apply_(model)
    calls = 0
    applied = copy.deepcopy(model)
    with pytest.raises(type(error)):
        delta.revert_(model)
    assert_same_bits(model, applied)


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _, _, delta = tuned_pair()
    delta.save(tmp_path / "d.safetensors", originals=True)
    return tmp_path / "d.safetensors"


def test_a_missing_file_and_a_folder_are_one_clear_sentence(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DeltaFormatError, match=f"{path} cannot be read: {reason}"):
            SparseDelta.load(path)


def test_a_file_of_another_kind_is_named_as_such(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DeltaFormatError, match=r"model.safetensors is no delta"):
        SparseDelta.load(tmp_path / "model.safetensors")
    make_mask(make_base()).save(tmp_path / "mask.safetensors")
    with pytest.raises(DeltaFormatError, match=r"its format is 'saft-mask', not 'saft-delta'"):
        SparseDelta.load(tmp_path / "mask.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DeltaFormatError):
        SparseDelta.load(saved)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(DeltaFormatError, match="claims a header of 1,099,511,627,776 bytes"):
        SparseDelta.load(path)


def test_what_safetensors_says_of_a_hostile_header_cannot_steer_a_terminal(tmp_path: Path) -> None:
    header = json.dumps(
        {"x": {"dtype": "\x1b[2J" + "x" * 5000, "shape": [], "data_offsets": [0, 0]}}
    )
    path = tmp_path / "d.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(DeltaFormatError, match=r"\\x1b\[2J") as caught:
        SparseDelta.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def parts_of(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def write_forged(path: Path, texts: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write a file whose checksum is right, whatever it holds."""
    texts["checksum"] = delta_file._checksum(texts, tensors)
    save_file(tensors, path, texts)


def edit_rows(change: Callable[[list[Any]], Any]) -> Callable[..., None]:
    def forge(texts: dict[str, str], tensors: dict[str, Tensor]) -> None:
        rows = json.loads(texts["tensors"])
        change(rows)
        texts["tensors"] = json.dumps(rows)

    return forge


def edit_row(column: int, value: Any) -> Callable[..., None]:
    """Change a cell in the row of ``conv.weight``, which has 20 entries of 216."""

    def change(rows: list[Any]) -> None:
        next(row for row in rows if row[0] == "conv.weight")[column] = value

    return edit_rows(change)


def edit_codes(change: Callable[[Tensor], Any]) -> Callable[..., None]:
    return lambda texts, tensors: change(tensors["indices"])


def edit_text(key: str, value: str) -> Callable[..., None]:
    return lambda texts, tensors: texts.update({key: value})


FORGERIES: dict[str, tuple[Callable[..., Any], str]] = {
    "too few indices": (edit_codes(lambda code: code.zero_()), "indices of .* are malformed"),
    "too many indices": (edit_codes(lambda code: code.fill_(255)), "indices of .* are malformed"),
    "another index": (edit_codes(lambda code: code[0].bitwise_xor_(2)), "indices of 'scale' are"),
    "count too large": (edit_row(5, 217), "number of entries of 'conv.weight' is impossible"),
    "count negative": (edit_row(5, -1), "number of entries"),
    "count is a bool": (edit_row(5, True), "number of entries"),
    "count is huge": (edit_row(5, 10**30), "number of entries"),
    "one more": (edit_row(5, 21), "are malformed|too short"),
    "one less": (edit_row(5, 19), "are malformed|too long"),
    "shape negative": (edit_row(3, [-1, 4]), "shape of 'conv.weight' is impossible"),
    "shape too large": (edit_row(3, [2**30, 2**30]), "shape of 'conv.weight' is impossible"),
    "shape too deep": (edit_row(3, [1] * 65), "shape of 'conv.weight' is impossible"),
    "shape smaller": (edit_row(3, [20]), "are malformed"),
    "shape is text": (edit_row(3, "72"), "shape of 'conv.weight' is impossible"),
    "dtype unknown": (edit_row(2, "float128"), "dtype of 'conv.weight' is unknown"),
    "dtype quantized": (edit_row(2, "quint8"), "cannot be changed in torch.quint8"),
    "dtype an integer": (edit_row(2, "int32"), "cannot be changed in torch.int32"),
    "dtype of no pool": (edit_row(2, "float64"), r"'values.float64' is missing"),
    "fingerprint": (edit_row(4, "xyz"), "fingerprint of 'conv.weight' is malformed"),
    "name": (edit_row(0, 7), "a parameter has no name"),
    "long name": (edit_row(0, "n" * 1001), "or one of more than 1,000 characters"),
    "long tied name": (edit_row(1, ["n" * 1001]), "names tied to 'conv.weight' are malformed"),
    "tied": (edit_row(1, "other"), "names tied to 'conv.weight' are malformed"),
    "listed twice": (edit_row(0, "scale"), "listed twice"),
    "tied to itself": (edit_row(1, ["conv.weight"]), "listed twice"),
    "no row": (edit_rows(lambda rows: rows.append([])), "a row of its table is malformed"),
    "table": (edit_text("tensors", "{}"), "its table is malformed"),
    "not JSON": (edit_text("tensors", "[1,"), "its table is not valid JSON"),
    "deep JSON": (edit_text("tensors", "[" * 100_000), "its table is not valid JSON"),
    "many lists": (edit_text("tensors", f"[{'[],' * 2000}[]]"), "its table is not valid JSON"),
    "long version": (edit_text("version", "2" * 5000), "has version '2{100}', this release"),
    "metadata": (edit_text("metadata", '{"a": 1}'), "metadata is not text"),
    "density": (edit_text("density", "nan"), "density is impossible"),
    "version": (edit_text("version", "1"), "has version '1', this release reads '2'"),
    "no pool": (lambda _, tensors: tensors.pop("values.float32"), "'values.float32' is missing"),
    "short pool": (
        lambda _, tensors: tensors.update({"values.float32": torch.ones(3)}),
        "too short",
    ),
    "long pool": (
        lambda _, tensors: tensors.update({"values.float32": torch.ones(99)}),
        "too long",
    ),
    "spare pool": (lambda _, t: t.update({"values.float16": torch.ones(1).half()}), "too long"),
    "matrix": (lambda _, t: t.update({"values.float32": torch.ones(61, 1)}), "is no vector of F32"),
    "wrong pool": (
        lambda _, t: t.update({"values.float32": torch.ones(61).half()}),
        "is no vector of F32",
    ),
    "unknown tensor": (lambda _, t: t.update({"extra": torch.ones(1)}), "unknown tensor 'extra'"),
    "float indices": (lambda _, t: t.update(indices=torch.ones(61)), "is no vector of U8"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_file_is_refused(saved: Path, case: str) -> None:
    forge, message = FORGERIES[case]
    texts, tensors = parts_of(saved)
    forge(texts, tensors)
    write_forged(saved, texts, tensors)
    with pytest.raises(DeltaFormatError, match=message) as caught:
        SparseDelta.load(saved)
    assert str(saved) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_the_forging_helper_itself_writes_files_that_load(saved: Path) -> None:
    write_forged(saved, *parts_of(saved))
    assert SparseDelta.load(saved).nnz == sum(SELECTED.values())


def test_a_row_without_entries_may_name_any_dtype(saved: Path) -> None:
    texts, tensors = parts_of(saved)
    edit_rows(lambda rows: rows.append(["odd", [], "quint8", [3], "0" * 32, 0]))(texts, tensors)
    write_forged(saved, texts, tensors)
    with pytest.raises(DeltaError, match="no parameter 'odd'"):
        SparseDelta.load(saved).apply_(make_base())


def test_a_huge_claimed_shape_costs_nothing(saved: Path) -> None:
    texts, tensors = parts_of(saved)
    edit_rows(lambda rows: rows.append(["huge", [], "float32", [1 << 20, 1 << 20], "0" * 32, 0]))(
        texts, tensors
    )
    write_forged(saved, texts, tensors)
    delta = SparseDelta.load(saved)
    with pytest.raises(DeltaError, match="no parameter 'huge'"):
        delta.apply_(make_base())


def test_any_single_changed_byte_of_the_values_is_noticed(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(DeltaFormatError, match="does not match its checksum"):
        SparseDelta.load(saved)


MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 64)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    ),
    min_size=1,
    max_size=4,
)


def mutate(content: bytes, mutations: list[tuple[str, float, Any]]) -> bytes:
    for kind, where, what in mutations:
        at = int(where * len(content))
        if kind == "set":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + what :]
        else:
            content = content[:at]
    return content


FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(mutations=MUTATIONS)
def test_mutated_files_are_refused_or_valid_and_the_model_stays_untouched(
    saved: Path, mutations: list[tuple[str, float, Any]]
) -> None:
    try_to_apply(saved, mutate(saved.read_bytes(), mutations))


@FUZZ
@given(mutations=MUTATIONS)
def test_mutated_tables_under_a_right_checksum_are_refused_or_valid(
    saved: Path, mutations: list[tuple[str, float, Any]]
) -> None:
    texts, tensors = parts_of(saved)
    mutated = mutate(texts["tensors"].encode(), mutations)
    texts["tensors"] = mutated.decode("latin-1")
    forged = saved.with_name("forged.safetensors")
    write_forged(forged, texts, tensors)
    try_to_apply(saved, forged.read_bytes())


def try_to_apply(saved: Path, content: bytes) -> None:
    """Load mutated content; whatever loads must behave on a model."""
    mutated = saved.with_name("mutated.safetensors")
    mutated.write_bytes(content)
    model = make_base()
    try:
        delta = SparseDelta.load(mutated)
    except DeltaFormatError:
        return
    try:
        delta.apply_(model)
    except DeltaError:
        assert_same_bits(model, make_base())
    else:
        delta.revert_(model)
        assert_same_bits(model, make_base())


# Writing ------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = saved.read_bytes()
    _, _, delta = tuned_pair()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FileWriteError, match="free some space"):
        delta.save(saved)
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


SMALL_DISK = """
import copy, resource, sys, torch
from saft_kernels import CooMask
from saft_kernels.delta import SparseDelta
from saft_kernels.delta import file as delta_file
from saft_kernels.errors import FileWriteError

model = torch.nn.Linear(64, 64)
mask = CooMask.from_indices(model, {"weight": torch.arange(4096)})
delta = SparseDelta.capture(model, mask, copy.deepcopy(model))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    delta.save(sys.argv[1])
except FileWriteError as error:
    print(error)
"""


def test_a_file_too_large_for_the_disk_keeps_the_old_one(saved: Path) -> None:
    old = saved.read_bytes()
    command = [sys.executable, "-c", SMALL_DISK, str(saved)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("write to a disk that allows files of this size")
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


def test_a_place_that_cannot_be_written_to_is_named(saved: Path) -> None:
    _, _, delta = tuned_pair()
    with pytest.raises(FileWriteError, match=r"below.* could not be written"):
        delta.save(saved / "below")


# Fingerprints -------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_for_every_layout_and_differs_for_every_change() -> None:
    tensor = torch.randn(6, 5, 4, 3)
    expected = fingerprint(tensor)
    assert fingerprint(tensor.to(memory_format=torch.channels_last)) == expected
    assert fingerprint(tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)) == expected
    assert len(expected) == 32
    changed = [tensor.view(6, 20, 3), tensor.view(torch.int32), tensor.double(), tensor.neg()]
    assert len({expected, *map(fingerprint, changed)}) == 5


def test_large_tensors_are_fingerprinted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 11, 13).transpose(0, 2)
    expected = fingerprint(tensor.contiguous())
    for block in (1, 10, 100, 1000):
        monkeypatch.setattr("saft_kernels.fingerprint.BLOCK", block)
        assert fingerprint(tensor) == expected


def test_tensors_without_elements_or_dimensions_have_a_fingerprint() -> None:
    tensors = [torch.empty(0), torch.empty(0, 3).t(), torch.tensor(0.0), torch.zeros(1)]
    assert len({fingerprint(tensor) for tensor in tensors}) == 4
    assert fingerprint(torch.zeros(4, 5)[:1, 0]) == fingerprint(torch.zeros(1))
