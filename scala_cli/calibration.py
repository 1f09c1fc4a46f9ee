"""Slims without training: orders channels and fits widths on some images of a data set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from scala_cli.data.calibration import calibration_images
from scala_cli.data.split import Split
from scala_cli.device import choose_device
from scala_cli.errors import DataError
from scala_cli.models.calibrate import FULL_WEIGHT, calibrate_family
from scala_cli.models.checkpoint import Record
from scala_cli.models.fit import Fit
from scala_cli.models.fitted import fit_widths
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import CalibrationSettings, DeviceSettings, FamilySettings, ReadSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher

TRIES = 4
"""Most times that a family is fitted, each time with a larger weight of the full width."""
PATCHES, LEAST = 40_960, 128
"""Default number of patches to calibrate on, and the least number of images.

A slice of a ViT-S at 224 pixels takes about a minute on 2 cores; more images are better (docs/results).
"""


@dataclass(frozen=True)
class Calibration:
    """The images and settings with which channels are ordered and widths fitted.

    Args:
        split: the images; their labels are not used.
        settings: if `calibrate` is False, channels are only ordered, and nothing is fitted.
    """

    split: Split
    settings: CalibrationSettings
    read: ReadSettings
    where: DeviceSettings
    watch: Watcher


def cut_without_training(
    net: SlimmableViT, record: Record, points: Iterable[Point], on: Calibration
) -> tuple[SlimmableViT, Record]:
    """Returns the family with its channels in order, if the order is free, and the slices of `points` fitted.

    Returns:
        the family, on the CPU and in evaluation mode, a `FittedViT` if slices were fitted; its record.

    Raises:
        DataError: no images, none that can be read, or all the same. Others as `order_channels` and
            `fit_widths`.
    """
    net, record, images = ordered(net, record, on)
    if on.settings.calibrate is not False:
        net = fit_widths(net, points, images, on.watch, every_token=net.spec.features)
        record = replace(record, calibrated=sum(map(len, images)))
    return net.to("cpu").eval(), record


def fit_family(
    net: SlimmableViT, record: Record, on: Calibration, kept: FamilySettings
) -> tuple[SlimmableViT, Record, dict[Point, Fit]]:
    """Returns the family with its channels in order and all widths fitted in shared weights.

    A larger weight of the full width keeps more of it and less of the narrower widths. If too little of it is
    kept, all widths are fitted again with a larger weight. Raises as `cut_without_training`.

    Args:
        kept: how much of the full width to keep.

    Returns:
        the family, on the CPU and in evaluation mode; its record; the fits of its widths.
    """
    net, record, images = ordered(net, record, on)
    fits: dict[Point, Fit] = {}
    if on.settings.calibrate is not False:
        weight = FULL_WEIGHT
        for _ in range(TRIES):
            family, fits = calibrate_family(
                net, images, full_weight=weight, every_token=net.spec.features, watch=on.watch
            )
            full = fits.get(Point(Fraction(1)))
            if full is None or full.output is None or full.output >= kept.keep_full:
                break
            # what the full width loses is nearly proportional to 1 / weight
            weight *= max(2, 1.5 * (1 - full.output) / (1 - kept.keep_full))
        net = family
        record = replace(record, calibrated=sum(map(len, images)))
    return net.to("cpu").eval(), record, fits


def refuse_alike(images: Sequence[Tensor]) -> None:
    """Raises DataError unless there are two different images in the batches (B, C, H, W)."""
    count, first = sum(map(len, images)), images[0][:1]
    if count == 1:
        raise DataError("there is one image only: too few to calibrate on.", "Give a hundred or more.")
    if all(torch.equal(batch, first.expand_as(batch)) for batch in images):
        raise DataError(
            "the images are all the same to the model: there is nothing to learn from them.",
            "Give images that differ.",
        )


def ordered(net: SlimmableViT, record: Record, on: Calibration) -> tuple[SlimmableViT, Record, list[Tensor]]:
    """Returns the family with its channels in order, on the device; its record; the images (B, C, H, W).

    Raises DataError if the images do not differ.
    """
    device = choose_device(on.where)
    on.split.tell(on.watch)
    count = on.settings.calibration_images or max(LEAST, PATCHES // net.spec.patches)
    images = [*calibration_images(on.split, net.spec, on.read, on.watch, count)]
    refuse_alike(images)
    if device.type == "cuda":  # ordering needs float64, which not every device has
        net = net.copied().to(device)
    if record.order_is_free(net.rule):
        net, record = order_channels(net, images), replace(record, order="importance")
    return net, record, images
