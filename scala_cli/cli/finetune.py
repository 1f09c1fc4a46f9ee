import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import DATA_HELP, Force, ImgSize, PatchSize, Ratios, Weights, place_of
from scala_cli.cli.remedies import advice
from scala_cli.cli.track import Service, tracker_of
from scala_cli.errors import ScalaError
from scala_cli.files import new_directory, refuse_occupied
from scala_cli.models.locate import path_of, short_name
from scala_cli.settings import (
    ON_RESUME,
    AugmentSettings,
    DeviceSettings,
    GridSettings,
    MethodSettings,
    OptimizerSettings,
    ReadSettings,
    RunSettings,
    Settings,
)
from scala_cli.slicing.point import Point


def finetune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|CKPT", help="Start from a model, as in scala convert, or a checkpoint."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help=DATA_HELP)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory. Default: runs/NAME-TIME.")
    ] = None,
    ratios: Ratios = None,
    weights: Weights = None,
    img_size: ImgSize = None,
    patch_size: PatchSize = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="Go on with this run; only where and how it is computed may differ. With larger --epochs "
            "it goes on past its planned end, at the learning rates of the longer run.",
        ),
    ] = None,
    log_to: Annotated[
        Service | None,
        typer.Option("--log-to", help="Also send losses and accuracies to TensorBoard or Weights & Biases."),
    ] = None,
    force: Force = False,
    *,
    method: MethodSettings,
    grid: GridSettings,
    optimizer: OptimizerSettings,
    augment: AugmentSettings,
    read: ReadSettings,
    device: DeviceSettings,
    drawn: RunSettings,
    out: Output,
) -> None:
    """Train every width of a pretrained ViT at once.

    If the images have other classes than the model, it gets a new head. The full width learns it first,
    alone, for a third as many epochs, and then teaches. If the model has no classifier, or with --task
    features, no labels are needed: every width learns the features of the pretrained model.

    Example: scala finetune deit_s --data DIR --epochs 10
    """
    if resume is None and (model is None or data is None):
        raise typer.BadParameter("Give a model and its images: scala finetune deit_s --data DIR")
    given = {name: value for name, value in context.params.items() if is_given(context, name)}
    changes = {name: given[name] for name in ON_RESUME if name in given}
    if resume is not None and given.keys() - {*changes, "resume", "log_to", *vars(out)}:
        options = ", ".join("--" + name.replace("_", "-") for name in (*ON_RESUME, "log_to"))
        raise typer.BadParameter(
            f"A resumed run keeps its model, images and settings: only {options} go with --resume."
        )

    if resume is None and output is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise typer.BadParameter("Several processes must agree on the run directory: --output runs/NAME")

    from scala_cli.data.split import refuse_unknown
    from scala_cli.methods import method_named
    from scala_cli.models.points import open_grid
    from scala_cli.models.source import Changes, is_checkpoint
    from scala_cli.training.finetune import finetune, resume_run
    from scala_cli.training.run import RUN_FILES, Run

    named, moment = resume or output, time.strftime("%Y%m%d-%H%M%S")
    place = nullcontext(named) if named else new_directory(Path(f"runs/{short_name(model or '')}-{moment}"))
    again = f" --log-to {log_to}" if log_to else ""
    with out.progress() as live, place as path, live.tracked(tracker_of(log_to, path)):
        run = Run(path, newest=True)
        try:
            if resume is not None:
                best = resume_run(run, live, changes)
            else:
                assert model is not None and data is not None
                refuse_occupied(run.path, force, RUN_FILES, path_of(model), in_place=True)
                refuse_unknown(data, read.data_dir)  # before anything is downloaded
                settings = Settings(place_of(data), method, optimizer, augment, read, device, drawn)
                kind = method_named(method.method)
                if not is_checkpoint(model) or kind.adds_modules:
                    ratios, grid = ratios or kind.ratios, replace(grid, keeps=grid.keeps or kind.keeps)
                sizes = Changes(None, img_size, patch_size)
                net, record = open_grid(model, ratios, grid, sizes, weights=weights, watch=live)
                best = finetune(net, record, settings, run, live, force)
        except KeyboardInterrupt:
            if run.holds_state():
                out.note(f"resume with: scala finetune --resume {run.path}{again}")
            raise
        except ScalaError as error:
            if error.resumable and run.holds_state():
                then = f"Then resume: scala finetune --resume {run.path}{again}"
                hint = " ".join(filter(None, (advice(error), then)))
                raise type(error)(error.message, hint) from error
            raise
    rows = [{name: value for name, value in point.items() if name != "images"} for point in best["points"]]
    out.result(
        {
            "run": str(run.path),
            "best": str(run.path / "best"),
            "points": rows,
            "images_per_sec": best["images_per_sec"],
        },
        rows,
        title=f"best epoch: {best['epoch']}",
    )
    out.note(f"next: scala slice --ratio {Point.of_row(best['points'][0])}, scala bench")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
