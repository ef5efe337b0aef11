"""Whatever is wrong with the input: one clear sentence, exit code 1, and nothing is lost."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_helpers import (
    SMALL,
    SMALL_RESNET,
    cut_short,
    small_checkpoint,
    write_folder,
    write_image,
    write_split_file,
)
from saft_clip import train
from saft_clip.cli import main
from saft_kernels.delta import SparseDelta
from saft_kernels.mask import CooMask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors"))


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", {"cat": 4, "dog": 4})


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; returns its one sentence."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        last = shown.rstrip("\n").splitlines()[-1]
        assert last.startswith("saft: ")
        return last

    return run


@pytest.fixture
def small(checkpoint):
    return ["--model", SMALL, "--pretrained", checkpoint]


@pytest.fixture
def quick(small, pets, tmp_path):
    """Options of a run of a few steps."""
    return [
        *small,
        *("--train-data", pets, "--shots", 2, "--epochs", 2, "--batch-size", 2),
        *("--density", 0.1, "--precision", "fp32", "--output", tmp_path / "run"),
    ]


@pytest.fixture
def interrupted(quick, tmp_path, monkeypatch, capsys):
    """The folder of a run that was interrupted after its last step."""

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "finish", interrupt)
        assert main(["finetune", *map(str, quick)]) == 130
    assert "--resume" in capsys.readouterr().err
    return tmp_path / "run"


def content(folder):
    """Every file below a folder and what it holds."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Data


def test_missing_folder(fails, small, tmp_path):
    where = tmp_path / "nowhere"
    assert f"there is no folder {where}" in fails("evaluate", *small, "--data", where)
    assert f"there is no folder {where}" in fails("select", *small, "--train-data", where)
    assert f"there is no folder {where}" in fails("finetune", *small, "--train-data", where)


def test_empty_folder(fails, small, tmp_path):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    for where in (tmp_path / "empty", tmp_path / "empty" / "class"):
        said = fails("evaluate", *small, "--data", where)
        assert str(where) in said
        assert "no image" in said or "no class folders" in said
        assert said.endswith(fails("finetune", *small, "--train-data", where))


def test_output_is_not_touched_when_the_data_are_wrong(fails, small, tmp_path):
    fails("finetune", *small, "--train-data", tmp_path / "no", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_class_with_too_few_images(fails, small, pets):
    options = [*small, "--train-data", pets, "--shots", 5]
    for command in ("finetune", "select"):
        said = fails(command, *options)
        assert "class 'cat' of pets has 4 readable image(s), fewer than --shots 5" in said


def test_unreadable_images_of_an_evaluation(small, pets, tmp_path, capsys):
    cut_short(pets / "cat" / "001.png")
    (pets / "dog" / "000.png").write_bytes(b"")
    file = tmp_path / "out.json"
    assert main(["evaluate", *small, "--data", str(pets), "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "2 unreadable image(s) of pets skipped" in shown.err
    assert str(pets / "cat" / "001.png") in shown.err
    assert " 6 " in shown.out
    result = json.loads(file.read_text())["results"][0]
    assert result["n"] == 6
    assert [line.split(": ")[0] for line in result["skipped"]] == [
        str(pets / "cat" / "001.png"),
        str(pets / "dog" / "000.png"),
    ]


@pytest.mark.parametrize("shots", [0, 3])
def test_unreadable_images_of_a_training_set(quick, pets, capsys, shots):
    for name in ("000", "001", "002"):
        if shots:
            write_image(pets / "dog" / f"more{name}.png")
        cut_short(pets / "dog" / f"{name}.png")
    assert main(["finetune", *map(str, quick), "--shots", str(shots)]) == 0
    said = capsys.readouterr().err
    assert "unreadable image(s) of pets skipped" in said
    assert str(pets / "dog" / "00") in said


def test_listed_images_that_are_missing(small, tmp_path, capsys):
    rows = [(f"{label}/{i}.png", label, f"c{label}") for label in (0, 1) for i in range(3)]
    for path, _, _ in rows:
        write_image(tmp_path / "images" / path)
    file = write_split_file(tmp_path / "split.json", {"train": rows, "test": rows})
    (tmp_path / "images" / "1" / "2.png").unlink()
    options = [*small, "--train-data", str(file), "--shots", "2", "--epochs", "1"]
    assert main(["finetune", *options, "--output", str(tmp_path / "run")]) == 0
    assert "1/2.png: No such file or directory" in capsys.readouterr().err


# Models, masks and deltas


def test_unknown_model_name(fails, pets, tmp_path):
    for command, data in (("evaluate", "--data"), ("finetune", "--train-data")):
        said = fails(command, "--model", "ViT-B16", data, pets)
        assert "no model 'ViT-B16' in open_clip; did you mean ViT-B-16" in said


def test_weights_of_another_architecture(fails, pets, tmp_path):
    other = small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET)
    said = fails("evaluate", "--model", SMALL, "--pretrained", other, "--data", pets)
    assert f"the checkpoint {other} does not fit {SMALL}" in said


def save_delta(path, checkpoint, name=SMALL):
    from saft_clip.models import load_model

    model = load_model(name, str(checkpoint)).model
    mask = CooMask.from_indices(model, {"visual.conv1.weight": torch.arange(9)})
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.visual.conv1.weight.view(-1)[:9] += 1
    SparseDelta.capture(model, mask, base=base).save(path)
    return path


def test_delta_of_another_architecture(fails, small, pets, tmp_path):
    weights = small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET)
    delta = save_delta(tmp_path / "delta.safetensors", weights, SMALL_RESNET)
    assert "visual.conv1.weight" in fails("evaluate", *small, "--data", pets, "--delta", delta)


def test_delta_of_other_weights(fails, small, pets, tmp_path):
    weights = small_checkpoint(tmp_path / "other.safetensors", seed=9)
    delta = save_delta(tmp_path / "delta.safetensors", weights)
    said = fails("evaluate", *small, "--data", pets, "--delta", delta)
    assert "base" in said


def test_mask_of_another_model(fails, interrupted, quick, tmp_path):
    weights = small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET)
    other = ["--model", SMALL_RESNET, "--pretrained", weights, "--train-data", tmp_path / "pets"]
    mask = interrupted / "mask.safetensors"
    assert main(["select", *map(str, other), "--shots", "2", "--output", str(mask)]) == 0
    before = content(interrupted)
    assert "mask" in fails("finetune", *quick, "--resume")
    assert content(interrupted) == before


