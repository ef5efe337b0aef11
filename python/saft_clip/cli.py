"""The ``saft`` command.

Every command imports what it needs when it runs, so that ``saft --help`` does not wait for torch.
"""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from saft_clip import data_cli, delta_cli, experiment_cli

#: What the disk and its owner may refuse at any time; any other OSError is a bug.
_EXPECTED = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EEXIST,
    )
)

app = typer.Typer(
    name="saft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune CLIP by updating 0.1% of its parameters, and ship the change as a small file.",
)
app.add_typer(data_cli.app, name="data")
app.add_typer(delta_cli.app, name="delta")
app.command()(experiment_cli.experiment)

#: docs/data.md says more.
WHAT_DATA_CAN_BE = (
    "Folder of images, data set of CoOp's or ImageNet, split file (.json), .csv, .tar, "
    "torchvision:NAME:ROOT or builtin:<domain>; behind it #fog:3 for corrupted images, #base or "
    "#new for half of the classes"
)

Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        help=f"{WHAT_DATA_CAN_BE}; may be repeated.",
    ),
]
Model = Annotated[str, typer.Option("--model", help="Model name of open_clip, or saft-tiny.")]
Pretrained = Annotated[
    str | None,
    typer.Option(
        "--pretrained",
        help="Tag of the model's weights (openai, ...), or a checkpoint file.",
        show_default="openai for ViT-B-16, built in for saft-tiny",
    ),
]
QuickGelu = Annotated[
    bool,
    typer.Option("--force-quick-gelu", help="Build the model with QuickGELU, for such a file."),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="Prompt template with {} for the class name, openai (80 templates), simple (7), or a "
        "text file of templates; may be repeated.",
        show_default="the data set's own, or 'a photo of a {}.'",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32 or amp_bf16.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that load images.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path(
        "saft-demo"
    ),
    domain: Annotated[
        str, typer.Option(help="Digits to train on: mnist, inverted, noisy or blurred.")
    ] = "mnist",
) -> None:
    """Compare SAFT with full fine-tuning on the built-in tiny CLIP; needs no network."""
    from saft_clip.demo import Plan, run_demo

    run_demo(output, Plan(trained=domain))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def finetune(context: typer.Context) -> None:
    """Fine-tune a CLIP model on a few images per class; the result is a delta file."""
    from saft_clip.commands import finetune_command
    from saft_clip.settings import run_with_settings

    text = finetune.__doc__ or ""
    run_with_settings(finetune_command, context.args, name="saft finetune", help=text)


@app.command()
def evaluate(
    data: Data,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Model name of open_clip, or saft-tiny.",
            show_default="the delta's or the adapter's, or ViT-B-16",
        ),
    ] = None,
    pretrained: Pretrained = None,
    force_quick_gelu: QuickGelu = False,
    delta: Annotated[
        Path | None, typer.Option("--delta", help="Delta file to apply to the model first.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="Adapter file: a trained classifier, or learned prompts."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    template: Template = None,
    batch_size: BatchSize = 64,
    precision: Precision = "fp32",
    device: Device = "cpu",
    workers: Workers = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Classify images zero-shot, by class prompts, with or without a delta; or by an adapter."""
    from saft_clip.commands import evaluate_command

    evaluate_command(
        data,
        model=model,
        pretrained=pretrained,
        force_quick_gelu=force_quick_gelu,
        delta=delta,
        adapter=adapter,
        split=split,
        templates=template or None,
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
        json_file=json,
    )


@app.command()
def select(
    train_data: Annotated[
        str,
        typer.Option("--train-data", help=f"{WHAT_DATA_CAN_BE}."),
    ],
    output: Annotated[Path, typer.Option("--output", help="Mask file to write.")] = Path(
        "mask.safetensors"
    ),
    density: Annotated[
        float, typer.Option("--density", help="Share of the parameters to select.")
    ] = 1e-3,
    score: Annotated[
        str, typer.Option("--score", help="mean_grad, fisher, random or magnitude.")
    ] = "mean_grad",
    shots: Annotated[
        int, typer.Option("--shots", min=0, help="Images per class; 0 takes all.")
    ] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the few-shot sample.")] = 1,
    model: Model = "ViT-B-16",
    pretrained: Pretrained = None,
    force_quick_gelu: QuickGelu = False,
    template: Template = None,
    batch_size: BatchSize = 32,
    precision: Precision = "amp_bf16",
    device: Device = "cpu",
    workers: Workers = 0,
) -> None:
    """Select the parameters that fine-tuning should change and write them to a mask file."""
    from saft_clip.commands import select_command
    from saft_clip.config import FinetuneConfig

    config = FinetuneConfig(
        train_data=train_data,
        density=density,
        shots=shots,
        seed=seed,
        model=model,
        pretrained=pretrained,
        force_quick_gelu=force_quick_gelu,
        template=tuple(template or ()),
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
        augment=False,
    )
    select_command(config, density, score, output)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a run.")],
) -> None:
    """Write the report page of a run again, from its metrics."""
    from saft_clip.console import say
    from saft_clip.report import write_report

    say(f"wrote {write_report(run)}")


@app.command()
def doctor() -> None:
    """Say what is installed, what was built, and which backends work."""
    from saft_clip.doctor import diagnose

    raise typer.Exit(diagnose())


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Say what SAFT would take for your model and batch, or run the benchmarks."""
    from saft_bench.cli import run_arguments  # it stands on this package; only this line knows it

    run_arguments(context.args, "saft bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: an error, explained in one sentence on stderr. 2: wrong usage. 130: interrupted by
    the user. Anything unexpected keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show a ± sign
    try:
        app(args=None if arguments is None else list(arguments), prog_name="saft")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        print(f"saft: {message}", file=sys.stderr)
        return 1
    return 0


def _explain(error: Exception) -> str | None:
    """The one sentence that says what went wrong; None if this error was not expected."""
    # Not imported here: it takes seconds, and importing it may be what has just failed.
    errors = sys.modules.get("saft_kernels.errors")
    if errors is not None and isinstance(error, errors.SaftError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.errno in _EXPECTED:
        return f"{error.filename} cannot be written or read: {error.strerror}"
    return None
