"""The cases by name, and running one into a record that JSON can hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from saft_kernels import backends

from .bars import without_bar
from .cases import (
    accumulate_topk,
    clip_finetune,
    clip_select,
    clip_step,
    delta,
    encode_prompts,
    gather_scatter,
    gpu,
    prompt_step,
    real_masks,
    sampled_grad,
    sparse_adamw,
    step_account,
)
from .environment import watch_load
from .harness import WrongResultError
from .memory import MeasurementError
from .models import Setting
from .outcome import Outcome
from .result_file import outcome_record


@dataclass(frozen=True)
class Case:
    """A part of the data path and what is measured of it.

    Attributes:
        name: on the command line.
        summary: of what it measures.
        run: measures it.
        on_gpu: whether it measures a GPU; then it runs only if it is named.
        fixed: names of what it does not take from a :class:`Setting`, but has of its own. The tiny
            model is a request for small sizes all the same.
    """

    name: str
    summary: str
    run: Callable[[Setting], Outcome]
    on_gpu: bool = False
    fixed: tuple[str, ...] = ()

    def ignored(self, asked: Setting) -> list[str]:
        """What was asked for and does not change this case, as the command line calls it."""
        return [
            option_name(name)
            for name in self.fixed
            if getattr(asked, name) != getattr(Setting, name)
        ]

    def own(self, setting: Setting) -> Setting:
        """The setting that it runs on: what it has of its own as by default, but small sizes."""
        names = (name for name in self.fixed if name != "model")
        return replace(setting, **{name: getattr(Setting, name) for name in names})


def option_name(field: str) -> str:
    """What the command line calls a field of the setting."""
    return {"images": "batch"}.get(field, field)


#: Of cases whose layers, models or batches are their own.
_SIZES = ("model", "pretrained", "images", "prompts")

#: In the order of the data path, the training steps last.
CASES = {
    case.name: case
    for case in (
        Case("accumulate_topk", "streaming selection and fused accumulation", accumulate_topk.run),
        Case(
            "gather_scatter", "values at the indices, out of weights and back", gather_scatter.run
        ),
        Case("sparse_adamw", "the optimizer step, its state and its growth", sparse_adamw.run),
        Case(
            "sampled_grad",
            "a weight gradient at the selected entries only",
            sampled_grad.run,
            fixed=_SIZES,
        ),
        Case(
            "real_masks",
            "where real masks' entries lie, and what suits them",
            real_masks.run,
            fixed=(*_SIZES, "dtype"),
        ),
        Case("delta", "the delta file: size, writing, applying, reverting", delta.run),
        Case(
            "encode_prompts",
            "the text tower without padding",
            encode_prompts.run,
            fixed=("images", "prompts", "density", "dtype"),
        ),
        Case(
            "clip_select",
            "a whole selection, from batches to mask",
            clip_select.run,
            fixed=("dtype",),
        ),
        Case("clip_step", "a whole training step: time and peak memory", clip_step.run),
        Case(
            "step_account",
            "where the time of a training step goes",
            step_account.run,
            fixed=("dtype",),
        ),
        Case(
            "prompt_step",
            "a whole training step on ImageNet's 1,000 classes",
            prompt_step.run,
            fixed=("pretrained", "images", "prompts", "dtype"),
        ),
        Case(
            "clip_finetune",
            "whole runs of saft finetune on the tiny CLIP",
            clip_finetune.run,
            fixed=(*_SIZES, "density", "dtype"),
        ),
        Case(
            "gpu_operations",
            "every operation on a GPU",
            gpu.run_operations,
            on_gpu=True,
            fixed=("dtype",),
        ),
        Case(
            "gpu_choices",
            "every way to a layer's weight gradient over densities, on a GPU",
            gpu.run_choices,
            on_gpu=True,
            fixed=("density", "dtype", "images", "prompts"),
        ),
        Case(
            "gpu_steps",
            "whole training steps on a GPU, and their memory",
            gpu.run_steps,
            on_gpu=True,
            fixed=("dtype",),
        ),
    )
}


@contextmanager
def applied(setting: Setting) -> Iterator[None]:
    """The setting's backend and threads, within a block.

    Raises:
        BackendUnavailableError: if that backend cannot run here.
    """
    threads = torch.get_num_threads()
    chosen = backends.use_backend(setting.backend) if setting.backend else nullcontext()
    with chosen:
        torch.set_num_threads(setting.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def run_case(case: Case, setting: Setting) -> dict[str, Any]:
    """Run one case.

    In place of times, a wrong result is recorded as ``refused``, and why something cannot be
    measured here as ``left_out``.
    """
    start = time.perf_counter()
    outcome, refused, left_out = Outcome(), None, None
    with watch_load() as load, applied(setting):
        try:
            outcome = case.run(case.own(setting))
            if not setting.has_bars:
                figures = [without_bar(figure) for figure in outcome.figures]
                outcome = replace(outcome, figures=figures)
        except WrongResultError as error:
            refused = str(error)
        except MeasurementError as error:
            left_out = str(error)
    return {
        "summary": case.summary,
        "fixed": [option_name(name) for name in case.fixed],
        "seconds": time.perf_counter() - start,
        "load": asdict(load),
        "refused": refused,
        "left_out": left_out,
        **outcome_record(outcome),
    }
