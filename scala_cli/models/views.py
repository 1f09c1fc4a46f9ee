"""timm's own forward on tensors that are not the model's: how every width is run."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its parts is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


Stamp = tuple[tuple[int, int], ...]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, by name: what a width is cut from."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fill(skeleton: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a model these tensors in place of its parameters and buffers, by name.

    They stay until the next, because a backward pass may run a block again (gradient checkpointing). One
    that is there already is replaced in a single assignment, so that a thread which runs the model meanwhile
    always finds it.
    """
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        module = skeleton.get_submodule(layer)
        module.__dict__[leaf] = tensor  # found before what is registered, and never missing
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)


def stamp(tensors: Iterable[Tensor]) -> Stamp | None:
    """What changes whenever one of these tensors does: where it lies, and how often it was written to.

    None where nobody counts that: of tensors that were made in inference mode.
    """
    try:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except RuntimeError:
        return None
