"""Universally Slimmable Networks (arXiv 1903.05134), the baseline of the Scala paper."""

from collections.abc import Iterator, Sequence
from random import Random

from scala_cli.methods.base import Batch, Method, Pass, Student, Teacher
from scala_cli.methods.sampling import uniform_sample
from scala_cli.slicing.point import Point


class USNet(Method):
    """Trains by the sandwich rule: the full width learns from the labels and teaches all others in the step.

    Without labels, the full width learns from the frozen model.
    """

    parts = frozenset({"order", "isolation"})
    masks_patches = True

    def draw(self, random: Random) -> list[Point]:
        return uniform_sample(self.points, random)

    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        largest, *others = drawn
        output = student(batch.images, largest)
        first = teacher(batch.images) if teacher and not self.task.labelled else None
        yield Pass(largest, self.task.loss(output, batch.targets, first, self.settings))
        yield from self.masked(batch, student, largest, first)
        lesson = output.detach()
        for point in others:
            yield Pass(point, self.task.loss(student(batch.images, point), None, lesson, self.settings))
            yield from self.masked(batch, student, point, lesson)
