from pathlib import Path
from typing import Annotated, Literal

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import CHOICES, Data, Ratios, as_sentence, place_of
from scala_cli.methods import VARIANTS
from scala_cli.models.locate import short_name
from scala_cli.settings import (
    AugmentSettings,
    DeviceSettings,
    GridSettings,
    OptimizerSettings,
    ReadSettings,
    RunSettings,
    Settings,
)


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL|CKPT", help="What every method starts from.")],
    data: Data,
    methods: Annotated[
        str,
        typer.Option("--methods", help="One or more." + as_sentence({**CHOICES["method"], **VARIANTS})),
    ] = "scala,paper,separate",
    without: Annotated[
        str,
        typer.Option("--without", help="Also train methods without each of these parts: order,teacher,..."),
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds, from --seed on.")] = 3,
    equal: Annotated[
        Literal["images", "macs"],
        typer.Option(
            "--equal", help="What is equal for all methods: training images or multiply-accumulates."
        ),
    ] = "images",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write, or to resume in.")
    ] = None,
    ratios: Ratios = None,
    *,
    grid: GridSettings,
    optimizer: OptimizerSettings,
    augment: AugmentSettings,
    read: ReadSettings,
    device: DeviceSettings,
    drawn: RunSettings,
    out: Output,
) -> None:
    """Train several methods from the same start and compare their widths.

    The model must know the classes of the images already, so that all methods start alike. After an
    interruption the same command resumes.

    Example: scala compare deit_s --data DIR --methods scala,separate --seeds 3 --epochs 2
    """
    from scala_cli.models.points import open_grid
    from scala_cli.plot import MISSING, can_draw
    from scala_cli.training.compare import arms_of, columns
    from scala_cli.training.compare import compare as run

    arms = arms_of(words(methods), words(without))
    target = output or Path(f"compare-{short_name(model)}")
    if not can_draw():
        out.note(MISSING)
    settings = Settings(
        place_of(data), optimizer=optimizer, augment=augment, read=read, device=device, run=drawn
    )
    with out.progress() as live:
        try:
            rows = run(
                model,
                lambda: open_grid(model, ratios, grid, watch=live),
                arms,
                seeds,
                equal,
                settings,
                target,
                live,
            )
        except KeyboardInterrupt:
            out.note("to resume, run the same command again.")
            raise
    out.result(
        {"path": str(target), "seeds": seeds, "equal": equal, "arms": rows},
        [columns(row) for row in rows],
        title="the last epoch, mean and standard deviation over the seeds",
    )


def words(text: str) -> list[str]:
    """Splits a comma-separated list into names of settings."""
    return [word.strip().replace("-", "_") for word in text.split(",") if word.strip()]
