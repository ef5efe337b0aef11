"""What ``saft experiment`` does with its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saft_clip.config import read_yaml
from saft_clip.console import output as stdout
from saft_clip.console import say
from saft_clip.errors import ConfigError
from saft_clip.experiment.formats import for_terminal
from saft_clip.experiment.page import REPORT, write_answers
from saft_clip.experiment.plan import Plan
from saft_clip.experiment.protocols import find_protocol, is_builtin
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
    """Run an experiment and write its answers, also after a failure or an interruption.

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
    if report_only:
        _answer(output, report)
        return
    plan = make_plan(protocol, given, config)
    if plan_only:
        text = yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)
        stdout.print(text, markup=False, soft_wrap=True, end="")
        return
    if report is not None:
        require_writable(report)
    try:
        run_experiment(plan, output, processes=processes, keep=keep)
    except KeyboardInterrupt:
        say("interrupted; what is finished is kept, and the same command goes on")
        raise
    _answer(output, report)


def _answer(folder: Path, report: Path | None) -> None:
    record = write_answers(folder, report)
    for table in accuracy_tables(record):
        stdout.print(for_terminal(table))
    say(f"wrote {report or folder / REPORT}, and tables.md, tables.tex and tables.csv in {folder}")


def make_plan(protocol: str, given: Mapping[str, Any], config: Path | None) -> Plan:
    """The plan of a file, or one for this protocol, with what was given in place of its own.

    Raises:
        ConfigError: if anything is missing or wrong.
    """
    values = _plan_of(protocol, given, config)
    if values.get("protocol", protocol) != protocol:
        raise ConfigError(
            f"the plan {config} is one for {values['protocol']}: run saft experiment "
            f"{values['protocol']}, or change it"
        )
    values["protocol"] = protocol
    for name in ("models", "train", "evaluate", "methods", "shots", "seeds"):
        if name in given:
            values[name] = list(given[name])
    if "methods" in given and values.get("tuning"):
        values = _without_other_trials(values, given["methods"])
    if "pretrained" in given:
        values["models"] = [
            {**({"model": one} if isinstance(one, str) else one), "pretrained": given["pretrained"]}
            for one in values["models"]
        ]
    if "device" in given:
        values["settings"] = {**(values.get("settings") or {}), "device": given["device"]}
    return Plan.from_dict(values, f"the plan {config}" if config else "the plan")


def _plan_of(protocol: str, given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    if config is not None:
        values = read_yaml(config, f"the plan {config}")
        if not isinstance(values, dict):
            raise ConfigError(f"the plan {config} is not a list of settings (name: value)")
        return values
    data = [*given.get("train", ()), *given.get("evaluate", ())]
    tiny = list(given.get("models", [TINY_NAME])) == [TINY_NAME]
    if tiny and all(map(is_builtin, data)):
        found: dict[str, Any] = read_yaml(_PLANS / f"{protocol}.yaml", f"the plan of {protocol}")
        return found
    if "train" not in given:
        model = given["models"][0] if "models" in given else "a model"
        raise ConfigError(f"nothing to train {model} on: give --train-data, or a --config")
    return {"models": _MODELS.get(protocol, ["ViT-B-16"]), "methods": _METHODS[protocol]}


def _without_other_trials(values: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """The plan's trials of the methods that are left."""
    tuning = dict(values["tuning"])
    tuning["try"] = {name: grid for name, grid in tuning["try"].items() if name in methods}
    return {**values, "tuning": tuning if tuning["try"] else None}
