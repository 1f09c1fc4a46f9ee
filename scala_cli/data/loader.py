"""Reads the batches of a split in several worker processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scala_cli.data.batches import Batches
from scala_cli.data.split import Split
from scala_cli.data.strict import Batch, Strict, collate
from scala_cli.data.workers import ignore_stop_signals, naming_a_dead_reader, stop_signals_blocked
from scala_cli.errors import DataError
from scala_cli.settings import ReadSettings
from scala_cli.watch import Watcher
from scala_cli.world import ALONE, World


class Loader:
    """Batches of one split. `skipped` maps each unreadable image to the reason; a batch may be empty.

    Args:
        training: shuffle, augment, and drop an incomplete last batch.
        world: the processes that share each batch; each gets `batch_size` images.

    Raises (on iteration):
        DataError: an unreadable image, unless `read.on_corrupt` is "skip".
    """

    def __init__(
        self,
        split: Split,
        transform: Any,
        batch_size: int,
        read: ReadSettings,
        *,
        training: bool = False,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        self.split, self.settings = split, read
        self.skipped: dict[str, str] = {}
        self.on_corrupt = read.on_corrupt
        self.batch_size = min(batch_size, max(1, len(split) // world.size))
        self.batches = Batches(len(split), self.batch_size, training, seed, world)
        self.loader = DataLoader(
            Strict(split.samples, transform, read.exif),
            batch_sampler=self.batches,
            num_workers=read.workers,
            collate_fn=collate,
            worker_init_fn=ignore_stop_signals,
            pin_memory=torch.cuda.is_initialized(),  # only useful if this process uses a GPU
            generator=torch.Generator(),  # otherwise each epoch would advance torch's global generator
        )

    def with_transform(self, transform: Any) -> "Loader":
        """Returns a loader of the same images, for evaluation, with another transform."""
        return Loader(self.split, transform, self.batch_size, self.settings)

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, targets) of every batch of epoch 0."""
        return self.of_epoch(0)

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images, targets) of an epoch, from batch number `first` on.

        Each batch depends only on the seed, the epoch and its number.
        """
        self.batches.epoch, self.batches.first = epoch, first
        for batch in self.read():
            for bad in batch.corrupt:
                if self.on_corrupt == "error":
                    raise DataError(f"{bad.name} cannot be read ({bad.why}).", remedy="skip_corrupt")
                self.skipped[bad.name] = bad.why
            yield batch.images, torch.tensor(batch.targets, dtype=torch.long)

    def read(self) -> Iterator[Batch]:
        """Yields the batches that the loader reads. Raises DataError if one of its processes dies."""
        with naming_a_dead_reader():
            with stop_signals_blocked():
                batches = iter(self.loader)
            yield from batches

    def nothing_read(self) -> DataError:
        """Returns the error to raise if every image was skipped; it names one of them."""
        one = "".join(f": {name} ({why})" for name, why in list(self.skipped.items())[:1])
        return DataError(f"none of the images could be read{one}.", "Mend them, or give others.")

    def tell_skipped(self, watch: Watcher) -> None:
        """Notes how many images were skipped, and the names of the first ten."""
        if self.skipped:
            named = ", ".join(f"{name} ({why})" for name, why in list(self.skipped.items())[:10])
            watch.note(f"unreadable and skipped: {len(self.skipped)}: {named}")
