"""Weights from elsewhere: taken over, or compared, as they are; nothing of a file is executed."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from fuzz import archives, mutations
from fuzz.choices import Choices
from fuzz.containers import Container, parse
from fuzz.oracles import bytes_of, refusals, require, state_of
from fuzz.targets.base import SafetensorsTarget
from saft_clip import models
from saft_clip.errors import CheckpointError, ModelError
from saft_kernels.delta import extract, open_weights
from saft_kernels.errors import DeltaError, SelectionError, WeightsFileError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Small(nn.Module):
    """Has what open_clip looks at when it loads weights, in few numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Module()
        self.visual.grid_size = (2, 2)
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, 4))
        self.visual.proj = nn.Parameter(torch.randn(4, 2))
        self.positional_embedding = nn.Parameter(torch.randn(6, 4))
        self.ln_final = nn.LayerNorm(4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = None
        self.register_buffer("attn_mask", torch.zeros(2, 2))


class WeightsTarget(SafetensorsTarget):
    """``load_model`` with a file: its check, and open_clip's own loading after that."""

    name = "weights"
    suffix = ".weights"  # which of its kinds a file is shows at its beginning
    weight = 30

    def __init__(self) -> None:
        self._model = _Small()

    def make_seeds(self) -> list[bytes]:
        """The same weights in every format, in parts that share memory, and in another size."""
        torch.manual_seed(0)
        state = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
        half = {name: value.half() for name, value in state.items()}
        larger = state | {"visual.positional_embedding": torch.randn(10, 4)}
        shared = state | {"ln_final.bias": state["ln_final.weight"]}
        return [
            save(state),
            save(half),
            _saved(state),
            _saved({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in half.items()}}),
            _saved(larger),
            _saved(shared),
            _in_the_older_format(state),
        ]

    def mutate(self, choices: Choices, content: bytes) -> bytes:
        """As the format asks."""
        if content[:2] == b"PK":
            return archives.change_archive(choices, content)
        if content[:1] == b"\x80":
            if choices.one_in(2):
                return archives.change_pickle(choices, content)
            return mutations.change_bytes(choices, content)
        return super().mutate(choices, content)

    def seal(self, container: Container) -> None:
        """There is no checksum."""

    def repair(self, content: bytes) -> bytes:
        """There is no checksum."""
        return content

    def read(self, path: Path) -> str:
        """Load the weights into a model."""
        file = _with_its_suffix(path)
        with refusals(file, of=(CheckpointError, ModelError)) as refused:
            models._load_weights(self._model, "small", file)
        if refused:
            return type(refused[0]).__name__
        if file.suffix == ".safetensors":
            _check(self._model, parse(file.read_bytes()))
        return "accepted"


class ExtractTarget(WeightsTarget):
    """The same files for ``open_weights``, and a delta made of them and their base."""

    name = "extract"

    def read(self, path: Path) -> str:
        """Extract all that differs, and some of it; the former makes the base the same again."""
        file, base = _with_its_suffix(path), self._model.state_dict()
        with refusals(file, of=(WeightsFileError,)) as refused:
            tensors = open_weights(file)
        if refused:
            return "WeightsFileError"
        with refusals(None, of=(DeltaError, SelectionError)) as unfit:
            extract(tensors, base, density=0.1)
            extraction = extract(tensors, base)
            changed = {name: value.clone() for name, value in base.items()}
            extraction.delta.apply_(changed)
            require(bytes_of(changed) == bytes_of(tensors), "the delta makes other weights")
        return "accepted, fits no model here" if unfit else "accepted"


def _with_its_suffix(path: Path) -> Path:
    """The file once more, named as what it is."""
    content = path.read_bytes()
    kind = ".pt" if content[:2] == b"PK" or content[:1] == b"\x80" else ".safetensors"
    file = path.with_suffix(kind)
    file.write_bytes(content)
    return file


def _saved(value: object, **options: bool) -> bytes:
    target = io.BytesIO()
    torch.save(value, target, **options)
    return target.getvalue()


def _in_the_older_format(state: dict[str, torch.Tensor]) -> bytes:
    """Parts of one vector, whose address in memory the file calls it by, and which is left out."""
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    content = _saved(views, _use_new_zipfile_serialization=False)
    return re.sub(rb"X.\0\0\0\d{9,20}", b"X\x01\0\0\x000", content, flags=re.DOTALL)


def _check(model: nn.Module, container: Container) -> None:
    """What is of the model's own shape and a dtype that can be compared is there bit for bit."""
    own = dict(model.state_dict())
    bits = state_of(model)
    for tensor in container.tensors:
        name = tensor.name.removeprefix("module.")
        if name in own and list(own[name].shape) == tensor.shape and tensor.dtype in _DTYPES:
            stored = torch.frombuffer(bytearray(tensor.data), dtype=_DTYPES[tensor.dtype])
            require(bits[name] == bytes_of({"": stored.float()})[""], f"{name} has other values")
