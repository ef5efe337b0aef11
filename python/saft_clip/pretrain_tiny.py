"""Pretrain the built-in tiny CLIP from scratch: ``python -m saft_clip.pretrain_tiny``.

The result is a stand-in that lets anyone run everything offline. It is a real open_clip model, but
a tiny one, and it knows digits and capital letters only. Real CLIP weights load by name where the
network allows.

How it is trained: glyphs of matplotlib's fonts and part of MNIST, kept as distance fields, are
rendered anew in every batch in random poses, lines, colours and sharpness
(:mod:`saft_clip.domains.augment`). The loss is contrastive between images and captions. The weights
that are saved are a moving average. What may be used here, and what is kept for testing, is said in
:mod:`saft_clip.domains`.

Why a plain contrastive run sits on a plateau, and what was done about it. In an earlier trial
(patch 8, 1,600 steps of 256) the loss hardly moved for 300 steps, and the result was weak. Pilots
of 200 steps of 64 images (patch 4, augmentation of strength 0.4) measured the share of training
images that find their class among the 36, over the last 25 steps:

====================================================================  =====
class token, learned positions, AdamW                                  9.8%
the same, the text tower warmed up alone for 100 steps                16.4%
and mean pooling, fixed sine-cosine positions                         19.7%
and Muon (lr 0.01) for the image tower's weight matrices              51.4%
====================================================================  =====

- At the start the captions of *different* classes are nearly parallel (mean cosine 0.91: they share
  all words but one), while those of the *same* class differ more (0.56: they share one word). The
  image tower is thus given almost the same target for every class. A hundred steps of the text
  tower alone, in which captions of one class attract each other, cost seconds and bring the mean
  cosine between classes to -0.02.
- A ViT has to find out first that neighbouring patches belong together. Fixed sine-cosine positions
  and mean pooling help a little. Muon (https://kellerjordan.github.io/posts/muon) helped most in
  these pilots; the weights that ship were trained with AdamW all the same, which needs more steps.
- Full augmentation from the first step hides the shapes from a model that knows none: its strength
  grows from a tenth, over nearly half of the steps.
- Images of one class in a batch are no negatives of each other (the loss is class-aware), and
  neither are classes that look alike in many renderings, such as 0 and O. Small batches give more
  steps for the same time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from saft_clip.console import console, output, progress, say
from saft_clip.data import load_dataset
from saft_clip.domains import DOMAINS, mnist_bitmaps, mnist_indices
from saft_clip.domains.augment import random_renderings
from saft_clip.domains.glyphs import CANVAS, DIGITS, LETTERS, distance_field, glyph_fields
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.evaluate import Evaluation, evaluate_zero_shot
from saft_clip.models import ClipModel, load_model
from saft_clip.tiny import ASSETS, OTHER_SIZES, TINY_NAME, register_tiny
from saft_kernels.errors import SaftError
from saft_kernels.files import atomic_write, make_folder

CLASSES = DIGITS + LETTERS
LOOKALIKES = (("0", "O"), ("1", "I"), ("2", "Z"), ("5", "S"))
"""Pairs that many renderings do not tell apart: never negatives of each other."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "{}",
    "{}.",
    "the digit {}.",
    "the number {}.",
    "a photo of the number {}.",
    "a photo of the digit {}.",
    "a picture of the digit {}.",
    "an image of the number {}.",
    "a handwritten digit {}.",
    "a handwritten {}.",
    "a printed digit {}.",
    "the number {} in print.",
    "a sketch of the number {}.",
    "a drawing of the digit {}.",
    "an outline of a {}.",
    "a blurry photo of the number {}.",
    "a noisy picture of the digit {}.",
    "a coloured digit {}.",
    "the figure {}.",
    "this is a {}.",
)
LETTER_CAPTIONS = (
    "{}",
    "{}.",
    "the letter {}.",
    "a photo of the letter {}.",
    "a picture of the letter {}.",
    "an image of the letter {}.",
    "the capital letter {}.",
    "a capital {}.",
    "an upper case {}.",
    "a printed letter {}.",
    "a sketch of the letter {}.",
    "a drawing of the letter {}.",
    "an outline of the letter {}.",
    "a blurry photo of the letter {}.",
    "a coloured letter {}.",
    "this is the letter {}.",
)
VALIDATION = ("mnist", "fonts", "letters", "inverted", "noisy", "sketch", "colour")

