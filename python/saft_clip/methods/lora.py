"""LoRA: low-rank changes of the weights of attention and MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from saft_clip.errors import ConfigError, MissingExtraError
from saft_clip.methods.dense import Dense

#: The weights that ``nn.MultiheadAttention`` computes with, in the module that holds them.
_ATTENTION = (("", "in_proj_weight"), ("out_proj", "weight"))


class Lora(Dense):
    """``W + lora_alpha / rank * B A`` in every attention and linear layer (Hu et al. 2022, Eq. 3).

    Both encoders. Linear layers are PEFT's. ``nn.MultiheadAttention``, which open_clip has, takes
    its weights without calling the layers that hold them. PEFT adds the change to them before each
    pass and takes it off again, whose rounding moves the frozen weights; here they are parametrized
    and keep their bits. The first step makes sure that every matrix has got a gradient. The result
    are the weights with the changes in them.
    """

    name = "lora"

    def trainable(self) -> dict[str, nn.Parameter]:
        """A and B of every layer.

        Raises:
            MissingExtraError: if PEFT is not installed.
            ConfigError: if the model has no such layers.
        """
        attention, linear = adaptable_layers(self.model)
        if not attention and not linear:
            raise ConfigError(f"{self.clip.name} has no layers that --method lora can change")
        self._checked = False
        self._attention = attention
        self._tuner: Any = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self._parametrize()
            if linear:
                self._tuner = self._tuner_of(linear)
        return {n: p for n, p in self.model.named_parameters() if _is_lora(n)}

    def _parametrize(self) -> None:
        rank, alpha = self.config.rank, self.config.lora_alpha
        assert rank is not None
        assert alpha is not None
        for module, weight in self._weights_of_attention():
            change = LowRank(getattr(module, weight), rank, alpha)
            parametrize.register_parametrization(module, weight, change)

    def _weights_of_attention(self) -> Iterator[tuple[nn.Module, str]]:
        for name in self._attention:
            for inner, weight in _ATTENTION:
                yield self.model.get_submodule(f"{name}.{inner}".rstrip(".")), weight

    def _tuner_of(self, names: list[str]) -> Any:
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise MissingExtraError(
                "--method lora needs PEFT, which is not installed: pip install 'saft-kernels[lab]'"
            ) from error
        options: Any = {"r": self.config.rank, "lora_alpha": self.config.lora_alpha}
        config = LoraConfig(target_modules=names, lora_dropout=0.0, bias="none", **options)
        return LoraModel(self.model, {"default": config}, "default")

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the whole gradient.

        Raises:
            ConfigError: if a matrix gets no gradient, and so would silently not be trained.
        """
        if not self._checked:
            silent = [name for name, param in self.params.items() if param.grad is None]
            if silent:
                raise ConfigError(
                    f"--method lora does not reach {silent[0]!r} and {len(silent) - 1} more "
                    f"matrices of {self.clip.name}, which get no gradient"
                )
            self._checked = True
        return super().clip_grad_norm_(max_norm)

    def finish(self, base: Callable[[], nn.Module]) -> None:
        """Add the changes to the weights; the model is one without LoRA again."""
        if self._tuner is not None:
            self._tuner.merge_and_unload()
        for module, weight in self._weights_of_attention():
            parametrize.remove_parametrizations(module, weight, leave_parametrized=True)


class LowRank(nn.Module):
    """``W -> W + alpha / rank * B A``; A as PEFT has it at first, B zero.

    Args:
        weight: W, [rows, columns].
        rank: of the change.
        alpha: its scale.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the change."""
        return weight + self.scale * self.lora_B @ self.lora_A


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def adaptable_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of attention layers, and of linear layers whose ``forward`` is called."""
    attention, linear = [], []
    inside: tuple[str, ...] = ()  # of these, only the weights are used
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            attention.append(name)
            inside += (f"{name}.",)
        elif isinstance(module, nn.MultiheadAttention | AttentionPool2d):
            inside += (f"{name}.",)
        elif isinstance(module, nn.Linear):
            linear.append(name)
    return attention, linear
