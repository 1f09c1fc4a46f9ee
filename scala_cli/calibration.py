"""Cutting without training: channels in order, slices fitted, on some images of a data set."""

from collections.abc import Iterable
from dataclasses import replace

from scala_cli.data.calibration import calibration_images
from scala_cli.data.split import Split
from scala_cli.device import choose_device
from scala_cli.models.checkpoint import Record
from scala_cli.models.fitted import fit_widths
from scala_cli.models.order import put_first_what_matters
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import CalibrationSettings, DeviceSettings, ReadSettings
from scala_cli.slicing.point import Point
from scala_cli.watch import Watcher

PATCHES, LEAST = 40_960, 128
"""Default number of patches to calibrate on, and the least number of images.

That takes a ViT-S at 224 pixels about a minute on 2 cores; more images are better (see docs/results).
"""


def cut_without_training(
    net: SlimmableViT,
    record: Record,
    points: Iterable[Point],
    split: Split,
    settings: CalibrationSettings,
    read: ReadSettings,
    where: DeviceSettings,
    watch: Watcher,
) -> tuple[SlimmableViT, Record]:
    """Returns the family with its channels in order, if the order is free, and the slices of `points` fitted.

    Args:
        split: the images; their labels are not used.
        settings: with `calibrate` False the channels are put in order and no slice is fitted.

    Returns:
        the family, on the CPU and in evaluation mode, a `FittedViT` where slices were fitted; its record.

    Raises:
        DataError: no images, or none that can be read. Others as `put_first_what_matters` and `calibrate`.
    """
    device = choose_device(where)
    split.tell(watch)
    count = settings.calibration_images or max(LEAST, PATCHES // net.spec.patches)
    images = [*calibration_images(split, net.spec, read, watch, count)]
    if device.type == "cuda":  # in float64, which not every device has
        net = net.copied().to(device)
    if record.order_is_free(net.rule):
        net, record = put_first_what_matters(net, images), replace(record, order="importance")
    if settings.calibrate is not False:
        net = fit_widths(net, points, images, watch, every_token=net.spec.features)
        record = replace(record, calibrated=sum(map(len, images)))
    return net.to("cpu").eval(), record
