"""The record of a run: one JSON object per line in ``metrics.jsonl``, and TensorBoard if asked for.

Every line has ``kind`` and ``step`` (optimizer steps taken). ``kind`` is ``train`` (``epoch``,
``loss``, ``lr``, ``grad_norm``, ``seconds``, ``images_per_s``), ``validation`` or ``evaluation``
(``when``, see :data:`WHEN`, and what :class:`saft_clip.evaluate.Evaluation` holds).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.forms import (
    Form,
    is_count,
    is_flag,
    is_number,
    is_share,
    is_text,
    one_of,
    require_form,
)
from saft_kernels.files import explain_refusal
from saft_kernels.untrusted import parse_json, shown

#: When an evaluation was made: before and after training; of the result, on the training images;
#: at a share ``alpha`` of the way from the pretrained to the trained weights.
WHEN = ("before", "after", "train", "along")

#: What a page uses of a line, by its kind.
EVALUATION: Form = {
    **{"when": one_of(*WHEN), "spec": is_text, "dataset": is_text, "shifted": is_flag},
    **{"n": is_count, "top1": is_share, "top5": is_share, "mean_per_class": is_share},
    **{"top1_stderr": is_share, "mean_per_class_stderr": is_share},
}
LINES: dict[str, Form] = {
    "train": {"loss": is_number},
    "validation": {"top1": is_share},
    "evaluation": EVALUATION,
}


class MetricsLog:
    """Appends to the record of a run.

    Args:
        path: ``metrics.jsonl``.
        tensorboard: folder for TensorBoard's event files; None for none.
        keep: bytes of an existing file to keep, what follows is removed: a resumed run goes on
            from its checkpoint, and no line appears twice.
        step: optimizer steps taken so far; TensorBoard drops what comes after.

    Raises:
        FileWriteError: if the file cannot be written.
        CheckpointError: if the existing file is shorter than ``keep``.
        ConfigError: if TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: Path, *, tensorboard: Path | None = None, keep: int = 0, step: int = 0
    ) -> None:
        self.path = path
        with self._explained():
            # Without a buffer: one that could not be written would be tried again on closing.
            self._file = path.open("ab", buffering=0)
            self._cut(keep)
            self._writer = None if tensorboard is None else _open_tensorboard(tensorboard, step)

    def _cut(self, keep: int) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size < keep:
            raise CheckpointError(
                f"{self.path} is shorter ({size} bytes) than when the checkpoint was made "
                f"({keep}): put the whole file back, or start again in another folder"
            )
        self._file.truncate(keep)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line.

        Raises:
            FileWriteError: if the disk is full.
        """
        line = json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n"
        with self._explained():
            # A file name that is not UTF-8 holds surrogates; \udcff is JSON for one.
            self._append(line.encode(errors="backslashreplace"))
            self._log_scalars(kind, step, values)

    def _append(self, content: bytes) -> None:
        while content:  # a disk that is nearly full takes a part first, and then refuses
            content = content[self._file.write(content) :]

    def _log_scalars(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        prefix = "/".join([kind, *(str(values[k]) for k in ("dataset",) if k in values)])
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def size(self) -> int:
        """Bytes written so far, after making sure that they are on the disk.

        Raises:
            FileWriteError: if the disk is full.
        """
        with self._explained():
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            with self._explained():
                self._writer.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_refusal(error, self.path) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a record; a last line that was cut short by a kill is left out.

    Raises:
        CheckpointError: if the file cannot be read or another line is broken.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        parsed = [parse_json(line) for line in lines[:-1]]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is broken: {shown(error)}") from error
    for number, line in enumerate(parsed, start=1):
        require_form(line, {"kind": one_of(*LINES), "step": is_count}, f"line {number:,} of {path}")
    return parsed


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the tensorboard package: pip install tensorboard, or leave it out"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
