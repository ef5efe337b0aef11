"""The cases by name, and running one into a record that JSON can hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .cases import (
    accumulate_topk,
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
from .harness import Outcome, WrongResultError
from .models import Setting


@dataclass(frozen=True)
class Case:
    """A part of the data path and what is measured of it.

    Attributes:
        name: on the command line.
        summary: of what it measures.
        run: measures it.
        on_gpu: whether it measures a GPU; then it runs only if it is named.
    """

    name: str
    summary: str
    run: Callable[[Setting], Outcome]
    on_gpu: bool = False


#: In the order of the data path, the training steps last.
CASES = {
    case.name: case
    for case in (
        Case("accumulate_topk", "streaming selection and fused accumulation", accumulate_topk.run),
        Case(
            "gather_scatter", "values at the indices, out of weights and back", gather_scatter.run
        ),
        Case("sparse_adamw", "the optimizer step, its state and its growth", sparse_adamw.run),
        Case("sampled_grad", "a weight gradient at the selected entries only", sampled_grad.run),
        Case("real_masks", "where real masks' entries lie, and what suits them", real_masks.run),
        Case("delta", "the delta file: size, writing, applying, reverting", delta.run),
        Case("encode_prompts", "the text tower without padding", encode_prompts.run),
        Case("clip_step", "a whole training step: time and peak memory", clip_step.run),
        Case("step_account", "where the time of a training step goes", step_account.run),
        Case("prompt_step", "a whole training step on ImageNet's 1,000 classes", prompt_step.run),
        Case("gpu", "every operation and whole training steps on a GPU", gpu.run, on_gpu=True),
    )
}


def run_case(case: Case, setting: Setting) -> dict[str, Any]:
    """Run one case. A wrong result is recorded as ``refused`` in place of times."""
    start = time.perf_counter()
    outcome, refused = Outcome(), None
    with watch_load() as load:
        try:
            outcome = case.run(setting)
        except WrongResultError as error:
            refused = str(error)
    return {
        "summary": case.summary,
        "seconds": time.perf_counter() - start,
        "load": asdict(load),
        "refused": refused,
        "figures": [{**asdict(figure), "verdict": figure.verdict} for figure in outcome.figures],
        "timings": [asdict(timing) for timing in outcome.timings],
    }
