"""Predicts the cost of a family's points on this machine from a few measured ones."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor, nn

from scala_cli.cost import macs_of, params_of
from scala_cli.models.vit import Spec

Key = TypeVar("Key")


def work_of(spec: Spec) -> tuple[float, float, float, float]:
    """Returns the work of a forward pass of one image, by kind, counted on the skeleton.

    Returns:
        (1, parameters, multiply-accumulates, elements that the layers write)
    """
    skeleton, written = spec.build(), [0]

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        written[0] += sum(each.numel() for each in (output if isinstance(output, tuple) else (output,)))

    for module in skeleton.modules():
        if not any(module.children()):
            module.register_forward_hook(count)
    macs = macs_of(skeleton, spec.input_size)
    return 1.0, float(params_of(skeleton)), float(macs), float(written[0])


def predict(work: Mapping[Key, Sequence[float]], measured: Mapping[Key, float]) -> dict[Key, float]:
    """Returns a prediction for every key: the sum of its amounts of work, each times a non-negative rate.

    The rates minimise the squared relative error on the measured keys. They are few, so which of them are
    zero is found by trying all choices.

    Args:
        work: the amount of each kind of work, by key.
        measured: positive measurements of some of the keys.
    """
    every = torch.tensor([list(amounts) for amounts in work.values()], dtype=torch.float64)
    scale = every.abs().amax(0).clamp_min(1e-30)
    places = {key: number for number, key in enumerate(work)}
    known = torch.tensor([*measured.values()], dtype=torch.float64)
    seen = every[[places[key] for key in measured]] / scale / known[:, None]
    kinds = range(every.shape[1])
    best, least = torch.zeros(len(kinds), dtype=torch.float64), float("inf")
    for count in range(1, min(len(kinds), len(known)) + 1):
        for some in combinations(kinds, count):
            rates = torch.linalg.lstsq(seen[:, some], torch.ones(len(known), 1, dtype=torch.float64)).solution
            error = (seen[:, some] @ rates - 1).square().sum().item()
            if (rates >= 0).all() and error < least - 1e-12:
                best, least = torch.zeros_like(best), error
                best[list(some)] = rates[:, 0]
    guesses = (every / scale @ best).tolist()
    return dict(zip(work, guesses, strict=True))
