"""The sampler: which images make up each batch, and in which order."""

import random
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from scala_cli.world import World


class Batches(Sampler[list[tuple[int, str]]]):
    """Yields the batches of an epoch, each a list of (index, seed), one per image.

    Args:
        count: number of images.
        size: images per batch in this process.
        shuffled: use a new order every epoch, and drop an incomplete last batch.
        world: the processes that share each batch.
    """

    def __init__(self, count: int, size: int, shuffled: bool, seed: int, world: World) -> None:
        self.count, self.size, self.shuffled, self.seed, self.world = count, size, shuffled, seed, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        whole = self.size * self.world.size
        return self.count // whole if self.shuffled else -(-self.count // whole)

    def __iter__(self) -> Iterator[list[tuple[int, str]]]:
        """Yields the batches of epoch `epoch`, from number `first` on."""
        name = f"{self.seed} {self.epoch}"
        order = [*range(self.count)]
        if self.shuffled:
            generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
            order = torch.randperm(self.count, generator=generator).tolist()
        whole = self.size * self.world.size
        for start in range(self.first * whole, len(self) * whole, whole):
            mine = order[start : start + whole][self.world.rank :: self.world.size]
            yield [(index, f"{name} {index}") for index in mine]
