"""What every method of fine-tuning has in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.batches import Batches
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.evaluate import Scores, embed_classes, image_features, zero_shot_scores
from saft_clip.models import ClipModel, autocast
from saft_clip.prompts import ClassPrompts
from saft_kernels.errors import NonFiniteGradientError

#: Parameters that are never trained: the paper's theta is the two encoders.
FROZEN = ("logit_scale", "logit_bias")

#: What names of tensors begin with that are trained beside the model's own: heads, prompts.
BESIDE = "adapter."


class Method(ABC):
    """One way to fine-tune: what is trained, how, on which loss, and what comes out.

    The training loop calls :meth:`prepare` once, then :meth:`loss`, :meth:`step` and
    :meth:`after_step`; :meth:`scores` classifies images at any time; checkpoints hold
    :meth:`state_dict`; in the end :meth:`finish` makes the result and :meth:`export` writes it.

    Args:
        clip: the pretrained model, on its device; it is changed in place.
        prompts: of the classes that are trained on.
        config: the run's settings.

    Raises:
        ConfigError: if a mask is given to a method that takes none, or the method cannot train a
            model of this kind.
    """

    #: What ``--method`` calls it.
    name: ClassVar[str]
    #: The file that :meth:`export` writes.
    artefact: ClassVar[str]
    #: Whether ``--mask`` can say what it trains.
    takes_mask: ClassVar[bool] = False
    optimizer: torch.optim.Optimizer

    def __init__(self, clip: ClipModel, prompts: ClassPrompts, config: FinetuneConfig) -> None:
        if config.mask is not None and not self.takes_mask:
            raise ConfigError(f"--method {self.name} takes no --mask: leave one of them out")
        self.clip = clip
        self.model = clip.model
        self.config = config
        self.device = torch.device(config.device)
        self.prompts = prompts
        for name, param in self.model.named_parameters():
            param.requires_grad_(name not in FROZEN)

    @abstractmethod
    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Decide what is trained and make the optimizer.

        Args:
            batches: the training data in order, not augmented; may be gone through repeatedly.
            folder: of the run: what takes long to decide is kept there, and found there on resume.
        """

    @cached_property
    def tokens(self) -> Tensor:
        """The prompts of the classes that are trained on: int64 [C, T, L], on the device."""
        return self.prompts.tokens.to(self.device)

    def check_classes(self, names: Sequence[str]) -> None:  # noqa: B027
        """Make sure that images can be classified among these classes, before anything is trained.

        Raises:
            ConfigError: if a name cannot be used.
        """

    @property
    @abstractmethod
    def trained(self) -> Mapping[str, int]:
        """How many values of each tensor are trained; what is no parameter of the model, too."""

    def encoder_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the two encoders by name, each once."""
        return {n: param for n, param in self.model.named_parameters() if n not in FROZEN}

    def image_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the image encoder by name, each once."""
        return {n: p for n, p in self.encoder_parameters().items() if _of_images(n)}

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the text encoder by name, each once."""
        return {n: p for n, p in self.encoder_parameters().items() if not _of_images(n)}

    def scores(self, prompts: ClassPrompts, *, show_progress: bool = False) -> Scores:
        """How images are classified, with what has been trained so far.

        Args:
            prompts: of any classes, which need not be those that are trained on.
            show_progress: of many prompts.

        Returns:
            images float32 [B, 3, H, W] -> scores [B, C], the higher the likelier.
        """
        return zero_shot_scores(self.model, prompts, self.device, show_progress=show_progress)

    def image_features(self, images: Tensor) -> Tensor:
        """Normalised image embeddings, float32 [B, E], of images on any device."""
        return image_features(self.model, images.to(self.device))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over the class prompts (SAFT, Eq. 1), in the run's precision.

        Args:
            images: float32 [B, 3, H, W].
            labels: int64 [B].

        Returns:
            float32, without dimensions.
        """
        return prompt_loss(
            self.model,
            images.to(self.device),
            labels.to(self.device),
            self.tokens,
            self.config.precision,
        )

    @abstractmethod
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the trained gradient to at most this norm; return the norm it had."""

    def require_finite(self) -> None:
        """Make sure that training has not diverged; a loss shows it one step too late.

        Raises:
            NonFiniteGradientError: naming the first parameter that holds NaN or infinity.
        """
        for name, param in self.results():
            if not torch.isfinite(param).all():
                raise NonFiniteGradientError(
                    f"training has diverged: {name!r} holds NaN or infinity; lower --lr", name
                )

    def results(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that answers depend on, by name."""
        yield from self.model.named_parameters()

    def step(self, lr: float) -> None:
        """Take an optimizer step with this learning rate and drop the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def after_step(self, done: int, total: int) -> None:  # noqa: B027
        """Called when ``done`` of a run's ``total`` steps have been taken."""

    def way(self, base: Callable[[], nn.Module]) -> Callable[[float], None]:
        """The way from pretrained to trained weights (WiSE-FT, Wortsman et al. 2022, Eq. 1).

        Args:
            base: loads the pretrained model as it was before training.

        Returns:
            A function that puts what is trained at a share of that way: 0 is the pretrained model,
            1 what was trained, to the bit. Only methods that have ``--alpha`` have one.
        """
        raise NotImplementedError

    def finish(self, base: Callable[[], nn.Module]) -> None:  # noqa: B027
        """Turn what was trained into the result, after the last step.

        Args:
            base: loads the pretrained model as it was before training.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Trained values and optimizer state, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, on a freshly prepared method: all of it or nothing.

        Raises:
            CheckpointError: if this is no state of this method, model and mask.
            OptimizerStateError: likewise, of the optimizer.
        """

    @abstractmethod
    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write the result.

        Args:
            folder: of the run.
            base: loads the pretrained model as it was before training.

        Raises:
            FileWriteError: if the file cannot be written.
        """


def _of_images(name: str) -> bool:
    return name.startswith("visual.")


def saved_tensors(saved: Any, expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that stand for these, one for each name.

    Args:
        saved: what the checkpoint holds in their place.
        expected: name -> a tensor of the dtype and shape that is needed.
        what: they are, for the message.

    Raises:
        CheckpointError: naming the first one that is missing or does not fit.
    """
    if not isinstance(saved, Mapping) or saved.keys() != expected.keys():
        raise CheckpointError(f"it does not hold {what} of this model, or holds others too")
    for name, own in expected.items():
        found = saved[name]
        fits = isinstance(found, Tensor) and (found.dtype, found.shape) == (own.dtype, own.shape)
        if not fits:
            raise CheckpointError(
                f"its {what} do not fit: {name!r} must be {own.dtype} {list(own.shape)}"
            )
    return dict(saved)


