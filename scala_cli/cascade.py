"""Cascades: a small point of a family answers, and a larger one only if the small one is unsure."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scala_cli.cost import gmacs, macs, pareto
from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.slimmable import Ratio, SlimmableViT


class Cascade(nn.Module):
    """A classifier that asks several points of one family in turn, to spend little on easy images.

    Args:
        net: the family.
        ratios: the points in the order in which they are run, cheapest first.
        threshold: an answer is final if the probability of its class is at least this.

    Raises:
        PointError: for a point that was not trained, or if costs do not increase.
        CheckpointError: if the model gives features.
    """

    def __init__(self, net: SlimmableViT, ratios: Sequence[Ratio], threshold: float) -> None:
        super().__init__()
        if net.spec.features:
            raise CheckpointError("a cascade needs classes; this model gives features.", remedy="train_head")
        self.net, self.threshold = net, threshold
        self.points = tuple(net.find(ratio) for ratio in ratios)
        spent = [macs(net.spec_at(point)) for point in self.points]
        if len(spent) < 2 or any(later <= earlier for earlier, later in pairwise(spent)):
            raise PointError(
                "a cascade needs two points or more, each costing more than the one before.",
                remedy="example",
                setting="cascade",
                value="0.25,1",
            )

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits of the first point that is sure, else of the last: (B, C, H, W) -> (B, classes)."""
        first, *others = self.points
        logits = self.net(images, first)
        for point in others:
            unsure = (confidence(logits) < self.threshold).nonzero().flatten()
            if not len(unsure):
                break
            # only the logits of unsure images are replaced
            logits = logits.index_copy(0, unsure, self.net(images[unsure], point).to(logits.dtype))
        return logits


def confidence(logits: Tensor) -> Tensor:
    """Returns the probability of the most probable class: (..., classes) -> (...,)."""
    return logits.float().softmax(-1).amax(-1)


def sweep(
    sure: Tensor, right: Tensor, macs: Sequence[int], thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns a cascade's accuracy and cost at every threshold, from the answers of all its points.

    Args:
        sure: (points, N) the confidence of each point on each image, cheapest point first.
        right: (points, N) whether its answer is right.
        macs: multiply-accumulates of one image at each point.

    Returns:
        per threshold {"threshold", "top1" in percent, "gmacs" per image on average, "escalated": percentage
        of images that the first point did not decide}
    """
    rows = []
    for threshold in thresholds:
        decides = sure >= threshold
        decides[-1] = True
        last = decides.int().argmax(0)  # index of the first point that is sure
        spent = torch.tensor(macs, dtype=torch.float64).cumsum(0)[last]
        rows.append(
            {
                "threshold": threshold,
                "top1": round(100 * right.gather(0, last[None]).float().mean().item(), 4),
                "gmacs": gmacs(spent.mean().item()),
                "escalated": round(100 * (last > 0).float().mean().item(), 2),
            }
        )
    return rows


def best_cascade(
    sure: Tensor, right: Tensor, macs: Sequence[int], max_gmacs: float, thresholds: Sequence[float]
) -> dict[str, Any] | None:
    """Returns the cascade of one, two or three points that is right most often within a mean budget.

    Only points on the Pareto front of cost and accuracy are used. All members share one threshold.

    Args:
        sure: (points, N) the confidence of each point on each image.
        right: (points, N) whether its answer is right.
        macs: multiply-accumulates of one image at each point.
        max_gmacs: the budget, billions of multiply-accumulates per image on average.
        thresholds: to choose from.

    Returns:
        a row of `sweep` with "members", the indices of its points, cheapest first. A single point has
        threshold 0. None if nothing fits the budget.
    """
    front = pareto([*zip(macs, right.double().mean(1).tolist(), strict=True)])
    found = []
    for size in (1, 2, 3):
        for members in combinations(front, size):
            some, spent = [*members], [macs[n] for n in members]
            rows = sweep(sure[some], right[some], spent, thresholds if size > 1 else (0.0,))
            found += [{"members": members, **row} for row in rows]
    fitting = [row for row in found if row["gmacs"] <= max_gmacs]
    return max(fitting, key=lambda row: (row["top1"], -row["gmacs"]), default=None)
