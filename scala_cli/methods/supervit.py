"""SuperViT: Super Vision Transformer (arXiv 2205.11397)."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import ClassVar

from scala_cli.errors import PointError
from scala_cli.methods.base import Batch, Method, Pass, Student, Teacher
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point, widths_of
from scala_cli.tasks.base import Task


class SuperViT(Method):
    """Trains many sizes and shares of tokens of one width (section 3 of the paper).

    A step trains four points: the largest size with all tokens and with fewer, another size with all tokens
    and with fewer. In the paper the points with all tokens learn from labels, and each teaches the point of
    its size with fewer tokens. If `teacher` is "all", the frozen starting model teaches every point, beside
    the labels and instead of the point of the same size; if it is "full", only the largest point.
    """

    parts = frozenset({"teacher"})
    ratios: ClassVar[str] = "1"
    keeps: ClassVar[str] = "0.5,0.7,1"
    rate = 0.3  # the sizes of a pretrained model start near their optimum (docs/results/supervit.md)

    def __init__(self, points: Sequence[Point], settings: MethodSettings, task: Task) -> None:
        super().__init__(points, settings, task)
        if len(widths_of(self.points)) > 1:
            raise PointError(
                "method supervit trains one width, of many sizes and shares of tokens.",
                "Give one.",
                remedy="example",
                setting="ratios",
                value="1",
            )
        self.whole = {point.size: point for point in self.points if point.keep == 1}
        """Size -> the point with all tokens, smallest first."""
        lonely = [point for point in self.points if point.size not in self.whole]
        if lonely:
            raise PointError(
                f"{lonely[0]} learns from the point of its size with all tokens, which is not trained.",
                "Add it.",
                remedy="example",
                setting="keeps",
                value=self.keeps,
            )

    def draw(self, random: Random) -> list[Point]:
        """Draws the largest size and a smaller one, each with all tokens and with fewer."""
        *smaller, largest = self.whole.values()
        drawn = []
        for whole in [largest, *([random.choice(smaller)] if smaller else [])]:
            fewer = [point for point in self.points if point.size == whole.size and point.keep < 1]
            drawn += [whole, *([random.choice(fewer)] if fewer else [])]
        return drawn

    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        frozen = teacher(batch.images) if teacher else None
        lesson = None
        for point in drawn:
            output = student(batch.images, point)
            everywhere = self.settings.teacher == "all" or point == drawn[0]
            known = frozen if everywhere else None
            if point.keep == 1:
                loss = self.task.loss(output, batch.targets, known, self.settings)
                lesson = output.detach()
            else:
                taught = frozen if frozen is not None and self.settings.teacher == "all" else lesson
                loss = self.task.loss(output, None, taught, self.settings)
            yield Pass(point, loss)
