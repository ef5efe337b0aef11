"""The ``saft delta`` commands: look into deltas, apply, merge, make and share them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from saft_clip.deltas import Facts

app = typer.Typer(no_args_is_help=True, help="Look into delta files, apply, merge and make them.")

File = Annotated[Path, typer.Argument(metavar="DELTA", help="Delta file (.safetensors).")]
Output = Annotated[Path, typer.Option("--output", help="File to write.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Model of the base, by its name in open_clip.", show_default="the delta's"
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="The base's weights: tag or file.", show_default="what the delta says"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for other programs.")]
Originals = Annotated[
    bool,
    typer.Option(
        "--with-originals",
        help="Keep the base's values in the file too, so that it can be reverted without the base.",
    ),
]


@app.command()
def info(file: File, json: Json = False) -> None:
    """Say what a delta file changes, in which model, and how large it is."""
    from saft_clip import deltas
    from saft_clip.console import output as stdout

    facts = deltas.info(file)
    if json:
        print_json(facts)
    else:
        stdout.print(deltas.info_table(facts))


@app.command()
def verify(file: File, model: Model = None, base: Base = None, json: Json = False) -> None:
    """Make sure that a delta file is whole, and that the base is the one that it was made from."""
    from saft_clip import deltas

    facts = deltas.verify(file, model, base)
    fits = {True: "and its base is at hand", None: "; give --base to compare its base too"}
    done(facts, json, f"{file} is whole {fits[facts['fits_base']]}".replace(" ;", ";"))


@app.command()
def apply(
    file: File,
    output: Output,
    model: Model = None,
    base: Base = None,
    alpha: Annotated[
        float, typer.Option(help="1 is the fine-tuned model, 0 the base (WiSE-FT).")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Write the weights of the fine-tuned model: the base's with the delta's entries in them."""
    from saft_clip import deltas

    facts = deltas.apply(file, output, model, base, alpha)
    done(facts, json, f"wrote {output}: {facts['entries']:,} entries changed")


