"""Pretrained CLIP models: any of open_clip's by tag or local file, and the built-in tiny one."""

from __future__ import annotations

import difflib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from saft_clip.config import PRECISIONS
from saft_clip.console import say
from saft_clip.errors import CheckpointError, ModelError
from saft_clip.tiny import TINY_NAME, TINY_WEIGHTS, register_tiny
from saft_kernels.backends import require_environment
from saft_kernels.delta.weights import load_torch_file, require_real
from saft_kernels.fingerprint import fingerprints
from saft_kernels.untrusted import is_file, open_safetensors, reason, require_plain_archive, shown

#: Asks for random weights by name, so that nobody trains from scratch by leaving out
#: ``pretrained``.
RANDOM = "random"


@dataclass
class ClipModel:
    """A model with all that belongs to it.

    Attributes:
        model: the open_clip model, in eval mode.
        preprocess_train: PIL image -> float32 [3, H, W], with random crops.
        preprocess_val: PIL image -> float32 [3, H, W], deterministic.
        tokenizer: list of P texts -> int64 [P, L].
        name: the open_clip name.
        pretrained: tag or file that the weights came from; ``builtin`` for the tiny model's.
    """

    model: nn.Module
    preprocess_train: Callable[[Any], Tensor]
    preprocess_val: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    pretrained: str | None


def load_model(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    force_quick_gelu: bool = False,
) -> ClipModel:
    """Load a pretrained model.

    Args:
        name: a model name of open_clip (``ViT-B-16``), or ``saft-tiny``.
        pretrained: a tag of that model (``openai``; downloaded once, then cached); a checkpoint
            file (``.safetensors``, or ``.pt``/``.bin`` holding tensors only: nothing else in a
            pickle is ever read); None or ``builtin`` for the weights of ``saft-tiny``; ``random``
            for random ones.
        device: where the model goes.
        precision: ``fp32`` or ``amp_bf16``; the weights are fp32 in both, see :func:`autocast`.
        force_quick_gelu: build the model with QuickGELU, for a file of weights trained with it
            (OpenAI's are); a tag brings this with it.

    Raises:
        BackendUnavailableError: if the environment asks for kernels that cannot run here.
        ModelError: if there is no such model, tag, precision or device, the weights cannot be
            downloaded, or belong to another architecture.
        CheckpointError: if the checkpoint file is broken or cut short.
    """
    require_environment()
    check_precision(precision)
    _check_device(device)
    register_tiny()
    name = name.replace("/", "-")
    _check_name(name)
    file, tag_config = _find_weights(name, pretrained)
    if tag_config.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        force_quick_gelu = True
    clip = _build(name, pretrained or "builtin", device, force_quick_gelu, tag_config)
    if file is not None:
        _load_weights(clip.model, name, file)
    return clip


def require_model(name: str, pretrained: str | None, device: str | torch.device) -> None:
    """Make sure that a model can be had: its name, its weights, which may be fetched, and a device.

    Raises:
        ModelError: as :func:`load_model` does.
    """
    register_tiny()
    name = name.replace("/", "-")
    _check_name(name)
    _find_weights(name, pretrained)
    _check_device(device)


def brings_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether a tag's weights need QuickGELU: then open_clip uses it, but for the tag only."""
    return bool(open_clip.get_pretrained_cfg(name, pretrained or "").get("quick_gelu", False))


def fingerprint_of(model: nn.Module) -> str:
    """What tells a model from one with other weights."""
    found = fingerprints(model.state_dict().values())
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def check_precision(precision: str) -> None:
    """Raise a :class:`ModelError` unless the precision is supported."""
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager[Any]:
    """The context in which a forward pass runs at this precision: ``fp32`` or ``amp_bf16``."""
    check_precision(precision)
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode, but leave BatchNorm in eval mode.

    Fine-tuning on a few images must not move the running statistics: they are no parameters, so
    neither a mask nor a delta would know of it.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used here ({reason(error)}); give --device cpu"
        ) from error


