from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Force, ImgSize, PatchSize, Ratios, Target, Weights
from scala_cli.errors import ScalaError
from scala_cli.files import refuse_occupied
from scala_cli.models.locate import CHECKPOINT_FILES, path_of, short_name
from scala_cli.settings import CalibrationSettings, DeviceSettings, FamilySettings, ReadSettings
from scala_cli.slicing.point import Point, parse_points

if TYPE_CHECKING:
    from scala_cli.models.fit import Fit


def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="deit_ti, deit_s, deit_b (or ..._distilled), a timm name, hf-hub:org/repo, "
            "a directory of timm or transformers, or a weight file."
        ),
    ],
    output: Target = None,
    ratios: Ratios = None,
    weights: Weights = None,
    ema: Annotated[
        bool,
        typer.Option(
            "--ema",
            help="Take the moving average of the weights that the file holds (model_ema, teacher).",
        ),
    ] = False,
    scratch: Annotated[bool, typer.Option("--scratch", help="Start from random weights.")] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            exists=True,
            dir_okay=False,
            help="Text file with the names of the model's classes, in order, one per line.",
        ),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of classes of a new head.")] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Attention heads, if a weight file does not say. Default: one per 64 channels."
        ),
    ] = None,
    img_size: ImgSize = None,
    patch_size: PatchSize = None,
    layout: Annotated[
        Literal["aligned", "fused"],
        typer.Option(
            help="aligned cuts every head of q, k and v alike; fused cuts qkv as one block (for comparison)."
        ),
    ] = "aligned",
    order: Annotated[
        Literal["importance", "none"] | None,
        typer.Option(
            help="importance puts the most important channels first and keeps the function; none never does. "
            "Default: leave it to scala finetune."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images for ordering the channels and fitting the narrower widths: any folder, "
            "no labels needed.",
        ),
    ] = None,
    task: Annotated[
        Literal["classification", "features"] | None,
        typer.Option(
            help="What the model is for; features removes its classifier. Default: features if it has none."
        ),
    ] = None,
    force: Force = False,
    *,
    calibration: CalibrationSettings,
    kept: FamilySettings,
    read: ReadSettings,
    device: DeviceSettings,
    out: Output,
) -> None:
    """Turn pretrained weights into a slimmable checkpoint.

    The full width computes the same as the pretrained model, and plain timm loads the result. With --data the
    narrower widths are fitted to the full one in closed form, so that they work without training; the full
    width's output then changes a little.

    Example: scala convert deit_s -o deit_s-slimmable; and: scala convert deit_s --data PHOTOS
    """
    if data is not None and order == "none":
        raise typer.BadParameter("--data needs --order importance.")
    if data is None and calibration.calibrate:
        raise typer.BadParameter("--calibrate needs images (labels are not used): --data DIR")
    if data is not None and (scratch or layout == "fused"):
        raise typer.BadParameter("--data needs pretrained weights and --layout aligned.")
    if task == "features" and (num_classes is not None or labels is not None):
        raise typer.BadParameter("--task features has no classes: leave out --num-classes and --labels.")
    points = parse_points(ratios) if ratios else None
    target = output or Path(f"{short_name(model)}-slimmable")
    refuse_occupied(target, force, CHECKPOINT_FILES, weights or path_of(model))

    from scala_cli.calibration import Calibration, fit_family
    from scala_cli.cost import cost
    from scala_cli.data.split import open_images
    from scala_cli.models.checkpoint import save
    from scala_cli.models.features import for_task, headless, refuse_without_classes
    from scala_cli.models.order import order_channels
    from scala_cli.models.source import Changes, distance, open_source
    from scala_cli.models.vit import random_images

    split = open_images(data, read.data_dir) if data is not None else None  # before any download
    changes = Changes(num_classes, img_size, patch_size)
    with out.progress() as live:
        opened = open_source(
            model,
            points,
            changes,
            weights=weights,
            scratch=scratch,
            average=ema,
            layout=layout,
            heads=num_heads,
            watch=live,
        )
        net, record = for_task(opened.net, opened.record, task)
        dropped = net.spec.features and not opened.net.spec.features
        original = headless(opened.original) if dropped else opened.original
        refuse_without_classes(net, record)
        if labels is not None:
            spec = net.spec.naming(read_labels(labels, net.spec.num_classes))
            net = net.like(spec=spec)
        fits: Mapping[Point, Fit] = {}
        if split is not None:
            on = Calibration(split, calibration, read, device, live)
            net, record, fits = fit_family(net, record, on, kept)
        elif order == "importance":
            net = order_channels(net, random_images(net.spec, 256).split(64))
    difference = distance(net, original, exact=not fits)
    save(net, replace(record, order=order or record.order), target)
    rows = [{**point.columns(), **cost(net.spec_at(point)), **r2_of(fits.get(point))} for point in net.points]
    out.result(
        {
            "path": str(target),
            "arch": net.spec.architecture,
            "task": record.task,
            "max_abs_diff": difference,
            **({"calibrated": record.calibrated} if fits else {}),
            "points": rows,
        },
        rows,
        title="widths",
    )


def r2_of(fit: "Fit | None") -> dict[str, float]:
    """Returns the R^2 of a fitted width's output as a column; no column if it is not known."""
    return {} if fit is None or fit.output is None else {"r2": round(fit.output, 4)}


def read_labels(file: Path, count: int) -> list[str]:
    """Returns the lines of a file. Raises ScalaError unless it names this many classes, each once."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ScalaError(f"{file} is not a UTF-8 text file.", "Write one name per line.") from None
    if len(names) != count:
        raise ScalaError(
            f"{file} names {len(names)} classes, the model has {count}.", "Write one line for each."
        )
    if len({*names}) < count:
        twice = next(name for name in names if names.count(name) > 1)
        raise ScalaError(f"{file} names {twice!r} more than once.", "Give each class a name of its own.")
    return names
