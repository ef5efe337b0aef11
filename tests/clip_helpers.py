"""Small models and data sets for the tests of the application."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

SMALL = "small-clip"
SMALL_DEEP = "small-deep-clip"
SMALL_RESNET = "small-resnet-clip"

open_clip.add_model_config(Path(__file__).with_name("configs"))


def small_checkpoint(path: Path, name: str = SMALL, seed: int = 0) -> Path:
    """Save the weights of a random small model as safetensors."""
    torch.manual_seed(seed)
    model = open_clip.create_model(name)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def write_image(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    """Save a noisy 20 x 24 image around a colour."""
    noise = np.random.default_rng(sum(path.name.encode())).integers(0, 40, (20, 24, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)
    return path


def write_folder(root: Path, counts: Mapping[str, int], suffix: str = ".png") -> Path:
    """A folder of class folders with so many images each."""
    for position, (name, count) in enumerate(counts.items()):
        colour = (80 * position % 256, 200 - 60 * position % 200, 30)
        for index in range(count):
            write_image(root / name / f"{index:03d}{suffix}", colour)
    return root


def write_split_file(path: Path, splits: Mapping[str, list[tuple[str, int, str]]]) -> Path:
    """A split file in CoOp's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: list(map(list, rows)) for name, rows in splits.items()}))
    return path


def cut_short(path: Path, share: float = 0.5) -> Path:
    """Keep only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def left_by_a_kill(path: Path) -> Path:
    """Make what a process that is killed while it writes a file leaves beside it."""
    hidden = path.with_name(f".{path.name}.01ab89ef.tmp")
    hidden.mkdir(parents=True)
    for name in (path.name, ".tmpAb3dE6"):  # the second one is of safetensors
        (hidden / name).write_bytes(b"half of it")
    return hidden
