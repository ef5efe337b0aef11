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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from saft_clip.models import RANDOM
from saft_kernels import CooMask, SparseAdamW

from .. import outcome
from ..allocations import TrainingWork
from ..bars import held_to
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
from ..correctness import (
    reference_step,
    require_loss,
    require_moved,
    require_stepped,
    require_untouched,
)
from ..flops import Flops
from ..harness import Contender, measure
from ..memory import MeasurementError, peak_memory
from ..models import (
    ADAMW,
    DTYPES,
    Setting,
    Task,
    Workload,
    candidates,
    make_task,
    with_concentrated_mask,
    workload,
)
from ..outcome import BASELINE, OURS, Figure, Memory, MemoryUse, Outcome, Timing
from ..ratios import times_as_long

FULL = "full fine-tuning, fused AdamW"
INDEX_AND_HOOK = "index and hook in plain torch, uniform mask"
INDEX_AND_HOOK_CONCENTRATED = "index and hook in plain torch, concentrated mask"
INDEX_AND_HOOK_SELECTED = "index and hook in plain torch, selected mask"
STREAMED = "SparseAdamW, streamed gradients, uniform mask"
STREAMED_SELECTED = "SparseAdamW, streamed gradients, selected mask"
SAMPLED = "SparseAdamW, sampled gradients, uniform mask"
SAMPLED_CONCENTRATED = "SparseAdamW, sampled gradients, concentrated mask"
SAMPLED_SELECTED = "SparseAdamW, sampled gradients, selected mask"
LORA = "PEFT LoRA r=8 on MLPs and attention"
LORA_OF_MLPS = "PEFT LoRA r=8 on MLPs"
MASKED = "Algorithm 1 literally: mask, fused AdamW, reset, uniform mask"
SPARSE_ADAM = "torch.optim.SparseAdam with a COO hook, uniform mask"
SHIRA = "PEFT SHiRA r=1 on c_fc and c_proj"
SUPER_TUNING = "PEFT Super-Tuning on c_fc and c_proj"
ADAMW_8BIT = "full fine-tuning, bitsandbytes' 8-bit AdamW"
FLOOR = "floor: every weight frozen"

#: In the order of those of a method.
MASKS = ("uniform", "concentrated", "selected")

ALL_SAMPLED = (SAMPLED, SAMPLED_CONCENTRATED, SAMPLED_SELECTED)
ALL_INDEX_AND_HOOK = (INDEX_AND_HOOK, INDEX_AND_HOOK_CONCENTRATED, INDEX_AND_HOOK_SELECTED)

#: Whose matrix products set the rate of a step, by precision.
PRODUCTS = {"fp32": torch.float32, "amp_bf16": torch.bfloat16}

#: What the sampled steps are held to: name in the bars -> contenders. Of those that train the same
#: mask, or something else, the fastest counts.
OTHERS = {
    "floor": (FLOOR,),
    "full": (FULL,),
    "index-and-hook": ALL_INDEX_AND_HOOK,
    "lora": (LORA, LORA_OF_MLPS),
}

ALL_STREAMED = (STREAMED, STREAMED_SELECTED)

#: Whose peak memory is compared, and the bar that it is held to, if there is one.
MEMORY_BARS = {
    STREAMED: "streamed/uniform/memory",
    STREAMED_SELECTED: "streamed/selected/memory",
    SAMPLED: "",
    SAMPLED_CONCENTRATED: "step/memory/concentrated",
    SAMPLED_SELECTED: "step/memory/selected",
}

#: They train adapters in the model, by peft.
ADAPTERS = (LORA, LORA_OF_MLPS, SHIRA, SUPER_TUNING)

#: What the bars are about.
HELD = (
    FULL,
    *ALL_INDEX_AND_HOOK,
    *ALL_STREAMED,
    *ALL_SAMPLED,
    LORA,
    LORA_OF_MLPS,
    FLOOR,
)

#: Streamed mode leaves frozen matrices to torch, which is so slow at them in bf16
#: (:mod:`..baselines.frozen`) that these steps would take a third of the time there is for all.
HELD_IN_BF16 = tuple(name for name in HELD if name != STREAMED_SELECTED)