@app.command()
def revert(
    file: File,
    tuned: Annotated[Path, typer.Option("--tuned", help="File of the fine-tuned weights.")],
    output: Output,
    json: Json = False,
) -> None:
    """Write the base's weights, from the fine-tuned ones and a delta that holds originals."""
    from saft_clip import deltas

    facts = deltas.revert(file, tuned, output)
    done(
        facts, json, f"wrote {output}: {facts['entries']:,} entries restored, the base bit for bit"
    )


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="Delta file.")],
    second: Annotated[Path, typer.Argument(help="Delta file of the same base.")],
    model: Model = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Compare two deltas of one base, entry by entry."""
    from saft_clip import deltas
    from saft_clip.console import output as stdout

    facts = deltas.compare(first, second, model, base)
    if json:
        print_json(facts)
    else:
        stdout.print(deltas.difference_table(facts))
        stdout.print(deltas.metadata_table(facts))


@app.command()
def compose(
    files: Annotated[list[Path], typer.Argument(help="Delta files of one base.")],
    output: Output,
    rule: Annotated[str, typer.Option(help="sum, mean, ties or dare.")] = "sum",
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each delta, in order.", show_default="1")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of changes that ties looks at.")] = 1.0,
    drop: Annotated[float, typer.Option(help="Share of changes that dare drops.")] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Of what dare drops.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw where they meet: .png, .svg or .pdf.")
    ] = None,
    model: Model = None,
    base: Base = None,
    with_originals: Originals = False,
    json: Json = False,
) -> None:
    """Make one delta that does what several of one base do, and say where they meet."""
    from saft_clip import deltas
    from saft_clip.console import output as stdout

    facts = deltas.merge(
        files,
        output,
        rule=rule,
        weights=weight or None,
        keep=keep,
        drop=drop,
        seed=seed,
        model=model,
        base=base,
        originals=with_originals,
        picture=picture,
    )
    if not json:
        stdout.print(deltas.overlap_table(facts))
    done(facts, json, f"wrote {output}: {facts['entries']:,} entries, the {rule} of {len(files)}")


@app.command()
def scale(
    file: File,
    alpha: Annotated[float, typer.Option(help="1 is the fine-tuned model, 0 the base (WiSE-FT).")],
    output: Output,
    model: Model = None,
    base: Base = None,
    with_originals: Originals = False,
    json: Json = False,
) -> None:
    """Make the delta of a model between the base and the fine-tuned one."""
    from saft_clip import deltas

    facts = deltas.scale(file, alpha, output, model, base, with_originals)
    done(facts, json, f"wrote {output}: {alpha:g} times the change of {file}")


@app.command()
def extract(
    tuned: Annotated[str, typer.Argument(help="Fine-tuned weights: a file, or a tag of --model.")],
    output: Output,
    base: Base = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Model of both, by its name in open_clip.",
            show_default="any two files of weights",
        ),
    ] = None,
    force_quick_gelu: Annotated[
        bool, typer.Option("--force-quick-gelu", help="Build the model with QuickGELU.")
    ] = False,
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of the entries to keep, those that changed most.", show_default="all"
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Tensors to leave as in the base, by pattern; may be repeated."),
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="To keep with it.")] = None,
    notes: Annotated[str | None, typer.Option(help="To keep with it.")] = None,
    with_originals: Originals = False,
    json: Json = False,
) -> None:
    """Make a delta of any fine-tuned model and its base, exactly or of what changed most."""
    from saft_clip import deltas

    texts = {"license": licence, "notes": notes}
    facts = deltas.take(
        tuned,
        output,
        base=base,
        model=model,
        force_quick_gelu=force_quick_gelu,
        density=density,
        exclude=exclude or (),
        metadata={key: text for key, text in texts.items() if text},
        originals=with_originals,
    )
    done(facts, json, deltas.said_of_extraction(facts))


@app.command()
def export(
    file: File,
    form: Annotated[str, typer.Option("--format", help="open_clip, transformers, vllm or shira.")],
    output: Annotated[
        Path, typer.Option("--output", help="File to write; a folder for transformers and shira.")
    ],
    model: Model = None,
    base: Base = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what a SHiRA adapter cannot hold.")
    ] = False,
    json: Json = False,
) -> None:
    """Write the fine-tuned model, or its change, as another program loads it."""
    from saft_clip import deltas

    facts = deltas.export(file, form, output, model, base, partial)
    left = facts.get("left_out")
    rest = f", without {left:,} of {facts['entries']:,} entries" if left else ""
    done(facts, json, f"wrote {output} for {form}{rest}")


@app.command()
def push(
    file: File,
    repository: Annotated[str, typer.Argument(help="user/name on the Hugging Face hub.")],
    name: Annotated[str, typer.Option("--file", help="Name there.")] = "delta.safetensors",
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see it.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    json: Json = False,
) -> None:
    """Upload a delta to a repository of the Hugging Face hub."""
    from saft_clip import hub

    address = hub.push(file, repository, name=name, private=private, message=message)
    done({"file": str(file), "commit": address}, json, f"uploaded {file}: {address}")


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="user/name on the Hugging Face hub.")],
    output: Output = Path("delta.safetensors"),
    name: Annotated[str, typer.Option("--file", help="Name there.")] = "delta.safetensors",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    json: Json = False,
) -> None:
    """Download a delta from a repository of the Hugging Face hub, and check it."""
    from saft_clip import hub

    hub.pull(repository, output, name=name, revision=revision)
    done({"repository": repository, "output": str(output)}, json, f"wrote {output}")


# What they say ------------------------------------------------------------------------------------


def print_json(facts: Facts) -> None:
    """One object on stdout and nothing else."""
    import json

    print(json.dumps(facts, indent=2))


def done(facts: Facts, as_json: bool, message: str) -> None:
    """Say what was done, or print it as JSON."""
    from saft_clip.console import say

    if as_json:
        print_json(facts)
    else:
        say(message)
