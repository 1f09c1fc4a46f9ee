from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Checkpoint, Force, Target
from scala_cli.models.locate import resolve
from scala_cli.slicing.point import Point


def slice(
    checkpoint: Checkpoint = None,
    *,
    ratio: Annotated[str, typer.Option("--ratio", help="One of the trained widths.")],
    output: Target = None,
    force: Force = False,
    out: Output,
) -> None:
    """Write one width as standalone safetensors that timm loads by itself.

    It is read back through timm and compared before it takes its place.

    Example: scala slice --ratio 0.5 -o small
    """
    point = Point.of(ratio)
    directory = resolve(checkpoint)

    from scala_cli.export import default_target, slice_model

    target = output or default_target(directory, point)
    with out.progress() as live:
        result = slice_model(directory, point, target, force, live)
    out.result(result, [])
    out.note(f"load it: timm.create_model('local-dir:{result['path']}', pretrained=True)")
