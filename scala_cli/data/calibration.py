"""Samples images of a split for calibration."""

from collections.abc import Iterator

from torch import Tensor

from scala_cli.data.loader import Loader
from scala_cli.data.split import Split, evenly
from scala_cli.data.transform import transform_for
from scala_cli.models.vit import Spec
from scala_cli.settings import ReadSettings
from scala_cli.watch import Watcher


def calibration_images(
    split: Split, spec: Spec, read: ReadSettings, watch: Watcher, count: int = 512
) -> Iterator[Tensor]:
    """Yields `count` images spread evenly over a split, or all if it has fewer, in batches (B, C, H, W)."""
    some = evenly(split, count)
    watch.phase("look at images", len(some))
    loader, readable = Loader(some, transform_for(spec), 64, read), 0
    for images, _ in loader:
        readable += len(images)
        if len(images):
            yield images
        watch.step(len(images))
    loader.tell_skipped(watch)
    if not readable:
        raise loader.nothing_read()
