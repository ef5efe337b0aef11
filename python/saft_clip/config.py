"""Every setting of a fine-tuning run, its default, and whether that default is the paper's.

From the paper (SAFT, arXiv 2407.03036): ViT-B/16 with OpenAI's weights, 16 images per class,
density 1e-3, AdamW with learning rate 5e-6 and weight decay 0.1, a cosine schedule with warm-up,
bf16 autocast. Ours, because the paper's values are not known to us: batch size, epochs and steps,
length of the warm-up, augmentation, gradient clipping, the seed. AdamW's betas and eps are torch's.

Other methods than SAFT have other defaults, and some have settings of their own
(:data:`saft_clip.methods.METHODS`).
"""

from __future__ import annotations

import math
import os
import shlex
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from saft_clip.errors import ConfigError
from saft_clip.methods import METHODS, find
from saft_kernels.files import atomic_write
from saft_kernels.untrusted import near_matches, shown

#: The most that a file of settings may take; what a run writes has some 1,000 bytes.
_MAX_FILE = 1 << 16
_MAX_DEPTH = 10

PAPER, OURS, TORCH = "the paper's", "ours", "torch's"

#: Of ``--density``: one of several, chosen on validation images (:mod:`saft_clip.auto_density`).
AUTO = "auto"

GRADIENTS = ("dense", "streamed", "sampled")
OPTIMIZERS = ("adamw", "sgd")
#: open_clip's ``--precision`` names that are supported: weights are fp32 in both.
PRECISIONS = ("fp32", "amp_bf16")

