"""The training loop: optimizer steps, their learning rate, and stopping between two of them."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from saft_clip.batches import Batch, TrainingBatches
from saft_clip.config import FinetuneConfig
from saft_clip.console import say
from saft_clip.methods.base import Method
from saft_clip.models import train_mode
from saft_clip.schedule import learning_rate
from saft_kernels.errors import NonFiniteGradientError


class Trainer:
    """Takes the optimizer steps of a run.

    Args:
        method: prepared, with its optimizer.
        batches: the training data.
        config: the run's settings.
    """

    def __init__(self, method: Method, batches: TrainingBatches, config: FinetuneConfig) -> None:
        self.method = method
        self.batches = batches
        self.config = config
        self.step = 0

    def steps(self) -> Iterator[dict[str, float]]:
        """Take the remaining steps; each yields ``loss``, ``lr``, ``grad_norm`` and ``images``.

        Raises:
            NonFiniteGradientError: if a loss or gradient is NaN or infinite; the weights are those
                before that step.
        """
        for batches in self.batches.steps_from(self.step):
            train_mode(self.method.model)
            size = self.batches.images_in(self.step)
            loss = self._backward(batches, size)
            norm = self.method.clip_grad_norm_(self.config.grad_clip_norm or math.inf)
            self._check_finite(loss, norm)
            config, total = self.config, self.batches.steps
            lr = learning_rate(self.step, total, config.lr, config.warmup)
            self.method.step(lr)
            self.step += 1
            self.method.after_step(self.step, total)
            yield {"loss": float(loss), "lr": lr, "grad_norm": float(norm), "images": size}

    def _backward(self, batches: Iterator[Batch], size: int) -> Tensor:
        """Accumulate the gradient of a step's mean loss over ``size`` images; return the loss."""
        total = torch.zeros((), device=self.method.device)
        for images, labels in batches:
            # A short batch counts for what it holds, so that the gradient is that of one big batch.
            loss = self.method.loss(images, labels) * (len(labels) / size)
            loss.backward()
            total += loss.detach()
        return total

    def _check_finite(self, loss: Tensor, norm: Tensor) -> None:
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise NonFiniteGradientError(
                    f"the {what} is {float(value)} at step {self.step + 1}: lower --lr, set "
                    "--grad-clip-norm, or use --precision fp32"
                )


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM ask for a stop instead of stopping at once; a second Ctrl-C does.

    Yields:
        A function that tells whether a stop was asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread can handle signals
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; press Ctrl-C again to stop at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
