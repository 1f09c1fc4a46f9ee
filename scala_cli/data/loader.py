"""Images as tensors, read strictly: nothing unreadable is replaced in silence."""

import os
import random
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from scala_cli.data.split import Samples, Some, Split
from scala_cli.data.transform import transform_for
from scala_cli.errors import DataError
from scala_cli.models.vit import Spec
from scala_cli.settings import ReadSettings
from scala_cli.watch import Watcher
from scala_cli.world import ALONE, World


@dataclass(frozen=True)
class Corrupt:
    """An image that could not be read, on its way from a worker to whoever decides what to do."""

    name: str
    why: str


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W), class numbers (B,), and what could not be read."""

    images: Tensor
    targets: Tensor
    corrupt: tuple[Corrupt, ...]

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU reads by itself; torch's loader calls this."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.corrupt)


@contextmanager
def own_randomness(seed: str) -> Iterator[None]:
    """Lets what happens within draw from random numbers of its own, and leaves the others as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = random.Random(seed).getrandbits(32)
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Strict(Dataset):
    """Transformed images; one that cannot be read comes as `Corrupt`, never as its neighbour.

    Asked for by number and seed. The transform depends on the seed alone, not on which process runs it after
    which other images, so that training goes on in the middle of an epoch, with any number of processes.
    """

    def __init__(self, samples: Samples, transform: Any) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, asked: tuple[int, str]) -> tuple[Tensor, int] | Corrupt:
        index, seed = asked
        try:
            image, target = self.samples[index]
            image = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = "no image" if isinstance(error, UnidentifiedImageError) else str(error).partition(":")[0]
            return Corrupt(self.samples.name(index), why)
        with own_randomness(seed):
            return self.transform(image), target


class Batches(Sampler[list[tuple[int, str]]]):
    """The images of each batch of an epoch, by number and seed.

    Args:
        count: of images.
        size: images of a batch that this process reads.
        shuffled: every epoch in an order of its own, without an incomplete last batch.
        world: the processes among which each batch is divided.
    """

    def __init__(self, count: int, size: int, shuffled: bool, seed: int, world: World) -> None:
        self.count, self.size, self.shuffled, self.seed, self.world = count, size, shuffled, seed, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        whole = self.size * self.world.size
        return self.count // whole if self.shuffled else -(-self.count // whole)

    def __iter__(self) -> Iterator[list[tuple[int, str]]]:
        """The batches from number `first` on of the epoch `epoch`."""
        name = f"{self.seed} {self.epoch}"
        order = [*range(self.count)]
        if self.shuffled:
            generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
            order = torch.randperm(self.count, generator=generator).tolist()
        whole = self.size * self.world.size
        for start in range(self.first * whole, len(self) * whole, whole):
            mine = order[start : start + whole][self.world.rank :: self.world.size]
            yield [(index, f"{name} {index}") for index in mine]


def collate(items: Sequence[tuple[Tensor, int] | Corrupt]) -> Batch:
    good = [item for item in items if not isinstance(item, Corrupt)]
    return Batch(
        images=default_collate([image for image, _ in good]) if good else torch.empty(0),
        targets=torch.tensor([target for _, target in good], dtype=torch.long),
        corrupt=tuple(item for item in items if isinstance(item, Corrupt)),
    )


STOPPING = {signal.SIGINT, signal.SIGTERM}


def leave_stopping_to_the_parent(_: int) -> None:
    """A terminal's Ctrl-C or a scheduler's SIGTERM also reaches the processes that read: they do not hear it.

    They go on until training has saved; then they are told to end, and they end with their parent. Its own
    SIGTERM they obey: Python sends that to what is left when it exits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=obey_the_parent, daemon=True).start()
    else:  # macOS: torch's own handler obeys the parent, but lets anybody's SIGTERM end the process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def obey_the_parent() -> None:
    parent = parent_process()  # which is not always the one that forked this process
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


@contextmanager
def born_deaf() -> Iterator[None]:
    """Processes started within do not hear of stopping even before they can say so themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def naming_a_dead_reader() -> Iterator[None]:
    """Turns what torch raises, at any moment, once a process that reads has died into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"(DataLoader worker|Pin memory).*(is killed|exited unexpectedly)", str(error)):
            raise
        raise DataError(
            "a process that reads images was killed; there may be too little memory.",
            "Use fewer of them: --workers 1, or 0 to read in the main process.",
        ) from None


class Loader:
    """Batches of one split. What could not be read is in `skipped`, once each; it may leave a batch empty.

    Args:
        training: shuffled and augmented, and an incomplete last batch is left out.
        world: the processes among which each batch is divided, `batch_size` for each.

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
        self.split = split
        self.skipped: dict[str, str] = {}
        self.on_corrupt = read.on_corrupt
        self.batch_size = min(batch_size, max(1, len(split) // world.size))
        self.batches = Batches(len(split), self.batch_size, training, seed, world)
        self.loader = DataLoader(
            Strict(split.samples, transform),
            batch_sampler=self.batches,
            num_workers=read.workers,
            collate_fn=collate,
            worker_init_fn=leave_stopping_to_the_parent,
            pin_memory=torch.cuda.is_initialized(),  # of use only where this process has a GPU
            generator=torch.Generator(),  # or each epoch would draw from the random numbers of others
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, targets) of every batch."""
        return self.of_epoch(0)

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, targets) of an epoch from its batch number `first` on.

        They depend on the seed, the epoch and the number alone.
        """
        self.batches.epoch, self.batches.first = epoch, first
        for batch in self.read():
            for bad in batch.corrupt:
                if self.on_corrupt == "error":
                    raise DataError(
                        f"{bad.name} cannot be read ({bad.why}).",
                        "Mend it, or pass --on-corrupt skip.",
                    )
                self.skipped[bad.name] = bad.why
            yield batch.images, batch.targets

    def read(self) -> Iterator[Batch]:
        """What the loader reads. Raises DataError where one of its processes dies."""
        with naming_a_dead_reader():
            with born_deaf():
                batches = iter(self.loader)
            yield from batches

    def nothing_read(self) -> DataError:
        """The error where all that there is was skipped; it names one."""
        one = "".join(f": {name} ({why})" for name, why in list(self.skipped.items())[:1])
        return DataError(f"not one of the images could be read{one}.", "Mend them, or give others.")

    def tell_skipped(self, watch: Watcher) -> None:
        """Notes how many images were skipped, and each by name as far as the first ten."""
        if self.skipped:
            named = ", ".join(f"{name} ({why})" for name, why in list(self.skipped.items())[:10])
            watch.note(f"unreadable and skipped: {len(self.skipped)}: {named}")


def calibration_images(
    split: Split, spec: Spec, read: ReadSettings, watch: Watcher, count: int = 512
) -> Iterator[Tensor]:
    """About `count` images spread evenly over a split, in batches (B, C, H, W)."""
    evenly = range(0, len(split), max(1, len(split) // count))
    some = Split(Some(split.samples, evenly), split.classes)
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
