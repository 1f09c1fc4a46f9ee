"""Linear regression in closed form, from moments accumulated batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Moments:
    """First and second moments of inputs x and targets t over tokens.

    Products are computed in the inputs' precision, about the means of the first batch, so that a large mean
    costs no digits; sums are kept in float64.

    Args:
        diagonal: each input has its own target, as in the affine part of a norm; then only the diagonals of
            the second moments are kept.
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
        """Mean of the inputs, (i,)."""
        return self.sum_x / self.count + in_double(self.centre_x)

    @property
    def mean_t(self) -> Tensor:
        """Mean of the targets, (o,)."""
        return self.sum_t / self.count + in_double(self.centre_t)

    def origins(self, bias: bool) -> tuple[Tensor, Tensor]:
        """Returns the means of inputs and targets; zeros if there is no bias to take up a shift."""
        return self.mean_x * bias, self.mean_t * bias

    def about(self, origin_x: Tensor, origin_t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns E[(x - a)(x - a)^T] (i, i) and E[(t - b)(x - a)^T] (o, i); if diagonal, (i,) and (i,)."""
        x, t = self.sum_x / self.count, self.sum_t / self.count
        a, b = origin_x - in_double(self.centre_x), origin_t - in_double(self.centre_t)
        times = torch.mul if self.diagonal else torch.outer
        xx = self.products_xx / self.count - times(x, a) - times(a, x) + times(a, a)
        tx = self.products_tx / self.count - times(t, a) - times(b, x) + times(b, a)
        return xx, tx


@dataclass(frozen=True)
class Normal:
    """The normal equations of a regression W x = t: W xx = tx.

    Args:
        xx: E[x x^T] (i, i), or (i,) if each input has its own target.
        tx: E[t x^T] (o, i), or (i,).
        least: always added to the diagonal of xx, about the smallest variance that is not rounding.
    """

    xx: Tensor
    tx: Tensor
    least: Tensor | float

    @classmethod
    def of(cls, moments: Moments, origins: tuple[Tensor, Tensor]) -> "Normal":
        """Returns the normal equations of moments, with inputs and targets about these origins."""
        xx, tx = moments.about(*origins)
        energy = xx if moments.diagonal else xx.diagonal()
        return cls(xx, tx, ROUNDING * (energy + moments.mean_x.square()).mean() + TINY)

    def solutions(self, weight: Tensor, strengths: Sequence[float]) -> list[Tensor]:
        """Returns, for each strength, the least-squares W regularised towards W0, in float64.

        W = W0 + (tx - W0 xx) (xx + lambda I)^-1

        Args:
            weight: W0, (o, i) or (i,).
            strengths: lambda, each as a share of the mean of the diagonal of xx.
        """
        start = in_double(weight)
        diagonal = self.xx.ndim == 1
        energy = (self.xx if diagonal else self.xx.diagonal()).mean()
        identity = 1 if diagonal else torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        left = self.tx - (start * self.xx if diagonal else start @ self.xx)
        fits = []
        for strength in strengths:
            gram = self.xx + (strength * energy + self.least) * identity
            fits.append(start + (left / gram if diagonal else solve(gram, left)))
        return fits

    def error(self, weight: Tensor) -> Tensor:
        """Returns E|t - W x|^2 less E|t|^2."""
        mapped = weight * self.xx if self.xx.ndim == 1 else weight @ self.xx
        return ((mapped - 2 * self.tx) * weight).sum()


def solve(gram: Tensor, left: Tensor) -> Tensor:
    """Solves X gram = left for X (o, i); gram (i, i) is symmetric, and positive up to rounding."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return torch.linalg.solve(gram, left, left=False)
    return torch.cholesky_solve(left.mT, root).mT


def best_strength(
    seen: Normal, held: Normal | None, weight: Tensor, strengths: Sequence[float]
) -> tuple[float, Tensor]:
    """Returns the strength whose solution has the least error on held-out data, and that solution.

    Earlier layers were fitted on the same images, so the inputs of a layer are more accurate there than on
    held-out images. So the best strength grows with depth, and no constant suits all layers.

    Args:
        held: normal equations of held-out data; None takes the middle strength.
    """
    if held is None:
        strengths = strengths[len(strengths) // 2 :][:1]
    fits = seen.solutions(weight, strengths)
    best = 0 if held is None else int(torch.stack([held.error(fit) for fit in fits]).argmin())
    return strengths[best], fits[best]


def best_solution(seen: Normal, held: Normal | None, weight: Tensor, strengths: Sequence[float]) -> Tensor:
    """Returns the solution of the `best_strength`."""
    return best_strength(seen, held, weight, strengths)[1]


@dataclass(frozen=True)
class Part:
    """One width's share in the fit of a layer that several widths share.

    Args:
        seen: moments of the width's inputs and targets.
        held: moments of the held-out ones.
        rows: (o_r,) indices of the outputs that the width keeps.
        columns: (i_r,) indices of the inputs that it keeps.
        weight: weight of the width in the fit.
    """

    seen: Moments
    held: Moments
    rows: Tensor
    columns: Tensor
    weight: float = 1.0

    def shift(self, weight: Tensor) -> Tensor:
        """Returns the bias (o_r,) with which weights (o_r, i_r) give the targets' mean as mean output."""
        return self.seen.mean_t - weight @ self.seen.mean_x


def fit_shared(parts: Sequence[Part], weight: Tensor, strengths: Sequence[float], bias: bool) -> Tensor:
    """Returns the weights (o, i), in float64, that fit all widths best, each width having its own bias.

    A row is shared by the widths that keep it. Its normal equations are the sum of theirs, padded with zeros
    to the inputs of the widest. All rows shared by the same widths are one regression.

    Args:
        weight: (o, i) weights that the fit is regularised towards; what no width keeps stays unchanged.
        bias: whether the layer has a bias.
    """
    fitted = in_double(weight).clone()
    equations = []
    for part in parts:
        origins = part.seen.origins(bias)
        held = Normal.of(part.held, origins) if part.held.count else None
        equations.append((part, Normal.of(part.seen, origins), held))
    keeps = torch.stack([torch.zeros(len(weight), dtype=torch.long).index_fill(0, p.rows, 1) for p in parts])
    for sharing in keeps.unique(dim=1).T:
        rows = (keeps == sharing[:, None]).all(0).nonzero().flatten()
        shared = [equation for equation, kept in zip(equations, sharing, strict=True) if kept]
        if not shared:
            continue
        columns = torch.cat([part.columns for part, _, _ in shared]).unique()
        place = (rows, columns)
        seen = padded_sum([(part, seen) for part, seen, _ in shared], place)
        tested = [(part, held) for part, _, held in shared if held]
        held = padded_sum(tested, place) if tested else None
        fit = best_solution(seen, held, fitted[rows][:, columns], strengths)
        fitted[rows[:, None], columns] = fit
    return fitted


def padded_sum(equations: Sequence[tuple[Part, Normal]], place: tuple[Tensor, Tensor]) -> Normal:
    """Returns the weighted sum of some widths' normal equations, for these (rows, columns)."""
    rows, columns = place
    like = equations[0][1].xx
    xx, tx = like.new_zeros(len(columns), len(columns)), like.new_zeros(len(rows), len(columns))
    least: Any = 0.0
    for part, own in equations:
        at = torch.searchsorted(columns, part.columns).to(like.device)
        chosen = torch.searchsorted(part.rows, rows).to(like.device)
        xx[at[:, None], at] += part.weight * own.xx
        tx[:, at] += part.weight * own.tx[chosen]
        least = least + part.weight * own.least
    return Normal(xx, tx, least)


ROUNDING = 1e-10
"""Smallest variance that float32 resolves, relative to the mean square."""
TINY = 1e-30
"""Prevents division by zero if all inputs are zero."""


def in_double(tensor: Tensor) -> Tensor:
    """Returns the tensor in float64, on the CPU if its device has no float64 (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
