"""The folder of a run: what is in it, and whether a run may start or go on there.

=================== ==========================================================================
config.yaml         the settings
inputs.json         fingerprints of the data and the pretrained weights
density/            the trials of ``--density auto``, each in a folder of its own
mask.safetensors    the selected entries (saft and other sparse methods)
probe.safetensors   the first classifier (lp-ft)
metrics.jsonl       one line per step and evaluation
checkpoints/        the last two, until the run is finished
delta.safetensors   the result; with other methods model.safetensors or adapter.safetensors
results.json        evaluations before and after, sizes, times, environment; written last but one
report.html         the page about it all
=================== ==========================================================================

While a process is at work here there is ``.saft-lock``, too: see :mod:`saft_clip.run_lock`. One
that is killed may leave it, and hidden temporary folders; whoever comes next removes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from saft_clip.config import FinetuneConfig
from saft_clip.data import ImageDataset
from saft_clip.errors import CheckpointError, ConfigError, LockedError
from saft_clip.forms import is_count, is_text, require_form
from saft_clip.run_lock import RunLock
from saft_kernels.errors import FileWriteError
from saft_kernels.files import atomic_write, make_folder, remove_leftovers
from saft_kernels.untrusted import parse_json, shown

#: The classifier that lp-ft trains first; a run that is stopped later finds it here.
PROBE = "probe.safetensors"

#: The trials of ``--density auto``.
TRIALS = "density"

_OURS = (
    *("config.yaml", "inputs.json", "mask.safetensors", "metrics.jsonl", "results.json"),
    *("delta.safetensors", "model.safetensors", "adapter.safetensors", PROBE),
    *("report.html", "demo.json", TRIALS),
)


class RunFolder:
    """The output folder of one run.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"
        self.lock = RunLock(self.path)

    def started(self) -> bool:
        """Whether a run has begun here."""
        return self.config.exists()

    def finished(self) -> bool:
        """Whether the run here has come to its end."""
        return self.results.exists()

    def complete(self) -> bool:
        """Whether all that a run writes is here."""
        return self.finished() and self.report.exists()

    def check(self, config: FinetuneConfig) -> None:
        """Make sure that a run with these settings may start or go on here; nothing is written.

        Raises:
            ConfigError: if there is a run and ``resume`` is not set, or its settings differ; or if
                there are files that a run would overwrite.
        """
        if not (config.resume and self.started()):
            self._check_unused()
            return
        changes = config.differences(FinetuneConfig.load(self.config))
        if changes:
            raise ConfigError(
                f"the run in {self.path} was started with other settings: {'; '.join(changes)};"
                " continue it with its own, or give another --output"
            )

    def _check_unused(self) -> None:
        found = ", ".join(name for name in _OURS if (self.path / name).exists())
        if self.started():
            state = "a finished run" if self.finished() else "an unfinished run"
            raise ConfigError(
                f"{self.path} already holds {state} ({found}): give --resume to continue it, or "
                "another --output"
            )
        if found:
            raise ConfigError(
                f"{self.path} holds {found}, which is not of a run that could be continued and "
                "would be overwritten: give another --output"
            )

    def abandon(self) -> None:
        """Remove what a run has written that failed before it had selected or trained anything."""
        if self._has_results():
            return
        # The one that makes it a run last.
        for path in (self.path / PROBE, self.metrics, self.inputs, self.config):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path / TRIALS):
            shutil.rmtree(folder, ignore_errors=True)

    def _has_results(self) -> bool:
        """Whether something has been selected or trained here, in a trial maybe."""
        return (
            (self.path / "mask.safetensors").exists()
            or any(self.checkpoints.glob("*"))
            or any(RunFolder(trial)._has_results() for trial in (self.path / TRIALS).glob("*"))
        )

    def start(self, config: FinetuneConfig, inputs: dict[str, dict[str, Any]]) -> None:
        """Lock the folder and write settings and fingerprints, or compare those of a resumed run.

        Args:
            config: the settings.
            inputs: what the run reads: name -> its properties, see :func:`describe_data`.

        Raises:
            FileWriteError: if the folder cannot be written to.
            LockedError: if another process is at work here.
            ConfigError: if a run may not start or go on here, see :meth:`check`; or if an input has
                changed; the message names it.
        """
        make_folder(self.path)
        self.lock.acquire()
        self.check(config)  # once more: before it was locked, another process may have come first
        make_folder(self.checkpoints)
        self._remove_leftovers()
        if not self.started():
            config.save(self.config)
        # A run that was killed between these two files has done nothing yet.
        if self.inputs.exists() or self._has_results():
            self._compare(inputs)
        else:
            write_json(self.inputs, inputs)

    def _remove_leftovers(self) -> None:
        remove_leftovers(self.path, _OURS)
        remove_leftovers(self.checkpoints, ["step-*.safetensors"])

    def _compare(self, inputs: dict[str, dict[str, Any]]) -> None:
        before = read_json(self.inputs)
        require_form(before, {str: {str: is_input}}, str(self.inputs))
        for name in sorted(before.keys() | inputs.keys()):
            then, now = before.get(name, {}), inputs.get(name, {})
            if then == now:
                continue
            changes = "; ".join(
                f"{shown(key)} {shown(then.get(key))}, now {now.get(key)}"
                for key in sorted(then.keys() | now.keys())
                if then.get(key) != now.get(key)
            )
            raise ConfigError(
                f"{shown(name)} changed since the run in {self.path} was started ({changes}): put "
                "it back as it was, or start again with another --output"
            )

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results; nothing needs the checkpoints any more."""
        write_json(self.results, results)
        self.settle()

    def settle(self) -> None:
        """Remove the checkpoints and whatever else a finished run has no use for."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self._remove_leftovers()

    def tidy(self) -> None:
        """Settle what a process that was killed at the very end has left, where that is allowed."""
        if not self.checkpoints.exists() and not any(self.path.glob(".*")):
            return
        with suppress(LockedError, FileWriteError), self.lock as lock:
            lock.acquire()
            self.settle()


def describe_data(dataset: ImageDataset, *, content: bool) -> dict[str, Any]:
    """What tells a data set from a changed one.

    Args:
        dataset: the images.
        content: hash all that is in the files; else only their names, sizes, beginnings and ends,
            by which one image is told from another, too.
    """
    digest = hashlib.sha256(json.dumps([dataset.class_names, dataset.templates]).encode())
    for index, label in enumerate(dataset.labels.tolist()):
        digest.update(str(label).encode())
        digest.update(dataset.source(index).mark(content))
    return {
        "images": len(dataset),
        "classes": len(dataset.class_names),
        "sha256": digest.hexdigest()[:16],
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically.

    Raises:
        FileWriteError: if it cannot be written.
    """
    with atomic_write(path) as temporary:
        # A path that is not UTF-8 holds surrogates; \udcff is JSON for one.
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        CheckpointError: if it is missing or broken.
    """
    try:
        return parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is broken: {shown(error)}") from error


def is_input(value: Any) -> bool:
    """A property of an input, as :func:`describe_data` gives them."""
    return is_text(value) or is_count(value)
