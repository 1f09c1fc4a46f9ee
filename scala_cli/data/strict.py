"""Images as tensors, read strictly: nothing unreadable is replaced in silence."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scala_cli.data.images import as_rgb
from scala_cli.data.samples import Samples


@dataclass(frozen=True)
class Corrupt:
    """An image that could not be read, on its way from a worker to whoever decides what to do."""

    name: str
    why: str


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W), B class numbers, and what could not be read.

    The numbers are no tensor on their way from a worker: with no shared memory left for so small a one, torch
    would wait for it for ever.
    """

    images: Tensor
    targets: list[int]
    corrupt: tuple[Corrupt, ...]

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU reads by itself; torch's loader calls this."""
        return Batch(self.images.pin_memory(), self.targets, self.corrupt)


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

    Args:
        upright: turn photographs as their EXIF data says.
    """

    def __init__(self, samples: Samples, transform: Any, upright: bool) -> None:
        self.samples, self.transform, self.upright = samples, transform, upright

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, asked: tuple[int, str]) -> tuple[Tensor, int] | Corrupt:
        index, seed = asked
        try:
            image, target = self.samples[index]
            image = as_rgb(image, self.upright)
        except MemoryError:
            raise
        except Exception as error:  # of a broken file Pillow's decoders raise errors of many kinds
            said = str(error).partition(":")[0] or type(error).__name__
            why = "no image" if isinstance(error, UnidentifiedImageError) else said
            return Corrupt(self.samples.name(index), why)
        with own_randomness(seed):
            return self.transform(image), target


def collate(items: Sequence[tuple[Tensor, int] | Corrupt]) -> Batch:
    good = [item for item in items if not isinstance(item, Corrupt)]
    return Batch(
        images=default_collate([image for image, _ in good]) if good else torch.empty(0),
        targets=[target for _, target in good],
        corrupt=tuple(item for item in items if isinstance(item, Corrupt)),
    )
