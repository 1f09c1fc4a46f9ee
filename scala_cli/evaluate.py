"""Accuracy of every width in one pass over the images."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor

from scala_cli.cascade import Cascade, confidence, sweep
from scala_cli.data.classes import class_misfit
from scala_cli.data.loader import Loader
from scala_cli.data.split import open_split
from scala_cli.data.transform import transform_for
from scala_cli.data.workers import naming_a_dead_reader
from scala_cli.device import autocast, naming_lack_of_memory
from scala_cli.errors import DataError
from scala_cli.measure import Predictor, cost
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import DeviceSettings, ReadSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher
from scala_cli.world import ALONE, World

Key = TypeVar("Key")


def validation_loader(net: SlimmableViT, data: str, batch_size: int, read: ReadSettings) -> Loader:
    """The validation images of a data set as `net` wants them, their classes numbered as in its head.

    Raises DataError, also where the data's classes are not the model's.
    """
    split = open_split(data, False, read.data_dir).numbered_as(net.spec.label_names)
    misfit = class_misfit(split.classes, net.spec.num_classes, net.spec.label_names)
    if misfit:
        raise DataError(
            f"{misfit}.",
            f"Train a head for them: scala finetune CKPT --data {data}; "
            "or, where they are the same under other names: scala convert MODEL --labels FILE",
        )
    return Loader(split, transform_for(net.spec), batch_size, read)


@torch.inference_mode()
def evaluate(
    net: SlimmableViT,
    loader: Loader,
    points: Sequence[Point],
    settings: DeviceSettings,
    watch: Watcher,
    world: World = ALONE,
) -> list[dict[str, float]]:
    """Top-1 and top-5 in percent of every point, over the images that could be read, each counted once.

    Args:
        world: the processes whose loaders together have all of the images.

    Returns:
        per point {"ratio", "top1", "top5", "images"}; with fewer than five classes top-5 is 100.
    """
    device = next(net.parameters()).device
    found = accuracies(widths(net, points, settings), loader, device, watch, world)
    return [{"ratio": float(point.ratio), **accuracy} for point, accuracy in found.items()]


def widths(net: SlimmableViT, points: Sequence[Point], settings: DeviceSettings) -> dict[Point, Predictor]:
    """The model at each width as it is evaluated."""
    net.eval()
    device = next(net.parameters()).device

    def predict(point: Point, images: Tensor) -> Tensor:
        with autocast(device, settings):
            return net(images, point)

    return {point: partial(predict, point) for point in points}


@naming_a_dead_reader()
@torch.inference_mode()
def accuracies(
    predictors: Mapping[Key, Predictor],
    loader: Loader,
    device: torch.device,
    watch: Watcher,
    world: World = ALONE,
) -> dict[Key, dict[str, float]]:
    """{"top1", "top5", "images"} of each predictor, as `evaluate`."""
    meters = {key: (AverageMeter(), AverageMeter()) for key in predictors}
    for images, targets in batches(loader, device, watch):
        for key, (top1, top5) in meters.items():
            with naming_lack_of_memory(len(images)):
                logits = predictors[key](images)
            first, fifth = accuracy(logits.float(), targets, topk=(1, 5))
            top1.update(first.item(), len(targets))
            top5.update(fifth.item(), len(targets))
    for meter in [meter for pair in meters.values() for meter in pair]:
        total, count = world.sum(torch.tensor([meter.sum, meter.count], device=device)).tolist()
        meter.count, meter.avg = int(count), total / max(count, 1)
    if not any(top1.count for top1, _ in meters.values()):
        raise loader.nothing_read()
    return {
        key: {"top1": round(top1.avg, 4), "top5": round(top5.avg, 4), "images": top1.count}
        for key, (top1, top5) in meters.items()
    }


@naming_a_dead_reader()
@torch.inference_mode()
def evaluate_cascade(
    cascade: Cascade,
    loader: Loader,
    thresholds: Sequence[float],
    settings: DeviceSettings,
    watch: Watcher,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a cascade gives at every threshold, in one pass over the images.

    Returns:
        per width alone {"ratio", "top1", "gmacs"}, and per threshold what `sweep` tells.
    """
    net, points = cascade.net, cascade.points
    predictors = widths(net, points, settings)
    seen: list[tuple[Tensor, Tensor]] = []  # of each batch, both (widths, B)
    for images, targets in batches(loader, next(net.parameters()).device, watch):
        with naming_lack_of_memory(len(images)):
            logits = torch.stack([predict(images) for predict in predictors.values()])
        seen.append((confidence(logits).cpu(), (logits.argmax(-1) == targets).cpu()))
    if not seen:
        raise loader.nothing_read()
    sure, right = (torch.cat(part, dim=1) for part in zip(*seen, strict=True))
    gmacs = [cost(net.spec.at(point))["gmacs"] for point in points]
    alone = [
        {"ratio": float(point.ratio), "top1": round(100 * share, 4), "gmacs": spent}
        for point, share, spent in zip(points, right.float().mean(1).tolist(), gmacs, strict=True)
    ]
    return alone, sweep(sure, right, gmacs, thresholds)


def batches(loader: Loader, device: torch.device, watch: Watcher) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, targets) of every batch of which anything could be read."""
    watch.phase("evaluate", len(loader.split))
    for images, targets in loader:
        if len(images):
            yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            watch.step(len(targets))
