"""What ``saft experiment`` does with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from saft_clip.config import read_yaml
from saft_clip.console import output as stdout
from saft_clip.console import say
from saft_clip.errors import ConfigError
from saft_clip.experiment.formats import for_terminal
from saft_clip.experiment.page import REPORT, write_answers
from saft_clip.experiment.plan import Entry, Plan, Tuning
from saft_clip.experiment.protocols import find_protocol, is_builtin
from saft_clip.experiment.record import read_plan
from saft_clip.experiment.runner import run_experiment
from saft_clip.experiment.tables import accuracy_tables
from saft_clip.tiny import TINY_NAME
from saft_kernels.files import require_writable

_PLANS = Path(__file__).with_name("plans")

#: What is compared where no plan says it: with the settings of the papers.
_METHODS: dict[str, list[Any]] = {
    "shift": ["zero-shot", "full", "saft"],
    "base-to-new": ["zero-shot", "full", "saft"],
    "cross-dataset": ["zero-shot", "full", "saft"],
    "sparsity": [
        "zero-shot",
        *(
            {"name": f"saft {100 * density:g}%", "method": "saft", "density": density}
            for density in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        ),
        "full",
    ],
    "ablation": [
        "zero-shot", "saft", "saft-fisher", "random", "magnitude", "full", "visual", "text",
    ],
}  # fmt: skip


#: What is fine-tuned where nobody says it: in the ablation, the towers that the paper has.
_MODELS: dict[str, list[Any]] = {
    "ablation": [
        {"model": model, "pretrained": "openai"} for model in ("RN50", "ViT-B-32", "ViT-B-16")
    ]
}


def experiment_command(
    protocol: str,
    given: Mapping[str, Any],
    *,
    config: Path | None,
    output: Path,
    report: Path | None,
    processes: int,
    keep: bool,
    plan_only: bool,
    report_only: bool,
) -> None:
    """Run an experiment and write its answers, whatever failed; end with 1 if something did.

    Args:
        protocol: its name.
        given: options that win over the plan: ``models``, ``pretrained``, ``train``, ``evaluate``,
            ``methods``, ``shots``, ``seeds``, ``device``.
        config: file of the plan.
        output: folder of the experiment.
        report: page to write.
        processes: runs at the same time.
        keep: keep the weights of whole models.
        plan_only: print the plan only.
        report_only: write the answers of what is there only.
    """
    find_protocol(protocol)
    if report is not None:
        require_writable(report)
    if report_only:
        _answer(protocol, output, report)
        return
    plan = make_plan(protocol, given, config)
    if plan_only:
        text = yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)
        stdout.print(text, markup=False, soft_wrap=True, end="")
        return
    try:
        failed = run_experiment(plan, output, processes=processes, keep=keep)
    except KeyboardInterrupt:
        say("interrupted; what is finished is kept, and the same command goes on")
        raise
    _answer(protocol, output, report)
    if failed:
        raise typer.Exit(1)


def _answer(protocol: str, folder: Path, report: Path | None) -> None:
    found = read_plan(folder).protocol
    if found != protocol:
        raise ConfigError(f"{folder} holds an experiment of {found}, not of {protocol}")
    record = write_answers(folder, report)
    for table in accuracy_tables(record):
        stdout.print(for_terminal(table))
    say(f"wrote {report or folder / REPORT}, and tables.md, tables.tex and tables.csv in {folder}")


def make_plan(protocol: str, given: Mapping[str, Any], config: Path | None) -> Plan:
    """The plan of a file, or one for this protocol, with what was given in place of its own.

    Raises:
        ConfigError: if anything is missing or wrong.
    """
    plan = Plan.from_dict(*_plan_of(protocol, given, config))
    if plan.protocol != protocol:
        raise ConfigError(
            f"the plan {config} is one for {plan.protocol}: run saft experiment {plan.protocol}, "
            "or change it"
        )
    values: dict[str, Any] = {
        name: tuple(given[name])
        for name in ("train", "evaluate", "shots", "seeds")
        if name in given
    }
    values["models"] = _models(plan, given)
    values["methods"] = methods = _methods(plan, given)
    values["tuning"] = _trials_of(plan, methods)
    if "device" in given:
        values["settings"] = {**plan.settings, "device": given["device"]}
    return plan.changed(**values)


def _models(plan: Plan, given: Mapping[str, Any]) -> tuple[Entry, ...]:
    models = plan.models
    if "models" in given:
        models = tuple(Entry(name, {"model": name}) for name in given["models"])
    if "pretrained" in given:
        own = {"pretrained": given["pretrained"]}
        models = tuple(Entry(entry.name, {**entry.settings, **own}) for entry in models)
    return models


def _methods(plan: Plan, given: Mapping[str, Any]) -> tuple[Entry, ...]:
    """The plan's own entries of these names; a method that it has none of, with its defaults."""
    if "methods" not in given:
        return plan.methods
    own = {entry.name: entry for entry in plan.methods}
    return tuple(own.get(name, Entry(name, {"method": name})) for name in given["methods"])


def _trials_of(plan: Plan, methods: Sequence[Entry]) -> Tuning | None:
    """The plan's trials of the methods that are left."""
    if plan.tuning is None:
        return None
    names = {entry.name for entry in methods}
    tried = {name: trials for name, trials in plan.tuning.tried.items() if name in names}
    return Tuning(tried, plan.tuning.seed, plan.tuning.shots) if tried else None


def _plan_of(
    protocol: str, given: Mapping[str, Any], config: Path | None
) -> tuple[dict[str, Any], str]:
    """The plan that options are applied to, and what messages call it."""
    if config is not None:
        where = f"the plan {config}"
        values = read_yaml(config, where)
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is not a list of settings (name: value)")
        return {"protocol": protocol, **values}, where
    data = [*given.get("train", ()), *given.get("evaluate", ())]
    tiny = list(given.get("models", [TINY_NAME])) == [TINY_NAME]
    where = f"the plan of {protocol}"
    if tiny and all(map(is_builtin, data)):
        return {**read_yaml(_PLANS / f"{protocol}.yaml", where), "protocol": protocol}, where
    if "train" not in given:
        model = given["models"][0] if "models" in given else "a model"
        raise ConfigError(f"nothing to train {model} on: give --train-data, or a --config")
    return {
        **{"protocol": protocol, "methods": _METHODS[protocol]},
        "models": _MODELS.get(protocol, ["ViT-B-16"]),
        **{name: list(given[name]) for name in ("train", "evaluate") if name in given},
    }, where
