"""Training in several processes, started by torchrun, each on its part of every batch."""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from scala_cli.errors import LostProcess


@dataclass(frozen=True)
class World:
    """The processes of a run: `size` of them; this one has number `rank`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Joins the processes that torchrun started; without torchrun the world is this process alone."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if not dist.is_initialized():
            with naming_a_lost_process():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over all processes, computed in place."""
        if self.size > 1:
            with naming_a_lost_process():
                dist.all_reduce(tensor)
        return tensor

    def total(self, *numbers: float) -> list[float]:
        """Returns the sum of each number over all processes."""
        if self.size == 1:
            return [*numbers]
        on = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=on)).tolist()

    def average_gradients(self, parameters: Iterable[nn.Parameter], images: int) -> None:
        """Averages gradients over all processes, weighted by their images, in one message.

        Args:
            images: number of images that this process's gradients are the mean of.
        """
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = parameters_to_vector([*gradients, gradients[0].new_ones(1)]).mul_(images)
        self.sum(sums)
        vector_to_parameters(sums[:-1].div_(sums[-1].clamp(min=1)), gradients)

    def agree(self, module: nn.Module) -> None:
        """Broadcasts rank 0's weights: ordering channels may round differently on each rank."""
        self.agree_on(module.state_dict().values())

    def agree_on(self, tensors: Iterable[Tensor]) -> None:
        """Broadcasts rank 0's tensors, in place."""
        if self.size > 1:
            with naming_a_lost_process():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Waits until every process gets here."""
        self.total(0)  # no process knows the sum before all have sent theirs, on a GPU too

    def same(self, text: str) -> bool:
        """Returns whether all processes pass the same text."""
        number = zlib.crc32(text.encode())
        return self.total(number) == [number * self.size]


ALONE = World()


@contextmanager
def naming_a_lost_process() -> Iterator[None]:
    """Turns torch's error for a process that has ended into a LostProcess."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise LostProcess(
            f"another process of this run has ended, or cannot be reached ({reason}).",
            "Its own output tells why.",
            remedy="resume_together",
        ) from None
