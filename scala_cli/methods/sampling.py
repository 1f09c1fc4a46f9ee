"""Which points one step trains. Every function returns them largest first."""

from collections.abc import Sequence
from random import Random

from scala_cli.slicing.point import Point

PASSES = 4
"""Number of points trained in one step, if the family has as many; one more in a grid of four widths."""


def stable_sample(points: Sequence[Point], random: Random) -> list[Point]:
    """Stable Sampling: draws l > m2 > m1 > s with m1 from (s, m] and m2 from (m, l), m = (s + l) / 2.

    This keeps the gaps in capacity between the four even. No width is drawn from an empty interval, so a
    family of one, two or three widths trains all of them every step.

    In a grid these are the `whole` widths, and one other point is drawn, or more if there are fewer than
    three widths. Fewer whole widths in a step cost all of them accuracy (docs/results/axes.md).

    Args:
        points: smallest first.
    """
    widths = whole(points)
    smallest, largest = widths[0].ratio, widths[-1].ratio
    middle = (smallest + largest) / 2
    lower = [p for p in widths if smallest < p.ratio <= middle]
    upper = [p for p in widths if middle < p.ratio < largest]
    drawn = {widths[0], *(random.choice(half) for half in (lower, upper) if half), widths[-1]}
    others = [p for p in points if p not in widths]
    drawn |= {*random.sample(others, min(len(others), max(1, PASSES - len(drawn))))}
    return sorted(drawn, reverse=True)


def uniform_sample(points: Sequence[Point], random: Random) -> list[Point]:
    """Draws the largest, two random points and the smallest (sandwich rule of US-Net, arXiv 1903.05134)."""
    between = list(points[1:-1])
    drawn = random.sample(between, min(2, len(between)))
    return sorted({points[0], *drawn, points[-1]}, reverse=True)


def whole(points: Sequence[Point]) -> list[Point]:
    """Returns the points of the widest one's size and share of tokens, usually the largest and all."""
    return [point for point in points if (point.size, point.keep) == (points[-1].size, points[-1].keep)]
