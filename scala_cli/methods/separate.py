"""Separate training of one width: the baseline that a family is compared with."""

from collections.abc import Iterator, Sequence
from random import Random

from scala_cli.errors import PointError
from scala_cli.methods.base import Batch, Method, Pass, Student, Teacher
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point
from scala_cli.tasks.base import Task


class Separate(Method):
    """Trains one width from its slice of the starting weights, with labels and a teacher if there is one."""

    parts = frozenset({"order", "calibrate", "teacher"})
    masks_patches = True
    one_point = True

    def __init__(self, points: Sequence[Point], settings: MethodSettings, task: Task) -> None:
        super().__init__(points, settings, task)
        if len(self.points) != 1:
            raise PointError(
                f"method separate trains one width a run, not {len(self.points)}.",
                "Give one.",
                remedy="example",
                setting="ratios",
                value=self.points[0],
            )

    def draw(self, random: Random) -> list[Point]:
        return [*self.points]

    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        (point,) = drawn
        lesson = teacher(batch.images) if teacher else None
        output = student(batch.images, point)
        yield Pass(point, self.task.loss(output, batch.targets, lesson, self.settings))
        yield from self.masked(batch, student, point, lesson)
