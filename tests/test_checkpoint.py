"""Checkpoint files: what goes in comes out, bit for bit, and a damaged file is refused."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_helpers import cut_short, left_by_a_kill
from saft_clip.checkpoint import (
    _checksum,
    find_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.methods.full import Full
from saft_clip.methods.saft import Saft
from saft_clip.models import ClipModel
from saft_clip.prompts import ClassPrompts
from saft_clip.random_states import check_random_states, random_states, set_random_states
from saft_clip.run_state import RunState
from saft_kernels.errors import FileWriteError
from saft_kernels.mask import CooMask

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


def forge(path, structure, tensors=None):
    """Write a checkpoint whose checksum is right, whatever it holds."""
    tensors = {"0": torch.ones(2)} if tensors is None else tensors
    text = structure if isinstance(structure, str) else json.dumps(structure)
    metadata = {"format": "saft-checkpoint", "version": "1", "structure": text}
    save_file(tensors, path, {**metadata, "checksum": _checksum(text, tensors)})
    return path


def test_the_forging_helper_itself_writes_files_that_load(tmp_path):
    path = forge(tmp_path / "c", ["list", [1, ["tensor", "0"]]])
    assert equal(load_checkpoint(path), [1, torch.ones(2)])


@pytest.mark.parametrize(
    "structure",
    [
        *("", "{", "[" * 100_000, '{"a": 1}', ["tensor"], ["tensor", "1"], ["tensor", ["0"]]),
        *(["list", [["tensor", "0"], ["tensor", "0"]]], ["set", [1]], [["list"], []], ["list", 1]),
        *(["dict", [1]], ["dict", [[1]]], ["dict", [[["list", []], 1]]], ["dict", {"a": 1}], 3),
    ],
)
def test_a_malformed_structure_is_refused(tmp_path, structure):
    path = forge(tmp_path / "c", structure)
    with pytest.raises(CheckpointError, match=f"{path} is broken: .*structure|belongs nowhere"):
        load_checkpoint(path)


def test_a_file_of_another_kind_is_not_read_whole(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "model")
    monkeypatch.setattr("saft_clip.checkpoint._checksum", pytest.fail)
    with pytest.raises(CheckpointError, match="was not written by this release"):
        load_checkpoint(tmp_path / "model")


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
    check_random_states(saved, CPU)
    expected = draw()
    assert draw() != expected
    set_random_states(saved, CPU)
    assert draw() == expected


@pytest.mark.parametrize("draws", [0, 1, 3, 623, 624, 625, 2000])
def test_states_after_any_number_of_draws_are_sound(draws):
    torch.manual_seed(3)
    torch.rand(draws), np.random.rand(draws), [random.random() for _ in range(draws)]
    check_random_states(random_states(CPU), CPU)


def changed_words(states, position, words):
    """The state of torch's generator with other 32-bit words."""
    content = states["torch"].numpy().copy()
    content.view(np.int32)[position : position + len(words)] = words
    return {"torch": torch.from_numpy(content)}


UNSOUND = {
    # From there numpy and torch would read what lies behind their states.
    "numpy, far beyond": lambda s: {"numpy": (*s["numpy"][:2], 10**6, *s["numpy"][3:])},
    "numpy, one beyond": lambda s: {"numpy": (*s["numpy"][:2], 625, *s["numpy"][3:])},
    "numpy, before": lambda s: {"numpy": (*s["numpy"][:2], -1, *s["numpy"][3:])},
    "torch, beyond": lambda s: changed_words(s, 2, [624, 1, 624]),
    "numpy, few words": lambda s: {"numpy": (s["numpy"][0], s["numpy"][1][:9], *s["numpy"][2:])},
    "numpy, another generator": lambda s: {"numpy": ("PCG64", *s["numpy"][1:])},
    "numpy, huge words": lambda s: {"numpy": (s["numpy"][0], [2**40] * 624, *s["numpy"][2:])},
    "torch, few bytes": lambda s: {"torch": s["torch"][:99]},
    "torch, floats": lambda s: {"torch": torch.zeros(5056)},
    "torch, a text": lambda s: {"torch": "x"},
    "python, few words": lambda s: {"python": (3, (1, 2, 3), None)},
    "python, position": lambda s: {"python": (3, (*s["python"][1][:-1], 625), None)},
    "python, another version": lambda s: {"python": (9, s["python"][1], None)},
    "python, no number": lambda s: {"python": (*s["python"][:2], "x")},
    "python, nothing": lambda s: {"python": None},
}


@pytest.mark.parametrize("case", UNSOUND)
def test_states_that_would_lead_beyond_memory_or_are_none_are_refused(case):
    states = random_states(CPU)
    states |= UNSOUND[case](states)
    with pytest.raises(ValueError, match="random generators are malformed"):
        check_random_states(states, CPU)


# What a run makes of it


