"""Universally Slimmable Networks (arXiv 1903.05134), the baseline of the Scala paper."""

from collections.abc import Iterator
from random import Random

from torch import Tensor

from scala_cli.methods.base import Method, Student, Teacher
from scala_cli.methods.losses import cross_entropy, distillation
from scala_cli.methods.scala import uniform_sample
from scala_cli.slicing.point import Point


class USNet(Method):
    """The sandwich rule, with the full width learning from the labels and teaching all others in place."""

    taught = False

    def passes(
        self, net: Student, images: Tensor, targets: Tensor, teacher: Teacher | None, random: Random
    ) -> Iterator[tuple[Point, Tensor]]:
        largest, *others = uniform_sample(self.points, random)
        logits = net(images, largest)
        yield largest, cross_entropy(logits, targets, self.settings.smoothing)
        lesson = logits.detach()
        for point in others:
            yield point, distillation(net(images, point), lesson)
