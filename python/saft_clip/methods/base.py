"""What every method of fine-tuning has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.batches import Batches
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.evaluate import embed_classes
from saft_clip.models import ClipModel, autocast
from saft_kernels.errors import NonFiniteGradientError
from saft_kernels.mask import CooMask

#: Parameters that are never trained: the paper's theta is the two encoders.
FROZEN = ("logit_scale", "logit_bias")


class Method(ABC):
    """One way to fine-tune: what is trained, how, on which loss, and what comes out.

    The training loop calls :meth:`prepare` once, then :meth:`loss` and :meth:`step`; checkpoints
    hold :meth:`state_dict`; :meth:`export` writes the result.

    Args:
        clip: the pretrained model, on its device; it is changed in place.
        tokens: int64 [C, T, L], T prompts for each of C classes.
        config: the run's settings.

    Raises:
        ConfigError: if a mask is given to a method that takes none.
    """

    #: What ``--method`` calls it.
    name: ClassVar[str]
    #: What pages call it.
    title: ClassVar[str]
    #: The file that :meth:`export` writes.
    artefact: ClassVar[str]
    #: Whether ``--mask`` can say what it trains.
    takes_mask: ClassVar[bool] = False
    #: The trained entries; None if all of the encoders' parameters are trained.
    mask: CooMask | None = None
    optimizer: torch.optim.Optimizer

    def __init__(self, clip: ClipModel, tokens: Tensor, config: FinetuneConfig) -> None:
        if config.mask is not None and not self.takes_mask:
            raise ConfigError(f"--method {self.name} takes no --mask: leave one of them out")
        self.clip = clip
        self.model = clip.model
        self.config = config
        self.device = torch.device(config.device)
        self.tokens = tokens.to(self.device)
        for name, param in self.model.named_parameters():
            param.requires_grad_(name not in FROZEN)

    @abstractmethod
    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Decide what is trained and make the optimizer.

        Args:
            batches: the training data in order, not augmented; may be gone through repeatedly.
            folder: of the run: what takes long to decide is kept there, and found there on resume.
        """

    @property
    def trained(self) -> int:
        """The number of trained values."""
        if self.mask is not None:
            return self.mask.nnz
        return sum(param.numel() for param in self.encoder_parameters())

    def encoder_parameters(self) -> list[nn.Parameter]:
        """All parameters of the two encoders, each once."""
        return [param for name, param in self.model.named_parameters() if name not in FROZEN]

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
        for name, param in self.model.named_parameters():
            if not torch.isfinite(param).all():
                raise NonFiniteGradientError(
                    f"training has diverged: {name!r} holds NaN or infinity; lower --lr", name
                )

    def step(self, lr: float) -> None:
        """Take an optimizer step with this learning rate and drop the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

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
    """SAFT's Eq. 1: mean cross-entropy of the logits exp(logit_scale) * cosine(image, class).

    Args:
        model: an open_clip model.
        images: float32 [B, 3, H, W].
        labels: int64 [B].
        tokens: int64 [C, T, L]; a class is the mean of its T prompts' embeddings.
        precision: ``fp32`` or ``amp_bf16``, of the encoders; the logits are always float32.
    """
    encode_image: Any = model.encode_image
    scale: Any = model.logit_scale
    with autocast(precision, images.device):
        features = encode_image(images)
        classes = embed_classes(model, tokens)
    logits = scale.exp() * F.normalize(features.float(), dim=-1) @ classes.float().T
    return F.cross_entropy(logits, labels)


def adamw_options(config: FinetuneConfig) -> dict[str, Any]:
    """AdamW's options; weight decay acts on every trained value."""
    return {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.wd,
    }
