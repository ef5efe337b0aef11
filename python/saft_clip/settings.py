"""Command-line options for every field of :class:`~saft_clip.config.FinetuneConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from saft_clip.config import FinetuneConfig, as_typed, dashed
from saft_clip.errors import ConfigError

_HINTS = get_type_hints(FinetuneConfig)

#: Headings of the help page, by the first option under each.
_PANELS = {
    "train_data": "Data and output",
    "model": "Model",
    "method": "What is trained",
    "epochs": "Training",
    "alpha": "Settings of some methods",
    "val_frequency": "Logging and loading",
}


def run_with_settings(
    run: Callable[[FinetuneConfig], Any], arguments: Sequence[str], *, name: str, help: str
) -> None:
    """Parse the options of a command into a configuration and run it.

    ``--config FILE`` gives the settings of a YAML file; options win over it. A resumed run takes
    the settings of its own ``config.yaml``.

    Args:
        run: what to do with the configuration.
        arguments: what follows the command's name.
        name: of the command, for its help page.
        help: what it does.

    Raises:
        ConfigError: if a setting is out of its range or the file is wrong.
        SystemExit: with 2 for an unknown option; with 0 after ``--help`` and when done.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def command(config: Path | None = None, **options: Any) -> None:
        given = {
            key: as_typed(value, _HINTS[key])
            for key, value in options.items()
            if value not in (None, [])
        }
        run(_configure(config, given))

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_config_option(), *map(_option, *zip(*_fields_with_panels(), strict=True))]
    )
    app.command(help=help)(command)
    app(args=list(arguments), prog_name=name)


def _configure(file: Path | None, given: dict[str, Any]) -> FinetuneConfig:
    if file is None and given.get("resume") and "train_data" not in given:
        file = Path(given.get("output", "saft-run")) / "config.yaml"
        given["output"] = str(file.parent)  # the file names the one before, if it was moved
    if file is not None:
        return FinetuneConfig.load(file).changed(**given)
    if "train_data" not in given:
        raise ConfigError("nothing to train on: give --train-data, or a --config that names it")
    return FinetuneConfig(**given)


def _fields_with_panels() -> Iterator[tuple[Field[Any], str]]:
    panel = ""
    for item in fields(FinetuneConfig):
        panel = _PANELS.get(item.name, panel)
        yield item, panel


def _config_option() -> inspect.Parameter:
    info = typer.Option(
        "--config", help="YAML file of settings; options win over it.", rich_help_panel="Settings"
    )
    return inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, info],
    )


def _option(item: Field[Any], panel: str) -> inspect.Parameter:
    """A field as an option that is None unless the user gives it."""
    kind = _plain_type(_HINTS[item.name])
    flag = f"--{dashed(item.name)}"
    info = typer.Option(
        f"{flag}/--no-{dashed(item.name)}" if item.default is True else flag,
        metavar=_metavar(_HINTS[item.name]),
        help=escape(item.metadata["help"] + _default(item)),
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _plain_type(hint: Any) -> Any:
    """``str | None`` -> str; ``tuple[str, ...]`` -> list[str]; a number or a word -> str."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if any(get_origin(kind) is Literal for kind in get_args(hint)):
        return str
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint


def _metavar(hint: Any) -> str | None:
    """What a number or a word is called; all others Typer knows."""
    words = [
        word for kind in get_args(hint) if get_origin(kind) is Literal for word in get_args(kind)
    ]
    return " or ".join(["<float>", *words]) if words else None


def _default(item: Field[Any]) -> str:
    """The default for the help text, where that does not say it itself."""
    default = item.metadata.get("default", MISSING)
    if default in (MISSING, None, ()) or default is False:
        return ""
    value = f"{default:g}" if isinstance(default, float) else str(default)
    source = item.metadata.get("source")
    known = f", {source}" if source else ""
    known += "; of some methods another" if item.metadata.get("by_method") else ""
    return f" [default: {'yes' if default is True else value}{known}]"
