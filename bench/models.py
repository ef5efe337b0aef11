"""What the cases work on: a model of open_clip or timm, a batch, its gradients, and two masks.

The weights are random unless a tag or file is named, as no trained ones can be had everywhere; the
gradients come from a genuine backward pass of the fine-tuning loss.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.methods.base import FROZEN, prompt_loss
from saft_clip.models import RANDOM, autocast, load_model
from saft_clip.prompts import class_prompts
from saft_clip.tiny import TINY_NAME
from saft_kernels import CooMask, select
from saft_kernels.errors import SaftError

from .harness import Effort
from .memory import MeasurementError

#: Of every AdamW here: the paper's.
ADAMW: dict[str, Any] = {"lr": 5e-6, "weight_decay": 0.1}

CACHE_LINE = 64

#: Shares of a weight's columns and rows that hold the entries of a concentrated mask: what the
#: largest mean gradients of a pretrained sentence encoder touched (MiniLM with a sentiment loss).
COLUMNS, ROWS = 0.08, 0.32

#: Where tensors are that several contenders share.
CPU = torch.device("cpu")

_SEED = 0


#: Of weights and gradients: name on the command line -> dtype.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class SettingError(SaftError, ValueError):
    """What is asked for cannot be measured; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What to measure on, and how long.

    Attributes:
        model: a name of open_clip or timm, or ``saft-tiny``.
        pretrained: tag or file of its weights; ``random``: only its shapes matter.
        images: in a batch.
        prompts: in a batch, one per class.
        density: share of the parameters that is selected.
        dtype: of weights and gradients, a name in ``DTYPES``.
        backend: of the kernels; None: the device's own.
        threads: of a CPU; None: torch's choice.
        kernels: how often short work is timed.
        steps: how often training steps are timed.
        bars_only: leave out rivals that no bar is about.
    """

    model: str = "ViT-B-16"
    pretrained: str = RANDOM
    images: int = 16
    prompts: int = 16
    density: float = 1e-3
    dtype: str = "fp32"
    backend: str | None = None
    threads: int | None = None
    kernels: Effort = field(default_factory=Effort)
    steps: Effort = field(default_factory=lambda: Effort(400, 7, 20, warm_up=0))
    bars_only: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and gradients."""
        return DTYPES[self.dtype]

    @property
    def has_bars(self) -> bool:
        """Whether it is what the bars were set for."""
        usual = Setting(kernels=self.kernels, steps=self.steps, threads=self.threads)
        return replace(self, backend=None, bars_only=False) == usual

    @property
    def small(self) -> bool:
        """Whether sizes that are not the model's are to be tiny ones, too."""
        return self.model == TINY_NAME


#: Shows in seconds whether every case runs; what it measures means nothing.
SMOKE = Setting(
    model=TINY_NAME,
    images=4,
    prompts=4,
    density=1e-2,
    kernels=Effort(0.0, 2, 2, warm_up=0),
    steps=Effort(0.0, 2, 2, warm_up=0),
)


@dataclass(frozen=True)
class Task:
    """A model in training mode and one batch for it.

    Attributes:
        model: of open_clip or timm.
        images: float32 [B, 3, H, W].
        labels: int64 [B].
        tokens: int64 [C, 1, L], one prompt for each of C classes; None for an image classifier.
        precision: of the forward pass, as ``saft finetune --precision`` has it.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    tokens: Tensor | None
    precision: str = "fp32"

    def loss(self, model: nn.Module) -> Tensor:
        """The fine-tuning loss of a copy of the model on the batch (SAFT, Eq. 1)."""
        if self.tokens is not None:
            return prompt_loss(model, self.images, self.labels, self.tokens, self.precision)
        with autocast(self.precision, self.images.device):
            logits = model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def to(self, device: torch.device) -> Task:
        """A copy of it on a device."""
        return replace(
            self,
            model=copy.deepcopy(self.model).to(device),
            images=self.images.to(device),
            labels=self.labels.to(device),
            tokens=None if self.tokens is None else self.tokens.to(device),
        )

    def part(self, size: int) -> Task:
        """The same model with the first images and prompts only."""
        tokens = None if self.tokens is None else self.tokens[:size]
        labels = self.labels[:size]
        if tokens is not None:
            labels = labels % len(tokens)
        return replace(self, images=self.images[:size], labels=labels, tokens=tokens)


def candidates(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the two encoders by name; the paper trains no others."""
    return {name: param for name, param in model.named_parameters() if name not in FROZEN}


