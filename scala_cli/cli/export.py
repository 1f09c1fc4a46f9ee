from pathlib import Path
from typing import Annotated, Literal

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Named, find_checkpoint, open_points
from scala_cli.settings import ReadSettings, TokenSettings

COMPARED = 64
"""Roughly how many images both runtimes are compared on."""


def export(
    checkpoint: Named = None,
    *,
    ratio: Annotated[
        str | None, typer.Option("--ratio", help="A width or point. Default: the only one of a slice.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every width, as ONNX graphs that share one copy of the weights.")
    ] = False,
    format: Annotated[
        Literal["onnx", "pt2", "openvino", "executorch"], typer.Option("--format", help="What to write.")
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; with --all a directory.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Use 8-bit weights (onnx only).")] = False,
    with_preprocess: Annotated[
        bool,
        typer.Option("--with-preprocess", help="Let the file take pixels, 0 to 255 (uint8), and normalise."),
    ] = False,
    outputs: Annotated[
        str | None,
        typer.Option(
            "--outputs",
            help="features,tokens (with a classifier logits,tokens) also gives the features of the patches. "
            "Default: the first only.",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", help="ONNX opset, 17 to 25. Default: the exporter's choice."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Images to compare the runtimes on, instead of noise: any folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    tokens: TokenSettings,
    read: ReadSettings,
    out: Output,
) -> None:
    """Write one width as ONNX, torch's pt2, OpenVINO or ExecuTorch, for any batch size.

    The file is read back by its own runtime and must give torch's outputs, or nothing is written. With 8-bit
    weights, 90 % of the images of --data must keep their class, or features have an R² of 0.9.

    Example: scala export --ratio 0.5 --format onnx -o half.onnx
    """
    if ratio and every:
        raise typer.BadParameter("Give one width with --ratio, or --all.")
    if int8 and format != "onnx":
        raise typer.BadParameter("--int8 goes with --format onnx.")
    if opset is not None and format != "onnx":
        raise typer.BadParameter("--opset goes with --format onnx.")
    if every and (int8 or with_preprocess or outputs or format != "onnx"):
        raise typer.BadParameter(
            "--all writes plain ONNX: leave out --format, --int8, --outputs and --with-preprocess."
        )

    import torch

    from scala_cli.data.calibration import calibration_images
    from scala_cli.data.split import open_images, open_validation_images
    from scala_cli.deploy.export import export as write
    from scala_cli.deploy.export import export_all
    from scala_cli.deploy.slice import default_target, tell_untrained
    from scala_cli.formats import FORMATS
    from scala_cli.models.locate import short_name
    from scala_cli.models.source import is_checkpoint
    from scala_cli.models.vit import random_images

    is_model = checkpoint is not None and not is_checkpoint(checkpoint)
    if is_model and every:
        raise typer.BadParameter(f"--all writes a family; make one first: scala convert {checkpoint}")
    directory = Path(short_name(str(checkpoint))) if is_model else find_checkpoint(checkpoint, out)
    net, record, points = open_points(checkpoint, [ratio] if ratio else None, tokens, out)
    if len(points) > 1 and not every:
        have = ", ".join(point.label for point in points)
        raise typer.BadParameter(f"Give one width with --ratio, of {have}; or --all.")
    point = points[-1]
    spec = net.spec_at(point)
    with out.progress() as live:
        images = random_images(spec, COMPARED if spec.input_size[1] <= 64 else 4)
        if data is not None:
            split = open_validation_images(data, read.data_dir) or open_images(data, read.data_dir)
            split.tell(live)
            images = torch.cat([*calibration_images(split, spec, read, live, COMPARED)])
        if every:
            target = output or default_target(checkpoint, directory, "onnx")
            result = export_all(net, directory, target, images, opset=opset, force=force, watch=live)
        else:
            kind = f"{format}-int8" if int8 else format
            ending = point.file_name + ("-int8" if int8 else "") + FORMATS[kind].suffix
            target = output or default_target(checkpoint, directory, ending)
            result = write(
                net,
                point,
                kind,
                target,
                images,
                real=data is not None,
                pixels=with_preprocess,
                outputs=outputs,
                opset=opset,
                force=force,
                watch=live,
            )
        tell_untrained(record, net.points if every else [point], live)
    out.result(result, result.get("points", []))