#: Weights that stand in for ``pretrained=None``; ``saft-tiny`` knows its own.
DEFAULT_PRETRAINED = {"ViT-B-16": "openai"}


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    source: str | None = None,
    may_change: bool = False,
    by_method: bool = False,
) -> Any:
    """A dataclass field that knows its help text and its limits.

    ``source`` says where the default comes from. ``may_change`` marks a setting that does not
    influence the result, so that a resumed run may have another value of it. ``by_method`` marks
    one whose default is the method's, if that has one: then ``default`` is that of all others, and
    if it is None, other methods have no such setting at all.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(
        default=None if by_method else default,
        metadata={
            "help": help,
            "limits": limits,
            "choices": choices,
            "source": source,
            "may_change": may_change,
            "by_method": by_method,
            "default": default,
        },
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The settings of ``saft finetune``: the flag of a field is its name with dashes.

    Raises:
        ConfigError: if a value is out of its range or of another type; the message names the flag.
    """

    train_data: str = field(
        metadata={
            "help": "what to train on: folder of images, data set of CoOp's or ImageNet, split "
            "file (.json), .csv, .tar, torchvision:NAME:ROOT or builtin:<domain>; behind it #fog:3 "
            "for corrupted images, #base or #new for half of the classes (docs/data.md)"
        }
    )
    val_data: str | None = option(
        None,
        "data for the validation curve [default: the training data's val split, if it has one]",
    )
    eval_data: tuple[str, ...] = option(
        (),
        "data sets whose test splits are evaluated before and after; the training data's own is in "
        "distribution, all others are shifted [default: the training data's test split]",
    )
    eval_split: str = option("test", "the split that is evaluated", choices=("val", "test"))
    eval_images: int | None = option(
        None,
        "evaluate so many images of a data set, evenly of its classes [default: all]",
        at_least=1,
    )
    eval_train: bool = option(
        False, "evaluate the result on the training images, too, without augmentation"
    )
    output: str = option("saft-run", "folder for everything the run writes", may_change=True)
    resume: bool = option(
        False, "continue the run in the output folder after an interruption", may_change=True
    )

    model: str = option("ViT-B-16", "open_clip model name, or saft-tiny", source=PAPER)
    pretrained: str | None = option(
        None,
        "open_clip tag or checkpoint file [default: openai for ViT-B-16, built in for saft-tiny]",
    )
    force_quick_gelu: bool = option(False, "build the model with QuickGELU, for such a checkpoint")
    template: tuple[str, ...] = option(
        (),
        "prompt template with {} for the class name, openai (80 templates), simple (7) or a text "
        "file of templates [default: the data set's own]",
    )

    method: str = option("saft", f"what is trained and how: {', '.join(METHODS)}")
    density: float | Literal["auto"] = option(
        1e-3,
        "share of the parameters that saft selects; auto tries several, and takes what is best on "
        "validation images",
        above=0,
        at_most=1,
        source=PAPER,
    )
    mask: str | None = option(
        None,
        "mask file (of saft select) with the entries that saft trains, whatever --density says "
        "[default: select them]",
    )
    gradients: str = option(
        "sampled",
        "how saft obtains gradients: sampled computes the selected entries only, streamed frees "
        "each dense one at once, dense keeps them",
        choices=GRADIENTS,
    )
    shots: int = option(16, "training images per class; 0 takes all", at_least=0, source=PAPER)
    seed: int = option(
        1, "seed of the few-shot sample, the order and the augmentation", at_least=0, source=OURS
    )
    augment: bool = option(True, "random crops, as open_clip trains with", source=OURS)

    epochs: int = option(
        10, "passes over the training data", at_least=1, source=OURS, by_method=True
    )
    min_steps: int = option(
        0, "least number of optimizer steps: epochs are added for it", at_least=0, source=OURS
    )
    batch_size: int = option(32, "images per forward pass", at_least=1, source=OURS, by_method=True)
    accum_freq: int = option(1, "forward passes per optimizer step", at_least=1, source=OURS)
    optimizer: str = option(
        "adamw", "what takes the steps", choices=OPTIMIZERS, source=PAPER, by_method=True
    )
    lr: float = option(5e-6, "peak learning rate", above=0, source=PAPER, by_method=True)
    wd: float = option(0.1, "weight decay", at_least=0, source=PAPER, by_method=True)
    momentum: float = option(
        0.9, "momentum of sgd", at_least=0, below=1, source="Dassl's", by_method=True
    )
    beta1: float = option(0.9, "AdamW's beta 1", at_least=0, below=1, source=TORCH)
    beta2: float = option(0.999, "AdamW's beta 2", at_least=0, below=1, source=TORCH)
    eps: float = option(1e-8, "AdamW's epsilon", above=0, source=TORCH)
    warmup: int | None = option(None, "warm-up steps [default: a tenth of all, ours]", at_least=0)
    grad_clip_norm: float | None = option(None, "largest norm of the trained gradient", above=0)
    alpha: float | None = option(
        None,
        "the result lies at this share of the way from the pretrained to the trained weights",
        at_least=0,
        at_most=1,
        by_method=True,
    )
    alphas: tuple[float, ...] = option(
        (),
        "with a method that has --alpha: also evaluate at these shares of the way",
        at_least=0,
        at_most=1,
    )
    penalty: float | None = option(
        None, "weight of the penalty or of the distillation", at_least=0, by_method=True
    )
    temperature: float | None = option(
        None, "temperature of the distillation", above=0, by_method=True
    )
    margin: float | None = option(
        None, "clipood's margin for classes that mean the same", at_least=0, by_method=True
    )
    beta: float | None = option(
        None,
        "clipood's averaging: a and b of its Beta distribution",
        above=0,
        at_most=1000,
        by_method=True,
    )
    rank: int | None = option(None, "rank of lora's matrices", at_least=1, by_method=True)
    lora_alpha: float | None = option(
        None, "lora's change is scaled by this over the rank", above=0, by_method=True
    )
    context: int | None = option(
        None,
        "learned vectors in a prompt (and in an image, of maple)",
        at_least=1,
        at_most=64,
        by_method=True,
    )
    depth: int | None = option(
        None, "blocks that maple gives prompts of their own", at_least=1, by_method=True
    )
    probe_epochs: int | None = option(
        None, "passes that lp-ft trains the classifier for first", at_least=1, by_method=True
    )
    probe_lr: float | None = option(
        None, "learning rate of lp-ft's classifier then", above=0, by_method=True
    )
    precision: str = option(
        "amp_bf16", "arithmetic of the forward pass", choices=PRECISIONS, source=PAPER
    )
    device: str = option("cpu", "cpu or cuda")

    val_frequency: int = option(1, "epochs between validations; 0 for none", at_least=0)
    save_frequency: int = option(1, "epochs between checkpoints", at_least=1, may_change=True)
    log_every_n_steps: int = option(1, "steps between lines of metrics.jsonl", at_least=1)
    workers: int = option(0, "processes that load images", at_least=0, may_change=True)
    license: str | None = option(None, "licence, to keep with the delta", may_change=True)
    notes: str | None = option(None, "notes, to keep with the delta", may_change=True)
    tensorboard: bool = option(False, "also log for TensorBoard", may_change=True)

    def __post_init__(self) -> None:
        """Take the method's defaults, and check every value."""
        hints = get_type_hints(type(self))
        _check_type("method", self.method, str)
        method = find(self.method)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata.get("by_method"):
                usual = self._usual(item)
                if value is not None and usual is None:
                    raise ConfigError(_no_such_setting(item.name, method.name))
                if value is None:
                    object.__setattr__(self, item.name, value := usual)
            _check_type(item.name, value, hints[item.name])
            for one in value if isinstance(value, tuple) else (value,):
                _check_limits(item.name, one, item.metadata.get("limits", {}))
            _check_choices(item.name, value, item.metadata.get("choices"))
        if self.alphas and self.alpha is None:
            raise ConfigError(_no_such_setting("alpha", method.name))
        if self.density == AUTO and not method.selects:
            selecting = ", ".join(entry.name for entry in METHODS.values() if entry.selects)
            raise ConfigError(
                f"--method {method.name} selects nothing, so that there is no density for auto to "
                f"choose: that is for {selecting}"
            )
        if self.density == AUTO and self.mask is not None:
            raise ConfigError("--mask has a density, so that there is none for auto to choose")

    @property
    def weights(self) -> str | None:
        """What to load: ``pretrained``, or the model's default."""
        return self.pretrained or DEFAULT_PRETRAINED.get(self.model)

    def _usual(self, item: Field[Any]) -> Any:
        """The default of a setting, with this method."""
        if not item.metadata.get("by_method"):
            return item.default
        return find(self.method).defaults.get(item.name, item.metadata["default"])

    def changed(self, **values: Any) -> FinetuneConfig:
        """A copy with other values, checked like new.

        With another method, settings that were the old one's defaults become the new one's.
        """
        if values.get("method", self.method) != self.method:
            usual = {
                item.name: None
                for item in fields(self)
                if item.metadata.get("by_method") and getattr(self, item.name) == self._usual(item)
            }
            values = usual | values
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value, in types that YAML and JSON know."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def training(self) -> dict[str, Any]:
        """What says how the delta came about: the settings that a resumed run must share."""
        fixed = {item.name for item in fields(self) if not item.metadata.get("may_change")}
        return {name: value for name, value in self.to_dict().items() if name in fixed}

    @classmethod
    def from_dict(cls, values: Any, source: str = "the configuration") -> FinetuneConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: if a setting is unknown (near matches are named), missing or wrong.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source} is not a list of settings (name: value)")
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                hint = near_matches(str(name), known)
                raise ConfigError(f"{source} has an unknown setting {shown(repr(name))}{hint}")
        if "train_data" not in values:
            raise ConfigError(f"{source} does not say what to train on (train_data)")
        hints = get_type_hints(cls)
        try:
            return cls(**{name: as_typed(value, hints[name]) for name, value in values.items()})
        except ConfigError as error:
            raise ConfigError(f"{source} is wrong: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a YAML file, atomically.

        Raises:
            FileWriteError: if it cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FinetuneConfig:
        """Read a YAML file.

        Raises:
            ConfigError: if it cannot be read, is no YAML, or a setting is unknown or wrong.
        """
        where = f"the configuration {path}"
        return cls.from_dict(read_yaml(path, where), where)

    def command(self) -> str:
        """The shell command that runs with these settings: only what differs from the defaults."""
        words = ["saft", "finetune"]
        for item in fields(self):
            value = getattr(self, item.name)
            if value != self._usual(item):
                words += _flag(item.name, value)
        return shlex.join(words)

    def differences(self, other: FinetuneConfig) -> list[str]:
        """Settings that influence the result and differ, as ``--flag: ours, not theirs``."""
        return [
            f"--{dashed(item.name)} is {getattr(self, item.name)}, not {getattr(other, item.name)}"
            for item in fields(self)
            if not item.metadata.get("may_change")
            and getattr(self, item.name) != getattr(other, item.name)
        ]


def read_yaml(path: str | Path, where: str) -> Any:
    """What a YAML file of settings holds.

    Args:
        path: of the file.
        where: what messages call it.

    Raises:
        ConfigError: if it cannot be read, is too large, or is no YAML.
    """
    text = _read(path, where)
    try:
        return yaml.load(text, _PlainLoader)
    # PyYAML lets out whatever int(), datetime() and the like raise.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML") from error


def has_setting(method: str, name: str) -> bool:
    """Whether a setting has a say with a method: some have settings of their own.

    Raises:
        ConfigError: if there is no such method.
    """
    item = next(item for item in fields(FinetuneConfig) if item.name == name)
    own = find(method).defaults
    return not item.metadata.get("by_method") or name in own or item.metadata["default"] is not None


class _PlainLoader(yaml.SafeLoader):
    """YAML that takes no more time and memory than its length suggests.

    A few lines of aliases can stand for more than any memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Refuse brackets in brackets, for each of which PyYAML goes through all others."""
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.YAMLError("too many brackets in brackets")
        super().fetch_flow_collection_start(token)


def _read(path: str | Path, where: str) -> str:
    try:
        if os.path.getsize(path) > _MAX_FILE:
            raise ConfigError(f"{where} is larger than any configuration")
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not valid YAML") from error


def _no_such_setting(name: str, method: str) -> str:
    has = ", ".join(entry.name for entry in METHODS.values() if name in entry.defaults)
    return f"--method {method} has no --{dashed(name)}: that is a setting of {has}"


def dashed(name: str) -> str:
    """The flag of a field, without the leading dashes."""
    return name.replace("_", "-")


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{dashed(name)}" if value else f"--no-{dashed(name)}"]
    if isinstance(value, tuple):
        return [word for one in value for word in (f"--{dashed(name)}", str(one))]
    return [f"--{dashed(name)}", str(value)]


def as_typed(value: Any, hint: Any) -> Any:
    """Lists become tuples; ``5e-6``, which YAML takes for text, becomes a number."""
    if isinstance(value, list):
        kind = get_args(hint)[0] if get_origin(hint) is tuple else None
        return tuple(as_typed(one, kind) for one in value)
    if isinstance(value, str) and (hint is float or float in get_args(hint)):
        with suppress(ValueError):
            return float(value)
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not _is_a(value, hint):
        found = shown(repr(value))
        raise ConfigError(f"--{dashed(name)} cannot be {found}: it must be {_describe(hint)}")


#: ``a | b`` is a Union where one of them is a Literal.
_UNIONS = (UnionType, Union)


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) in _UNIONS:
        return any(_is_a(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    if get_origin(hint) in _UNIONS:
        return " or ".join(_describe(one) for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of numbers" if get_args(hint)[0] is float else "a list of texts"
    return names[hint]


def _check_limits(name: str, value: Any, limits: dict[str, float | None]) -> None:
    if value is None or isinstance(value, str):
        return
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(f"--{dashed(name)} must be finite, not {value}")
    tests = {
        "at_least": lambda limit: value >= limit,
        "above": lambda limit: value > limit,
        "at_most": lambda limit: value <= limit,
        "below": lambda limit: value < limit,
    }
    given = {kind: limit for kind, limit in limits.items() if limit is not None}
    if all(tests[kind](limit) for kind, limit in given.items()):
        return
    allowed = " and ".join(f"{kind.replace('_', ' ')} {limit:g}" for kind, limit in given.items())
    raise ConfigError(f"--{dashed(name)} must be {allowed}, not {value}")


def _check_choices(name: str, value: Any, choices: tuple[str, ...] | None) -> None:
    if choices is not None and value not in choices:
        found = shown(repr(value))
        raise ConfigError(f"--{dashed(name)} must be {' or '.join(choices)}, not {found}")
