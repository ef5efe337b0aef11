"""What is in the folder of a run: whole files and nothing else, the same as without any kill."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saft_clip.checkpoint import load_checkpoint
from saft_clip.config import FinetuneConfig
from saft_clip.metrics import read_metrics
from saft_kernels.delta import SparseDelta
from saft_kernels.mask import CooMask

#: What depends on the clock, and where.
TIMES = ("images_per_s", "seconds", "cost")

_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


class WrongError(Exception):
    """A file that should not be there, is not whole, or differs."""


class Undisturbed:
    """The run that nobody kills, to compare others with.

    Args:
        folder: of that run, finished.
        checkpoints: a folder that holds a copy of every checkpoint it made.
    """

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self.folder = folder
        self.config = FinetuneConfig.load(folder / "config.yaml")
        self.record = record(folder / "metrics.jsonl")
        self.checkpoints = {path.name: checkpoint(path) for path in checkpoints.iterdir()}
        self._readers: dict[str, Callable[[Path], Any]] = {
            "config.yaml": self._check_config,
            "inputs.json": self._check_same_bytes,
            "mask.safetensors": self._check_mask,
            "metrics.jsonl": self._check_record,
            "delta.safetensors": self._check_delta,
            "model.safetensors": self._check_same_bytes,
            "results.json": self._check_results,
            "report.html": self._check_report,
        }

    def check(self, folder: Path) -> int:
        """Look at every file of a run that was killed.

        Returns:
            How many hidden folders with half-written files the kill has left.

        Raises:
            WrongError: if anything is wrong; it names the file.
        """
        hidden = 0
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            if path.name == "checkpoints":
                hidden += self._check_checkpoints(path)
            elif (found := _HIDDEN.fullmatch(path.name)) and found.group(1) in self._readers:
                hidden += 1
            elif path.name in self._readers:
                self._readers[path.name](path)
            elif path.name != ".saft-lock":
                raise WrongError(f"{path} does not belong here")
        return hidden

    def compare(self, folder: Path) -> None:
        """Look at a run that came to its end after all.

        Raises:
            WrongError: if it differs in anything but times, or holds anything more.
        """
        self.check(folder)
        names, expected = (sorted(path.name for path in f.iterdir()) for f in (folder, self.folder))
        _require(names == expected, folder, f"holds {names}, not {expected}")
        found = record(folder / "metrics.jsonl")
        _require(found == self.record, folder / "metrics.jsonl", "is another record")

    def _check_checkpoints(self, folder: Path) -> int:
        hidden = 0
        for path in folder.iterdir():
            if _HIDDEN.fullmatch(path.name):
                hidden += 1
                continue
            _require(path.name in self.checkpoints, path, "does not belong here")
            what = difference(checkpoint(path), self.checkpoints[path.name])
            _require(what is None, path, f"differs from the undisturbed run's in {what}")
        return hidden

    def _check_config(self, path: Path) -> None:
        differences = FinetuneConfig.load(path).differences(self.config)
        _require(not differences, path, f"differs: {differences}")

    def _check_mask(self, path: Path) -> None:
        CooMask.load(path)
        self._check_same_bytes(path)

    def _check_delta(self, path: Path) -> None:
        SparseDelta.load(path)
        self._check_same_bytes(path)

    def _check_same_bytes(self, path: Path) -> None:
        same = path.read_bytes() == (self.folder / path.name).read_bytes()
        _require(same, path, "differs from the undisturbed run's")

    def _check_record(self, path: Path) -> None:
        """The beginning of the whole record: no line is lost in between, none is there twice."""
        found = record(path)
        _require(found == self.record[: len(found)], path, "is not the beginning of the record")

    def _check_results(self, path: Path) -> None:
        found, expected = (
            _without_times(json.loads(p.read_text())) for p in (path, self.folder / path.name)
        )
        _require(found == expected, path, "holds other results")

    def _check_report(self, path: Path) -> None:
        _require(path.read_text().rstrip().endswith("</html>"), path, "is cut short")


def record(path: Path) -> list[Any]:
    """The lines of a run's record, without times."""
    return [_without_times(line) for line in read_metrics(path)]


def checkpoint(path: Path) -> Any:
    """What a checkpoint holds, without times and what may differ between two runs."""
    state = _without_times(load_checkpoint(path))
    config = FinetuneConfig.from_dict(state["config"])
    state["config"] = config.changed(output="", resume=False, workers=0).to_dict()
    state.pop("metrics")  # bytes of the record, in which times have more digits or fewer
    return state


def difference(a: Any, b: Any, where: str = "it") -> str | None:
    """Where two nested structures first differ, tensors by a bit; None if they do not."""
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return where if type(a) is not type(b) or not _same_bits(a, b) else None
    if isinstance(a, dict):
        pairs = [(key, a[key], b.get(key)) for key in a] if list(a) == list(b) else None
    elif isinstance(a, list | tuple):
        pairs = list(zip(range(len(a)), a, b, strict=True)) if len(a) == len(b) else None
    else:
        pairs = [] if a == b else None
    if pairs is None:
        return where
    found = (difference(x, y, f"{where}[{key!r}]") for key, x, y in pairs)
    return next((place for place in found if place is not None), None)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value


def _require(holds: bool, path: Path, what: str) -> None:
    if not holds:
        raise WrongError(f"{path} {what}")
