"""A fine-tuning run that kills itself (SIGKILL) at a given moment: ``killed_run.py MOMENT CONFIG``.

Moments: ``selection`` (after its second batch), ``step`` (between the sixth optimizer step and its
record), ``checkpoint`` (with half of the second checkpoint written), ``export`` (with half of the
result written).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import clip_helpers  # noqa: F401  (registers the small models)
from saft_clip import checkpoint
from saft_clip.config import FinetuneConfig
from saft_clip.methods import saft
from saft_clip.train import finetune
from saft_kernels.delta import file as delta_file


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_calls(owner: Any, name: str, count: int) -> None:
    """Die after the ``count``-th call of a function."""
    original = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == count:
            kill()
        return result

    setattr(owner, name, counted)


def half_written(owner: Any, count: int) -> None:
    """Die in the ``count``-th call of ``owner.save_file``, with half of the file there."""
    original = owner.save_file
    calls = 0

    def half(tensors: Any, path: Path, metadata: Any = None) -> None:
        nonlocal calls
        calls += 1
        original(tensors, path, metadata)
        if calls == count:
            os.truncate(path, os.stat(path).st_size // 2)
            kill()

    owner.save_file = half


if __name__ == "__main__":
    moment, config = sys.argv[1:]
    if moment == "selection":
        after_calls(saft.Saft, "loss", 2)
    elif moment == "step":
        after_calls(saft.Saft, "step", 6)
    elif moment == "checkpoint":
        half_written(checkpoint, 2)
    elif moment == "export":
        half_written(delta_file, 1)
    torch.set_num_threads(1)
    finetune(FinetuneConfig.load(config).changed(resume=True))
    sys.exit(f"was not killed at {moment}")
