from pathlib import Path
from typing import Annotated, Any

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Data, Named, Widths, open_points
from scala_cli.settings import (
    CalibrationSettings,
    DeviceSettings,
    EvalSettings,
    ProbeSettings,
    ReadSettings,
    TokenSettings,
)

DRAWN_THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def evaluate(
    checkpoint: Named = None,
    *,
    data: Data,
    ratio: Widths = None,
    cascade: Annotated[
        str | None,
        typer.Option(
            help="Points, 0.25,1 or 0.5@128~0.5,1@224~0.7: the first answers, the next is asked if that one "
            "is unsure. Or auto: the best points for --max-gmacs."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Of --cascade: accept an answer of at least this probability. Default: 0.8."
        ),
    ] = None,
    max_gmacs: Annotated[
        float | None,
        typer.Option(
            min=0, help="Of --cascade auto: billions of multiply-accumulates per image, on average."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A backbone to compare features with: a model as in scala convert, or a checkpoint. "
            "Default: the full width."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the cascade at every threshold: .svg, .png or .pdf.")
    ] = None,
    probe: ProbeSettings,
    tokens: TokenSettings,
    calibration: CalibrationSettings,
    settings: EvalSettings,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Measure the accuracy of every point on the validation images, or of several points as a cascade.

    A point such as 1~0.5 needs no training: if the model was not trained for it, its tokens are merged.

    For a backbone it compares the features of every width with the full width's, on any folder of images.

    With --probe it measures embeddings: the accuracy of a probe fitted to the full width's embeddings (full)
    and to the width's own (own); agreement, how many of the full width's 10 nearest images are among its own;
    recall, how often it finds the same image in an index of the full width's. --against takes the place of
    the full width.

    --cascade auto finds the best one, two or three points within a mean budget. It chooses them on half of
    the images and evaluates them on the others.

    Example: scala eval runs/last --data DIR; and: scala eval --data DIR --cascade 0.25,1 --threshold 0.8
    """
    if cascade and ratio:
        raise typer.BadParameter("--cascade already names the points: leave out --ratio.")
    if probe.probe and cascade:
        raise typer.BadParameter("--probe judges embeddings, --cascade answers: leave out one.")
    if (plot or threshold is not None) and not cascade:
        raise typer.BadParameter("--threshold and --plot go with --cascade.")
    if settings.resized and (cascade or probe.probe):
        raise typer.BadParameter("--cascade and --probe always resize: leave out --resized.")
    search = cascade == "auto"
    if search is not (max_gmacs is not None):
        raise typer.BadParameter("--cascade auto and --max-gmacs go together.")
    if search and (threshold is not None or plot):
        raise typer.BadParameter("--cascade auto finds its threshold: leave out --threshold and --plot.")
    threshold = 0.8 if threshold is None else threshold

    from scala_cli.calibration import Calibration, cut_without_training
    from scala_cli.cascade import Cascade
    from scala_cli.data.split import open_images
    from scala_cli.device import choose_device
    from scala_cli.embeddings import probe_loaders, probe_widths
    from scala_cli.evaluate import (
        answering,
        evaluate,
        evaluate_as_sliced,
        evaluate_cascade,
        find_cascade,
        reference_for,
        validation_loader,
    )
    from scala_cli.models.source import open_backbone
    from scala_cli.models.vit import choose_attention
    from scala_cli.plot import cascade_picture, refuse_picture, save
    from scala_cli.precision import note_emulation, uses_bfloat16
    from scala_cli.tasks import task_named

    if plot:
        refuse_picture(plot)
    place = choose_device(device)
    named = cascade.split(",") if cascade and not search else ratio
    net, record, points = open_points(checkpoint, named, tokens, out)
    task = task_named(record.task)
    if cascade:  # refuses unsuitable points before any image is read
        Cascade(net, points if not search else [points[0], points[-1]], threshold)
    if against and task.labelled:
        raise typer.BadParameter("--against compares features; this model has classes.")
    if probe.probe:
        loaders = probe_loaders(net, data, probe, settings.batch_size, read)
        loader = loaders[-1]
    else:
        loader = validation_loader(net, task, data, settings.batch_size, read)
    document: dict[str, Any]
    with out.progress() as live:
        if calibration.calibrate:
            images = open_images(data, read.data_dir)
            on = Calibration(images, calibration, read, device, live)
            net, _ = cut_without_training(net, record, points, on)
        reference = None
        if against:
            other = reference_for(net, open_backbone(against, net.spec, live)).to(place)
            choose_attention(other, place, uses_bfloat16(place, device))
            reference = answering(other, task, device)
        net.to(place)
        choose_attention(net, place, uses_bfloat16(place, device))
        note_emulation(place, device, live)
        loader.split.tell(live)
        if sizes := [point.size for point in points if point.size]:
            loader.split.tell_enlarged(max(sizes), live)
        if probe.probe:
            if loaders[0] is not loader:
                loaders[0].split.tell(live)
            rows = probe_widths(net, probe, loaders, points, device, live, reference)
            document = {"points": rows}
            if loaders[0] is not loader:
                loaders[0].tell_skipped(live)
        elif max_gmacs is not None:
            document = find_cascade(net, points, loader, max_gmacs, device, live)
            rows = document["points"]
        elif cascade:
            asked = Cascade(net, points, threshold)
            thresholds = sorted({*DRAWN_THRESHOLDS, threshold})
            rows, sweep = evaluate_cascade(asked, loader, thresholds, device, live)
            document = next({**row} for row in sweep if row["threshold"] == threshold)
            document |= {"cascade": [str(point) for point in asked.points], "points": rows, "sweep": sweep}
        else:
            if settings.resized:
                rows = evaluate(net, task, loader, points, device, live, reference=reference)
            else:
                rows = evaluate_as_sliced(net, task, loader, points, device, live, reference)
            document = {"points": rows}
        loader.tell_skipped(live)
    if cascade and plot:
        save(cascade_picture(document["sweep"], rows), plot)
    skipped = [*(loaders[0].skipped if probe.probe and loaders[0] is not loader else ()), *loader.skipped]
    out.result({**document, "skipped": skipped}, document.get("sweep", rows))
