"""Checkpoints: a run goes on from what was saved, bit for bit, or model and generators stay."""

from __future__ import annotations

import copy
import random
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fuzz import mutations
from fuzz.choices import Choices
from fuzz.containers import Container
from fuzz.oracles import bytes_of, refusals, require, state_of
from fuzz.targets.base import SafetensorsTarget
from saft_clip.checkpoint import load_checkpoint, load_latest, save_checkpoint
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.methods.base import Method
from saft_clip.methods.full import Full
from saft_clip.methods.saft import Saft
from saft_clip.models import ClipModel
from saft_clip.prompts import ClassPrompts
from saft_clip.random_states import random_states
from saft_clip.run_state import RunState
from saft_kernels import CooMask

_CPU = torch.device("cpu")
_SETTINGS = {"train_data": "builtin:mnist", "model": "saft-tiny"}


def seal(container: Container) -> None:
    """Give a checkpoint the checksum of what it holds."""
    value = zlib.crc32(str(container.texts.get("structure")).encode())
    for tensor in sorted(container.tensors, key=lambda each: str(each.name)):
        value = zlib.crc32(tensor.data, value)
    container.texts.put("checksum", f"{value:08x}")


class CheckpointTarget(SafetensorsTarget):
    """``load_latest``, and how a run goes on from what it gives."""

    name = "checkpoint"
    weight = 40

    def __init__(self) -> None:
        self._methods = [_prepared(Saft), _prepared(Full)]
        self._random = random_states(_CPU)

    def make_seeds(self) -> list[bytes]:
        """Checkpoints of either method, after a step."""
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return [_saved(method) for method in self._methods]

    def seal(self, container: Container) -> None:
        """Put the checksum right."""
        seal(container)

    def change(self, choices: Choices, container: Container) -> None:
        """Half of the time, change the structure."""
        text = container.texts.get("structure")
        if isinstance(text, str) and choices.one_in(2):
            container.texts.put("structure", mutations.change_json(choices, text))
        else:
            super().change(choices, container)

    def read(self, path: Path) -> str:
        """Load, save, load, and let a run of either method go on from it."""
        checkpoints, copies = path.with_name("checkpoints"), path.with_name("copies")
        checkpoints.mkdir(exist_ok=True)
        copies.mkdir(exist_ok=True)
        newest = checkpoints / "step-00000001.safetensors"
        newest.write_bytes(path.read_bytes())
        labels = []
        with refusals(newest, of=(CheckpointError, ConfigError)) as refused:
            state = load_latest(checkpoints)
            again = load_checkpoint(save_checkpoint(copies, 1, state))
            require(_same(state, again), "saved and loaded, it is another state")
            saved = RunState.of(state, f"the checkpoint {newest}")
            labels = [self._resume(method, saved, newest) for method in self._methods]
        if refused:
            return type(refused[0]).__name__
        return "accepted" if True in labels else "accepted, fits no run here"

    def _resume(self, method: Method, saved: RunState, path: Path) -> bool:
        before = _everything(method)
        with refusals(path, of=(CheckpointError,)) as refused:
            saved.restore(method)
        if refused:
            require(_same(_everything(method), before), "a refused checkpoint changed something")
            return False
        self._check(method, saved)
        _step(method)
        return True

    def _check(self, method: Method, saved: RunState) -> None:
        """What was saved is there; then one draw of every generator, which must not crash."""
        require(_same(method.state_dict()["values"], saved.method["values"]), "other values")
        require(_same(random_states(_CPU), saved.random), "other random states")
        random.random(), random.gauss(0, 1), np.random.rand(700), np.random.randn(3)
        torch.rand(700), torch.randn(3)


class _TwoTowers(nn.Module):
    """Stands for a CLIP model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(3, 4)
        self.transformer = nn.Linear(4, 2)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


def _prepared(kind: type[Method]) -> Method:
    clip = ClipModel(_TwoTowers(), None, None, None, "two towers", "random")
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"visual.weight": torch.arange(0, 12, 5), "transformer.bias": torch.tensor([1])}
        CooMask.from_indices(clip.model, chosen).save(Path(folder) / "mask.safetensors")
        config = FinetuneConfig(**_SETTINGS, method=kind.name, gradients="dense")
        prompts = ClassPrompts(("x",), ("{}",), lambda _: torch.zeros(1, 1, dtype=torch.int64))
        method = kind(clip, prompts, config)
        method.prepare([], Path(folder))
    return method


def _step(method: Method) -> None:
    """A step with the gradient 1; whatever was loaded, it must be possible."""
    for param in method.model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    method.step(1e-3)


def _saved(method: Method) -> bytes:
    _step(method)
    state = {
        "step": 1,
        "metrics": 100,
        "method": method.state_dict(),
        "random": random_states(_CPU),
        "seconds": {"preparation": 0.5, "training": 1.0},
        "config": method.config.to_dict(),
        "inputs": {"the training data": {"images": 3, "sha256": "0"}},
    }
    with tempfile.TemporaryDirectory() as folder:
        return save_checkpoint(Path(folder), 1, state).read_bytes()


def _everything(method: Method) -> Any:
    """All that a checkpoint may change."""
    optimizer = copy.deepcopy(method.optimizer.state_dict())
    return state_of(method.model), optimizer, random_states(_CPU)


def _same(a: Any, b: Any) -> bool:
    """Whether two nested structures are the same, tensors bit for bit; lists may be tuples."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bytes_of({"": a}) == bytes_of({"": b})
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return repr(list(a)) == repr(list(b)) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)
