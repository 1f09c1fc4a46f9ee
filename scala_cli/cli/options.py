"""How commands get their options.

A parameter whose type is a dataclass becomes one option for each of its fields, so that a default and its
help text are written once, where the setting is.
"""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from scala_cli.cli.console import Output, reporting_errors

Checkpoint = Annotated[
    str | None,
    typer.Argument(
        metavar="[CKPT]", help="A checkpoint or run directory, or hf-hub:org/repo. Default: the newest run."
    ),
]
Data = Annotated[
    str,
    typer.Option("--data", help="A folder with train/ and val/ of class folders, torch/cifar10, or digits."),
]
Ratios = Annotated[
    str | None, typer.Option("--ratios", help="Widths, as shares of the full one. [default: 0.25,0.5,0.75,1]")
]
Some = Annotated[
    list[str] | None,
    typer.Option("--ratio", help="One of the trained widths; repeat for more. Default: all."),
]
Target = Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what the output directory holds.")]


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command; see the module's own words.

    The function's `out: Output` gives every command --json, --quiet and --debug, and mistakes are
    reported through it.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, type] = {}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function).parameters.values():
            kind = hints[parameter.name]
            if is_dataclass(kind) and isinstance(kind, type):
                groups[parameter.name] = kind
                parameters += [parameter_of(field, kind) for field in fields(kind)]
            else:
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

        def run(**values: Any) -> None:
            for group, kind in groups.items():
                values[group] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            with reporting_errors(values["out"]):
                function(**values)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, no_args_is_help=False)(run)
        return function

    return register


def parameter_of(field: Field, group: type) -> inspect.Parameter:
    """The option of one dataclass field: --field-name, its short flag, its help text, its default."""
    hints = get_type_hints(group)
    flag = "--" + field.name.replace("_", "-")
    flags = [flag, *field.metadata["short"]]
    if field.metadata.get("switch"):
        flags[0] = flag
    elif hints[field.name] in (bool, bool | None):
        flags[0] = f"{flag}/--no-{flag[2:]}"
    panel = None if group is Output else (group.__doc__ or "").rstrip(".")
    info = typer.Option(*flags, help=field.metadata["help"], rich_help_panel=panel)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[hints[field.name], info],
    )
