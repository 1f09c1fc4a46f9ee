"""What training costs: multiply-accumulates of an image."""

from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor

from scala_cli.methods import METHODS
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point

STEPS = 1000


def training_gmacs(gmacs: Mapping[Point, float], method: MethodSettings, pretrained: bool) -> float:
    """GMACs that one training image costs: a backward pass counts as two forwards.

    The widths that a method draws are averaged over 1,000 steps.

    Args:
        gmacs: of one forward at each width; the teacher's is taken to be the largest.
        pretrained: whether the start can teach.
    """
    kind = METHODS[method.method]
    teacher = max(gmacs.values()) if pretrained and kind.taught and method.teacher != "none" else 0.0
    if method.method == "separate":
        return round(sum(3 * each + teacher for each in gmacs.values()), 4)
    drawn: list[float] = []

    def student(_: Tensor, point: Point) -> Tensor:
        drawn.append(gmacs[point])
        return torch.zeros(1, 2)

    images, targets = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for step in range(STEPS):
        for _ in kind(tuple(gmacs), method).passes(student, images, targets, None, Random(step)):
            pass
    return round(3 * sum(drawn) / STEPS + teacher, 4)