def make_task(model: str, images: int, prompts: int, pretrained: str = RANDOM) -> Task:
    """Build the model, and a batch of smooth random images and prompts for real class names.

    Raises:
        SettingError: if neither open_clip nor timm has a model of this name.
        ModelError: if its weights cannot be had.
    """
    torch.manual_seed(_SEED)
    if has_text_tower(model):
        return _clip_task(model, images, prompts, pretrained)
    if timm.is_model(model):
        return _classifier_task(model, images, pretrained)
    near = difflib.get_close_matches(model, [*open_clip.list_models(), *timm.list_models()], n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise SettingError(f"neither open_clip nor timm has a model {model!r}{hint}")


def has_text_tower(model: str) -> bool:
    """Whether it is one of open_clip's."""
    return model == TINY_NAME or model in open_clip.list_models()


def require_clip(setting: Setting) -> None:
    """Make sure that the model has a text tower.

    Raises:
        MeasurementError: if it has none.
    """
    if not has_text_tower(setting.model):
        raise MeasurementError(
            f"it needs a model with a text tower, one of open_clip's, and {setting.model} is none"
        )


def _clip_task(model: str, images: int, prompts: int, pretrained: str) -> Task:
    """An open_clip model; what the paper does not train is frozen."""
    clip = load_model(model, pretrained)
    clip.model.train()
    for name in FROZEN:
        param = dict(clip.model.named_parameters()).get(name)
        if param is not None:
            param.requires_grad_(False)
    visual: Any = clip.model.visual
    size = visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    names = open_clip.IMAGENET_CLASSNAMES
    if not 1 <= prompts <= len(names):
        raise SettingError(f"between 1 and {len(names)} prompts can be had, not {prompts}")
    return Task(
        clip.model,
        _smooth_images(images, height, width),
        torch.arange(images) % prompts,
        class_prompts(
            names[:: len(names) // prompts][:prompts], ["a photo of a {}."], clip.tokenizer
        ),
    )


def _classifier_task(model: str, images: int, pretrained: str) -> Task:
    """A timm model with its classifier; dropout is off, so that a step can be checked."""
    options: dict[str, Any] = {"drop_rate": 0.0}
    if pretrained == RANDOM:
        options["pretrained"] = False
    elif pretrained.endswith((".safetensors", ".pth", ".bin")):
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": pretrained}}
    else:
        model, options["pretrained"] = f"{model.partition('.')[0]}.{pretrained}", True
    classifier = timm.create_model(model, **options).train()
    _, height, width = timm.data.resolve_model_data_config(classifier)["input_size"]
    labels = torch.arange(images) % classifier.num_classes
    return Task(classifier, _smooth_images(images, height, width), labels, None)


def _smooth_images(count: int, height: int, width: int) -> Tensor:
    """Random patches of colour and some noise; noise alone would look all the same to a model."""
    patches = F.interpolate(torch.randn(count, 3, 14, 14), (height, width), mode="bilinear")
    return patches + 0.2 * torch.randn(count, 3, height, width)


@dataclass(frozen=True)
class Workload:
    """A task, its loss and gradients, and the masks. Nobody may change these tensors.

    Attributes:
        task: model and batch.
        loss: of the batch, in fp32.
        gradients: by parameter name, contiguous, in the weights' dtype.
        masks: ``uniform``, the worst case: nearly every entry on a page of its own; ``selected``,
            what :func:`saft_kernels.select` chose on the batch.
    """

    task: Task
    loss: float
    gradients: dict[str, Tensor]
    masks: dict[str, CooMask]

    @property
    def numel(self) -> int:
        """The number of candidate entries, D."""
        return sum(gradient.numel() for gradient in self.gradients.values())


def workload(setting: Setting, device: torch.device = CPU) -> Workload:
    """Everything that the cases share, made once; loss and mask are those of fp32 weights.

    Args:
        setting: model and batch.
        device: where loss and gradients are computed; the result is on the CPU.
    """
    return _workload(setting, device)


@cache
def _workload(setting: Setting, device: torch.device) -> Workload:
    own = make_task(setting.model, setting.images, setting.prompts, setting.pretrained)
    there = own if device == CPU else own.to(device)
    selected = selected_mask(there, setting.density)
    loss = there.loss(there.model)
    loss.backward()
    gradients = {
        name: _take_gradient(param).to(CPU, setting.torch_dtype)
        for name, param in candidates(there.model).items()
    }
    masks = {"uniform": uniform_mask(own.model, setting.density), "selected": selected}
    own.model.to(setting.torch_dtype)
    return Workload(own, loss.item(), gradients, masks)


def _take_gradient(param: nn.Parameter) -> Tensor:
    gradient, param.grad = param.grad, None
    return torch.zeros_like(param) if gradient is None else gradient.contiguous()


def uniform_mask(model: nn.Module, density: float) -> CooMask:
    """Entries drawn uniformly from all candidates."""
    return select(model, density=density, score="random", exclude=list(FROZEN), seed=_SEED)


def concentrated_mask(model: nn.Module, density: float) -> CooMask:
    """As many entries in every matrix as the uniform mask has, in few of its rows and columns.

    What ``select`` finds with random weights lies almost all in the text tower, and costs nothing
    in the image tower. Masks of trained models have their entries in every layer: this is like one.
    """
    weights = dict(model.named_parameters())
    indices = {}
    for name, flat in uniform_mask(model, density).items():
        weight = weights[name]
        if weight.dim() > 1:
            width = weight[0].numel()
            flat = concentrated_entries(weight.numel() // width, width, flat.numel())
        indices[name] = flat.sort().values.to(torch.int32)
    return CooMask.from_indices(model, indices)


def with_concentrated_mask(work: Workload, density: float) -> Workload:
    """The same work, with a mask ``concentrated``, which whole steps are measured with."""
    mask = concentrated_mask(work.task.model, density)
    return replace(work, masks={**work.masks, "concentrated": mask})


def selected_mask(task: Task, density: float) -> CooMask:
    """The entries with the largest gradients on the task's batch."""
    return select(
        task.model,
        lambda model, batch: task.loss(model),
        [task.images],
        density=density,
        exclude=list(FROZEN),
    )


def cache_lines(mask: CooMask, tensors: Mapping[str, Tensor]) -> int:
    """How many cache lines hold the selected entries."""
    return sum(lines_touched(indices, tensors[name]) for name, indices in mask.items())


def lines_touched(indices: Tensor, tensor: Tensor, line: int = CACHE_LINE) -> int:
    """How many lines of a contiguous tensor hold the entries at sorted flat indices."""
    return (indices // (line // tensor.element_size())).unique_consecutive().numel()


def uniform_entries(height: int, width: int, count: int) -> Tensor:
    """Flat indices anywhere in a weight of this size."""
    return _some(height * width, count)


def concentrated_entries(height: int, width: int, count: int) -> Tensor:
    """As many, in a few rows and columns; all of these if they have no more."""
    rows = _some(height, max(1, int(ROWS * height)), seed=1)
    columns = _some(width, max(1, int(COLUMNS * width)), seed=2)
    block = _some(len(rows) * len(columns), count)
    return rows[block // len(columns)] * width + columns[block % len(columns)]


def _some(among: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = min(max(count, 1), among)
    return torch.randperm(among, generator=generator)[:count].sort().values
