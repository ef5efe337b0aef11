"""``saft delta``: what each command writes, prints as JSON, and says when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from clip_helpers import SMALL, small_checkpoint, write_folder
from saft_clip import overlap_picture
from saft_clip.cli import main
from saft_clip.models import load_model
from saft_kernels import SparseDelta, ops, select
from saft_kernels.delta import compose, save_weights
from saft_kernels.fingerprint import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


class Deltas:
    """A base, two deltas of it, and the commands on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.weights = small_checkpoint(folder / "base.safetensors")
        self.about = {"model": SMALL, "pretrained": str(self.weights)}
        self.base = self._model().state_dict()
        self.tuned = [self._tune(seed) for seed in (1, 2)]
        self.files = [folder / f"{name}.safetensors" for name in ("birds", "cars")]
        for file, (delta, _) in zip(self.files, self.tuned, strict=True):
            delta.save(file)

    def _model(self) -> torch.nn.Module:
        return load_model(SMALL, str(self.weights)).model

    def _tune(self, seed: int) -> tuple[SparseDelta, dict[str, Tensor]]:
        model = self._model()
        mask = select(model, density=0.02, score="random", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, index in mask.items():
                values = torch.randn(index.numel(), generator=generator)
                ops.scatter_(model.get_parameter(name), index, values)
        about = {**self.about, "seed": str(seed)}
        return SparseDelta.capture(model, mask, self.base, about), model.state_dict()

    def __call__(self, command: str, *arguments: object, code: int = 0) -> str:
        """Run a command; what it printed on stdout, or said if it fails."""
        self._capsys.readouterr()
        assert main(["delta", command, *map(str, arguments)]) == code
        shown = self._capsys.readouterr()
        return shown.out if code == 0 else shown.err

    def json(self, command: str, *arguments: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(command, *arguments, "--json"))
        return found

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture
def saft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Deltas:
    return Deltas(tmp_path, capsys)


def assert_weights(file: Path, wanted: dict[str, Tensor]) -> None:
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert same_bits(found[name], tensor).all(), name


def test_info(saft: Deltas) -> None:
    file, (delta, _) = saft.files[0], saft.tuned[0]
    total = sum(tensor.numel() for tensor in saft.base.values())
    shown = saft("info", file)
    assert f"{delta.nnz:,} of the model's {total:,} parameters" in shown
    assert f"{file.stat().st_size:,} bytes" in shown
    facts = saft.json("info", file)
    assert (facts["entries"], facts["parameters"], facts["with_originals"]) == (
        delta.nnz,
        total,
        False,
    )
    assert facts["metadata"] == {**saft.about, "seed": "1"}
    assert sum(tensor["entries"] for tensor in facts["tensors"]) == delta.nnz
    assert {tensor["name"] for tensor in facts["tensors"]} == saft.base.keys()
    assert facts["bytes_per_entry"] == pytest.approx(file.stat().st_size / delta.nnz)


def test_verify(saft: Deltas) -> None:
    assert saft.json("verify", saft.files[0])["fits_base"] is True
    other = small_checkpoint(saft / "other.safetensors", seed=3)
    said = saft("verify", saft.files[0], "--base", other, code=1)
    assert "the model is not the base that the delta was made from" in said
    delta, _ = saft.tuned[0]
    delta.metadata.clear()
    delta.save(saft / "anonymous.safetensors")
    assert saft.json("verify", saft / "anonymous.safetensors")["fits_base"] is None
    fits = saft.json("verify", saft / "anonymous.safetensors", "--base", saft.weights)
    assert fits["fits_base"] is True
    content = bytearray(saft.files[0].read_bytes())
    content[-1] ^= 1
    saft.files[0].write_bytes(content)
    assert "does not match its checksum" in saft("verify", saft.files[0], code=1)


def test_apply_and_revert(saft: Deltas) -> None:
    delta, tuned = saft.tuned[0]
    delta.save(saft / "reversible.safetensors", originals=True)
    facts = saft.json("apply", saft.files[0], "--output", saft / "tuned.safetensors")
    assert facts["entries"] == delta.nnz
    assert_weights(saft / "tuned.safetensors", tuned)
    saft(
        "revert", saft / "reversible.safetensors", "--tuned", saft / "tuned.safetensors",
        "--output", saft / "back.safetensors",
    )  # fmt: skip
    assert_weights(saft / "back.safetensors", saft.base)
    said = saft(
        "revert", saft.files[0], "--tuned", saft / "tuned.safetensors", "--output",
        saft / "x.safetensors", code=1,
    )  # fmt: skip
    assert "holds no original values" in said
    said = saft(
        "revert", saft / "reversible.safetensors", "--tuned", saft.weights, "--output",
        saft / "x.safetensors", code=1,
    )  # fmt: skip
    assert "is not applied to this model" in said
    assert not (saft / "x.safetensors").exists()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_apply_and_scale_interpolate(saft: Deltas, alpha: float) -> None:
    _, tuned = saft.tuned[0]
    saft("apply", saft.files[0], "--alpha", alpha, "--output", saft / "direct.safetensors")
    saft("scale", saft.files[0], "--alpha", alpha, "--output", saft / "scaled.safetensors")
    saft("apply", saft / "scaled.safetensors", "--output", saft / "scaled-weights.safetensors")
    wanted = {
        name: ((1 - alpha) * base.double() + alpha * tuned[name].double()).to(base.dtype)
        for name, base in saft.base.items()
    }
    if alpha in (0.0, 1.0):
        wanted = tuned if alpha else saft.base
    for file in ("direct.safetensors", "scaled-weights.safetensors"):
        assert_weights(saft / file, wanted)


def test_weights_of_a_file_that_no_model_is_known_for(saft: Deltas) -> None:
    base = {"a": torch.randn(30), "b": torch.randn(4, 5)}
    tuned = {"a": base["a"].clone(), "b": base["b"] + 1}
    save_weights(saft / "b.safetensors", base)
    torch.save({"state_dict": tuned}, saft / "t.pt")
    facts = saft.json(
        "extract", saft / "t.pt", "--base", saft / "b.safetensors", "--output",
        saft / "d.safetensors", "--license", "mit", "--notes", "mine", "--with-originals",
    )  # fmt: skip
    assert (facts["entries"], facts["different"], facts["error"]) == (20, 20, 0)
    found = saft.json("info", saft / "d.safetensors")
    assert found["metadata"] == {"license": "mit", "notes": "mine"}
    assert found["with_originals"] is True
    saft(
        "apply", saft / "d.safetensors", "--base", saft / "b.safetensors", "--output",
        saft / "again.safetensors",
    )  # fmt: skip
    assert_weights(saft / "again.safetensors", tuned)
    said = saft("apply", saft / "d.safetensors", "--output", saft / "x.safetensors", code=1)
    assert "does not say which model it was made from; give --base" in said


def test_extract_of_a_model_of_open_clips(saft: Deltas) -> None:
    delta, tuned = saft.tuned[0]
    save_weights(saft / "tuned.safetensors", tuned)
    arguments = (saft / "tuned.safetensors", "--model", SMALL, "--base", saft.weights)
    facts = saft.json("extract", *arguments, "--output", saft / "d.safetensors")
    assert facts["entries"] == delta.nnz
    assert saft.json("diff", saft / "d.safetensors", saft.files[0])["same"] == delta.nnz
    saft("verify", saft / "d.safetensors")  # it says which model, and where its weights are
    saft("extract", *arguments, "--density", "0.001", "--output", saft / "few.safetensors")
    few = saft.json("info", saft / "few.safetensors")
    assert few["entries"] == sum(t.numel() for t in saft.base.values()) // 1000
    facts = saft.json(
        "extract", *arguments, "--exclude", "visual.*", "--output", saft / "text.safetensors"
    )
    assert facts["left_out"]
    assert all(name.startswith("visual.") for name in facts["left_out"])
    said = saft("extract", saft / "tuned.safetensors", "--output", saft / "x", code=1)
    assert "give --base" in said


def test_diff(saft: Deltas) -> None:
    facts = saft.json("diff", *saft.files)
    (first, _), (second, _) = saft.tuned
    assert facts["only_first"] + facts["same"] + facts["different"] == first.nnz
    assert facts["only_second"] + facts["same"] + facts["different"] == second.nnz
    assert facts["distance"] is None
    assert facts["metadata"] == {"seed": ["1", "2"]}
    known = saft.json("diff", *saft.files, "--base", saft.weights)
    squares = [
        (saft.tuned[0][1][name] - saft.tuned[1][1][name]).double().square().sum()
        for name in saft.base
    ]
    assert known["distance"] == pytest.approx(float(sum(squares)) ** 0.5)
    shown = saft("diff", *saft.files)
    assert "What is written about them" in shown


@pytest.mark.parametrize("rule", ["sum", "mean", "ties", "dare"])
def test_compose(saft: Deltas, rule: str) -> None:
    options = ["--rule", rule, "--weight", "1", "--weight", "0.5", "--drop", "0.5", "--seed", "3"]
    facts = saft.json("compose", *saft.files, *options, "--output", saft / "both.safetensors")
    loaded = [SparseDelta.load(file) for file in saft.files]
    for delta in loaded:
        delta.learn_originals(saft.base)
    wanted = compose(loaded, rule, weights=[1, 0.5], drop=0.5, seed=3)
    wanted.save(saft / "wanted.safetensors")
    assert (saft / "both.safetensors").read_bytes() == (saft / "wanted.safetensors").read_bytes()
    assert facts["entries"] == wanted.nnz
    assert facts["overlap"]["nnz"] == [delta.nnz for delta in loaded]
    assert "Entries that they share" in saft(
        "compose", *saft.files, *options, "--output", saft / "both.safetensors"
    )


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture_of_an_overlap(saft: Deltas, suffix: str) -> None:
    picture = saft / f"overlap.{suffix}"
    arguments = (*saft.files, "--output", saft / "both.safetensors", "--picture", picture)
    saft("compose", *arguments)
    content = picture.read_bytes()
    if suffix == "png":
        with Image.open(picture) as image:
            assert image.width > 1000
    elif suffix == "svg":
        text = content.decode()
        assert "birds" in text
        assert "cars" in text
        assert "one direction" in text
    saft("compose", *arguments)
    assert picture.read_bytes() == content


def test_picture_of_deltas_that_share_nothing(saft: Deltas, tmp_path: Path) -> None:
    base = {"a": torch.zeros(4)}
    for i in range(2):
        tuned = {"a": torch.eye(4)[i]}
        save_weights(saft / "t.safetensors", tuned)
        save_weights(saft / "b.safetensors", base)
        saft(
            "extract", saft / "t.safetensors", "--base", saft / "b.safetensors", "--output",
            saft / f"{i}.safetensors", "--with-originals",
        )  # fmt: skip
    picture = saft / "none.svg"
    saft(
        "compose", saft / "0.safetensors", saft / "1.safetensors", "--output",
        saft / "both.safetensors", "--picture", picture,
    )  # fmt: skip
    assert "No entry is changed by two deltas" in picture.read_text()
    assert overlap_picture.KINDS == (".png", ".svg", ".pdf")


def test_exports(saft: Deltas) -> None:
    _, tuned = saft.tuned[0]
    saft("export", saft.files[0], "--format", "open_clip", "--output", saft / "oc.safetensors")
    assert_weights(saft / "oc.safetensors", tuned)
    saft("export", saft.files[0], "--format", "transformers", "--output", saft / "hf")
    assert {path.name for path in (saft / "hf").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    saft("export", saft.files[0], "--format", "vllm", "--output", saft / "patch.safetensors")
    assert len(load_file(saft / "patch.safetensors")) % 2 == 0
    said = saft("export", saft.files[0], "--format", "shira", "--output", saft / "a", code=1)
    assert "entries are elsewhere" in said
    facts = saft.json(
        "export", saft.files[0], "--format", "shira", "--output", saft / "a", "--partial"
    )
    assert 0 < facts["left_out"] < facts["entries"]


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("info", ["missing.safetensors"], "cannot be read"),
        ("verify", ["base.safetensors"], "is no delta"),
        ("apply", ["birds.safetensors", "--output", "x.pt"], "must end in .safetensors"),
        ("apply", ["birds.safetensors", "--output", "no/x.safetensors"], "there is no folder no"),
        ("scale", ["birds.safetensors", "--alpha", "nan", "--output", "x"], "finite number"),
        ("compose", ["birds.safetensors", "--output", "x", "--rule", "foo"], "no rule 'foo'"),
        ("compose", ["birds.safetensors", "--output", "x", "--picture", "p.txt"], "is no picture"),
        ("export", ["birds.safetensors", "--format", "onnx", "--output", "x"], "--format must be"),
        (
            "extract",
            ["base.safetensors", "--base", "birds.safetensors", "--output", "x"],
            "no tensor",
        ),
        ("diff", ["birds.safetensors", "base.safetensors"], "is no delta"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    saft: Deltas,
    command: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(saft.folder)
    before = {path.name for path in saft.folder.iterdir()}
    message = saft(command, *arguments, code=1)
    assert re.fullmatch(r"saft: [^\n]+\n", message)
    assert said in message
    assert {path.name for path in saft.folder.iterdir()} == before


def test_what_finetune_writes_about_a_delta(
    saft: Deltas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pets = write_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
    run = tmp_path / "run"
    assert main([
        "finetune", "--model", SMALL, "--pretrained", str(saft.weights), "--train-data", str(pets),
        "--epochs", "1", "--shots", "2", "--output", str(run), "--license", "mit",
        "--notes", "pets",
    ]) == 0  # fmt: skip
    about = saft.json("info", run / "delta.safetensors")["metadata"]
    assert (about["score"], about["license"], about["notes"]) == ("mean_grad", "mit", "pets")
    training = json.loads(about["training"])
    assert (training["lr"], training["epochs"], training["shots"]) == (5e-6, 1, 2)
    assert "output" not in training
    saft("verify", run / "delta.safetensors")
