from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Named, Widths, find_checkpoint
from scala_cli.files import refuse_unwritable
from scala_cli.settings import (
    BenchSettings,
    CalibrationSettings,
    DeviceSettings,
    EvalSettings,
    OptimizerSettings,
    ReadSettings,
    Settings,
    TokenSettings,
)

if TYPE_CHECKING:
    from scala_cli.models.checkpoint import Record
    from scala_cli.models.slimmable import SlimmableViT


def bench(
    checkpoint: Named = None,
    ratio: Widths = None,
    data: Annotated[str | None, typer.Option("--data", help="Also evaluate on these images.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="Also time this timm model (a name or a directory), with random weights; repeat for more.",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the rows to this file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw accuracy, or else GMACs, against latency: .svg, .png or .pdf."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write table and picture as one page; its points have tooltips."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Time training steps instead, also timm's at the full width.")
    ] = False,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="With --train: as in scala finetune.")
    ] = False,
    torchcompile: Annotated[
        bool, typer.Option("--torchcompile", help="With --train: as in scala finetune.")
    ] = False,
    *,
    settings: BenchSettings,
    tokens: TokenSettings,
    calibration: CalibrationSettings,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Measure latency, throughput, memory, parameters and multiply-accumulates of every width.

    Widths and the models to --compare them with take turns; runtimes are measured one after the other.

    Example: scala bench runs/last --runtime torch,onnx --int8 --compare mobilenetv3_large_100 --plot b.svg;
    before training: scala bench deit_s --train -b 64
    """
    for file in filter(None, (csv, html)):
        refuse_unwritable(file)
    elsewhere = (data, compare, plot, html, settings.int8, settings.runtime != "torch")
    if train and any(elsewhere):
        raise typer.BadParameter(
            "--train times torch on random images: "
            "leave out --data, --compare, --plot, --html, --int8 and --runtime."
        )
    if calibration.calibrate and (train or data is None):
        raise typer.BadParameter("--calibrate goes with --data, not with --train.")
    for name, given in (("--grad-checkpointing", grad_checkpointing), ("--torchcompile", torchcompile)):
        if given and not train:
            raise typer.BadParameter(f"{name} goes with --train.")

    from scala_cli.bench.run import bench as bench_predictions
    from scala_cli.calibration import Calibration, cut_without_training
    from scala_cli.data.split import open_images
    from scala_cli.evaluate import validation_loader
    from scala_cli.models.points import with_untrained
    from scala_cli.plot import as_svg, bench_picture, refuse_picture, save
    from scala_cli.report import write_csv, write_page
    from scala_cli.tasks import task_named
    from scala_cli.training.price import price_of_run
    from scala_cli.training.speed import bench_training

    for picture in (plot, html.with_suffix(".svg") if html else None):
        if picture:
            refuse_picture(picture)
    net, record, directory = what_to_time(checkpoint, data is not None, out)
    task = task_named(record.task)
    with out.progress() as live:
        net, points = with_untrained(net, record, ratio, tokens, live)
        if train:
            size = settings.batch_size or OptimizerSettings().batch_size
            optimizer = OptimizerSettings(
                batch_size=size, grad_checkpointing=grad_checkpointing, torchcompile=torchcompile
            )
            training = Settings("", optimizer=optimizer, device=device)
            document = bench_training(
                net.with_points(points), record.task, training, settings.runs or 10, live
            )
        else:
            images = (
                validation_loader(net, task, data, EvalSettings().batch_size, read)
                if data is not None
                else None
            )
            if images:
                images.split.tell(live)
            if calibration.calibrate:
                assert data is not None
                seen = open_images(data, read.data_dir)
                on = Calibration(seen, calibration, read, device, live)
                net, _ = cut_without_training(net, record, points, on)
            document = bench_predictions(net, record, points, compare or (), settings, device, live, images)
            if images:
                images.tell_skipped(live)
    if not train and directory and (spent := price_of_run(net, record, directory)):
        document["training"] = spent
        out.note(
            f"trained in {spent['minutes']:.4g} minutes, all widths at once; training each alone on as many "
            f"images would take {spent['separate']:.3g} times the multiply-accumulates."
        )
    rows = document["steps" if train else "points"]
    if csv is not None:
        write_csv(csv, rows)
    if plot is not None:
        save(bench_picture(rows, task), plot)
    if html is not None:
        facts = {name: value for name, value in document.items() if isinstance(value, str | int | float)}
        title = f"{net.spec.architecture}: what each width costs"
        write_page(html, title, facts, readable(rows), as_svg(bench_picture(rows, task)))
    out.result(document, readable(rows))


def what_to_time(
    checkpoint: str | None, trained: bool, out: Output
) -> tuple["SlimmableViT", "Record", Path | None]:
    """Returns the model to time, its record, and its directory if it is a checkpoint.

    A MODEL has random weights unless `trained`.
    """
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.source import is_checkpoint, open_slimmable

    if checkpoint is None or is_checkpoint(checkpoint):
        directory = find_checkpoint(checkpoint, out)
        return *load_with_record(directory), directory
    out.note(
        "the narrower widths are cut without training."
        if trained
        else "timed with random weights, as trained ones take as long; none are read."
    )
    return *open_slimmable(checkpoint, None, scratch=not trained), None


def readable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows as printed.

    Left out are empty columns, a model or runtime that is the same in all, and the bounds of the latency.
    """
    from scala_cli.report import even

    rows = even(rows)
    dull = {name for name in rows[0] if all(row[name] is None for row in rows)}
    dull |= {"latency_ms_low", "latency_ms_high"}
    dull |= {name for name in ("model", "runtime") if len({row.get(name) for row in rows}) == 1}
    return [{name: value for name, value in row.items() if name not in dull} for row in rows]
