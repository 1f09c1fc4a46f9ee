from pathlib import Path
from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Checkpoint, find_checkpoint
from scala_cli.settings import TokenSettings


def explain(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    checkpoint: Checkpoint = None,
    *,
    ratio: Annotated[
        str | None,
        typer.Option("--ratio", help="A point, trained or not, such as 1~0.5. Default: the widest."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")
    ] = Path("explained.png"),
    tokens: TokenSettings,
    out: Output,
) -> None:
    """Draw which patches of an image are dropped or merged, at every stage.

    Each patch has the mean colour of the token that has most of it, or is black once it is dropped. Lines
    separate the tokens.

    Example: scala explain cat.jpg runs/last -o cat.png
    """
    from scala_cli.explain import mergings, painted, pixels_of, read_image
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.models.points import with_untrained
    from scala_cli.plot import refuse_picture, save, stages_picture

    refuse_picture(output)
    net, record = load_with_record(find_checkpoint(checkpoint, out))
    net, points = with_untrained(net, record, [ratio] if ratio else None, tokens)
    point = points[-1]
    vit, spec = net.at(point), net.spec_at(point)
    seen = read_image(image, spec)
    stages = mergings(vit, seen)
    pixels, grid = pixels_of(seen, spec), vit.patch_embed.grid_size
    pictures = [pixels, *(painted(pixels, stage, grid) for stage in stages)]
    titles = [f"{spec.patches} patches"]
    titles += [f"{len(stage.shares)} tokens after block {stage.block}" for stage in stages]
    save(stages_picture([picture.numpy() for picture in pictures], titles), output)
    rows = [stage.as_row() for stage in stages]
    document = {"path": str(output), "image": str(image), "patches": spec.patches, "stages": rows}
    out.result(document, [{k: v for k, v in row.items() if k != "owners"} for row in rows])
