"""What methods that train whole tensors, with dense gradients, have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saft_clip.adapter_file import ADAPTER, Adapter
from saft_clip.batches import Batches
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError
from saft_clip.methods import find_method
from saft_clip.methods.base import Method, adamw_options, saved_tensors
from saft_clip.models import ClipModel, fingerprint_of
from saft_clip.prompts import ClassPrompts
from saft_kernels.errors import SaftError
from saft_kernels.files import atomic_write
from saft_kernels.untrusted import parse_json

#: What an optimizer keeps for each parameter: its shape, or (the step) one number.
_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class Dense(Method):
    """A method that trains some parameters as a whole; its result are the model's weights."""

    artefact = "model.safetensors"
    #: What is trained, by name: parameters of the model, and others.
    params: dict[str, nn.Parameter]

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """What is to be trained, by name; made here if it is no parameter of the model."""

    def prepare(self, batches: Batches, folder: Path | None) -> None:
        """Freeze everything else and make the optimizer."""
        self.params = self.trainable()
        trained = {id(param) for param in self.params.values()}
        for param in self.model.parameters():
            param.requires_grad_(id(param) in trained)
        self.optimizer = make_optimizer(list(self.params.values()), self.config)

    def results(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters, and what is trained beside them."""
        yield from {**dict(super().results()), **self.params}.items()

    @property
    def trained(self) -> Mapping[str, int]:
        """All values of what is trained."""
        return {name: param.numel() for name, param in self.params.items()}

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the whole gradient."""
        return torch.nn.utils.clip_grad_norm_(self.params.values(), max_norm)

    def state_dict(self) -> dict[str, Any]:
        """What is trained, and the optimizer's state."""
        return {"values": dict(self.params), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put everything back: all of it or nothing.

        Raises:
            CheckpointError: if this is not what was saved of this model.
        """
        values = saved_tensors(state.get("values"), self.params, "parameters")
        moments = self._saved_moments(state.get("optimizer"))
        for name, param in self.params.items():
            param.copy_(values[name])
        # The options are the settings', with which the run goes on.
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": own})

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Become what was trained by another run, which wrote these values.

        Raises:
            CheckpointError: if they are not of this method and model.
        """
        self.params = self.trainable()
        found = saved_tensors(values, self.params, "values")
        for name, param in self.params.items():
            param.copy_(found[name])

    def way(self, base: Callable[[], nn.Module]) -> Callable[[float], None]:
        """Averages of everything that is trained, where that is weights of the model."""
        start = self.starting_values(base)
        ends = [(p, start[n].to(p), p.detach().clone()) for n, p in self.params.items()]

        @torch.no_grad()
        def go(alpha: float) -> None:
            for param, before, after in ends:
                param.copy_(torch.lerp(before, after, alpha))

        return go

    def starting_values(self, base: Callable[[], nn.Module]) -> Mapping[str, Tensor]:
        """What training started from, by name; see :meth:`way`."""
        return dict(base().named_parameters())

    def finish(self, base: Callable[[], nn.Module]) -> None:
        """Go back to ``--alpha`` of the way from the pretrained values, where there is one."""
        alpha = self.config.alpha
        if alpha is not None and alpha != 1:
            self.way(base)(alpha)

    def _saved_moments(self, saved: Any) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state of each parameter, by its number; torch itself takes any shapes."""
        found = saved.get("state") if isinstance(saved, Mapping) else None
        params = list(self.params.values())
        if not isinstance(found, Mapping) or not found.keys() <= set(range(len(params))):
            raise CheckpointError("it holds no optimizer state of this model")
        kind = self.config.optimizer
        moments = {}
        for number, entry in found.items():
            expected = dict.fromkeys(_MOMENTS[kind], params[number].detach())
            if kind == "adamw":
                expected["step"] = torch.tensor(0.0)
            moments[number] = saved_tensors(entry, expected, f"moments of parameter {number}")
            if kind == "adamw" and not 0 <= float(moments[number]["step"]) < float("inf"):
                raise CheckpointError(f"the steps taken with parameter {number} are impossible")
        return moments

    def export(self, folder: Path, base: Callable[[], nn.Module]) -> Path:
        """Write the whole model, in a form that ``--pretrained`` takes."""
        path = folder / self.artefact
        # Clones: safetensors refuses tensors that share memory, as tied weights do.
        weights = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        with atomic_write(path) as temporary:
            save_file(weights, temporary, {"format": "pt"})
        return path


def restored(adapter: Adapter, clip: ClipModel, device: str, precision: str, source: str) -> Dense:
    """The method that wrote an adapter, as it was then.

    Args:
        adapter: from its file.
        clip: the pretrained model that it was made for, on the device; it is changed in place.
        device: where to classify.
        precision: of the encoders.
        source: the file, for messages.

    Raises:
        CheckpointError: if it does not fit the model, or is broken.
    """
    try:
        settings = parse_json(adapter.texts["training"])
        config = FinetuneConfig.from_dict(settings, source)
        kind = find_method(config.method)
        if not issubclass(kind, Dense) or kind.artefact != ADAPTER:
            raise CheckpointError(f"--method {config.method} writes no adapters")
        if adapter.texts.get("base") != fingerprint_of(clip.model):
            raise CheckpointError("it was made for other weights: give its --pretrained")
        config = config.changed(device=device, precision=precision)
        prompts = ClassPrompts(adapter.names, adapter.templates, clip.tokenizer)
        method = kind(clip, prompts, config)
        method.restore(adapter.tensors)
    except (SaftError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be used with {clip.name}: {error}") from error
    return method


def make_optimizer(params: list[nn.Parameter], config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum, as the settings say; weight decay on every parameter."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(params, fused=True, **adamw_options(config))
    return torch.optim.SGD(
        params, lr=config.lr, momentum=config.momentum, weight_decay=config.wd, fused=True
    )
