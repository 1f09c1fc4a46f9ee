"""Which points one step trains. Every function returns them largest first."""

from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import TypeVar

from scala_cli.slicing.point import Point

Value = TypeVar("Value", bound=int | Fraction)


def stable_sample(points: Sequence[Point], random: Random) -> list[Point]:
    """Stable Sampling: draws l > m2 > m1 > s with m1 from (s, m] and m2 from (m, l), m = (s + l) / 2.

    This keeps the gaps in capacity between the four even. No width is drawn from an empty interval, so a
    family of one, two or three widths trains all of them every step.
    """
    smallest, largest = points[0].ratio, points[-1].ratio
    middle = (smallest + largest) / 2
    lower = [p for p in points if smallest < p.ratio <= middle]
    upper = [p for p in points if middle < p.ratio < largest]
    between = [random.choice(half) for half in (lower, upper) if half]
    return sorted({points[0], *between, points[-1]}, reverse=True)


def narrowest(points: Sequence[Point]) -> Point:
    """Returns the point that every step trains beside the largest.

    In a grid it is the narrowest width at the largest size with all tokens. Training the smallest point
    instead costs narrow widths at the largest size up to 5 points of accuracy (docs/results/axes.md). If the
    family lacks that point or has a single width, it is the smallest point.
    """
    largest = points[-1]
    whole = [p for p in points[:-1] if (p.size, p.keep) == (largest.size, largest.keep)]
    return (whole or points)[0]


def sample_axes(points: Sequence[Point], random: Random) -> list[Point]:
    """Stable Sampling in a grid of widths, sizes and shares of tokens; the points between cover each axis.

    On every axis one of the two takes a value from the lower half and the other from the upper half. A point
    that the family lacks, or that is drawn already, is left out.
    """
    ratios = from_both_halves([point.ratio for point in points], random)
    sizes = from_both_halves([point.size or 0 for point in points], random)
    keeps = from_both_halves([point.keep for point in points], random)
    between = [
        Point(ratio, size or None, keep) for ratio, size, keep in zip(ratios, sizes, keeps, strict=True)
    ]
    chosen = {narrowest(points), *(point for point in between if point in points), points[-1]}
    return sorted(chosen, reverse=True)


def from_both_halves(values: Sequence[Value], random: Random) -> list[Value]:
    """Returns a value of the lower half and one of the upper half, in random order.

    The middle one of an odd number of values belongs to both halves.
    """
    ordered = sorted({*values})
    half = (len(ordered) + 1) // 2
    pair = [random.choice(ordered[:half]), random.choice(ordered[-half:])]
    random.shuffle(pair)
    return pair


def uniform_sample(points: Sequence[Point], random: Random) -> list[Point]:
    """Draws the largest, two random points and the smallest (sandwich rule of US-Net, arXiv 1903.05134)."""
    between = list(points[1:-1])
    drawn = random.sample(between, min(2, len(between)))
    return sorted({points[0], *drawn, points[-1]}, reverse=True)