class TwoTowers(torch.nn.Module):
    """Stands for a CLIP model."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Linear(3, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))


def prepared(kind, folder):
    """A method with a small model, and what a run would save of it after a step."""
    torch.manual_seed(0)
    clip = ClipModel(TwoTowers(), None, None, None, "two towers", "random")
    chosen = {"visual.weight": torch.tensor([1, 7]), "visual.bias": torch.tensor([2])}
    CooMask.from_indices(clip.model, chosen).save(folder / "mask.safetensors")
    config = FinetuneConfig(train_data="x", method=kind.name, gradients="dense")
    prompts = ClassPrompts(("x",), ("{}",), lambda _: torch.zeros(1, 1, dtype=torch.int64))
    method = kind(clip, prompts, config)
    method.prepare([], folder)
    for param in method.model.parameters():
        param.grad = torch.ones_like(param)
    method.step(0.1)
    return method, {
        **{"step": 1, "metrics": 10, "method": method.state_dict(), "random": random_states(CPU)},
        **{"seconds": {"preparation": 0.0, "training": 1}, "config": config.to_dict()},
        "inputs": {},
    }


@pytest.mark.parametrize("kind", [Saft, Full])
def test_a_run_goes_on_from_its_state(tmp_path, kind):
    method, state = prepared(kind, tmp_path)
    path = save_checkpoint(tmp_path, 1, state)
    expected = copy.deepcopy((method.model.state_dict(), method.optimizer.state_dict()["state"]))
    method.step(0.1)
    RunState.of(load_checkpoint(path), "it").restore(method)
    assert equal(
        (dict(method.model.state_dict()), method.optimizer.state_dict()["state"]), expected
    )


BAD_STATES = [
    *({}, {"step": -1}, {"step": 1.0}, {"step": True}, {"metrics": 2**70}, {"method": 3}),
    *({"random": []}, {"seconds": {}}, {"seconds": {"preparation": 0, "training": float("nan")}}),
    *({"inputs": None}, {"config": {}}, {"config": 3}, {"config": {"train_data": "x", "lr": "y"}}),
]


@pytest.mark.parametrize("change", BAD_STATES)
def test_what_is_no_state_of_a_run_is_refused(tmp_path, change):
    _, state = prepared(Full, tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=r"^the checkpoint x"):
        RunState.of({**state, **change} if change else change, "the checkpoint x")


def moments(**change):
    def forge(state):
        state["optimizer"]["state"][0] |= change

    return forge


def values(**change):
    return lambda state: state["values"].update({f"visual.{k}": v for k, v in change.items()})


NAN = torch.tensor(float("nan"))
BAD_METHODS = {
    "no values": lambda state: state.pop("values"),
    "values are a list": lambda state: state.update(values=[1]),
    "one value is missing": lambda state: state["values"].pop("visual.bias"),
    "one value too many": values(more=torch.ones(1)),
    "a value is a number": values(bias=1.0),
    "a value of another dtype": values(bias=torch.ones(4).double()),
    "a value of another shape": values(bias=torch.ones(99)),
    "a value that would be broadcast": values(weight=torch.ones(1)),
    "no optimizer": lambda state: state.pop("optimizer"),
    "the optimizer is a number": lambda state: state.update(optimizer=3),
    "no moments": lambda state: state["optimizer"].pop("state"),
    "moments of no parameter": lambda state: state["optimizer"]["state"].update({7: {}}),
    "a moment is missing": lambda state: state["optimizer"]["state"][0].pop("exp_avg"),
    "a moment of another shape": moments(exp_avg=torch.ones(1)),
    "a moment of another dtype": moments(exp_avg_sq=torch.ones(4, 3).half()),
    "a moment is a text": moments(exp_avg="x"),
    "steps before the first": moments(step=torch.tensor(-1.0)),
    "steps that are no number": moments(step=NAN),
    "random states": None,
}


@pytest.mark.parametrize("kind", [Saft, Full])
@pytest.mark.parametrize("case", BAD_METHODS)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path, kind, case):
    method, state = prepared(kind, tmp_path)
    path = save_checkpoint(tmp_path, 1, state)
    bad = load_checkpoint(path)
    if BAD_METHODS[case] is None:
        bad["random"]["torch"] = torch.zeros(5056)
    else:
        BAD_METHODS[case](bad["method"])
    if kind is Saft and case == "moments of no parameter":
        pytest.skip("SparseAdamW reads those of its parameters only")
    method.step(0.1)
    before = copy.deepcopy((method.model.state_dict(), method.optimizer.state_dict()))
    drawn = random.getstate(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=f"{path} cannot be continued from: "):
        RunState.of(bad, f"the checkpoint {path}").restore(method)
    assert equal((method.model.state_dict(), method.optimizer.state_dict()), before)
    assert equal((random.getstate(), torch.get_rng_state()), drawn)