_POOL_SHARES = (0.35, 0.3, 0.35)
_TEXT_LR = 2e-3
_TEXT_SCALE = 14.0
_FIRST_STRENGTH = 0.1
_MAX_SCALE = math.log(100)
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Settings:
    """What determines the result.

    Attributes:
        steps: optimiser steps on images and captions.
        text_steps: steps of the text tower alone, before those.
        batch_size: images per step.
        lr: peak learning rate of AdamW.
        weight_decay: decay of weight matrices; embeddings, norms and biases have none.
        warmup: steps over which the learning rate rises; a cosine to zero follows.
        ramp: share of the steps in which the strength of the augmentation grows by ``strength``.
        strength: full strength of the augmentation, see
            :func:`saft_clip.domains.augment.random_renderings`.
        average: decay of the moving average of the weights, which is what is saved.
        seed: seeds the initial weights and every batch.
        model: ``saft-tiny``, or one of its siblings of another size.
    """

    steps: int = 3500
    text_steps: int = 60
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 150
    ramp: float = 0.5
    strength: float = 0.8
    average: float = 0.997
    seed: int = 0
    model: str = TINY_NAME

    def check(self) -> None:
        """Raise a :class:`ConfigError` if a value is out of range."""
        if self.model not in (TINY_NAME, *OTHER_SIZES):
            raise ConfigError(
                f"this program pretrains {TINY_NAME}, {' and '.join(OTHER_SIZES)}, "
                f"not {self.model!r}"
            )
        if self.steps < 1 or self.batch_size < 8:
            raise ConfigError(
                f"pretraining needs at least 1 step and 8 images per step, not {self.steps} steps "
                f"of {self.batch_size}: raise --steps or --batch-size"
            )


@dataclass(frozen=True)
class Pool:
    """Shapes to draw from: ``fields`` float16 [M, 64, 64], ``labels`` int64 [M] into CLASSES."""

    fields: Tensor
    labels: Tensor


def build_pools() -> tuple[Pool, ...]:
    """The pretraining shapes: MNIST's pretraining part, digits in fonts, letters in fonts."""
    images, labels = mnist_bitmaps()
    index = mnist_indices("pretrain", labels)
    large = F.interpolate(images[index, None].float(), (CANVAS, CANVAS), mode="bicubic")[:, 0]
    bitmaps = large.clamp(0, 255).to(torch.uint8).numpy()
    handwritten = torch.stack([distance_field(bitmap) for bitmap in bitmaps])
    digits, digit_labels = glyph_fields("pretrain", DIGITS)
    letters, letter_labels = glyph_fields("pretrain", LETTERS)
    return (
        Pool(handwritten.half(), labels[index]),
        Pool(digits.half(), digit_labels),
        Pool(letters.half(), letter_labels + len(DIGITS)),
    )