#: Measured in fp32 only: no bar is about these.
PEERS = (MASKED, SPARSE_ADAM, SHIRA, SUPER_TUNING, ADAMW_8BIT)


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
        mask: that it is given, and checked at: ``uniform``, ``concentrated`` or ``selected``.
        covers: what it trains if that is not the mask's entries by AdamW.
        role: whose it is.
    """

    method: Method
    mask: str = "uniform"
    covers: str = ""
    role: str = OURS


WAYS: dict[str, Way] = {
    FULL: Way(full_adamw.full_adamw, covers=full_adamw.COVERS, role=BASELINE),
    **{
        name: Way(index_and_hook.index_and_hook, mask, index_and_hook.COVERS, BASELINE)
        for name, mask in zip(ALL_INDEX_AND_HOOK, MASKS, strict=True)
    },
    STREAMED: Way(streamed),
    STREAMED_SELECTED: Way(streamed, "selected"),
    **{name: Way(sampled, mask) for name, mask in zip(ALL_SAMPLED, MASKS, strict=True)},
    LORA: Way(lora.lora, covers=lora.COVERS, role=BASELINE),
    LORA_OF_MLPS: Way(lora.lora_of_mlps, covers=lora.COVERS, role=BASELINE),
    MASKED: Way(masked_adamw.masked_adamw, covers=masked_adamw.COVERS, role=BASELINE),
    SPARSE_ADAM: Way(sparse_adam.sparse_adam, covers=sparse_adam.COVERS, role=BASELINE),
    SHIRA: Way(shira.shira, covers=shira.COVERS, role=BASELINE),
    SUPER_TUNING: Way(super_tuning.super_tuning, covers=super_tuning.COVERS, role=BASELINE),
    ADAMW_8BIT: Way(adamw8bit.adamw8bit, covers=adamw8bit.COVERS, role=BASELINE),
    FLOOR: Way(frozen.frozen, covers=frozen.COVERS, role=outcome.FLOOR),
}


def run(setting: Setting) -> Outcome:
    """Every method on its own copy of the model, in fp32 and bf16; then each one's memory.

    The copies of all of them at once would not fit into the memory of a small machine: peers that
    no bar is about have a group of their own, beside full fine-tuning, the floor and ours.
    """
    work = with_concentrated_mask(workload(setting), setting.density)
    outcome = Outcome()
    if setting.dtype == "fp32":
        outcome += _times(work, "fp32", HELD, setting)
        if not setting.bars_only:
            outcome += _times(work, "fp32", (FULL, *PEERS, SAMPLED, FLOOR), setting, " (peers)")
    outcome += _times(work, "amp_bf16", HELD_IN_BF16, setting)
    names = dict.fromkeys([*(timing.name for timing in outcome.timings), STREAMED_SELECTED])
    outcome += _memories(work, setting, list(names))
    return outcome


def _group(precision: str, setting: Setting) -> str:
    return f"training step in {precision}, {setting.images} images and {setting.prompts} prompts"


def _times(
    work: Workload, precision: str, names: Sequence[str], setting: Setting, which: str = ""
) -> Outcome:
    """Times of what can be measured here, and a figure for each method that cannot."""
    task = replace(work.task, precision=precision)
    effort = replace(setting.steps, warm_up=1)  # a first round is up to a tenth slower
    contenders, left_out = [], []
    for name in names:
        try:
            contenders.append(contender(name, work, task))
        except MeasurementError as reason:
            left_out.append(Figure(f"{name} measured", 0, "", note=str(reason)))
    # Their copies of the model are freed before others, and other processes, need the memory.
    times = measure(_group(precision, setting) + which, contenders, effort)
    figures = _peer_figures(times) if which else _held_figures(times, precision)
    return Outcome(list(times.values()), [*figures, *left_out])


def _held_figures(times: dict[str, Timing], precision: str) -> list[Figure]:
    streamed = _streamed_figures(times) if precision == "fp32" else []
    return [*streamed, *_sampled_figures(times, precision)]


def _peer_figures(times: dict[str, Timing]) -> list[Figure]:
    return [
        times_as_long(f"training step in fp32: {SAMPLED} against {name}", times[SAMPLED], timing)
        for name, timing in times.items()
        if name in PEERS
    ]


def _streamed_figures(times: dict[str, Timing]) -> list[Figure]:
    def as_long(name: str) -> Figure:
        what = f"training step against full fine-tuning's: {name}"
        return times_as_long(what, times[name], times[FULL])

    return [
        held_to("streamed/uniform/time", as_long(STREAMED)),
        held_to("streamed/selected/time", as_long(STREAMED_SELECTED)),
        as_long(FLOOR),
    ]


def _sampled_figures(times: dict[str, Timing], precision: str) -> list[Figure]:
    return [
        held_to(
            f"step/{precision}/{WAYS[name].mask}/{key}",
            times_as_long(
                f"training step in {precision}: {name} against {rival.name}", times[name], rival
            ),
        )
        for name in ALL_SAMPLED
        for key, rivals in OTHERS.items()
        if (rival := _fastest(rivals, WAYS[name].mask, times)) is not None
    ]


def _fastest(rivals: Sequence[str], mask: str, times: dict[str, Timing]) -> Timing | None:
    """Of those that were not left out, and train this mask or something else."""
    found = [
        times[rival]
        for rival in rivals
        if rival in times and (WAYS[rival].mask == mask or WAYS[rival].covers)
    ]
    return min(found, key=lambda timing: timing.calm, default=None)


def _memory_figures(memory: dict[str, Memory], numel: int) -> list[Figure]:
    """Of what could be measured."""
    if FULL not in memory or FLOOR not in memory:
        return []
    full, floor = memory[FULL].peak, memory[FLOOR].peak

    def below_full(name: str) -> Figure:
        what = f"peak memory below full fine-tuning's, per parameter: {name}"
        return Figure(what, (full - memory[name].peak) / numel, "bytes")

    def above_floor(name: str) -> Figure:
        what = f"peak memory above the floor's, in percent of what full fine-tuning adds: {name}"
        return Figure(what, 100 * (memory[name].peak - floor) / max(full - floor, 1), "%")

    figures = [below_full(FLOOR)]
    for name, bar in MEMORY_BARS.items():
        if name in memory:
            figure = below_full(name) if name in ALL_STREAMED else above_floor(name)
            figures.append(held_to(bar, figure) if bar else figure)
    return figures


def contender(name: str, work: Workload, task: Task) -> Contender:
    """A step reads every weight forward and backward, and does at least what is counted."""
    model = copy.deepcopy(task.model)
    way = WAYS[name]
    step = way.method(model, work.masks[way.mask], task.loss)
    flops, weights = Flops(), sum(param.nbytes for param in candidates(task.model).values())
    needs = flops.needs(2 * weights, PRODUCTS[task.precision])
    check = flops.checked(_check(name, model, work, task.precision))
    return Contender(name, step, check, needs=needs, covers=way.covers, role=way.role)


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
    step is little more than their sign: there most of the larger ones must have the same, if the
    weights are not so coarse that a step does not move them. The 8-bit AdamW is held to the
    specification as the others are, since its first step has no rounded moments yet.
    """
    base, mask = candidates(work.task.model), work.masks[WAYS[name].mask]
    if name == SPARSE_ADAM:
        require_stepped(params, sparse_adam.first_step(base, work.gradients, mask), mask)
    elif name != FLOOR and precision == "fp32":
        sums = work.gradients if name in ALL_SAMPLED else None
        require_stepped(params, reference_step(base, work.gradients, mask), mask, sums)
    elif name != FLOOR and all(weight.dtype == torch.float32 for weight in base.values()):
        require_moved(params, base, work.gradients, mask)
    if name not in (FULL, ADAMW_8BIT):
        require_untouched(params, base, None if name == FLOOR else mask)


