from dataclasses import asdict
from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Checkpoint, Force, Target, find_checkpoint
from scala_cli.files import refuse_occupied
from scala_cli.models.locate import FILES
from scala_cli.settings import Budget, DeviceSettings
from scala_cli.slicing.point import Point


def slice(
    checkpoint: Checkpoint = None,
    *,
    ratio: Annotated[str | None, typer.Option("--ratio", help="One of the trained widths.")] = None,
    output: Target = None,
    force: Force = False,
    budget: Budget,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Write one width as standalone safetensors that timm loads by itself.

    The one named, or the widest that fits a budget. It is read back through timm and compared before it
    takes its place.

    Example: scala slice --ratio 0.5 -o small; and: scala slice --max-latency-ms 8 --threads 1
    """
    limited = any(limit is not None for limit in asdict(budget).values())
    if (ratio is not None) is limited:
        raise typer.BadParameter("Give either a width, --ratio 0.5, or what it must fit, --max-latency-ms 8.")
    point = Point.of(ratio) if ratio is not None else None
    directory = find_checkpoint(checkpoint, out)
    if output is not None:
        refuse_occupied(output, force, FILES, source=directory)  # before anything is measured

    from scala_cli.deploy.budget import candidates, choose, is_measured
    from scala_cli.deploy.slice import default_target, slice_model

    if device != DeviceSettings() and not is_measured(budget):
        raise typer.BadParameter("--device, --amp and --threads go with what is measured: --max-latency-ms.")
    rows = []
    with out.progress() as live:
        if point is None:
            rows = candidates(directory, budget, device, live)
            point = Point.of_row(choose(rows, budget))
        target = output or default_target(checkpoint, directory, point.file_name)
        result = slice_model(directory, point, target, force, live)
    out.result({**result, "candidates": rows} if rows else result, rows)
    out.note(f"load it: timm.create_model('local-dir:{result['path']}', pretrained=True)")
