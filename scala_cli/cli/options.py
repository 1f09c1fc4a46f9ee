"""Options of the commands.

A parameter whose type is a dataclass becomes one option per field, so that each default and help text is
written once, in that dataclass.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from scala_cli.cli.console import Output, reporting_errors
from scala_cli.methods import METHODS
from scala_cli.models.locate import resolve
from scala_cli.settings import DEFAULT_RATIOS, TokenSettings

if TYPE_CHECKING:
    from scala_cli.models.checkpoint import Record
    from scala_cli.models.slimmable import SlimmableViT
    from scala_cli.slicing.point import Point

Checkpoint = Annotated[
    str | None,
    typer.Argument(
        metavar="[CKPT]", help="A checkpoint or run directory, or hf-hub:org/repo. Default: the newest run."
    ),
]
DATA_HELP = (
    "A folder with class folders in train/ and val/, a timm data set such as torch/cifar10, or digits; "
    "for features any folder of images. Or tar files: 'DIR/{000..010}.tar' or a folder of them."
)
Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]
Ratios = Annotated[
    str | None,
    typer.Option(
        "--ratios",
        help=f"Widths, as shares of the full width. Default: the checkpoint's, else {DEFAULT_RATIOS}.",
    ),
]
Widths = Annotated[
    list[str] | None,
    typer.Option(
        "--ratio", help="A trained width or point, such as 0.5 or 0.5@160~0.7; repeat for more. Default: all."
    ),
]
Named = Annotated[
    str | None,
    typer.Argument(
        metavar="[CKPT|MODEL]",
        help="A checkpoint, or a model as in scala convert. Default: the newest run.",
    ),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Read this file instead of downloading.")]
ImgSize = Annotated[int | None, typer.Option("--img-size", min=1, help="Image size, pixels per side.")]
PatchSize = Annotated[int | None, typer.Option("--patch-size", min=1, help="Patch size, pixels per side.")]
Target = Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what the output directory holds.")]


def find_checkpoint(named: str | None, out: Output) -> Path:
    """Returns the directory of the named checkpoint, or else of the newest run, which a note then names."""
    directory = resolve(named)
    if named is None:
        out.note(f"the newest run: {os.path.relpath(directory.resolve())}")
    return directory


def open_points(
    named: str | None, wanted: Sequence[str] | None, tokens: TokenSettings, out: Output
) -> "tuple[SlimmableViT, Record, list[Point]]":
    """Opens a checkpoint, or a MODEL with its pretrained weights, with the wanted points.

    Args:
        wanted: labels of points; None means all points of a checkpoint, or the full width of a MODEL.
    """
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.points import with_untrained
    from scala_cli.models.source import is_checkpoint, open_slimmable
    from scala_cli.slicing.point import Point, decimal, widths_of

    with out.progress() as live:
        if named is None or is_checkpoint(named):
            net, record = load_with_record(find_checkpoint(named, out))
        else:
            ratios = widths_of(map(Point.of, wanted or ("1",)))
            net, record = open_slimmable(named, ",".join(map(decimal, ratios)), watch=live)
        net, points = with_untrained(net, record, wanted, tokens, live)
    return net, record, points


def place_of(data: str) -> str:
    """Returns the images' folder or tar files as an absolute path, so that a run resumes from anywhere.

    The name of a data set is returned unchanged.
    """
    place = Path(data).expanduser()
    return str(place.resolve()) if place.is_dir() or place.suffix == ".tar" else data


def add_command(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Registers a function as a command.

    Its parameter `out: Output` adds --json, --quiet and --debug; errors are reported through it.
    """
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

    run.__doc__ = function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name)(run)


CHOICES = {"method": {name: what for name, (_, what) in METHODS.items()}}
"""Allowed values of settings whose type does not list them, and what they mean, by field name."""


def parameter_of(field: Field, group: type) -> inspect.Parameter:
    """Returns the option of a dataclass field: --field-name, its short flag, help text and default."""
    hints = get_type_hints(group)
    flag = "--" + field.name.replace("_", "-")
    flags = [flag, *field.metadata["short"]]
    if hints[field.name] in (bool, bool | None):
        off = f"--no-{flag[2:]}"
        flags[0] = {"on": flag, "off": f" /{off}", "": f"{flag}/{off}"}[field.metadata["only"]]
    panel = None if group is Output else (group.__doc__ or "").rstrip(".")
    choices = CHOICES.get(field.name, {})
    kind = Literal[*choices] if choices else hints[field.name]
    shows_default = hints[field.name] is not bool
    info = typer.Option(
        *flags,
        help=field.metadata["help"] + as_sentence(choices),
        rich_help_panel=panel,
        show_default=shows_default,
        min=field.metadata["min"],
        max=field.metadata["max"],
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[kind, info],
    )


def as_sentence(choices: Mapping[str, str]) -> str:
    """Returns names and what they mean: " one: what; other: what."; "" without choices."""
    return f" {'; '.join(f'{name}: {what}' for name, what in choices.items())}." if choices else ""
