"""Files of what was trained beside the model's own weights: classifiers, prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saft_clip.errors import CheckpointError
from saft_clip.forms import is_text
from saft_clip.prompts import ClassPrompts
from saft_kernels.files import atomic_write, sort_metadata
from saft_kernels.untrusted import open_safetensors, parse_json, reason

ADAPTER = "adapter.safetensors"

_FORMAT = "saft-adapter"


@dataclass(frozen=True)
class Adapter:
    """What such a file holds.

    Attributes:
        tensors: what was trained, by name.
        texts: how it came about: model, pretrained, method, training (settings as JSON).
        names: of the classes that were trained on.
        templates: of their prompts.
    """

    tensors: dict[str, Tensor]
    texts: dict[str, str]
    names: tuple[str, ...]
    templates: tuple[str, ...]


def save_adapter(
    path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], prompts: ClassPrompts
) -> Path:
    """Write a file, atomically.

    Raises:
        FileWriteError: if it cannot be written.
    """
    metadata = {
        "format": _FORMAT,
        **texts,
        "classes": json.dumps(prompts.names),
        "templates": json.dumps(prompts.templates),
    }
    values = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(values, temporary, metadata)
        sort_metadata(temporary)
    return path


def load_adapter(path: Path) -> Adapter:
    """Read a file.

    Raises:
        CheckpointError: if it cannot be read or is something else.
    """
    where = f"the adapter {path}"
    try:
        with open_safetensors(path) as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names, templates = (parse_json(texts.pop(key)) for key in ("classes", "templates"))
        if texts.pop("format") != _FORMAT or {"method", "training"} - texts.keys():
            raise KeyError
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error
    except KeyError:
        raise CheckpointError(f"{where} is no file of saft finetune's") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} is broken: {reason(error)}") from error
    for texts_of in (names, templates):
        if not isinstance(texts_of, list) or not texts_of or not all(map(is_text, texts_of)):
            raise CheckpointError(f"{where} is broken: it names no classes or prompts")
    return Adapter(tensors, texts, tuple(names), tuple(templates))