def test_given_mask_of_another_model(fails, quick, tmp_path):
    weights = small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET)
    other = ["--model", SMALL_RESNET, "--pretrained", weights, "--train-data", tmp_path / "pets"]
    mask = tmp_path / "mask.safetensors"
    assert main(["select", *map(str, other), "--shots", "2", "--output", str(mask)]) == 0
    assert "mask" in fails("finetune", *quick, "--mask", mask)
    assert not (tmp_path / "run").exists()


def test_what_a_delta_says_of_itself_cannot_steer_the_terminal(tmp_path, checkpoint, capsys):
    file = save_delta(tmp_path / "delta.safetensors", checkpoint)
    delta = SparseDelta.load(file)
    delta.created_by = "\x1b[2J" + "x" * 5000
    delta.metadata = {"file": "\x1b]0;gotcha\a", "a\x1bb": "\ud800"}
    delta.metadata |= {str(i): "" for i in range(3000)}
    delta.save(file)
    capsys.readouterr()
    assert main(["delta", "info", str(file)]) == 0
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert f"{file.stat().st_size:,} bytes" in shown
    assert "and 2,902 more" in shown
    assert len(shown) < 30_000


@pytest.mark.parametrize("key", ["model", "pretrained"])
@pytest.mark.parametrize("value", ["x" * 5000, "a\0b", "../" * 2000, "\x1b[2J"])
def test_a_delta_of_a_model_that_cannot_be(fails, pets, tmp_path, checkpoint, key, value):
    file = save_delta(tmp_path / "delta.safetensors", checkpoint)
    delta = SparseDelta.load(file)
    delta.metadata = {"model": SMALL, "pretrained": str(checkpoint), key: value}
    delta.save(file)
    said = fails("evaluate", "--data", pets, "--delta", file)
    assert "there is no model" in said or "has no pretrained tag" in said
    assert said.isprintable()
    assert len(said) < 1000


# Settings


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", "nan", "inf", "1e-12"])
def test_density_outside_its_range(fails, small, pets, tmp_path, density):
    for command in ("finetune", "select"):
        output = tmp_path / command
        options = ["--train-data", pets, "--shots", 2, f"--density={density}", "--output", output]
        assert "density" in fails(command, *small, *options)


