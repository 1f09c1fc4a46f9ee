"""Counts what a model costs on any machine: parameters and multiply-accumulates."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scala_cli.models.vit import Spec


def cost(spec: Spec) -> dict[str, Any]:
    """Counts parameters and multiply-accumulates per image, on the skeleton of a Spec.

    Returns:
        {"embed_dim", "num_heads", "params", "gmacs"}
    """
    skeleton = spec.build()
    return {
        "embed_dim": spec.embed_dim,
        "num_heads": spec.num_heads,
        "params": params_of(skeleton),
        "gmacs": gmacs(macs_of(skeleton, spec.input_size)),
    }


def macs(spec: Spec) -> int:
    """Returns the multiply-accumulates for one image."""
    return macs_of(spec.build(), spec.input_size)


def macs_of(skeleton: nn.Module, input_size: Sequence[int]) -> int:
    """Returns the multiply-accumulates, half the FLOPs, of a model on the meta device for one (C, H, W)."""
    with FlopCounterMode(display=False) as counter:
        skeleton(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


def params_of(model: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(macs: float) -> float:
    """Returns billions of multiply-accumulates, to four decimals, or to four digits for small models."""
    billions = macs / 1e9
    return round(billions, 4 if billions >= 0.01 or not billions else 3 - math.floor(math.log10(billions)))


def pareto(places: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the (cost, gain) pairs that no other pair beats in both, cheapest first."""
    front: list[int] = []
    for number in sorted(range(len(places)), key=lambda n: (places[n][0], -places[n][1])):
        if not front or places[number][1] > places[front[-1]][1]:
            front.append(number)
    return front
