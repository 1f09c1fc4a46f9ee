"""Evaluates every point in one pass over the images."""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import torch
from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.cascade import Cascade, best_cascade, confidence, sweep
from scala_cli.cost import gmacs, macs
from scala_cli.data.loader import Loader
from scala_cli.data.transform import transform_for
from scala_cli.data.workers import naming_a_dead_reader
from scala_cli.errors import CheckpointError, DataError, PointError
from scala_cli.memory import naming_lack_of_memory
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.precision import autocast
from scala_cli.settings import DeviceSettings, ReadSettings
from scala_cli.slicing.point import Point
from scala_cli.tasks import task_named
from scala_cli.tasks.base import Task
from scala_cli.timing import Predictor
from scala_cli.watch import Watcher
from scala_cli.world import ALONE, World

Key = TypeVar("Key")
TRIED_THRESHOLDS = tuple(n / 40 for n in range(8, 40))
"""Thresholds that `find_cascade` tries: 0.2 to 0.975."""


def validation_loader(
    net: SlimmableViT, task: Task, data: str, batch_size: int, read: ReadSettings
) -> Loader:
    """Returns a loader of a data set's validation images at the model's size.

    Raises DataError if the data is missing, malformed or does not fit the model.
    """
    return Loader(task.judged(net.spec, data, read.data_dir), transform_for(net.spec), batch_size, read)


def at_their_sizes(
    net: SlimmableViT, points: Sequence[Point], loader: Loader
) -> Iterator[tuple[list[Point], Loader]]:
    """Yields the points of each image size, with a loader that decodes images at that size as slices do.

    Args:
        loader: the images at the model's size; its `skipped` collects the unreadable images of all sizes.
    """
    by_size: dict[int | None, list[Point]] = {}
    for point in points:
        by_size.setdefault(None if point.size == net.spec.size else point.size, []).append(point)
    for size, some in by_size.items():
        if size is None:
            yield some, loader
        else:
            sized = loader.with_transform(transform_for(net.spec.at_point(Point(Fraction(1), size))))
            yield some, sized
            loader.skipped.update(sized.skipped)


def evaluate_as_sliced(
    net: SlimmableViT,
    task: Task,
    loader: Loader,
    points: Sequence[Point],
    settings: DeviceSettings,
    watch: Watcher,
    reference: Predictor | None = None,
) -> list[dict[str, Any]]:
    """Returns the rows of `evaluate`, each point on images decoded at its own size.

    For features all images are decoded at the model's size and resized for each point, as the reference, the
    full model, needs them at its own.
    """
    if task.every_token:
        return evaluate(net, task, loader, points, settings, watch, reference=reference)
    rows: dict[Point, dict[str, Any]] = {}
    for some, sized in at_their_sizes(net, points, loader):
        found = evaluate(net, task, sized, some, settings, watch, reference=reference)
        rows.update(zip(some, found, strict=True))
    return [rows[point] for point in points]


@torch.inference_mode()
def evaluate(
    net: SlimmableViT,
    task: Task,
    loader: Loader,
    points: Sequence[Point],
    settings: DeviceSettings,
    watch: Watcher,
    world: World = ALONE,
    reference: Predictor | None = None,
) -> list[dict[str, Any]]:
    """Evaluates every point on all readable images, each counted once.

    Args:
        world: the processes whose loaders together have all of the images.
        reference: what outputs are compared with if there are no labels. Default: the full width's.

    Returns:
        a row per point: its columns, those of the task, and "images".
    """
    device = next(net.parameters()).device
    if reference is None and not task.labelled:
        reference = answering(net.vit, task, settings)
    found = metrics(widths(net, task, points, settings), task, loader, device, watch, world, reference)
    return [{**point.columns(), **measured} for point, measured in found.items()]


def widths(
    net: SlimmableViT, task: Task, points: Sequence[Point], settings: DeviceSettings
) -> dict[Point, Predictor]:
    """Returns a function for each point that computes its outputs."""
    net.eval()
    device = next(net.parameters()).device

    def predict(point: Point, images: Tensor) -> Tensor:
        with autocast(device, settings):
            return task.forward(net.at(point), net.fitting(images, point))

    return {point: partial(predict, point) for point in points}


def answering(vit: VisionTransformer, task: Task, settings: DeviceSettings) -> Predictor:
    """Returns a function that computes the outputs of a timm model."""
    vit.eval()
    device = next(vit.parameters()).device

    def predict(images: Tensor) -> Tensor:
        with autocast(device, settings):
            return task.forward(vit, images)

    return predict


def reference_for(net: SlimmableViT, other: SlimmableViT) -> VisionTransformer:
    """Returns the full width of another backbone, to compare the features of `net` with.

    Raises CheckpointError if it has other patches or other features.
    """
    ours, theirs = ((each.spec.patches, each.vit.head.out_features) for each in (net, other))
    if ours != theirs:
        raise CheckpointError(
            f"features cannot be compared: the model gives {ours[1]} for each of {ours[0]} patches, "
            f"the other one {theirs[1]} for each of {theirs[0]}.",
            "Give the model it was made from, at the same image size.",
        )
    return other.vit


