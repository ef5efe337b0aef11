"""CooMask: what it accepts, what it refuses, and that its files can be trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saft_kernels.errors import DeltaFormatError, FileWriteError, MaskError
from saft_kernels.layout import MAX_ELEMENTS, index_dtype
from saft_kernels.mask import CooMask


class Tied(nn.Module):
    """A model whose decoder shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.fc = nn.Linear(4, 3)
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.decoder = nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight


@pytest.fixture
def model() -> Tied:
    return Tied()


@pytest.fixture
def mask(model: Tied) -> CooMask:
    return CooMask.from_indices(
        model,
        {
            "conv.weight": torch.tensor([23, 0, 7]),
            "embedding.weight": torch.tensor([2, 1], dtype=torch.int32),
            "fc.bias": torch.tensor([], dtype=torch.int64),
        },
    )


def test_holds_sorted_unique_indices_per_parameter_in_model_order(mask: CooMask) -> None:
    assert [(name, index.tolist()) for name, index in mask.items()] == [
        ("embedding.weight", [1, 2]),
        ("conv.weight", [0, 7, 23]),
    ]
    assert list(mask) == ["embedding.weight", "conv.weight"]
    assert len(mask) == 2
    assert "fc.bias" not in mask
    assert mask["conv.weight"].dtype == torch.int32


def test_tied_parameters_are_one_tensor(model: Tied, mask: CooMask) -> None:
    total = 24 + 12 + 3 + 24 + 3
    assert mask.numel == total
    assert mask.nnz == 5
    assert mask.density == 5 / total
    assert list(mask.shapes) == [name for name, _ in model.named_parameters()]
    with pytest.raises(MaskError, match=r"'decoder.weight' is tied to 'embedding.weight'"):
        CooMask.from_indices(model, {"decoder.weight": torch.tensor([0])})


def test_indices_are_int32_and_int64_from_two_to_the_31_elements_on() -> None:
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64
    shapes = {"large": (2, 2**30), "small": (2**31 - 1,)}
    mask = CooMask(
        {
            "large": torch.tensor([5, 2**31 - 1]),
            "small": torch.tensor([2**31 - 2], dtype=torch.int32),
        },
        shapes,
    )
    assert mask["large"].dtype == torch.int64
    with torch.device("meta"):
        on_meta = nn.ParameterDict({"large": nn.Parameter(torch.empty(2, 2**30))})
    assert CooMask.from_indices(on_meta, {"large": torch.tensor([3], dtype=torch.int32)})[
        "large"
    ].dtype == (torch.int64)


def test_parameters_come_in_model_order_with_their_indices(model: Tied, mask: CooMask) -> None:
    found = mask.parameters(model)
    assert [name for name, _, _ in found] == ["embedding.weight", "conv.weight"]
    assert found[0][1] is model.embedding.weight
    assert found[1][2] is mask["conv.weight"]