def _memories(work: Workload, setting: Setting, names: Sequence[str]) -> Outcome:
    """Of every method, at the precision that its weights have."""
    precision = "fp32" if setting.dtype == "fp32" else "amp_bf16"
    outcome, memory = Outcome(), {}
    with TemporaryDirectory() as folder:
        files = {kind: str(Path(folder, f"{kind}.safetensors")) for kind in work.masks}
        for kind, mask in work.masks.items():
            mask.save(files[kind])
        for name in names:
            try:
                memory[name] = peak_memory(
                    f"{__name__}:steps",
                    name=name,
                    mask=files[WAYS[name].mask],
                    model=setting.model,
                    images=setting.images,
                    prompts=setting.prompts,
                    dtype=setting.dtype,
                    precision=precision,
                    pretrained=setting.pretrained,
                )
            except MeasurementError as reason:  # too large for this machine, perhaps
                missing = Figure(f"memory of {name} measured", 0, "", note=str(reason))
                outcome.figures.append(missing)
    group = _group(precision, setting)
    outcome.memory += [memory_use(group, n, each, WAYS[n]) for n, each in memory.items()]
    outcome.figures += _memory_figures(memory, work.numel)
    return outcome


def memory_use(group: str, name: str, memory: Memory, way: Way) -> MemoryUse:
    """What a process of its own needed, for the record."""
    return MemoryUse(group, name, way.covers, way.role, **asdict(memory))


def steps(name: str, *arguments: Any, **options: Any) -> TrainingWork:
    """The work whose memory is measured, of one method; arguments as in :func:`training_work`."""
    return training_work(WAYS[name].method, *arguments, **options)


def training_work(
    method: Method,
    mask: str,
    model: str,
    images: int,
    prompts: int,
    dtype: str = "fp32",
    precision: str = "fp32",
    device: str = "cpu",
    pretrained: str = RANDOM,
) -> TrainingWork:
    """Steps of a method: a small one, which makes the state, and whole ones."""
    own = replace(make_task(model, images, prompts, pretrained), precision=precision)
    own.model.to(DTYPES[dtype])
    if device != "cpu":  # it makes a copy
        own = own.to(torch.device(device))
    batches = chain([own.part(1)], repeat(own))
    step = method(own.model, CooMask.load(mask), lambda model: next(batches).loss(model))
    return TrainingWork(
        step,
        own.model,
        optimizer=getattr(step, "optimizer", None),
        batch=[t for t in (own.images, own.labels, own.tokens) if t is not None],
        device=torch.device(device),
    )
