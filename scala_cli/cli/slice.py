from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Force, ImgSize, PatchSize, Target, Weights, find_checkpoint
from scala_cli.files import refuse_occupied
from scala_cli.models.locate import CHECKPOINT_FILES, path_of, short_name
from scala_cli.settings import (
    DEFAULT_RATIOS,
    Budget,
    CalibrationSettings,
    DeviceSettings,
    EvalSettings,
    ReadSettings,
    TokenSettings,
)
from scala_cli.slicing.point import Point

NAMED = {"second": "the second best", "better": "the next better, over the limit"}


def slice(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT|MODEL]",
            help="A checkpoint; with --data also a model as in scala convert, of which limits try the widths "
            f"{DEFAULT_RATIOS}. Default: the newest run.",
        ),
    ] = None,
    *,
    ratio: Annotated[
        str | None,
        typer.Option("--ratio", help="A width or point of it, such as 0.5@160~0.7; of a MODEL any width."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Images to fit the slice on: any folder, no labels needed."),
    ] = None,
    output: Target = None,
    force: Force = False,
    weights: Weights = None,
    img_size: ImgSize = None,
    patch_size: PatchSize = None,
    tokens: TokenSettings,
    calibration: CalibrationSettings,
    budget: Budget,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Write one width as standalone safetensors that plain timm loads.

    Give --ratio, or limits that the best point must meet. A width that has not been trained is first fitted
    to the full model in closed form, on images without labels. The file is read back by timm and compared
    before it is moved into place.

    Example: scala slice deit_s --ratio 0.5 --data PHOTOS -o half; and: scala slice --max-latency-ms 8
    """
    if (ratio is not None) is bool(budget.limits()):
        raise typer.BadParameter("Give either a width, --ratio 0.5, or a limit, --max-latency-ms 8.")
    if calibration.calibrate and data is None:
        raise typer.BadParameter("--calibrate needs images (labels are not used): --data DIR")
    point = Point.of(ratio) if ratio is not None else None
    source = path_of(checkpoint) if checkpoint else None
    if output is not None:
        refuse_occupied(output, force, CHECKPOINT_FILES, source=source)  # before anything is measured

    from scala_cli.calibration import Calibration, cut_without_training
    from scala_cli.data.split import open_images
    from scala_cli.deploy.budget import alternatives, candidates, choose, is_measured
    from scala_cli.deploy.slice import default_target, slice_family, slice_model, tell_untrained
    from scala_cli.evaluate import evaluate_as_sliced, validation_loader
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.points import with_untrained
    from scala_cli.models.source import Changes, is_checkpoint, open_model
    from scala_cli.tasks import task_named

    if device != DeviceSettings() and not is_measured(budget) and data is None:
        raise typer.BadParameter(
            "--device, --amp and --threads go with --max-latency-ms, --max-memory-mb or --data."
        )
    if budget.runtime != Budget.runtime and not is_measured(budget):
        raise typer.BadParameter("--runtime goes with --max-latency-ms or --max-memory-mb.")
    changes = Changes(None, img_size, patch_size)
    # at the full width, another size or fewer tokens need no images
    whole = point is not None and point.ratio == 1 and point != Point(point.ratio)
    is_model = (data is not None or whole) and checkpoint is not None and not is_checkpoint(checkpoint)
    if (weights or changes.given()) and not is_model:
        raise typer.BadParameter("--weights, --img-size and --patch-size go with a MODEL and --data.")
    split = open_images(data, read.data_dir) if data is not None else None  # before any download
    rows = []
    with out.progress() as live:
        if is_model:
            model = str(checkpoint)
            alone = (Point(point.ratio),) if point else None
            net, record = open_model(model, alone, changes, weights=weights, watch=live)
            directory = Path(short_name(model))
        else:
            directory = find_checkpoint(checkpoint, out)
            net, record = load_with_record(directory)
        family = net
        if ratio is not None:
            net, (point,) = with_untrained(net, record, [ratio], tokens, live)
        task = task_named(record.task)
        if point is None and (budget.min_top1 is None or not task.labelled):
            rows = candidates(net, record, net.points, budget, device, live)
            point = Point.of_row(choose(rows, budget))
        points = [point] if point else net.points
        fits = record.is_untrained(points) if calibration.calibrate is None else calibration.calibrate
        cut_anew = split is not None and (fits or is_model)
        if split is not None and cut_anew:
            on = Calibration(split, replace(calibration, calibrate=fits), read, device, live)
            net, record = cut_without_training(net, record, points, on)
        elif split is not None and calibration.calibrate is None:
            live.note("nothing is fitted: the width is trained or full. To fit it anyway: --calibrate")
        if point is None:
            if data is not None and cut_anew:
                loader = validation_loader(net, task, data, EvalSettings().batch_size, read)
                found = evaluate_as_sliced(net, task, loader, points, device, live)
                record = replace(record, metrics=found)
            rows = candidates(net, record, net.points, budget, device, live)
            point = Point.of_row(choose(rows, budget))
        target = output or default_target(checkpoint, directory, point.file_name)
        if cut_anew or is_model or net is not family:
            tell_untrained(record, [point], live)
            result = slice_family(net, record, point, target, force)
        else:
            result = slice_model(directory, point, target, force, live)
    fit = result.get("fit", {})
    if fit.get("r2") is not None:
        embedding = f", and {fit['embedding']:.1%} of its embedding's" if "embedding" in fit else ""
        out.note(
            f"fitted to {fit['images']} images; on {fit['held_out']} others its output explains "
            f"{fit['r2']:.1%} of the variance of the full model's output{embedding}."
        )
    if rows:
        others = alternatives(rows, budget)
        result = {**result, **others, "candidates": rows}
        for name, row in others.items():
            out.note(f"{NAMED[name]}: {described(row)}.")
    out.result(result, rows)
    needed = "import scala_cli, which registers its architecture in timm; " if "import" in result else ""
    out.note(f"load it: {needed}timm.create_model('local-dir:{result['path']}', pretrained=True)")


def described(row: dict[str, Any]) -> str:
    """Describes a candidate: its point, then its figures."""
    point, skipped = Point.of_row(row), {"ratio", "size", "keep", "fits", "predicted"}
    figures = ", ".join(
        f"{name} {value:.4g}" for name, value in row.items() if name not in skipped and value is not None
    )
    return f"{point} with {figures}{' (predicted)' if row.get('predicted') else ''}"
