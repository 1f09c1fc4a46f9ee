"""Draws what a dense head makes of every width's patch tokens, beside the photograph, as one picture.

    python docs/draw_maps.py CKPT DECODER.onnx IMAGE [-o maps.png]

The head takes tokens (1, C, h, w) of the full width and returns one map (1, 1, H, W).
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image

import scala_cli
from scala_cli.data.images import as_rgb
from scala_cli.data.transform import transform_for


def main(
    checkpoint: str,
    decoder: Path,
    image: Path,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("maps.png"),
):
    net = scala_cli.load(checkpoint)
    head = onnxruntime.InferenceSession(str(decoder))
    transform = transform_for(net.spec)
    images = transform(as_rgb(Image.open(image), upright=True))[None]
    maps = {}
    for point in reversed(net.points):
        with torch.no_grad():
            tokens = net.features(images, point, grid=True).tokens
        maps[point] = head.run(None, {head.get_inputs()[0].name: tokens.numpy()})[0][0, 0]
    full, shown = maps[net.widest], images[0].permute(1, 2, 0).numpy()
    shown = (shown - shown.min()) / (shown.max() - shown.min())
    figure = Figure(figsize=(2.4 * (1 + len(maps)), 2.7))
    places = figure.subplots(1, 1 + len(maps))
    for place, (title, picture) in zip(
        places, {"photograph": shown, **{titled(p, m, full): m for p, m in maps.items()}}.items(), strict=True
    ):
        place.imshow(picture, vmin=full.min(), vmax=full.max())  # the same colours at every width
        place.set_title(title, fontsize=9)
        place.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=120, bbox_inches="tight")
    print(output)


def titled(point, found: np.ndarray, full: np.ndarray) -> str:
    alike = np.corrcoef(found.ravel(), full.ravel())[0, 1]
    return f"width {point}\ncorrelation {alike:.2f}" if found is not full else f"width {point}"


if __name__ == "__main__":
    typer.run(main)
