"""The crash harness (tests/crashes): a few kills here, and what came out of its last long run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_helpers import SMALL, cut_short, left_by_a_kill, small_checkpoint, write_folder
from crashes.outcome import Undisturbed, WrongError, difference
from crashes.watch import PHASES
from saft_clip import checkpoint, train
from saft_clip.checkpoint import load_checkpoint
from saft_clip.config import FinetuneConfig

RESULT = Path(__file__).parent / "crashes" / "result.json"


def test_runs_that_are_killed_come_out_the_same():
    """In a process of its own, which is small and quick to copy."""
    options = ["--kills", "8", "--refusals", "4", "--seed", "3", "--settings", "sampled"]
    done = subprocess.run(
        [sys.executable, "-m", "crashes", *options],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills" in done.stdout
    assert "every run came out the same" in done.stdout


def test_the_last_long_run_killed_in_every_phase():
    result = json.loads(RESULT.read_text())
    assert sum(result["phases"].values()) == result["kills"] >= 200
    assert min(result["phases"][phase] for phase in PHASES) >= 10
    assert len(result["settings"]) == 4


# What the harness would notice


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashes")
    config = FinetuneConfig(
        train_data=str(write_folder(folder / "pets", {"cat": 2, "dog": 2})),
        model=SMALL,
        pretrained=str(small_checkpoint(folder / "small.safetensors")),
        shots=2,
        epochs=2,
        batch_size=2,
        density=0.01,
        precision="fp32",
        output=str(folder / "run"),
    )
    kept = folder / "kept"
    kept.mkdir()

    def save(*arguments):
        return Path(shutil.copy(checkpoint.save_checkpoint(*arguments), kept))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save)
        train.finetune(config)
    return Undisturbed(folder / "run", kept)


@pytest.fixture
def run(undisturbed, tmp_path):
    """A copy of that run, from before its checkpoints were removed."""
    folder = shutil.copytree(undisturbed.folder, tmp_path / "run")
    shutil.copytree(undisturbed.folder.parent / "kept", folder / "checkpoints")
    return folder


def test_a_run_without_fault_passes(undisturbed, run):
    assert undisturbed.check(run) == 0
    left_by_a_kill(run / "delta.safetensors")
    left_by_a_kill(run / "checkpoints" / "step-00000002.safetensors")
    (run / ".saft-lock").write_text("process 1 on nowhere\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert undisturbed.check(run) == 2
    with pytest.raises(WrongError, match="holds"):
        undisturbed.compare(run)
    shutil.copytree(undisturbed.folder, again := run.with_name("again"))
    undisturbed.compare(again)


def twice(path):
    """A line of the record that is there twice."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[2], *lines[3:]]))


FAULTS = {
    "config.yaml": lambda path: path.write_text(path.read_text().replace("seed: 1", "seed: 2")),
    "inputs.json": cut_short,
    "mask.safetensors": cut_short,
    "metrics.jsonl": twice,
    "delta.safetensors": cut_short,
    "results.json": lambda path: path.write_text(
        path.read_text().replace('"trained": ', '"trained": 1')
    ),
    "report.html": cut_short,
    "checkpoints/step-00000002.safetensors": cut_short,
    "checkpoints/step-00000003.safetensors": Path.touch,
    ".tmpAb3dE6": Path.touch,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_any_file_is_noticed(undisturbed, run, name):
    FAULTS[name](run / name)
    with pytest.raises((WrongError, ValueError)):
        undisturbed.check(run)


def test_a_checkpoint_with_another_bit_is_noticed(undisturbed, run):
    path = run / "checkpoints" / "step-00000002.safetensors"
    state = load_checkpoint(path)
    state["method"]["values"]["visual.proj"][0] *= 1.0000001
    checkpoint.save_checkpoint(path.parent, 2, state)
    with pytest.raises(WrongError, match=r"differs .* in it\['method'\]\['values'\]"):
        undisturbed.check(run)
    assert difference(state, load_checkpoint(path)) is None
