"""A whole training step on 32 images and the prompts of ImageNet's 1,000 classes.

This is ``saft finetune`` at its real size: sampled gradients and packed prompts, against full
fine-tuning (fused AdamW over all weights) with the padded prompts of open_clip.

The loss couples all prompts, and the activations of 1,000 padded ones (28 GiB in a ViT-B/16's text
tower) do not fit into the memory of a small machine. There the exact gradient of the whole batch
takes two passes (GradCache; Gao et al. 2021). The first encodes every prompt and keeps nothing
but the class features. The second computes the loss and its gradient in these features, encodes
the prompts once more, a hundred at a time, and sends that gradient back through each hundred.
Activation checkpointing would encode everything twice too.

A machine with memory enough needs no first pass, so that the passes are timed apart. The second
pass alone is a lower bound of the padded step on any machine: each tower once forward and once
backward, and the optimizer. The bar holds against this bound; the sum of both is what the step
takes here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from saft_clip.evaluate import embed_classes
from saft_kernels import CooMask

from ..bars import held_to
from ..baselines.full_adamw import COVERS
from ..correctness import (
    reference_step,
    require_same_gradients,
    require_stepped,
    require_untouched,
)
from ..flops import Flops
from ..harness import Contender, Effort, measure, require
from ..models import (
    ADAMW,
    Setting,
    Task,
    candidates,
    make_task,
    require_clip,
    selected_mask,
    uniform_mask,
)
from ..outcome import BASELINE, OURS, Figure, Outcome, Timing, one_after_another
from ..ratios import times_faster
from .clip_step import sampled

IMAGES, PROMPTS = 32, 1000
SMALL_IMAGES, SMALL_PROMPTS = 4, 20

#: Padded prompts whose activations exist at a time.
CHUNK = 100

#: Of the loss and of the class features, in single precision.
TOLERANCE = 1e-4

FIRST_PASS = "full fine-tuning, padded prompts, first pass: class features"
SECOND_PASS = "full fine-tuning, padded prompts, second pass: the step, given these"


def run(setting: Setting) -> Outcome:
    """Both passes of the padded step, and a packed one for each mask."""
    require_clip(setting)
    images, prompts = (SMALL_IMAGES, SMALL_PROMPTS) if setting.small else (IMAGES, PROMPTS)
    task = make_task(setting.model, images, prompts)
    masks = {
        "uniform": uniform_mask(task.model, setting.density),
        "selected": selected_mask(task, setting.density),
    }
    padded = PaddedStep(task, CHUNK)
    found = Found()
    contenders = [
        _counted(
            task,
            FIRST_PASS,
            padded.find_classes,
            _check_first_pass(padded, task),
            BASELINE,
            "nothing: class features only",
        ),
        _counted(
            task,
            SECOND_PASS,
            padded.step,
            _check_second_pass(padded, task, masks, found),
            BASELINE,
            COVERS,
        ),
        *(_packed(kind, mask, task, found) for kind, mask in masks.items()),
    ]
    group = f"training step, {images} images and {prompts:,} prompts"
    effort = Effort(300.0, 3, 7, warm_up=0) if setting.steps.seconds else setting.steps
    first, second, *packed = measure(group, contenders, effort).values()
    figures = [
        figure
        for kind, timing in zip(masks, packed, strict=True)
        for figure in _figures(group, kind, first, second, timing)
    ]
    return Outcome([first, second, *packed], figures)


def _counted(
    task: Task,
    name: str,
    run: Callable[[], Any],
    check: Check,
    role: str = OURS,
    covers: str = "",
) -> Contender:
    """A contender whose operations are counted; it reads every weight once at least."""
    flops = Flops()
    weights = sum(param.nbytes for param in candidates(task.model).values())
    needs = flops.needs(weights)
    return Contender(name, run, flops.checked(check), needs=needs, covers=covers, role=role)


def _figures(group: str, kind: str, first: Timing, second: Timing, packed: Timing) -> list[Figure]:
    what, full = f"{group}, sampled and packed, {kind} mask", "against full and padded"
    bound = times_faster(f"{what}, {full}: lower bound, second pass alone", second, packed)
    both = one_after_another("both passes", first, second)
    return [
        held_to(f"prompt-step/{kind}", bound),
        times_faster(f"{what}, {full}: both passes", both, packed),
    ]


# Padded -------------------------------------------------------------------------------------------


class PaddedStep:
    """Full fine-tuning on padded prompts: the gradient of the whole batch, a chunk in memory.

    Args:
        task: with one prompt per class; its model is copied.
        chunk: prompts whose activations exist at a time.
    """

    def __init__(self, task: Task, chunk: int) -> None:
        self.model = copy.deepcopy(task.model)
        self.classes = torch.empty(0)
        self._task = task
        self._chunks = _tokens(task).flatten(0, 1).split(chunk)
        self._optimizer = torch.optim.AdamW(candidates(self.model).values(), fused=True, **ADAMW)

    @torch.no_grad()
    def find_classes(self) -> None:
        """The first pass: the features of all classes, which the loss needs at once."""
        self.classes = torch.cat([self._encode(tokens) for tokens in self._chunks])

    def step(self) -> Tensor:
        """The second pass: a step, from the features that the first has found."""
        classes = self.classes.detach().requires_grad_()
        loss = self._loss(classes)
        loss.backward()
        assert classes.grad is not None
        gradients = classes.grad.split([len(tokens) for tokens in self._chunks])
        for tokens, gradient in zip(self._chunks, gradients, strict=True):
            self._encode(tokens).backward(gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _encode(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        return F.normalize(model.encode_text(tokens), dim=-1)

    def _loss(self, classes: Tensor) -> Tensor:
        """As :func:`saft_clip.methods.base.prompt_loss`, from class features."""
        model: Any = self.model
        features = F.normalize(model.encode_image(self._task.images), dim=-1)
        return F.cross_entropy(model.logit_scale.exp() * features @ classes.T, self._task.labels)


def _tokens(task: Task) -> Tensor:
    """A CLIP's prompts."""
    assert task.tokens is not None
    return task.tokens


