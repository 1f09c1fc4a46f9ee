"""Judges every width of a family by its embeddings of labelled images, without training it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from scala_cli.data.loader import Loader
from scala_cli.data.split import evenly, open_split
from scala_cli.data.transform import transform_for
from scala_cli.data.workers import naming_a_dead_reader
from scala_cli.errors import DataError
from scala_cli.evaluate import batches
from scala_cli.memory import naming_lack_of_memory
from scala_cli.models.dense import pooled
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.precision import autocast
from scala_cli.probe import LinearProbe, agreement, nearest, recall, vote
from scala_cli.settings import DeviceSettings, ProbeSettings, ReadSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher

FULL = Point(Fraction(1))
AGREED = 10
"""Number of neighbours that are compared with the full width's."""
WITHIN = (1, 10)
"""Recall counts an image as found if it is among this many nearest in the index."""


@dataclass(frozen=True)
class Embedded:
    """The embeddings of some images at several widths.

    Args:
        of: (N, C) for each width.
        labels: (N,) class numbers.
    """

    of: dict[Point, Tensor]
    labels: Tensor


def probe_loaders(
    net: SlimmableViT, data: str, probe: ProbeSettings, batch_size: int, read: ReadSettings
) -> tuple[Loader, Loader]:
    """Returns the labelled images to fit on and those to judge, each spread evenly over its part.

    Raises DataError, also if there is only one class.
    """
    training = open_split(data, True, read.data_dir)
    if len(training.classes) < 2:
        raise DataError(
            f"{data} has one class, {training.classes[0]!r}; there is nothing to tell apart.",
            "Give images of two classes or more.",
        )
    judged = open_split(data, False, read.data_dir, training.classes)
    transform = transform_for(net.spec)
    first, second = (
        Loader(evenly(split, probe.probe_images), transform, batch_size, read) for split in (training, judged)
    )
    return first, second


@naming_a_dead_reader()
@torch.inference_mode()
def embed(
    net: SlimmableViT, loader: Loader, points: Iterable[Point], settings: DeviceSettings, watch: Watcher
) -> Embedded:
    """Returns the embeddings of the images that can be read, in float32, at each width and the full one.

    Raises DataError if none can be read.
    """
    net.eval()
    device = next(net.parameters()).device
    found: dict[Point, list[Tensor]] = {point: [] for point in {FULL: 0, **dict.fromkeys(points)}}
    labels = []
    for images, targets in batches(loader, device, watch):
        for point, some in found.items():
            with naming_lack_of_memory(len(images)), autocast(device, settings):
                some.append(pooled(net, images, point).float())
        labels.append(targets)
    if not labels:
        raise loader.nothing_read()
    return Embedded({point: torch.cat(some) for point, some in found.items()}, torch.cat(labels))


@torch.inference_mode()
def probe_widths(
    net: SlimmableViT,
    probe: ProbeSettings,
    loaders: tuple[Loader, Loader],
    points: Sequence[Point],
    settings: DeviceSettings,
    watch: Watcher,
) -> list[dict[str, Any]]:
    """Judges the embeddings of every width, by themselves and against the full width's.

    Returns:
        per width its columns, "images" (how many were judged), and in percent:
        "knn_full" or "linear_full": top-1 on this width's embeddings of a probe fitted to the full width's;
        "knn_own" or "linear_own": top-1 of a probe fitted to this width's own embeddings;
        "agreement": how many of the full width's 10 nearest training images are among this width's 10;
        "recall@1" and "recall@10": how often a judged image is among that many nearest, if this width embeds
        the query and the full width the index.

    Raises DataError if no image can be read.
    """
    seen, judged = (embed(net, loader, points, settings, watch) for loader in loaders)
    classes = len(loaders[0].split.classes)
    theirs = nearest(judged.of[FULL], seen.of[FULL], AGREED).numbers
    rows = []
    for point in points:
        queries, banks = judged.of[point], (seen.of[FULL], seen.of[point])
        near = [nearest(queries, bank) for bank in banks]
        if probe.probe == "knn":
            guesses = [vote(found, seen.labels, classes) for found in near]
        else:
            guesses = [LinearProbe(bank, seen.labels, classes)(queries) for bank in banks]
        right = [(guess == judged.labels).float().mean().item() for guess in guesses]
        shares = {
            f"{probe.probe}_full": right[0],
            f"{probe.probe}_own": right[1],
            "agreement": agreement(near[1].numbers[:, :AGREED], theirs),
        }
        shares |= zip([f"recall@{n}" for n in WITHIN], recall(queries, judged.of[FULL], WITHIN), strict=True)
        percent = {name: round(100 * share, 4) for name, share in shares.items()}
        rows.append({**point.columns(), **percent, "images": len(queries)})
    return rows