@naming_a_dead_reader()
@torch.inference_mode()
def metrics(
    predictors: Mapping[Key, Predictor],
    task: Task,
    loader: Loader,
    device: torch.device,
    watch: Watcher,
    world: World = ALONE,
    reference: Predictor | None = None,
) -> dict[Key, dict[str, Any]]:
    """Returns the task's columns and "images" of each predictor, as `evaluate`."""
    meters = {key: task.meter() for key in predictors}
    for images, targets in batches(loader, device, watch):
        if reference is not None:
            targets = reference(images)
        for key, meter in meters.items():
            with naming_lack_of_memory(len(images)):
                output = predictors[key](images)
            meter.update(output, targets)
    found = {key: meter.result(world) for key, meter in meters.items()}
    if not any(each["images"] for each in found.values()):
        raise loader.nothing_read()
    return found


def evaluate_cascade(
    cascade: Cascade,
    loader: Loader,
    thresholds: Sequence[float],
    settings: DeviceSettings,
    watch: Watcher,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Evaluates a cascade at every threshold, in one pass over the images.

    Returns:
        the rows of `as_points`, one per point, and the rows of `sweep`, one per threshold.
    """
    spent = [macs(cascade.net.spec_at(point)) for point in cascade.points]
    sure, right = answers(cascade.net, cascade.points, loader, settings, watch)
    return as_points(cascade.points, right, spent), sweep(sure, right, spent, thresholds)


def find_cascade(
    net: SlimmableViT,
    points: Sequence[Point],
    loader: Loader,
    max_gmacs: float,
    settings: DeviceSettings,
    watch: Watcher,
) -> dict[str, Any]:
    """Finds the best cascade of some points within a mean budget, in one pass over the images.

    It is chosen on every second image and evaluated on the others.

    Returns:
        {"cascade": labels, "threshold", "top1", "gmacs", "escalated", "points": the rows of `as_points`}; a
        single point if no cascade is better.

    Raises PointError if nothing fits the budget, DataError for a single image.
    """
    spent = [macs(net.spec_at(point)) for point in points]
    sure, right = answers(net, points, loader, settings, watch)
    if right.shape[1] < 2:
        raise DataError("a cascade needs images to choose it on and others to judge it on.", "Give more.")
    found = best_cascade(sure[:, ::2], right[:, ::2], spent, max_gmacs, TRIED_THRESHOLDS)
    if found is None:
        cheapest = gmacs(min(spent))
        raise PointError(
            f"no point costs {max_gmacs:g} GMACs or less; the cheapest costs {cheapest:g}.",
            remedy="example",
            setting="max-gmacs",
            value=f"{cheapest:g}",
        )
    members = [*found["members"]]
    (row,) = sweep(
        sure[members, 1::2], right[members, 1::2], [spent[n] for n in members], [found["threshold"]]
    )
    labels = [str(points[number]) for number in members]
    return {**row, "cascade": labels, "points": as_points(points, right[:, 1::2], spent)}


def as_points(points: Sequence[Point], right: Tensor, spent: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a row per point: its columns, "top1" and "gmacs".

    Args:
        right: (points, N) whether each answer is right.
        spent: multiply-accumulates of one image at each point.
    """
    shares = right.float().mean(1).tolist()
    return [
        {**point.columns(), "top1": round(100 * share, 4), "gmacs": gmacs(each)}
        for point, share, each in zip(points, shares, spent, strict=True)
    ]


@naming_a_dead_reader()
@torch.inference_mode()
def answers(
    net: SlimmableViT,
    points: Sequence[Point],
    loader: Loader,
    settings: DeviceSettings,
    watch: Watcher,
) -> tuple[Tensor, Tensor]:
    """Returns each point's confidence on each image, and whether its answer is right: both (points, N)."""
    predictors = widths(net, task_named("classification"), points, settings)
    seen: list[tuple[Tensor, Tensor]] = []  # of each batch, both (points, B)
    for images, targets in batches(loader, next(net.parameters()).device, watch):
        with naming_lack_of_memory(len(images)):
            logits = torch.stack([predict(images) for predict in predictors.values()])
        seen.append((confidence(logits).cpu(), (logits.argmax(-1) == targets).cpu()))
    if not seen:
        raise loader.nothing_read()
    sure, right = (torch.cat(part, dim=1) for part in zip(*seen, strict=True))
    return sure, right


def batches(loader: Loader, device: torch.device, watch: Watcher) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images, targets) of every batch in which an image could be read."""
    watch.phase("evaluate", len(loader.split))
    for images, targets in loader:
        if len(images):
            yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            watch.step(len(targets))