def test_unknown_backend():
    done = subprocess.run(
        [sys.executable, "-m", "saft_clip", "evaluate", "--model", "saft-tiny", "--data", "x"],
        env=os.environ | {"SAFT_BACKEND": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("saft: there is no backend 'nonsense'")
    assert len(done.stderr.splitlines()) == 1


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(fails, quick, pets, tmp_path, checkpoint, value):
    state = load_file(checkpoint)
    state["visual.conv1.weight"][0, 0, 0, 0] = value
    broken = tmp_path / "broken.safetensors"
    save_file(state, broken)
    model = ["--model", SMALL, "--pretrained", broken]
    said = fails("select", *model, "--train-data", pets, "--shots", 2)
    assert "nan" in said.lower() or "inf" in said.lower()
    fails("finetune", *quick, *model)
    said = fails("finetune", *quick, *model, "--method", "full", "--output", tmp_path / "full")
    assert "nan" in said.lower() or "inf" in said.lower()
    assert not (tmp_path / "full" / "model.safetensors").exists()


# Files


@contextmanager
def full_disk(limit=30_000):
    """No file may grow beyond this, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_old_mask(fails, small, pets, tmp_path):
    file = tmp_path / "mask.safetensors"
    file.write_text("old")
    before = content(tmp_path)
    options = [*small, "--train-data", pets, "--shots", 2, "--density", 0.5, "--output", file]
    with full_disk():
        said = fails("select", *options)
    assert f"{file} could not be written (File too large)" in said
    assert content(tmp_path) == before


def test_full_disk_keeps_the_old_results(fails, small, pets, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("old")
    with full_disk(100):
        said = fails("evaluate", *small, "--data", pets, "--json", file)
    assert f"{file} could not be written (File too large)" in said
    assert file.read_text() == "old"


def test_full_disk_during_a_run(fails, quick, tmp_path):
    with full_disk():
        said = fails("finetune", *quick)
    assert "could not be written (File too large)" in said
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert main(["finetune", *map(str, quick), "--resume"]) == 0


@contextmanager
def read_only(folder, monkeypatch):
    """Nothing can be created below a folder, not even by root."""

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def below(path):
        return folder == Path(path) or folder in Path(path).parents

    def guard(function, writes):
        def guarded(path, *arguments, **options):
            if isinstance(path, str | Path) and below(path) and writes(*arguments):
                refuse(path)
            return function(path, *arguments, **options)

        return guarded

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", guard(os.open, lambda flags, *_: flags & os.O_CREAT))
        patch.setattr(os, "mkdir", guard(os.mkdir, lambda *_: True))
        patch.setattr(os, "access", guard(os.access, lambda mode, *_: mode & os.W_OK))
        yield


@pytest.mark.parametrize("exists", [False, True])
def test_read_only_output_folder(fails, small, pets, quick, tmp_path, monkeypatch, exists):
    folder = tmp_path / "locked"
    if exists:
        folder.mkdir()
    with read_only(folder, monkeypatch):
        said = fails("finetune", *quick, "--output", folder)
        assert str(folder) in said
        assert "Read-only file system" in said
        options = [*small, "--train-data", pets, "--shots", 2, "--output", folder / "m"]
        assert str(folder) in fails("select", *options)
        assert str(folder) in fails("evaluate", *small, "--data", pets, "--json", folder / "x")
    assert not exists or not any(folder.iterdir())


def test_output_folder_that_is_a_file(fails, quick, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in fails("finetune", *quick, "--output", tmp_path / "file")
    assert str(tmp_path / "file") in fails("finetune", *quick, "--output", tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_not_overwritten(fails, interrupted, quick):
    before = content(interrupted)
    assert "--resume" in fails("finetune", *quick)
    assert content(interrupted) == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.999])
def test_model_checkpoint_cut_short(fails, pets, tmp_path, share):
    file = cut_short(small_checkpoint(tmp_path / "cut.safetensors"), share)
    said = fails("evaluate", "--model", SMALL, "--pretrained", file, "--data", pets)
    assert f"the checkpoint {file} cannot be read: it is broken, cut short" in said


@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.999])
def test_run_checkpoint_cut_short(fails, interrupted, quick, share):
    newest = max((interrupted / "checkpoints").iterdir())
    cut_short(newest, share)
    before = content(interrupted)
    said = fails("finetune", *quick, "--resume")
    assert str(newest) in said
    assert content(interrupted) == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.999])
def test_mask_and_delta_cut_short(
    fails, interrupted, quick, small, pets, tmp_path, checkpoint, share
):
    delta = cut_short(save_delta(tmp_path / "delta.safetensors", checkpoint), share)
    assert str(delta) in fails("evaluate", *small, "--data", pets, "--delta", delta)
    assert str(delta) in fails("delta", "info", delta)
    mask = cut_short(interrupted / "mask.safetensors", share)
    assert str(mask) in fails("finetune", *quick, "--resume")


def test_missing_files(fails, small, quick, pets, tmp_path):
    missing = tmp_path / "none.safetensors"
    assert str(missing) in fails("delta", "info", missing)
    assert str(missing) in fails("evaluate", *small, "--data", pets, "--delta", missing)
    assert str(missing) in fails("finetune", "--config", missing)
    assert str(missing) in fails(
        "finetune", "--model", SMALL, "--pretrained", missing, "--train-data", pets
    )
    assert str(missing) in fails("finetune", *quick, "--mask", missing)
    assert str(missing) in fails("report", missing)