# Checks -------------------------------------------------------------------------------------------

Check = Callable[[Callable[[], Any]], None]


@dataclass
class Found:
    """The first padded step's loss and gradients, which the packed ones are checked against."""

    loss: float = float("nan")
    gradients: dict[str, Tensor] = field(default_factory=dict)


def _check_first_pass(padded: PaddedStep, task: Task) -> Check:
    """The class features are those without padding."""

    def check(run: Callable[[], Any]) -> None:
        run()
        with torch.no_grad():
            expected = embed_classes(task.model, _tokens(task))
        close = torch.allclose(padded.classes, expected, rtol=0, atol=TOLERANCE)
        require(close, "the class features are not those of packed prompts")

    return check


def _check_second_pass(
    padded: PaddedStep, task: Task, masks: Mapping[str, CooMask], found: Found
) -> Check:
    """The weights follow the gradients; packed steps are checked against these, and so they it."""

    def check(run: Callable[[], Any]) -> None:
        found.loss, found.gradients = watch(run, padded.model)
        finite = all(gradient.isfinite().all() for gradient in found.gradients.values())
        require(finite, "a gradient is not finite")
        _require_steps(padded.model, task, found.gradients, masks["uniform"])

    return check


def _packed(kind: str, mask: CooMask, task: Task, found: Found) -> Contender:
    model = copy.deepcopy(task.model)

    def check(run: Callable[[], Any]) -> None:
        loss, gradients = watch(run, model)
        close = abs(loss - found.loss) <= TOLERANCE * abs(found.loss)
        require(close, f"its loss is {loss}, not {found.loss}")
        require_same_gradients(gradients, found.gradients, mask)
        _require_steps(model, task, gradients, mask)
        require_untouched(candidates(model), candidates(task.model), mask)

    name = f"SparseAdamW, sampled gradients, packed prompts, {kind} mask"
    return _counted(task, name, sampled(model, mask, task.loss), check)


def _require_steps(
    model: nn.Module, task: Task, gradients: Mapping[str, Tensor], mask: CooMask
) -> None:
    """Where one AdamW step leads with the gradients that the optimizer was given."""
    expected = reference_step(candidates(task.model), gradients, mask)
    require_stepped(candidates(model), expected, mask)


def watch(run: Callable[[], Any], model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Take a step; its loss and the gradients that its optimizer was given, by name."""
    names = {id(param): name for name, param in candidates(model).items()}
    gradients: dict[str, Tensor] = {}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    gradients[names[id(param)]] = param.grad.to_dense()

    handle = register_optimizer_step_pre_hook(look)
    try:
        return run().item(), gradients
    finally:
        handle.remove()
