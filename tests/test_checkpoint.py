"""Checkpoint files: what goes in comes out, bit for bit, and a damaged file is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_helpers import cut_short, left_by_a_kill
from saft_clip.checkpoint import (
    find_checkpoints,
    load_checkpoint,
    load_latest,
    random_states,
    save_checkpoint,
    set_random_states,
)
from saft_clip.errors import CheckpointError
from saft_kernels.errors import FileWriteError

CPU = torch.device("cpu")


def state():
    flat = torch.arange(10.0)
    return {
        "step": 3,
        "nothing": None,
        "values": {"a": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), "b": flat[2:4]},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "indices": flat[:2].int()}},
            "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0], "x": None}],
        },
        "empty": [[], (), {}, torch.empty(0)],
    }  # fmt: skip


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, 3, state())
    assert equal(load_checkpoint(path), state())


def test_the_last_two_are_kept(tmp_path):
    left_by_a_kill(tmp_path / "step-00000001.safetensors")
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, step, {"step": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000009.safetensors", "step-00000010.safetensors"]
    assert load_latest(tmp_path) == {"step": 10}


def test_no_checkpoint(tmp_path):
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_short(tmp_path, share):
    save_checkpoint(tmp_path, 1, state())
    cut_short(save_checkpoint(tmp_path, 2, state()), share)
    with pytest.raises(
        CheckpointError,
        match=r"step-00000002.* broken or cut short.*; delete it to continue from .*step-00000001",
    ):
        load_latest(tmp_path)


def test_the_only_one_is_broken(tmp_path):
    cut_short(save_checkpoint(tmp_path, 1, state()))
    with pytest.raises(CheckpointError, match="there is no earlier one, so start again"):
        load_latest(tmp_path)


@pytest.mark.parametrize("place", [-1, -20, 100])
def test_every_flipped_bit_is_found(tmp_path, place):
    """In the tensors or in the structure: neither is covered by safetensors' own checks."""
    path = save_checkpoint(tmp_path, 1, state())
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_another_safetensors_file(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "step-00000001.safetensors")
    with pytest.raises(CheckpointError, match="was not written by this release"):
        load_latest(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "no")


def test_failure_leaves_the_older_one(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, 1, state())

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saft_clip.checkpoint.save_file", full_disk)
    with pytest.raises(FileWriteError, match="No space left"):
        save_checkpoint(tmp_path, 2, state())
    assert find_checkpoints(tmp_path) == [first]
    assert equal(load_latest(tmp_path), state())


def test_a_checkpoint_cannot_hold_objects(tmp_path):
    with pytest.raises(TypeError, match="cannot hold"):
        save_checkpoint(tmp_path, 1, {"model": torch.nn.Linear(1, 1)})


def test_random_states(tmp_path):
    def draw():
        return random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist()

    np.random.randn(1)  # leaves a second Gaussian in store, which is part of the state
    saved = load_checkpoint(save_checkpoint(tmp_path, 1, random_states(CPU)))
    expected = draw()
    assert draw() != expected
    set_random_states(saved, CPU)
    assert draw() == expected
