"""The ``saft experiment`` command: compare methods by the protocols of the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Texts = list[str] | None
Numbers = list[int] | None


def experiment(
    protocol: Annotated[
        str,
        typer.Argument(help="shift, base-to-new, cross-dataset, sparsity or ablation."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of the plan; options win over it.",
            show_default="a plan for the built-in data and model, or the paper's settings",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder for everything it writes; what is there is not run again.",
            show_default="saft-PROTOCOL",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Page to write.", show_default="report.html in the folder"),
    ] = None,
    model: Annotated[
        Texts, typer.Option("--model", help="Model of open_clip, or saft-tiny; may be repeated.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="Tag or file of the models' weights.")
    ] = None,
    train_data: Annotated[
        Texts, typer.Option("--train-data", help="Data to train on; may be repeated.")
    ] = None,
    eval_data: Annotated[
        Texts, typer.Option("--eval-data", help="Further data to evaluate on; may be repeated.")
    ] = None,
    method: Annotated[
        Texts, typer.Option("--method", help="Method to compare; may be repeated.")
    ] = None,
    shots: Annotated[
        Numbers, typer.Option("--shots", min=0, help="Images per class; may be repeated.")
    ] = None,
    seed: Annotated[Numbers, typer.Option("--seed", min=0, help="Seed; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda.")] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Runs at the same time.")
    ] = 1,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the weights of whole models, too.")
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Print the plan as YAML and run nothing.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write tables and page of what is there.")
    ] = False,
) -> None:
    """Compare methods over data sets, seeds and shots; the answer is a page with tables.

    Runs that are finished are not run again: the same command goes on after an interruption.
    """
    from saft_clip.experiment.command import experiment_command

    given: dict[str, Any] = {
        "models": model,
        "pretrained": pretrained,
        "train": train_data,
        "evaluate": eval_data,
        "methods": method,
        "shots": shots,
        "seeds": seed,
        "device": device,
    }
    experiment_command(
        protocol,
        {key: value for key, value in given.items() if value},
        config=config,
        output=output or Path(f"saft-{protocol}"),
        report=report,
        processes=processes,
        keep=keep_models,
        plan_only=plan_only,
        report_only=report_only,
    )
