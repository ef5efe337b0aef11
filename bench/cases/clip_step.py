"""A whole training step on one batch: forward, backward, optimizer; time and peak memory.

The uniform mask is the worst case: it has entries in nearly every row and column of every tensor.
The concentrated one has them in every tensor too, but in few rows and columns, as masks of trained
models do. The selected one, chosen with random weights, leaves nearly all of the image tower out.
Memory is that of the whole process: some of LoRA's are libraries that ``peft`` loads.

A method that trains anything else than the mask's entries by AdamW says so in its row. One whose
library is missing is left out, with the reason in a row of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from saft_kernels import CooMask, SparseAdamW

from ..baselines import (
    Loss,
    Method,
    Step,
    adamw8bit,
    frozen,
    full_adamw,
    index_and_hook,
    lora,
    masked_adamw,
    shira,
    sparse_adam,
    step_of,
    super_tuning,
)
from ..baselines.peft_adapters import pretrained, require_trained
from ..checks import reference_step, require_loss, require_stepped, require_untouched
from ..harness import Contender, Figure, Outcome, Timing, measure, times_as_long
from ..memory import MeasurementError, Memory, peak_memory
from ..models import (
    ADAMW,
    Setting,
    Task,
    Workload,
    candidates,
    make_task,
    with_concentrated_mask,
    workload,
)

FULL = "full fine-tuning, fused AdamW"
INDEX_AND_HOOK = "index and hook in plain torch, uniform mask"
STREAMED = "SparseAdamW, streamed gradients, uniform mask"
STREAMED_SELECTED = "SparseAdamW, streamed gradients, selected mask"
SAMPLED = "SparseAdamW, sampled gradients, uniform mask"
SAMPLED_CONCENTRATED = "SparseAdamW, sampled gradients, concentrated mask"
SAMPLED_SELECTED = "SparseAdamW, sampled gradients, selected mask"
LORA = "PEFT LoRA r=8 on c_fc, c_proj and attn"
MASKED = "Algorithm 1 literally: mask, fused AdamW, reset, uniform mask"
SPARSE_ADAM = "torch.optim.SparseAdam with a COO hook, uniform mask"
SHIRA = "PEFT SHiRA r=1 on c_fc and c_proj"
SUPER_TUNING = "PEFT Super-Tuning on c_fc and c_proj"
ADAMW_8BIT = "full fine-tuning, bitsandbytes' 8-bit AdamW"
FLOOR = "floor: every weight frozen"

ALL_SAMPLED = (SAMPLED, SAMPLED_CONCENTRATED, SAMPLED_SELECTED)

#: They train adapters in the model, by peft.
ADAPTERS = (LORA, SHIRA, SUPER_TUNING)

#: What is measured in fp32 only: the bars in bf16 need none of these.
ONLY_IN_FP32 = (STREAMED_SELECTED, MASKED, SPARSE_ADAM, SHIRA, SUPER_TUNING, ADAMW_8BIT)

#: Largest time of a step with sampled gradients over the floor's and over full fine-tuning's.
OVER_FLOOR = {"fp32": 1.05, "amp_bf16": 1.06}
OVER_FULL = {"fp32": 0.66, "amp_bf16": 0.72}


def streamed(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients gathered and freed as they come."""
    return step_of(SparseAdamW(model, mask, gradients="streamed", **ADAMW), model, loss)


def sampled(model: nn.Module, mask: CooMask, loss: Loss) -> Step:
    """This package, with gradients computed at the selected entries only."""
    return step_of(SparseAdamW(model, mask, gradients="sampled", **ADAMW), model, loss)


@dataclass(frozen=True)
class Way:
    """A method, and what it trains.

    Attributes:
        method: of training.
        mask: that it is given: ``uniform``, ``concentrated`` or ``selected``.
        covers: what it trains if that is not the mask's entries by AdamW.
    """

    method: Method
    mask: str = "uniform"
    covers: str = ""


WAYS: dict[str, Way] = {
    FULL: Way(full_adamw.full_adamw, covers=full_adamw.COVERS),
    INDEX_AND_HOOK: Way(index_and_hook.index_and_hook, covers=index_and_hook.COVERS),
    STREAMED: Way(streamed),
    STREAMED_SELECTED: Way(streamed, "selected"),
    SAMPLED: Way(sampled),
    SAMPLED_CONCENTRATED: Way(sampled, "concentrated"),
    SAMPLED_SELECTED: Way(sampled, "selected"),
    LORA: Way(lora.lora, covers=lora.COVERS),
    MASKED: Way(masked_adamw.masked_adamw, covers=masked_adamw.COVERS),
    SPARSE_ADAM: Way(sparse_adam.sparse_adam, covers=sparse_adam.COVERS),
    SHIRA: Way(shira.shira, covers=shira.COVERS),
    SUPER_TUNING: Way(super_tuning.super_tuning, covers=super_tuning.COVERS),
    ADAMW_8BIT: Way(adamw8bit.adamw8bit, covers=adamw8bit.COVERS),
    FLOOR: Way(frozen.frozen, covers=frozen.COVERS),
}


def run(setting: Setting) -> Outcome:
    """Every method on its own copy of the model, in fp32 and bf16; then each one's memory."""
    work = with_concentrated_mask(workload(setting), setting.density)
    fp32, left_out = _times(work, "fp32", list(WAYS), setting)
    bf16, _ = _times(work, "amp_bf16", [n for n in fp32 if n not in ONLY_IN_FP32], setting)
    memory = _memories(work, setting, list(fp32))
    timings = [replace(timing, peak=memory[name].peak) for name, timing in fp32.items()]
    figures = [
        *_streamed_figures(fp32),
        *_sampled_figures(fp32, "fp32"),
        *_sampled_figures(bf16, "amp_bf16"),
        *_memory_figures(memory, work.numel),
        *left_out,
    ]
    return Outcome([_row(timing) for timing in (*timings, *bf16.values())], figures)