def draw_batch(
    pools: Sequence[Pool], size: int, strength: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw shapes from the pools, in fixed shares, and render each.

    Returns:
        images, float32 [size, 3, 32, 32], normalised as open_clip's preprocessing does; and labels,
        int64 [size] into CLASSES.
    """
    counts = [round(share * size) for share in _POOL_SHARES[:-1]]
    counts.append(size - sum(counts))
    fields, labels = [], []
    for pool, count in zip(pools, counts, strict=True):
        rows = torch.randint(len(pool.labels), (count,), generator=generator)
        fields.append(pool.fields[rows].float())
        labels.append(pool.labels[rows])
    images = random_renderings(torch.cat(fields), strength, generator)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (images - mean) / std, torch.cat(labels)


def caption_tokens() -> list[Tensor]:
    """Every caption of every class: for each class int64 [captions, 16]."""
    register_tiny()
    tokenizer = open_clip.get_tokenizer(TINY_NAME)
    digits = [
        tokenizer([caption.format(name) for name in names for caption in DIGIT_CAPTIONS])
        for names in zip(DIGITS, DIGIT_WORDS, strict=True)
    ]
    letters = [tokenizer([caption.format(name) for caption in LETTER_CAPTIONS]) for name in LETTERS]
    return digits + letters


def draw_captions(captions: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """One random caption per class: int64 [C, L]."""
    picks = [int(torch.randint(len(tokens), (), generator=generator)) for tokens in captions]
    return torch.stack([tokens[pick] for tokens, pick in zip(captions, picks, strict=True)])


def lookalike_mask() -> Tensor:
    """bool [C, C], True where two classes are not to be negatives of each other."""
    mask = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.bool)
    for first, second in LOOKALIKES:
        row, column = CLASSES.index(first), CLASSES.index(second)
        mask[row, column] = mask[column, row] = True
    return mask


def class_aware_loss(logits: Tensor, labels: Tensor, lookalikes: Tensor) -> Tensor:
    """Symmetric contrastive loss in which all images of a class are positives of its caption.

    Follows the unified contrastive loss of Yang et al. 2022 (arXiv 2204.03610, eq. 3), with one
    caption per class.

    Args:
        logits: float32 [N, C], scaled similarity of each image to one caption of each class.
        labels: int64 [N].
        lookalikes: bool [C, C], pairs of classes left out of each other's denominator.

    Returns:
        The mean of the image-to-text and the text-to-image loss, a scalar.
    """
    logits = logits.masked_fill(lookalikes[labels], float("-inf"))
    image_to_text = F.cross_entropy(logits, labels)
    own = labels[None] == torch.arange(logits.shape[1])[:, None]
    present = own.any(1)
    shares = logits.T[present].log_softmax(1).masked_fill(~own[present], 0.0)
    text_to_image = -(shares.sum(1) / own[present].sum(1)).mean()
    return (image_to_text + text_to_image) / 2


class Trainer:
    """The model, its optimiser and its moving average; each step draws from its own seed."""

    def __init__(self, settings: Settings) -> None:
        register_tiny()
        self.settings = settings
        self.step = 0
        self.minutes = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.model: Any = load_model(settings.model, "random").model.train()
        self.captions = caption_tokens()
        self.lookalikes = lookalike_mask()
        self.optimizer = _optimizer(self.model, settings)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.average)
        )

    def warm_text(self) -> float:
        """Teach the text tower which captions are of the same class; returns the last loss."""
        text = [p for n, p in self.model.named_parameters() if _is_text(n) and p.requires_grad]
        optimizer = torch.optim.AdamW(text, lr=_TEXT_LR, weight_decay=0.0)
        classes = torch.arange(len(CLASSES))
        last = math.nan
        for step in range(self.settings.text_steps):
            generator = torch.Generator().manual_seed(step)
            first, second = (
                self.model.encode_text(draw_captions(self.captions, generator), normalize=True)
                for _ in range(2)
            )
            logits = (first @ second.T * _TEXT_SCALE).masked_fill(self.lookalikes, float("-inf"))
            loss = F.cross_entropy(logits, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = float(loss.detach())
        return last

    def train_step(self, pools: Sequence[Pool]) -> float:
        """One optimiser step on freshly drawn images and captions; returns the loss."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * _SEED_STRIDE + self.step)
        grown = min(1.0, _FIRST_STRENGTH + self.step / settings.steps / settings.ramp)
        images, labels = draw_batch(
            pools, settings.batch_size, settings.strength * grown, generator
        )
        tokens = draw_captions(self.captions, generator)
        self._set_learning_rate()
        with torch.autocast("cpu", torch.bfloat16):
            image_features = self.model.encode_image(images, normalize=True)
            text_features = self.model.encode_text(tokens, normalize=True)
        logits = image_features.float() @ text_features.float().T * self.model.logit_scale.exp()
        loss = class_aware_loss(logits, labels, self.lookalikes)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, _MAX_SCALE)
        self.average.update_parameters(self.model)
        self.step += 1
        return float(loss.detach())

    def save_checkpoint(self, path: Path) -> None:
        """Write everything that the next step depends on to one safetensors file, atomically."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        # The average starts as a copy; safetensors wants every tensor to own its memory.
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(self.step), "minutes": str(self.minutes)}
        metadata["settings"] = json.dumps(asdict(self.settings))
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def from_checkpoint(cls, path: Path) -> Trainer:
        """Restore what :meth:`save_checkpoint` wrote.

        Raises:
            CheckpointError: the file is missing, broken, or no checkpoint of this program.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            trainer = cls(Settings(**json.loads(metadata["settings"])))
            trainer.model.load_state_dict(_under(tensors, "model."))
            trainer.average.load_state_dict(_under(tensors, "average."))
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _under(tensors, "optimizer.").items():
                index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
            groups = trainer.optimizer.state_dict()["param_groups"]
            trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
            trainer.step = int(metadata["step"])
            trainer.minutes = float(metadata["minutes"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is not a complete checkpoint of this program ({error}): "
                "start again without --resume"
            ) from error
        return trainer

    def _set_learning_rate(self) -> None:
        warmup, steps = self.settings.warmup, self.settings.steps
        progressed = max(0, self.step - warmup) / max(1, steps - warmup)
        factor = min(1.0, (self.step + 1) / warmup) * (1 + math.cos(math.pi * progressed)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor


def _is_text(name: str) -> bool:
    return not name.startswith("visual.") and name != "logit_scale"


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embedding" not in name
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights as fp16 safetensors, atomically, for open_clip to load by path."""
    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def evaluate_domains(clip: ClipModel, names: Sequence[str], split: str) -> dict[str, Evaluation]:
    """Zero-shot evaluation on one split of each named domain, in fp32."""
    return {
        name: evaluate_zero_shot(
            clip,
            load_dataset(f"builtin:{name}", split, clip.preprocess_val),
            batch_size=250,
            show_progress=False,
        )
        for name in names
    }


def write_card(path: Path, clip: ClipModel, settings: Settings, minutes: float) -> dict[str, Any]:
    """Evaluate the finished weights on every test set and write the model card.

    Args:
        path: the JSON file to write.
        clip: the model, loaded from the weights that ship.
        settings: what it was trained with.
        minutes: wall time of the training, on ``torch.get_num_threads()`` threads.

    Returns:
        The card.
    """
    results = evaluate_domains(clip, tuple(DOMAINS), "test")
    card = {
        "model": settings.model,
        "purpose": "a tiny stand-in that lets anyone run everything offline; it knows digits and "
        "capital letters and nothing else",
        "parameters": sum(p.numel() for p in clip.model.parameters()),
        "rebuild": "python -m saft_clip.pretrain_tiny",
        "settings": asdict(settings),
        "training": {
            "minutes": round(minutes, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "zero_shot": {
            name: {
                "images": result.n,
                "classes": len(result.per_class),
                "top1": round(result.top1, 4),
                "top1_stderr": round(result.top1_stderr, 4),
                "mean_per_class": round(result.mean_per_class, 4),
            }
            for name, result in results.items()
        },
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def pretrain(
    trainer: Trainer,
    *,
    minutes: float | None = None,
    checkpoint: Path | None = None,
    validate_every: int = 500,
) -> None:
    """Train to the last step, or until the time is up.

    Args:
        trainer: a new or a restored trainer.
        minutes: stop after this many minutes in all; None for no limit.
        checkpoint: where to save the state, at each validation and at the end.
        validate_every: steps between evaluations on the validation splits.
    """
    started = time.monotonic() - 60 * trainer.minutes
    if trainer.step == 0:
        say(f"text tower: loss {trainer.warm_text():.4f} after {trainer.settings.text_steps} steps")
    pools = build_pools()
    remaining = trainer.settings.steps - trainer.step
    smoothed: float | None = None
    with progress("pretraining", remaining, unit="steps") as advance:
        for _ in range(remaining):
            loss = trainer.train_step(pools)
            smoothed = loss if smoothed is None else 0.98 * smoothed + 0.02 * loss
            advance(1, note=f"loss {smoothed:.3f}")
            trainer.minutes = (time.monotonic() - started) / 60
            out_of_time = minutes is not None and trainer.minutes > minutes
            if trainer.step % validate_every == 0 or trainer.step == trainer.settings.steps:
                say(
                    f"step {trainer.step}, loss {smoothed:.3f}, {trainer.minutes:.1f} min: "
                    + _validate(trainer)
                )
            if checkpoint and (trainer.step % validate_every == 0 or out_of_time):
                trainer.save_checkpoint(checkpoint)
            if out_of_time:
                say(f"stopped after {trainer.step} of {trainer.settings.steps} steps: time is up")
                break


def _validate(trainer: Trainer) -> str:
    clip = replace(load_model(trainer.settings.model, "random"), model=trainer.average.module)
    results = evaluate_domains(clip, VALIDATION, "val")
    return ", ".join(f"{name} {result.top1:.3f}" for name, result in results.items())


def main(
    output_folder: Annotated[
        Path, typer.Option("--output", help="Folder for the weights and the model card.")
    ] = ASSETS,
    model: Annotated[
        str, typer.Option(help="saft-tiny, saft-tiny-small or saft-tiny-large.")
    ] = TINY_NAME,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = Settings.batch_size,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = Settings.lr,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = Settings.seed,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop early after this many minutes in all; weights are saved."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to save the training state to, every 500 steps.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from --checkpoint, with the settings saved in it.")
    ] = False,
) -> None:
    """Pretrain the tiny CLIP from scratch on rendered glyphs and part of MNIST.

    Writes MODEL.safetensors (fp16) and MODEL-card.json, which holds the zero-shot accuracy
    on every built-in domain. The model is a stand-in that lets anyone run everything offline: it
    knows digits and capital letters, and nothing else.
    """
    try:
        torch.set_num_threads(threads)
        settings = Settings(steps=steps, batch_size=batch_size, lr=lr, seed=seed, model=model)
        settings.check()
        if resume and checkpoint is None:
            raise ConfigError("--resume needs --checkpoint FILE, the file to go on from")
        make_folder(output_folder)
        trainer = (
            Trainer.from_checkpoint(checkpoint) if resume and checkpoint else Trainer(settings)
        )
        pretrain(trainer, minutes=minutes, checkpoint=checkpoint)
        name = trainer.settings.model
        weights = output_folder / f"{name}.safetensors"
        save_weights(trainer.average.module, weights)
        clip = load_model(name, str(weights))
        card_file = output_folder / f"{name}-card.json"
        card = write_card(card_file, clip, trainer.settings, trainer.minutes)
        _show(card)
    except SaftError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _show(card: dict[str, Any]) -> None:
    table = Table("domain", "images", "classes", "zero-shot top-1")
    for name, result in card["zero_shot"].items():
        accuracy = f"{100 * result['top1']:.1f} ± {100 * result['top1_stderr']:.1f} %"
        table.add_row(name, str(result["images"]), str(result["classes"]), accuracy)
    output.print(table)


if __name__ == "__main__":
    typer.run(main)
