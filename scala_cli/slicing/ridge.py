"""Linear regression in closed form, from moments accumulated batch by batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Moments:
    """First and second moments of inputs x and targets t over tokens.

    Products are computed in the precision of the inputs, about the means of the first batch, so a large mean
    costs no digits; sums are kept in float64.

    Args:
        diagonal: each input has its own target, as in the affine part of a norm; only the diagonals of the
            second moments are kept.
    """

    def __init__(self, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        self.count = 0
        self.centre_x: Any = None
        self.centre_t: Any = None
        self.sum_x: Any = 0.0
        self.sum_t: Any = 0.0
        self.products_xx: Any = 0.0
        self.products_tx: Any = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds (..., i) inputs and (..., o) targets."""
        x, t = inputs.flatten(0, -2), targets.flatten(0, -2)
        if not len(x):
            return
        if self.count == 0:
            self.centre_x, self.centre_t = x.mean(0), t.mean(0)
        x, t = x - self.centre_x, t - self.centre_t
        self.count += len(x)
        self.sum_x = self.sum_x + in_double(x.sum(0))
        self.sum_t = self.sum_t + in_double(t.sum(0))
        self.products_xx = self.products_xx + in_double((x * x).sum(0) if self.diagonal else x.mT @ x)
        self.products_tx = self.products_tx + in_double((t * x).sum(0) if self.diagonal else t.mT @ x)

    @property
    def mean_x(self) -> Tensor:
        """(i,)"""
        return self.sum_x / self.count + in_double(self.centre_x)

    @property
    def mean_t(self) -> Tensor:
        """(o,)"""
        return self.sum_t / self.count + in_double(self.centre_t)

    def about(self, origin_x: Tensor, origin_t: Tensor) -> tuple[Tensor, Tensor]:
        """E[(x - a)(x - a)^T] (i, i) and E[(t - b)(x - a)^T] (o, i); where diagonal (i,) and (i,)."""
        x, t = self.sum_x / self.count, self.sum_t / self.count
        a, b = origin_x - in_double(self.centre_x), origin_t - in_double(self.centre_t)
        times = torch.mul if self.diagonal else torch.outer
        xx = self.products_xx / self.count - times(x, a) - times(a, x) + times(a, a)
        tx = self.products_tx / self.count - times(t, a) - times(b, x) + times(b, a)
        return xx, tx


def ridge(
    seen: Moments, weight: Tensor, strengths: Sequence[float], bias: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Returns, for each strength, the layer that best maps inputs to targets, regularised towards W0.

    W = W0 + (T - W0 X) X^T (X X^T + lambda I)^-1 and b = mean(t) - W mean(x), where X and T are inputs and
    targets about their means, or about zero if the layer has no bias to fit a shift.

    Args:
        weight: W0, (o, i), or (i,) if the moments are diagonal.
        strengths: lambda, each as a share of the inputs' mean square about the mean (zero).
        bias: whether the layer has one.

    Returns:
        W as W0 in float64, and b (o,) or None.
    """
    start = in_double(weight)
    xx, tx = seen.about(*origins(seen, bias))
    energy = xx if seen.diagonal else xx.diagonal()
    least = ROUNDING * (energy + seen.mean_x.square()).mean() + TINY
    identity = 1 if seen.diagonal else torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    left = tx - (start * xx if seen.diagonal else start @ xx)
    fits: list[tuple[Tensor, Tensor | None]] = []
    for strength in strengths:
        gram = xx + (strength * energy.mean() + least) * identity
        change = left / gram if seen.diagonal else solve(gram, left)
        fitted = start + change
        mapped = fitted * seen.mean_x if seen.diagonal else fitted @ seen.mean_x
        fits.append((fitted, seen.mean_t - mapped if bias else None))
    return fits


def solve(gram: Tensor, left: Tensor) -> Tensor:
    """Returns (o, i) X with X gram = left, for a symmetric (i, i) gram, positive up to rounding."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return torch.linalg.solve(gram, left, left=False)
    return torch.cholesky_solve(left.mT, root).mT


def best_ridge(
    seen: Moments, held: Moments, weight: Tensor, strengths: Sequence[float], bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the layer of `ridge` with the least error on held-out data.

    Earlier layers were fitted on the same images, so the inputs of a layer are better there than on others.
    So the strength that does best on other images grows with depth, and no constant suits all layers.

    Args:
        held: moments of data that is not in `seen`; if empty, the middle strength is taken.
    """
    if not held.count:
        strengths = strengths[len(strengths) // 2 :][:1]
    fits = ridge(seen, weight, strengths, bias)
    if len(fits) == 1:
        return fits[0]
    xx, tx = held.about(*origins(seen, bias))
    errors = [
        ((fitted * xx if held.diagonal else fitted @ xx) * fitted - 2 * tx * fitted).sum()
        for fitted, _ in fits
    ]
    return fits[int(torch.stack(errors).argmin())]


def origins(seen: Moments, bias: bool) -> tuple[Tensor, Tensor]:
    """Returns the origins of inputs and targets: their means, or zero without a bias."""
    return (seen.mean_x, seen.mean_t) if bias else (0 * seen.mean_x, 0 * seen.mean_t)


ROUNDING = 1e-10
"""Smallest variance that float32 resolves, relative to the mean square; less counts as constant."""
TINY = 1e-30
"""Prevents division by zero if all inputs are zero."""


def in_double(tensor: Tensor) -> Tensor:
    """Returns the tensor in float64, on the CPU if its device has no float64 (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
