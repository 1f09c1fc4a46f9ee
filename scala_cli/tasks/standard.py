"""Measures the units in which feature vectors are compared.

PHI-S (arXiv 2410.01680) rotates features so that every channel has the same variance, and divides all by one
scale. A mean squared error does not depend on the rotation, so only the scale matters: predicting the mean
then has error 1. `whiten` also raises directions of small variance.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from scala_cli.slicing.ridge import Moments, in_double

LEAST = 0.01
"""Directions with less variance than this share of the mean variance are scaled as if they had it."""
NOTHING = 1e-10
"""A variance below this share of the mean square counts as rounding."""


class Spread:
    """Mean and covariance of vectors, accumulated batch by batch."""

    def __init__(self) -> None:
        self.moments = Moments()

    def add(self, vectors: Tensor) -> None:
        """Adds vectors (..., C)."""
        vectors = in_double(vectors.detach())
        self.moments.add(vectors, vectors[..., :0])  # no targets

    def unit(self, whiten: float) -> Tensor | None:
        """Returns the (C, C) map into the units in which vectors are compared; (1, 1) if it is one scale.

        Principal direction i, of variance v_i, is multiplied by v_i^(-whiten / 2); then all are scaled to a
        mean variance of 1.

        Returns:
            None if all vectors are the same.
        """
        covariance, _ = self.moments.about(*self.moments.origins(True))
        variance = covariance.diagonal().mean()
        if variance <= NOTHING * (variance + self.moments.mean_x.square().mean()):
            return None
        if not whiten:
            return variance.rsqrt().float()[None, None]
        values, directions = torch.linalg.eigh(covariance)
        weights = values.clamp_min(LEAST * variance) ** (-whiten / 2)
        weights = weights / (values.clamp_min(0) * weights.square()).mean().sqrt()
        return (weights[:, None] * directions.T).float()


def in_units(vectors: Tensor, unit: Tensor) -> Tensor:
    """Returns vectors (..., C) in the units of `Spread.unit`."""
    return vectors * unit.squeeze() if unit.numel() == 1 else vectors @ unit.T


def spreads(outputs: Iterable[Tensor]) -> tuple[Spread, Spread]:
    """Returns the spread of the first tokens of outputs (B, N, C), and that of all other tokens."""
    first, others = Spread(), Spread()
    for output in outputs:
        first.add(output[:, :1])
        others.add(output[:, 1:])
    return first, others
