"""Judges embeddings by their nearest neighbours, by a linear classifier, and as queries to an index."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scala_cli.slicing.ridge import Moments, Normal, best_strength

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Settings of the vote of neighbours, as in DINO (arXiv 2104.14294)."""
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths from which a linear classifier takes the best."""
HELD_OUT = 8
"""One image in this many is held out to choose the strength."""
CHUNK = 1024
"""Number of queries whose similarities to the whole bank are in memory at once."""
ROUNDING = 1e-6
"""Cosines that differ by less count as equal."""


class Nearest(NamedTuple):
    """The k most similar embeddings of a bank to each of Q queries, most similar first.

    Args:
        cosines: (Q, k)
        numbers: (Q, k) their indices in the bank.
    """

    cosines: Tensor
    numbers: Tensor


def nearest(queries: Tensor, bank: Tensor, count: int = NEIGHBOURS) -> Nearest:
    """Returns the nearest embeddings by cosine, `count` of them or all if the bank has fewer.

    Args:
        queries: (Q, C)
        bank: (N, C)
    """
    bank = F.normalize(bank, dim=1)
    found = [
        (F.normalize(some, dim=1) @ bank.T).topk(min(count, len(bank)), dim=1)
        for some in queries.split(CHUNK)
    ]
    return Nearest(torch.cat([each.values for each in found]), torch.cat([each.indices for each in found]))


def vote(found: Nearest, labels: Tensor, classes: int) -> Tensor:
    """Returns (Q,) the class of each query by the vote of its neighbours, each exp(cosine / TEMPERATURE).

    Args:
        labels: (N,) class numbers of the bank.
    """
    weights = (found.cosines / TEMPERATURE).exp()
    votes = weights.new_zeros(len(weights), classes)
    return votes.scatter_add_(1, labels[found.numbers], weights).argmax(1)


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Returns the share of the neighbours `theirs` that are among `ours`, for indices (Q, k)."""
    return (ours[:, :, None] == theirs[:, None, :]).any(1).float().mean().item()


def recall(queries: Tensor, index: Tensor, counts: Sequence[int]) -> list[float]:
    """Returns, for each count, the share of queries with their own image among that many nearest in an index.

    Args:
        queries, index: (N, C) embeddings of the same images in the same order.
    """
    index, ahead, first = F.normalize(index, dim=1), [], 0
    for some in queries.split(CHUNK):
        cosines = F.normalize(some, dim=1) @ index.T
        own = cosines.diagonal(first)[:, None]
        ahead.append((cosines > own + ROUNDING).sum(1))
        first += len(some)
    ranks = torch.cat(ahead)
    return [(ranks < count).float().mean().item() for count in counts]


class LinearProbe:
    """A linear classifier on embeddings: ridge regression of the classes, in closed form.

    Each channel is standardised. The ridge strength is the best on held-out images; the classifier is then
    fitted to all images.

    Args:
        embeddings: (N, C)
        labels: (N,) class numbers.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, classes: int) -> None:
        self.mean, deviation = embeddings.mean(0), embeddings.std(0, correction=0)
        self.deviation = deviation.clamp_min(ROUNDING * deviation.max()).clamp_min(1e-30)
        x, targets = self.standardised(embeddings), F.one_hot(labels, classes).to(embeddings)
        held = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
        seen, tested, whole = (moments(x[some], targets[some]) for some in (~held, held, held | ~held))
        start, origins = torch.zeros_like(whole.products_tx), seen.origins(True)
        judged = Normal.of(tested, origins) if tested.count else None
        strength, _ = best_strength(Normal.of(seen, origins), judged, start, STRENGTHS)
        (weight,) = Normal.of(whole, whole.origins(True)).solutions(start, [strength])
        self.weight, self.bias = (
            part.to(embeddings) for part in (weight, whole.mean_t - weight @ whole.mean_x)
        )

    def standardised(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.mean) / self.deviation

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Returns (N,) the class of each embedding (N, C)."""
        return F.linear(self.standardised(embeddings), self.weight, self.bias).argmax(1)


def moments(inputs: Tensor, targets: Tensor) -> Moments:
    """Returns the moments of (N, i) inputs and (N, o) targets."""
    found = Moments()
    found.add(inputs, targets)
    return found
