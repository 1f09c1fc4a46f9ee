from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Some
from scala_cli.models.locate import resolve
from scala_cli.settings import BenchSettings, DeviceSettings, EvalSettings, ReadSettings
from scala_cli.slicing.point import choose_points


def bench(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT|MODEL]",
            help="A checkpoint, or a model as in scala convert. Default: the newest run.",
        ),
    ] = None,
    ratio: Some = None,
    data: Annotated[str | None, typer.Option("--data", help="Also evaluate on these images.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the rows to this file.")] = None,
    *,
    settings: BenchSettings,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Latency, throughput, parameters and multiply-accumulates of every width.

    Example: scala bench runs/last -b 8 --threads 1
    """
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: there is no directory {csv.parent}.")

    import scala_cli.measure
    from scala_cli.evaluate import evaluate, validation_loader
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.source import is_checkpoint, open_slimmable
    from scala_cli.report import write_csv

    if checkpoint is None or is_checkpoint(checkpoint):
        net, record = load_with_record(resolve(checkpoint))
    else:
        net, record = open_slimmable(checkpoint, None, scratch=data is None)
        if data is None:
            out.note("random weights: they take as long as trained ones.")
        else:
            out.note("its narrower widths are cut without training.")
    points = choose_points(ratio, net.points)
    device = replace(device, amp=bool(device.amp))
    with out.progress() as live:
        document = scala_cli.measure.bench(net, record, points, settings, device, live)
        if data is not None:
            loader = validation_loader(net, data, EvalSettings().batch_size, read)
            for row, found in zip(
                document["points"], evaluate(net, loader, points, device, live), strict=True
            ):
                row["top1"] = found["top1"]
            loader.tell_skipped(live)
    out.result(document, document["points"])
    if csv is not None:
        write_csv(csv, document["points"])
