"""What an experiment compares, as its YAML file says it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from saft_clip.config import FinetuneConfig, as_typed, has_setting, read_yaml
from saft_clip.errors import ConfigError
from saft_clip.experiment.protocols import find_protocol
from saft_clip.methods import find
from saft_kernels.files import atomic_write
from saft_kernels.untrusted import near_matches, shown

#: What an experiment itself decides for every cell.
_OURS = frozenset(
    {"train_data", "val_data", "eval_data", "eval_split", "eval_train", "output", "resume"}
    | {"shots", "seed", "alphas", "val_frequency", "tensorboard"}
)
#: What the entries under ``models`` may say.
_OF_MODELS = frozenset({"model", "pretrained", "force_quick_gelu"})
#: What the entries under ``methods`` may say, and what ``settings`` and trials may.
_SETTINGS = frozenset(item.name for item in fields(FinetuneConfig)) - _OURS - _OF_MODELS
_SHARED = _SETTINGS - {"method"}

_HINTS = get_type_hints(FinetuneConfig)


@dataclass(frozen=True)
class Entry:
    """A method or a model with settings, under a name of its own.

    Attributes:
        name: what tables call it.
        settings: fields of :class:`~saft_clip.config.FinetuneConfig`.
    """

    name: str
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For YAML."""
        return {"name": self.name, **self.settings}


