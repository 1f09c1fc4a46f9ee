"""Accuracy of every width in one pass over the images."""

from collections.abc import Sequence

import torch
from timm.utils import AverageMeter, accuracy

from scala_cli.data.loader import Loader, transform_for
from scala_cli.data.split import class_misfit, open_split
from scala_cli.device import autocast
from scala_cli.errors import DataError
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import DeviceSettings, ReadSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher
from scala_cli.world import ALONE, World


def validation_loader(net: SlimmableViT, data: str, batch_size: int, read: ReadSettings) -> Loader:
    """The validation images of a data set as `net` wants them.

    Raises DataError, also where the data's classes are not the model's.
    """
    split = open_split(data, False, read.data_dir)
    misfit = class_misfit(split.classes, net.spec.num_classes, net.spec.label_names)
    if misfit:
        raise DataError(f"{misfit}.", f"Train a head for them: scala finetune CKPT --data {data}")
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
    net.eval()
    device = next(net.parameters()).device
    meters = {point: (AverageMeter(), AverageMeter()) for point in points}
    watch.phase("evaluate", len(loader.split))
    for images, targets in loader:
        if not len(images):
            continue
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        for point, (top1, top5) in meters.items():
            with autocast(device, settings):
                logits = net(images, point)
            first, fifth = accuracy(logits.float(), targets, topk=(1, 5))
            top1.update(first.item(), len(targets))
            top5.update(fifth.item(), len(targets))
        watch.step(len(targets))
    for meter in [meter for pair in meters.values() for meter in pair]:
        total, count = world.sum(torch.tensor([meter.sum, meter.count], device=device)).tolist()
        meter.count, meter.avg = int(count), total / max(count, 1)
    if not any(top1.count for top1, _ in meters.values()):
        raise DataError("not one of the images could be read.", "Check the validation images.")
    return [
        {
            "ratio": float(point.ratio),
            "top1": round(top1.avg, 4),
            "top5": round(top5.avg, 4),
            "images": top1.count,
        }
        for point, (top1, top5) in meters.items()
    ]
