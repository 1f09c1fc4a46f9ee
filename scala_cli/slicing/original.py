"""Tensors that map the channels of a model put in order back to its original channels.

They are not part of timm's model and are saved in `extra.st`. They have rows in the slicing table,
so ordering channels changes them together with the weights, and slicing cuts them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BASIS = "stream.basis"
"""(C, C): maps tokens x (..., C) between two blocks to x @ basis, up to their mean over channels."""
WEIGHT, BIAS = "tokens.weight", "tokens.bias"
"""(C, C) and (C,): map normed tokens y (..., C) to y @ weight.T + bias.

In a model for features its head is this map."""
ORIGINAL_MAPS = (BASIS, WEIGHT, BIAS)


def original_of(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of `extra.st` that map back to the original channels."""
    return {name: extra[name] for name in ORIGINAL_MAPS if name in extra}


def identity_tensor(name: str, channels: int) -> Tensor:
    """Returns one of these tensors for a model whose channels were never reordered."""
    return torch.zeros(channels) if name == BIAS else torch.eye(channels)
