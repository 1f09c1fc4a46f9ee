"""Runs timm's own forward on views of the full weights, as every width does."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode for the block, then restores the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


Stamp = tuple[tuple[int, int], ...]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a module by name; every width is cut from these."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fill(skeleton: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replaces parameters and buffers of a model by these tensors, by name.

    They stay until the next call, because a backward pass may run a block again (gradient checkpointing).
    Each is replaced in a single assignment, so a thread that runs the model meanwhile never finds one
    missing.
    """
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        module = skeleton.get_submodule(layer)
        module.__dict__[leaf] = tensor  # takes precedence over a registered tensor
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)


def stamp(tensors: Iterable[Tensor]) -> Stamp | None:
    """Returns the tensors' addresses and version counters, which change whenever a tensor does.

    None for tensors made in inference mode, which have no version counter.
    """
    try:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except RuntimeError:
        return None
