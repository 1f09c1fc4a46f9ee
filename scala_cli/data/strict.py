"""Reads images as tensors; an unreadable one is reported, never silently replaced."""

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
    """An image that a worker could not read; the main process decides what to do."""

    name: str
    why: str


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W), B class numbers, and the images that could not be read.

    Workers send the class numbers as a list: torch hangs on so small a tensor if shared memory is full.
    """

    images: Tensor
    targets: list[int]
    corrupt: tuple[Corrupt, ...]

    def pin_memory(self) -> "Batch":
        """Returns the batch in pinned memory; torch's loader calls this."""
        return Batch(self.images.pin_memory(), self.targets, self.corrupt)


@contextmanager
def own_randomness(seed: str) -> Iterator[None]:
    """Seeds the random generators for the block, and restores their state afterwards."""
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
    """Transformed images; an unreadable one gives `Corrupt`, not its neighbour as in timm.

    Indexed by (number, seed). The transform depends only on the seed, not on the process or on earlier
    images, so training can resume in the middle of an epoch, with any number of workers.

    Args:
        upright: rotate photographs as their EXIF data says.
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
        except Exception as error:  # Pillow's decoders raise many kinds of error for a broken file
            said = str(error).partition(":")[0] or type(error).__name__
            why = "no image" if isinstance(error, UnidentifiedImageError) else said
            return Corrupt(self.samples.name(index), why)
        with own_randomness(seed):
            return self.transform(image), target


def collate(items: Sequence[tuple[Tensor, int] | Corrupt]) -> Batch:
    """Returns one batch of the readable images, and which ones are corrupt."""
    good = [item for item in items if not isinstance(item, Corrupt)]
    return Batch(
        images=default_collate([image for image, _ in good]) if good else torch.empty(0),
        targets=[target for _, target in good],
        corrupt=tuple(item for item in items if isinstance(item, Corrupt)),
    )
