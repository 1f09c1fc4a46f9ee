"""Separate training: one width alone, what a family of widths is measured against."""

from collections.abc import Iterator, Sequence
from random import Random

from torch import Tensor

from scala_cli.errors import PointError
from scala_cli.methods.base import Method, Student, Teacher
from scala_cli.methods.losses import cross_entropy, distillation
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point


class Separate(Method):
    """One width from its slice of the starting weights, with labels and, where there is one, the teacher."""

    def __init__(self, points: Sequence[Point], settings: MethodSettings) -> None:
        super().__init__(points, settings)
        if len(self.points) != 1:
            raise PointError(
                f"method separate trains one width a run, not {len(self.points)}.",
                f"Give one: --ratios {self.points[0]}",
            )

    def passes(
        self, net: Student, images: Tensor, targets: Tensor, teacher: Teacher | None, random: Random
    ) -> Iterator[tuple[Point, Tensor]]:
        (point,) = self.points
        logits = net(images, point)
        loss = cross_entropy(logits, targets, self.settings.smoothing)
        if teacher:
            loss = loss + distillation(logits, teacher(images))
        yield point, loss