@dataclass(frozen=True)
class Tuning:
    """The trials that settings are chosen with, on validation images: as many for each method.

    Attributes:
        tried: method's name in the plan -> the settings of each of its trials, in order.
        seed: of the few-shot sample and the order in all trials.
        shots: training images per class in all trials.
    """

    tried: Mapping[str, tuple[Mapping[str, Any], ...]]
    seed: int
    shots: int

    def to_dict(self) -> dict[str, Any]:
        """For YAML."""
        tried = {name: [dict(trial) for trial in trials] for name, trials in self.tried.items()}
        return {"seed": self.seed, "shots": self.shots, "try": tried}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment.

    Attributes:
        protocol: one of :data:`~saft_clip.experiment.protocols.PROTOCOLS`.
        models: what is fine-tuned.
        methods: how.
        train: data sets to train on, one after the other.
        evaluate: further data sets that every result is evaluated on, where the protocol has such.
        shots: training images per class; 0 takes all.
        seeds: of the few-shot samples, the order and the augmentation.
        settings: of every cell.
        tuning: how settings are chosen first; None: they are given.
        alphas: shares of the way from pretrained to trained weights at which methods that have
            ``alpha`` are evaluated, too.
        retrieval: class names to show the five best images of, before and after.

    Raises:
        ConfigError: if anything does not fit together; the message says what.
    """

    protocol: str
    models: tuple[Entry, ...]
    methods: tuple[Entry, ...]
    train: tuple[str, ...]
    evaluate: tuple[str, ...] = ()
    shots: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (1, 2, 3)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    alphas: tuple[float, ...] = ()
    retrieval: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check everything that can be checked without data and models."""
        find_protocol(self.protocol).check(self.train, self.evaluate)
        for what in ("models", "methods", "train", "shots", "seeds"):
            _require_some(what, getattr(self, what))
        _require_distinct("models", [entry.name for entry in self.models])
        _require_distinct("methods", [entry.name for entry in self.methods])
        for what in ("train", "evaluate", "shots", "seeds", "alphas", "retrieval"):
            _require_distinct(what, getattr(self, what))
        _require_known(self.settings, _SHARED, "settings")
        kinds = [entry.settings["method"] for entry in self.methods]
        for name in self.settings:
            if not any(has_setting(kind, name) for kind in kinds):
                raise ConfigError(f"settings has {name}, which no method of the plan has")
        for model, method in product(self.models, self.methods):
            self._check(model, method)
        if self.tuning is not None:
            self._check_budget(self.tuning)

    def _check(self, model: Entry, method: Entry) -> None:
        _require_known(model.settings, _OF_MODELS, f"the model {shown(model.name)}")
        _require_known(method.settings, _SETTINGS, f"the method {shown(method.name)}")
        tried = self.tuning.tried if self.tuning else {}
        for trial in tried.get(method.name, ({},)):
            _require_known(trial, _SHARED, f"the trials of {shown(method.name)}")
            for shots, seed in product(self.shots, self.seeds):
                self.config(model, method, self.train[0], shots, seed, trial)

    def _check_budget(self, tuning: Tuning) -> None:
        names = {entry.name for entry in self.methods}
        for name in tuning.tried:
            if name not in names:
                raise ConfigError(f"tuning names {shown(repr(name))}, which is not among methods")
        trained = [e.name for e in self.methods if find(e.settings["method"]).trains]
        counts = {name: len(tuning.tried.get(name, ())) for name in trained}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{shown(name)} {count}" for name, count in counts.items())
            raise ConfigError(f"every method must get the same number of trials, not {found}")
        for method in self.methods:
            self._require_different(method, tuning)

    def _require_different(self, method: Entry, tuning: Tuning) -> None:
        """Trials that come to the same are fewer than they seem."""
        seen: list[FinetuneConfig] = []
        for trial in tuning.tried.get(method.name, ()):
            for name in trial:
                if not _has_a_say(method.settings["method"], name):
                    raise ConfigError(f"{name} has no say in {shown(method.name)}: do not try it")
            config = self.config(
                self.models[0], method, self.train[0], tuning.shots, tuning.seed, trial
            )
            if config in seen:
                raise ConfigError(f"two trials of {shown(method.name)} are the same")
            seen.append(config)

    @property
    def most_shots(self) -> int:
        """The largest number of shots, with which figures are made; 0, for all images, is more."""
        return 0 if 0 in self.shots else max(self.shots)

    def config(
        self,
        model: Entry,
        method: Entry,
        train: str,
        shots: int,
        seed: int,
        chosen: Mapping[str, Any],
    ) -> FinetuneConfig:
        """The settings of a cell: the plan's, the model's, the method's, and what trials chose."""
        values = {**self.settings, **model.settings, **method.settings, **chosen}
        # The plan's settings for all may be such that only some methods have; an entry's may not.
        own = {**method.settings, **chosen}
        kind = values["method"]
        values = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in own or _has_a_say(kind, key)
        }
        try:
            return FinetuneConfig(train_data=train, shots=shots, seed=seed, **values)
        except ConfigError as error:
            raise ConfigError(f"{shown(method.name)} with {shown(model.name)}: {error}") from error

    def changed(self, **values: Any) -> Plan:
        """A copy with other values, checked like new."""
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """In types that YAML knows."""
        return {
            "protocol": self.protocol,
            "models": [entry.to_dict() for entry in self.models],
            "methods": [entry.to_dict() for entry in self.methods],
            "train": list(self.train),
            "evaluate": list(self.evaluate),
            "shots": list(self.shots),
            "seeds": list(self.seeds),
            "settings": dict(self.settings),
            "tuning": None if self.tuning is None else self.tuning.to_dict(),
            "alphas": list(self.alphas),
            "retrieval": list(self.retrieval),
        }

    @classmethod
    def from_dict(cls, values: Any, source: str = "the plan") -> Plan:
        """The inverse of :meth:`to_dict`; a method or a model may be given by its name alone.

        Raises:
            ConfigError: if anything is unknown, missing or wrong.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source} is not a list of settings (name: value)")
        known = [item.name for item in fields(cls)]
        _require_known(values, known, source, of_cells=False)
        for name in ("protocol", "models", "methods", "train"):
            if not values.get(name):
                raise ConfigError(f"{source} does not say {name}")
        try:
            return cls(
                protocol=str(values["protocol"]),
                models=tuple(_entries(values["models"], "model")),
                methods=tuple(_entries(values["methods"], "method")),
                train=_texts(values["train"], "train"),
                evaluate=_texts(values.get("evaluate"), "evaluate"),
                shots=_numbers(values.get("shots", [16]), "shots"),
                seeds=_numbers(values.get("seeds", [1, 2, 3]), "seeds"),
                settings=_mapping(values.get("settings"), "settings"),
                tuning=_tuning(values),
                alphas=tuple(map(float, _shares(values.get("alphas"), "alphas"))),
                retrieval=_texts(values.get("retrieval"), "retrieval"),
            )
        except ConfigError as error:
            raise ConfigError(f"{source} is wrong: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a YAML file.

        Raises:
            ConfigError: if it cannot be read, is no YAML, or anything in it is wrong.
        """
        where = f"the plan {path}"
        return cls.from_dict(read_yaml(path, where), where)

    def save(self, path: str | Path) -> None:
        """Write a YAML file, atomically.

        Raises:
            FileWriteError: if it cannot be written.
        """
        with atomic_write(path) as temporary:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")


