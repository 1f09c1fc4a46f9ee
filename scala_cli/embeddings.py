"""Judges every width of a family by its embeddings, without training it."""

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
from scala_cli.tasks import task_named
from scala_cli.timing import Predictor
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
        index: (N, C) of the model that an index is made with.
        labels: (N,) class numbers.
    """

    of: dict[Point, Tensor]
    index: Tensor
    labels: Tensor


def probe_loaders(
    net: SlimmableViT, data: str, probe: ProbeSettings, batch_size: int, read: ReadSettings
) -> tuple[Loader, Loader]:
    """Returns the labelled images to fit on and those to judge, each spread evenly over its part.

    Recall needs no labels: it gets the same images for both, the validation images or else all.

    Raises DataError, also if there is only one class.
    """
    if probe.probe == "recall":
        split = evenly(task_named("features").judged(net.spec, data, read.data_dir), probe.probe_images)
        loader = Loader(split, transform_for(net.spec), batch_size, read)
        return loader, loader
    training = open_split(data, True, read.data_dir)
    if len(training.classes) < 2:
        raise DataError(
            f"{data} has one class, {training.classes[0]!r}; there is nothing to tell apart.",
            remedy="no_classes",
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
    net: SlimmableViT,
    loader: Loader,
    points: Iterable[Point],
    settings: DeviceSettings,
    watch: Watcher,
    reference: Predictor | None = None,
) -> Embedded:
    """Returns the embeddings of the images that can be read, in float32.

    Args:
        reference: gives the outputs (B, 1 + patches, C) of the model that an index is made with, whose first
            token is the embedding. Default: the full width.

    Raises DataError if none can be read.
    """
    net.eval()
    device = next(net.parameters()).device
    found: dict[Point, list[Tensor]] = {point: [] for point in points}
    index, labels = [], []
    for images, targets in batches(loader, device, watch):
        with naming_lack_of_memory(len(images)), autocast(device, settings):
            for point, some in found.items():
                some.append(pooled(net, images, point).float())
            if reference is not None:
                index.append(reference(images)[:, 0].float())
            else:
                index.append(found[FULL][-1] if FULL in found else pooled(net, images, FULL).float())
        labels.append(targets)
    if not labels:
        raise loader.nothing_read()
    of = {point: torch.cat(some) for point, some in found.items()}
    return Embedded(of, torch.cat(index), torch.cat(labels))


@torch.inference_mode()
def probe_widths(
    net: SlimmableViT,
    probe: ProbeSettings,
    loaders: tuple[Loader, Loader],
    points: Sequence[Point],
    settings: DeviceSettings,
    watch: Watcher,
    reference: Predictor | None = None,
) -> list[dict[str, Any]]:
    """Judges the embeddings of every width, by themselves and against the full width's.

    Args:
        reference: another model to take the place of the full width, as in `embed`.

    Returns:
        per width its columns, "images" (how many were judged), and in percent, with recall the last only:
        "knn_full" or "linear_full": top-1 on this width's embeddings of a probe fitted to the full width's;
        "knn_own" or "linear_own": top-1 of a probe fitted to this width's own embeddings;
        "agreement": how many of the full width's 10 nearest training images are among this width's 10;
        "recall@1" and "recall@10": how often a judged image is among that many nearest, if this width embeds
        the query and the full width the index.

    Raises DataError if no image can be read.
    """
    judged = embed(net, loaders[1], points, settings, watch, reference)
    if probe.probe == "recall":
        return [{**point.columns(), **recalled(judged, point)} for point in points]
    seen = embed(net, loaders[0], points, settings, watch, reference)
    classes = len(loaders[0].split.classes)
    theirs = nearest(judged.index, seen.index, AGREED).numbers
    rows = []
    for point in points:
        queries, banks = judged.of[point], (seen.index, seen.of[point])
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
        percent = {name: round(100 * share, 4) for name, share in shares.items()}
        rows.append({**point.columns(), **percent, **recalled(judged, point)})
    return rows


def recalled(judged: Embedded, point: Point) -> dict[str, Any]:
    """Returns "recall@1" and "recall@10" of a width, in percent, and "images"."""
    shares = recall(judged.of[point], judged.index, WITHIN)
    percent = {f"recall@{n}": round(100 * share, 4) for n, share in zip(WITHIN, shares, strict=True)}
    return {**percent, "images": len(judged.index)}
