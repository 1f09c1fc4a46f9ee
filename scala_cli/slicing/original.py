"""Tensors that lead from the channels of a model in order back to those that it had before.

They are no part of timm's model and lie in `extra.safetensors`. As they have rows in the slicing table, they
are rewritten with the weights when channels are put in order, and cut with them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BASIS = "stream.basis"
"""(C, C): tokens x (..., C) between two blocks were x @ basis before, up to their mean over channels."""
WEIGHT, BIAS = "tokens.weight", "tokens.bias"
"""(C, C) and (C,): normed tokens y (..., C) were y @ weight.T + bias before.

A model that gives features has its head for this."""
NAMES = (BASIS, WEIGHT, BIAS)


def original_of(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of the tensors of `extra.safetensors` that lead back to the former channels."""
    return {name: extra[name] for name in NAMES if name in extra}


def identity_tensor(name: str, channels: int) -> Tensor:
    """Returns one of these tensors for a model whose channels are as they were."""
    return torch.zeros(channels) if name == BIAS else torch.eye(channels)