def _entries(values: Any, kind: str) -> Iterator[Entry]:
    """Models or methods: texts, or settings with an optional ``name``."""
    for value in values if isinstance(values, list) else [values]:
        settings = {kind: value} if isinstance(value, str) else _mapping(value, f"{kind}s")
        if not isinstance(settings.get(kind), str):
            raise ConfigError(f"one of {kind}s does not say which {kind} it is ({kind}: NAME)")
        name = settings.pop("name", settings[kind])
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"the name of a {kind} must be text, not {shown(repr(name))}")
        yield Entry(name, settings)


def _tuning(values: Mapping[str, Any]) -> Tuning | None:
    given = _mapping(values.get("tuning"), "tuning")
    if not given:
        return None
    _require_known(given, ("seed", "shots", "try"), "tuning", of_cells=False)
    tried = {name: _trials(one, name) for name, one in _mapping(given.get("try"), "try").items()}
    if not tried:
        raise ConfigError("tuning does not say what to try (try: {method: {lr: [...]}})")
    every = _numbers(values.get("shots", [16]), "shots")
    most = max(every, key=lambda k: k or math.inf, default=16)
    seed, shots = given.get("seed", 0), given.get("shots", most)
    _numbers([seed, shots], "seed and shots of tuning")
    return Tuning(tried, seed, shots)


def _trials(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """A list of settings, or values of each setting, of which every combination is tried."""
    what = f"try of {shown(name)}"
    if isinstance(value, list):
        trials = [_mapping(one, what) for one in value]
    else:
        grid = {
            key: one if isinstance(one, list) else [one]
            for key, one in _mapping(value, what).items()
        }
        trials = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if not trials or not all(trials):
        raise ConfigError(f"{what} has nothing to try")
    return tuple(trials)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be settings (name: value), not {shown(repr(value))}")
    return {str(key): _typed(one, _HINTS.get(key)) for key, one in value.items()}


def _typed(value: Any, hint: Any) -> Any:
    """Like a single run's settings, but that a list may be of values to try."""
    if isinstance(value, list):
        return [_typed(one, hint) for one in value]
    return as_typed(value, hint)


#: Settings that every method takes, though they have a say only where entries are selected.
_OF_SELECTION = ("density", "mask")


def _has_a_say(method: str, name: str) -> bool:
    return has_setting(method, name) and (find(method).selects or name not in _OF_SELECTION)


def _texts(value: Any, what: str) -> tuple[str, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{what} must be texts, not {shown(repr(value))}")
    return tuple(values)


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(type(one) is int and one >= 0 for one in values):
        raise ConfigError(f"{what} must be whole numbers from 0, not {shown(repr(value))}")
    return tuple(values)


def _shares(value: Any, what: str) -> Sequence[float]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(one) in (int, float) and 0 <= one <= 1 for one in values):
        raise ConfigError(f"{what} must be numbers from 0 to 1, not {shown(repr(value))}")
    return values


def _require_some(what: str, values: Sequence[Any]) -> None:
    if not values:
        raise ConfigError(f"{what} must name at least one")


def _require_distinct(what: str, values: Sequence[Any]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{what} has {shown(twice)} twice: give it once, or another name")


def _require_known(
    values: Mapping[str, Any], known: Any, source: str, *, of_cells: bool = True
) -> None:
    """Refuse what is not known; settings of cells have hints of their own."""
    for name in values:
        if name in known:
            continue
        if of_cells and name in _OF_MODELS and source == "settings":
            raise ConfigError(f"{name} belongs under models, not under settings")
        if of_cells and name == "method":
            raise ConfigError(f"{source} cannot set the method: list it under methods")
        if of_cells and name in _OURS:
            raise ConfigError(f"{source} sets {name}, which an experiment decides itself")
        hint = near_matches(str(name), sorted(known))
        raise ConfigError(f"{source} has an unknown setting {shown(repr(name))}{hint}")