def _row(timing: Timing) -> Timing:
    """The timing, with what its method trains if that is not the mask."""
    covers = WAYS[timing.name].covers
    return replace(timing, name=f"{timing.name} (trains {covers})") if covers else timing


def _times(
    work: Workload, precision: str, names: list[str], setting: Setting
) -> tuple[dict[str, Timing], list[Figure]]:
    """Times by name of what can be measured here, and a figure for each method that cannot."""
    group = f"training step in {precision}, {setting.images} images and {setting.prompts} prompts"
    task = replace(work.task, precision=precision)
    effort = replace(setting.steps, warm_up=1)  # a first round is up to a tenth slower
    contenders, left_out = [], []
    for name in names:
        try:
            contenders.append(_contender(name, work, task))
        except MeasurementError as reason:
            left_out.append(Figure(f"{name} measured", 0, "", note=str(reason)))
    # Their copies of the model are freed before others, and other processes, need the memory.
    return measure(group, contenders, effort), left_out


def _streamed_figures(times: dict[str, Timing]) -> list[Figure]:
    return [
        times_as_long(
            f"training step against full fine-tuning's: {name}", times[name], times[FULL], bar
        )
        for name, bar in ((STREAMED, 1.0), (STREAMED_SELECTED, 1.0), (FLOOR, None))
    ]


def _sampled_figures(times: dict[str, Timing], precision: str) -> list[Figure]:
    figures = []
    for name in ALL_SAMPLED:
        for other, bar in (
            (FLOOR, OVER_FLOOR[precision]),
            (FULL, OVER_FULL[precision]),
            (INDEX_AND_HOOK, 1.0),
            (LORA, 1.0),
        ):
            if other not in times:
                continue  # left out
            what = f"training step in {precision}: {name} against {other}"
            figures.append(times_as_long(what, times[name], times[other], bar))
    return figures


def _memory_figures(memory: dict[str, Memory], numel: int) -> list[Figure]:
    full, floor = memory[FULL].peak, memory[FLOOR].peak
    figures = []
    for name, bar in ((STREAMED, 7.5), (STREAMED_SELECTED, 7.5), (FLOOR, None)):
        what = f"peak memory below full fine-tuning's, per parameter: {name}"
        figures.append(Figure(what, (full - memory[name].peak) / numel, "bytes", bar=bar))
    for name, bar in ((SAMPLED, None), (SAMPLED_CONCENTRATED, 6), (SAMPLED_SELECTED, 6)):
        what = f"peak memory above the floor's, in percent of what full fine-tuning adds: {name}"
        share = 100 * (memory[name].peak - floor) / max(full - floor, 1)
        figures.append(Figure(what, share, "%", bar=bar, at_least=False))
    return figures


def _contender(name: str, work: Workload, task: Task) -> Contender:
    model = copy.deepcopy(task.model)
    way = WAYS[name]
    step = way.method(model, work.masks[way.mask], task.loss)
    return Contender(name, step, _check(name, model, work, task.precision))


def _check(
    name: str, model: nn.Module, work: Workload, precision: str
) -> Callable[[Callable[[], Any]], None]:
    """The first step's loss, then the weights."""

    def check(run: Callable[[], Any]) -> None:
        require_loss(run().item(), work.loss, precision)
        if name in ADAPTERS:
            require_trained(model)
            require_untouched(pretrained(model), candidates(work.task.model), None)
        else:
            _check_weights(name, candidates(model), work, precision)

    return check


def _check_weights(
    name: str, params: dict[str, nn.Parameter], work: Workload, precision: str
) -> None:
    """The first step against the specification at the mask, and the bits of what must stay.

    In bf16 the gradients differ from the fp32 ones that the specification has, and the first AdamW
    step is little more than their sign: there only the bits are checked. The 8-bit AdamW is held to
    the specification as the others are, since its first step has no rounded moments yet.
    """
    base, mask = candidates(work.task.model), work.masks[WAYS[name].mask]
    if name == SPARSE_ADAM:
        require_stepped(params, sparse_adam.first_step(base, work.gradients, mask), mask)
    elif name != FLOOR and precision == "fp32":
        sums = work.gradients if name in ALL_SAMPLED else None
        require_stepped(params, reference_step(base, work.gradients, mask), mask, sums)
    if name not in (FULL, ADAMW_8BIT):
        require_untouched(params, base, None if name == FLOOR else mask)


def _memories(work: Workload, setting: Setting, names: list[str]) -> dict[str, Memory]:
    with TemporaryDirectory() as folder:
        files = {kind: str(Path(folder, f"{kind}.safetensors")) for kind in work.masks}
        for kind, mask in work.masks.items():
            mask.save(files[kind])
        return {
            name: peak_memory(
                f"{__name__}:steps",
                name=name,
                mask=files[WAYS[name].mask],
                model=setting.model,
                images=setting.images,
                prompts=setting.prompts,
            )
            for name in names
        }


def steps(name: str, mask: str, model: str, images: int, prompts: int) -> Callable[[], object]:
    """The work whose memory is measured: a small step, which makes the state, and a whole one."""
    own = make_task(model, images, prompts)
    batches = iter([own.part(1), own])
    step = WAYS[name].method(own.model, CooMask.load(mask), lambda model: next(batches).loss(model))
    return lambda: [step(), step()]
