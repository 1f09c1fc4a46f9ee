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
    from scala_cli.models.checkpoint import read_about

    result = slice_model(directory, point, output or default_target(directory, point), force)
    if read_about(directory)[2].method is None and point.ratio < 1:
        out.note("no width but the full one has been trained yet: scala finetune CKPT --data DIR")
    out.result(result, [])
    out.note(f"load it: timm.create_model('local-dir:{result['path']}', pretrained=True)")
