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
    """Who takes part: `size` processes, of which this one is number `rank`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Meets the processes that torchrun started beside this one; alone without torchrun."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if not dist.is_initialized():
            with naming_a_lost_process():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            with naming_a_lost_process():
                dist.all_reduce(tensor)
        return tensor

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        if self.size == 1:
            return [*numbers]
        on = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return self.sum(torch.tensor(numbers, dtype=torch.float64, device=on)).tolist()

    def average_gradients(self, parameters: Iterable[nn.Parameter], images: int) -> None:
        """Gives every process the mean of all their gradients, in one message.

        Args:
            images: whose mean this process's gradients are, and for which they count.
        """
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = parameters_to_vector([*gradients, gradients[0].new_ones(1)]).mul_(images)
        self.sum(sums)
        vector_to_parameters(sums[:-1].div_(sums[-1].clamp(min=1)), gradients)

    def agree(self, module: nn.Module) -> None:
        """Gives every process the weights of the first: the same arithmetic may round elsewhere otherwise."""
        self.agree_on(module.state_dict().values())

    def agree_on(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the tensors of the first, in place."""
        if self.size > 1:
            with naming_a_lost_process():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all are here."""
        self.total(0)  # which a GPU only has once all have sent theirs

    def same(self, text: str) -> bool:
        """Whether all processes hold this text."""
        number = zlib.crc32(text.encode())
        return self.total(number) == [number * self.size]


ALONE = World()


@contextmanager
def naming_a_lost_process() -> Iterator[None]:
    """Turns what torch says when another process has ended into a LostProcess."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise LostProcess(
            f"another process of this run has ended, or cannot be reached ({reason}).",
            "What it says itself tells why.",
            remedy="resume_together",
        ) from None
