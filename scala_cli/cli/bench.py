from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Some
from scala_cli.models.locate import resolve
from scala_cli.settings import (
    BenchSettings,
    DeviceSettings,
    EvalSettings,
    OptimizerSettings,
    ReadSettings,
    Settings,
)
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
    train: Annotated[
        bool, typer.Option("--train", help="Time steps of training instead, beside timm's of the full width.")
    ] = False,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="With --train: as in scala finetune.")
    ] = False,
    *,
    settings: BenchSettings,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Latency, throughput, parameters and multiply-accumulates of every width.

    Example: scala bench runs/last -b 8 --threads 1; and before training: scala bench deit_s --train -b 64
    """
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: there is no directory {csv.parent}.")
    if train and data is not None:
        raise typer.BadParameter("--train takes random images: leave out --data.")
    if grad_checkpointing and not train:
        raise typer.BadParameter("--grad-checkpointing goes with --train.")

    import scala_cli.measure
    from scala_cli.evaluate import evaluate, validation_loader
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.source import is_checkpoint, open_slimmable
    from scala_cli.report import write_csv
    from scala_cli.training.speed import bench_training

    if checkpoint is None or is_checkpoint(checkpoint):
        net, record = load_with_record(resolve(checkpoint))
    else:
        net, record = open_slimmable(checkpoint, None, scratch=data is None)
        if data is None:
            out.note("random weights: they take as long as trained ones.")
        else:
            out.note("its narrower widths are cut without training.")
    points = choose_points(ratio, net.points)
    with out.progress() as live:
        if train:
            size = settings.batch_size or OptimizerSettings().batch_size
            optimizer = OptimizerSettings(batch_size=size, grad_checkpointing=grad_checkpointing)
            training = Settings("", optimizer=optimizer, device=device)
            document = bench_training(net.with_points(points), training, settings.runs or 10, live)
        else:
            device = replace(device, amp=bool(device.amp))
            document = scala_cli.measure.bench(net, record, points, settings, device, live)
        rows = document["steps" if train else "points"]
        if data is not None:
            loader = validation_loader(net, data, EvalSettings().batch_size, read)
            for row, found in zip(rows, evaluate(net, loader, points, device, live), strict=True):
                row["top1"] = found["top1"]
            loader.tell_skipped(live)
    out.result(document, rows)
    if csv is not None:
        write_csv(csv, rows)
