"""Adapters: what loads becomes the method that wrote it, or the model is not used at all."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from clip_helpers import SMALL_DEEP, small_checkpoint
from fuzz import mutations
from fuzz.choices import Choices
from fuzz.containers import Container
from fuzz.oracles import bytes_of, refusals, require
from fuzz.targets.base import SafetensorsTarget
from saft_clip.adapter_file import load_adapter
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError
from saft_clip.methods import find_method
from saft_clip.methods.dense import restored
from saft_clip.models import ClipModel, load_model
from saft_clip.prompts import ClassPrompts

#: Method -> settings with which it fits the small model.
_METHODS: dict[str, dict[str, Any]] = {
    **{"lp": {}, "lp-ft": {}, "wise-ft": {}, "cocoop": {}},
    **{"coop": {"context": 2}, "maple": {"depth": 3}},
}
_NAMES = ("cat", "small dog")
_TEXTS = ("training", "training", "classes", "templates", "method")


class AdapterTarget(SafetensorsTarget):
    """``load_adapter``, and the method that classifies with what it gives."""

    name = "adapter"
    weight = 30

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = small_checkpoint(Path(folder) / "small.safetensors", SMALL_DEEP)
            self._clip = load_model(SMALL_DEEP, str(file))
        self._clip.pretrained = "small"  # the path is another one each time
        self._images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def _fresh(self) -> ClipModel:
        clip = copy.copy(self._clip)
        clip.model = copy.deepcopy(self._clip.model)
        return clip

    def make_seeds(self) -> list[bytes]:
        """What every kind of method writes."""
        files = []
        for name, settings in _METHODS.items():
            config = FinetuneConfig(
                train_data="x", model=SMALL_DEEP, method=name, precision="fp32", **settings
            )
            clip = self._fresh()
            prompts = ClassPrompts(_NAMES, ("a {}.",), clip.tokenizer)
            method = find_method(name)(clip, prompts, config)
            images = torch.zeros(2, 3, 16, 16)
            method.prepare([(images, torch.tensor([0, 1]))], None)
            with tempfile.TemporaryDirectory() as folder:
                files.append(method.export(Path(folder), lambda: self._clip.model).read_bytes())
        return files

    def seal(self, container: Container) -> None:
        """There is no checksum."""

    def repair(self, content: bytes) -> bytes:
        """There is no checksum."""
        return content

    def change(self, choices: Choices, container: Container) -> None:
        """Half of the time, change what the texts say."""
        key = choices.pick(_TEXTS)
        text = container.texts.get(key)
        if isinstance(text, str) and choices.one_in(2):
            container.texts.put(key, mutations.change_json(choices, text))
        else:
            super().change(choices, container)

    def read(self, path: Path) -> str:
        """Load, and classify."""
        with refusals(path, of=(CheckpointError,)) as refused:
            adapter = load_adapter(path)
        if refused:
            return "CheckpointError"
        clip = self._fresh()
        with refusals(path, of=(CheckpointError,)) as unfit:
            method = restored(adapter, clip, "cpu", "fp32", f"the adapter {path}")
            require(bytes_of(method.params) == bytes_of(adapter.tensors), "other values")
            with torch.inference_mode():
                prompts = ClassPrompts(("cat", "x"), ("{}",), clip.tokenizer)
                found = method.scores(prompts)(self._images)
            require(found.shape == (2, 2), "scores of another shape")
        return "accepted, fits no model here" if unfit else "accepted"