def _build(
    name: str,
    source: str,
    device: str | torch.device,
    force_quick_gelu: bool,
    tag_config: dict[str, Any],
) -> ClipModel:
    """The model with random weights, in eval mode, and its transforms and tokenizer."""
    try:
        with _quiet():
            model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(
                name,
                device=device,
                force_quick_gelu=force_quick_gelu,
                image_mean=tag_config.get("mean"),
                image_std=tag_config.get("std"),
                image_interpolation=tag_config.get("interpolation"),
                image_resize_mode=tag_config.get("resize_mode"),
                pretrained_text=False,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"open_clip cannot build {name} here ({reason(error)}); "
            "some of its models need more packages or files from the network"
        ) from error
    return ClipModel(model.eval(), preprocess_train, preprocess_val, tokenizer, name, source)


def _check_name(name: str) -> None:
    names = open_clip.list_models()
    if name in names:
        return
    folded = {known.lower(): known for known in names}
    near = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3)]
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists them all"
    )
    raise ModelError(f"there is no model {shown(repr(name))} in open_clip; {hint}")


def _find_weights(name: str, pretrained: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file to load (None: keep random weights), and what open_clip knows of its tag."""
    if pretrained == RANDOM:
        return None, {}
    if name == TINY_NAME and pretrained in (None, "builtin"):
        return TINY_WEIGHTS, {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
    if pretrained is None:
        raise ModelError(
            f"no weights were named for {name}: give --pretrained a tag ({known}), "
            f"a checkpoint file, or {RANDOM}"
        )
    config = open_clip.get_pretrained_cfg(name, pretrained)
    if config:
        return _download(name, pretrained, config), config
    if not is_file(pretrained):
        raise ModelError(
            f"{name} has no pretrained tag {shown(repr(pretrained))}, and no file has that name; "
            f"{known}"
        )
    return Path(pretrained), {}


def _download(name: str, tag: str, config: dict[str, Any]) -> Path:
    source = config.get("hf_hub") or config.get("url")
    say(f"fetching the weights {tag!r} of {name} from {source}, unless they are cached")
    try:
        with _quiet():
            return Path(open_clip.download_pretrained(config))
    # Whatever the network, the cache folder or the hub's client may raise, the advice is the same.
    except Exception as error:
        raise ModelError(
            f"the weights {tag!r} of {name} could not be downloaded from {source} "
            f"({reason(error)}); check the network, or give --pretrained a local file"
        ) from error


def _load_weights(model: nn.Module, name: str, file: Path) -> None:
    _check_weights(file)
    try:
        with _quiet():
            open_clip.load_checkpoint(model, str(file), weights_only=True)
    # open_clip reshapes and converts before it compares, so that foreign weights fail in many ways.
    except Exception as error:
        raise ModelError(
            f"the checkpoint {file} does not fit {name} ({_first_difference(error)}); "
            "give the --model it was made for"
        ) from error


def _check_weights(file: Path) -> None:
    """Make sure that a file holds whole tensors and nothing else, before open_clip opens it.

    It may only be opened after that: where torch takes exception to a file in one way, open_clip
    tries once more without saying that a pickle may hold tensors only.
    """
    try:
        with _quiet():
            if str(file).endswith(".safetensors"):
                with open_safetensors(file):
                    pass
            elif file.suffix == ".npz":
                require_plain_archive(file)
            elif file.suffix != ".npy":  # numpy reads no pickle unless told to
                _require_tensors(file)
    # A hostile pickle may make anything of torch's reader fail.
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {file} cannot be read: it is broken, cut short, or holds more than "
            f"tensors ({reason(error)}); give a whole .safetensors file, or a .pt file of "
            "tensors only"
        ) from error


def _require_tensors(file: Path) -> None:
    found = load_torch_file(file)
    if isinstance(found, dict) and "state_dict" in found:
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise ValueError("it holds no weights")
    for tensor in found.values():
        if isinstance(tensor, Tensor):
            require_real(tensor)


def _first_difference(error: Exception) -> str:
    """The first parameter that differs, if ``load_state_dict`` says so; else the reason."""
    lines = str(error).strip().splitlines()
    if len(lines) < 2 or "loading state_dict" not in lines[0]:
        return reason(error)
    difference = lines[1].strip().rstrip(".")
    if difference.startswith("size mismatch"):
        return shown(difference)
    return shown(difference.partition(", ")[0].rstrip(". "))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from logging what the errors here say better."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