def test_equality_and_fingerprint_cover_names_shapes_and_indices(
    model: Tied, mask: CooMask
) -> None:
    entries = dict(mask.items())
    same = CooMask(dict(reversed(entries.items())), dict(reversed(mask.shapes.items())))
    assert same == mask
    assert hash(same) == hash(mask)
    others = [
        CooMask(entries, mask.shapes | {"fc.bias": (4,)}),
        CooMask(entries, mask.shapes | {"extra": (0,)}),
        CooMask(
            entries | {"conv.weight": torch.tensor([0, 7, 22], dtype=torch.int32)}, mask.shapes
        ),
        CooMask({"conv.weight": entries["conv.weight"]}, mask.shapes),
    ]
    assert len({mask.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert mask != "a mask"


def test_repr_is_short(mask: CooMask) -> None:
    assert repr(mask) == "CooMask(nnz=5 of 66, density=0.0758, parameters=2 of 5)"


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"fc.weihgt": torch.tensor([0])}, "no parameter 'fc.weihgt'; did you mean 'fc.weight'"),
        ({"fc.weight": torch.tensor([3, 1, 3])}, "index 3 of 'fc.weight' is given more than once"),
        (
            {"fc.weight": torch.tensor([12])},
            "index 12 of 'fc.weight' is out of range.* 12 elements",
        ),
        ({"fc.weight": torch.tensor([0, -1])}, "index -1 of 'fc.weight' is out of range"),
        ({"fc.weight": torch.tensor([0.0])}, "'fc.weight' are torch.float32"),
        ({"fc.weight": torch.zeros(3, 4, dtype=torch.bool)}, r"torch.bool.*nonzero\(\)"),
        ({"fc.weight": [0, 1]}, "'fc.weight' are list"),
        ({"fc.weight": torch.tensor([[0, 1]])}, r"shape \[1, 2\]; give one vector"),
        ({}, "selects no entry"),
        ({"fc.weight": torch.tensor([], dtype=torch.int64)}, "selects no entry"),
    ],
)
def test_from_indices_refuses_malformed_indices(
    model: Tied, indices: dict[str, Any], message: str
) -> None:
    with pytest.raises(MaskError, match=message):
        CooMask.from_indices(model, indices)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([1, 0], dtype=torch.int32), "not sorted and unique"),
        (torch.tensor([1, 1], dtype=torch.int32), "not sorted and unique"),
        (torch.tensor([0]), "torch.int64"),
        (torch.tensor([[0]], dtype=torch.int32), r"\[1, 1\]"),
        (torch.tensor([4], dtype=torch.int32), "out of range"),
        (torch.tensor([-1, 0], dtype=torch.int32), "index -1 .* out of range"),
    ],
)
def test_the_constructor_checks_its_invariants(index: Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        CooMask({"w": index}, {"w": (2, 2)})


def test_indices_without_a_shape_are_refused() -> None:
    with pytest.raises(MaskError, match="'w' has indices but is no candidate"):
        CooMask({"w": torch.tensor([0], dtype=torch.int32)}, {})


# Fitting a model ------------------------------------------------------------------------------


def test_loading_onto_a_model_that_does_not_fit_says_which_parameter_differs(
    mask: CooMask, tmp_path: Path
) -> None:
    mask.save(tmp_path / "mask.safetensors")
    loaded = CooMask.load(tmp_path / "mask.safetensors")
    loaded.check(Tied())

    other = Tied()
    other.fc = nn.Linear(4, 5)
    with pytest.raises(MaskError, match=r"'fc.weight' has shape \[5, 4\].* made for \[3, 4\]"):
        loaded.check(other)

    renamed = nn.ModuleDict({"module": Tied()})
    with pytest.raises(
        MaskError, match=r"no parameter 'embedding.weight'; did you mean 'module.emb"
    ):
        loaded.parameters(renamed)


def test_a_model_that_ties_two_candidates_does_not_fit() -> None:
    untied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    mask = CooMask.from_indices(untied, {"a.weight": torch.tensor([0])})
    untied["b"].weight = untied["a"].weight
    with pytest.raises(MaskError, match=r"'b.weight' and 'a.weight' are one tied parameter"):
        mask.check(untied)


def test_parameters_that_are_no_candidates_do_not_matter(model: Tied, mask: CooMask) -> None:
    model.register_parameter("added_later", nn.Parameter(torch.zeros(3)))
    mask.check(model)


# Files ----------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_mask(mask: CooMask, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = CooMask.load(str(path))
    assert loaded == mask
    assert loaded.shapes == mask.shapes
    assert list(loaded) == list(mask)
    for name, index in mask.items():
        assert torch.equal(loaded[name], index)
        assert loaded[name].dtype == index.dtype


def test_one_index_tensor_may_serve_two_parameters(tmp_path: Path) -> None:
    index = torch.tensor([0, 2], dtype=torch.int32)
    mask = CooMask({"a": index, "b": index}, {"a": (3,), "b": (3,)})
    mask.save(tmp_path / "mask.safetensors")
    assert CooMask.load(tmp_path / "mask.safetensors") == mask


def test_a_loaded_mask_does_not_depend_on_its_file(mask: CooMask, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    loaded = CooMask.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded["conv.weight"], mask["conv.weight"])


def test_a_failed_save_leaves_the_old_file(
    mask: CooMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    before = path.read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(FileWriteError, match="space"):
        mask.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def good_content() -> tuple[dict[str, Any], dict[str, str]]:
    shapes = {"a": [2, 3], "b": [4]}
    arrays = {"a": np.array([0, 5], np.int32), "b": np.array([1], np.int32)}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    metadata = {
        "format": "saft-mask",
        "version": "1",
        "shapes": json.dumps(shapes),
        "fingerprint": CooMask(tensors, shapes).fingerprint,
    }
    return arrays, metadata


def test_the_broken_files_below_are_broken_by_what_they_change(tmp_path: Path) -> None:
    arrays, metadata = good_content()
    safetensors.numpy.save_file(arrays, tmp_path / "good", metadata)
    assert CooMask.load(tmp_path / "good").nnz == 3


Change = Callable[[dict[str, Any], dict[str, str]], object]
INT32 = np.int32
BROKEN: list[tuple[str, Change]] = [
    ("format is None", lambda a, m: m.clear()),
    ("format is 'saft-delta'", lambda a, m: m.update(format="saft-delta")),
    ("format is 'x{100}', not", lambda a, m: m.update(format="x" * 5000)),
    ("version is 'x{100}', this", lambda a, m: m.update(version="x" * 5000)),
    ("not valid JSON", lambda a, m: m.update(shapes=f"[{'[],' * 2000}[]]")),
    ("version is '2'.*update", lambda a, m: m.update(version="2")),
    ("lack 'shapes'", lambda a, m: m.pop("shapes")),
    ("lack 'fingerprint'", lambda a, m: m.pop("fingerprint")),
    ("not match its fingerprint", lambda a, m: m.update(fingerprint="0" * 64)),
    ("not match its fingerprint", lambda a, m: a.update(b=np.array([2], INT32))),
    ("not match its fingerprint", lambda a, m: a.pop("b")),
    ("not valid JSON", lambda a, m: m.update(shapes="{")),
    ("not valid JSON", lambda a, m: m.update(shapes="[" * 100_000)),
    ("not valid JSON", lambda a, m: m.update(shapes='{"a": [' + "9" * 5000 + "]}")),
    ("not a JSON object", lambda a, m: m.update(shapes="[1, 2]")),
    ("not a JSON object", lambda a, m: m.update(shapes="null")),
    ("'a' is not a list", lambda a, m: m.update(shapes='{"a": 6}')),
    ("'a' is not a list", lambda a, m: m.update(shapes=f'{{"a": {[1] * 65}}}')),
    ("not a size", lambda a, m: m.update(shapes='{"a": [2, 3.0]}')),
    ("not a size", lambda a, m: m.update(shapes='{"a": [true]}')),
    ("not a size", lambda a, m: m.update(shapes='{"a": [NaN]}')),
    ("not a size", lambda a, m: m.update(shapes='{"a": [-2, -3]}')),
    ("not a size", lambda a, m: m.update(shapes=f'{{"a": [{MAX_ELEMENTS + 1}]}}')),
    ("has more than", lambda a, m: m.update(shapes=f'{{"a": [{MAX_ELEMENTS}, 2]}}')),
    ("torch.int64 is needed", lambda a, m: m.update(shapes=f'{{"a": [{2**31}], "b": [4]}}')),
    ("more than 1,000 characters", lambda a, m: m.update(shapes=f'{{"{"n" * 1001}": [4]}}')),
    ("more than 1,000 characters", lambda a, m: a.update({"n" * 1001: np.zeros(1, INT32)})),
    ("'c' has indices but is no", lambda a, m: a.update(c=np.array([0], INT32))),
    ("selects no entry", lambda a, m: a.clear()),
    ("selects no entry", lambda a, m: m.update(shapes='{"a": [0]}') or a.clear()),
    ("dtype F32", lambda a, m: a.update(a=np.array([0, 5], np.float32))),
    ("dtype U8", lambda a, m: a.update(a=np.array([0, 5], np.uint8))),
    ("torch.int64", lambda a, m: a.update(a=np.array([0, 5], np.int64))),
    (r"\[1, 2\]", lambda a, m: a.update(a=np.array([[0, 5]], INT32))),
    (r"\[\]", lambda a, m: a.update(a=np.array(0, INT32))),
    ("not sorted", lambda a, m: a.update(a=np.array([5, 0], INT32))),
    ("not sorted", lambda a, m: a.update(a=np.array([5, 5], INT32))),
    ("index 6 of 'a' is out of range", lambda a, m: a.update(a=np.array([0, 6], INT32))),
    ("index -1 of 'a' is out of range", lambda a, m: a.update(a=np.array([-1, 0], INT32))),
]


@pytest.mark.parametrize(("message", "change"), BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(
    message: str, change: Change, tmp_path: Path
) -> None:
    arrays, metadata = good_content()
    change(arrays, metadata)
    safetensors.numpy.save_file(arrays, tmp_path / "broken", metadata)
    with pytest.raises(DeltaFormatError, match=message) as caught:
        CooMask.load(tmp_path / "broken")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x04\0\0\0\0\0\0\0\xff\xfe\xfd\xfc",
        b"PK\x03\x04 a pickle in a zip",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DeltaFormatError, match=r"mask file .*broken"):
        CooMask.load(tmp_path / "broken")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DeltaFormatError, match="cannot be read"):
            CooMask.load(path)


EDITS = st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9))


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(EDITS, min_size=1, max_size=4), kept=st.just(1.0) | st.floats(0, 1))
def test_damaged_bytes_give_the_same_mask_or_a_format_error(
    edits: list[tuple[float, int, bytes]],
    kept: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    arrays, metadata = good_content()
    content = safetensors.numpy.save(arrays, metadata)
    for where, removed, inserted in edits:
        at = round(where * len(content))
        content = content[:at] + inserted + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: round(kept * len(content))])
    try:
        loaded = CooMask.load(path)
    except DeltaFormatError:
        return
    assert loaded.fingerprint == metadata["fingerprint"]