def prompt_loss(
    model: nn.Module, images: Tensor, labels: Tensor, tokens: Tensor, precision: str
) -> Tensor:
    """SAFT's Eq. 1: the mean cross-entropy of :func:`prompt_logits`; labels are int64 [B]."""
    return F.cross_entropy(prompt_logits(model, images, tokens, precision), labels)


def prompt_logits(model: nn.Module, images: Tensor, tokens: Tensor, precision: str) -> Tensor:
    """The logits exp(logit_scale) * cosine(image, class), float32 [B, C].

    Args:
        model: an open_clip model.
        images: float32 [B, 3, H, W].
        tokens: int64 [C, T, L]; a class is the mean of its T prompts' embeddings.
        precision: ``fp32`` or ``amp_bf16``, of the encoders.
    """
    scale: Any = model.logit_scale
    with autocast(precision, images.device):
        features = image_features(model, images)
        classes = embed_classes(model, tokens)
    logits: Tensor = scale.exp() * features @ classes.float().T
    return logits


def about(method: Method) -> dict[str, str]:
    """What a file says of how it came about."""
    config = method.config
    texts = {
        "model": method.clip.name,
        "pretrained": str(method.clip.pretrained),
        "method": method.name,
        "train_data": config.train_data,
        "shots": str(config.shots),
        "seed": str(config.seed),
        "training": json.dumps(config.training()),
    }
    texts |= {key: text for key in ("license", "notes") if (text := getattr(config, key))}
    if config.force_quick_gelu:  # no weight shows it, and without it accuracy is lower
        texts["force_quick_gelu"] = "yes"
    return texts


def adamw_options(config: FinetuneConfig) -> dict[str, Any]:
    """AdamW's options; weight decay acts on every trained value."""
    return {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.wd,
    }
