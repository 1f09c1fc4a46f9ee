"""Scala: Slicing Vision Transformer for Flexible Inference (arXiv 2412.04786)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

from scala_cli.methods.base import OFF, Batch, Method, Pass, Recipe, Student, Teacher
from scala_cli.methods.sampling import PASSES, stable_sample, uniform_sample, whole
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point


class Scala(Method):
    """Trains four widths per step, largest first (section 3 of the paper); in a grid, other points as well.

    In the paper each width is taught by the next larger one of the step, and the largest by the frozen
    pretrained model. From pretrained weights that model is the best teacher for every width
    (docs/results/pretrained.md), so by default it teaches all. Isolated Activation is in the slicing rule.
    """

    parts = frozenset(OFF)
    masks_patches = True
    own = frozenset({"full_every"})
    isolated = True
    recipes: ClassVar[Mapping[str, Recipe]] = {
        # the authors' released code with pretrained weights (Table 8), which cuts qkv as one block
        "paper": Recipe(
            MethodSettings(
                order="none", calibrate=False, isolation=True, teacher="full", favour_narrowest=False
            ),
            "fused",
            "fixed",
        )
    }

    def draw(self, random: Random) -> list[Point]:
        """Draws the points of a step (`stable_sample`).

        The largest, which costs half of a step, is drawn in one of `full_every` steps only: from pretrained
        weights it is good from the start, and its frozen copy teaches the others (docs/performance.md).
        """
        sample = stable_sample if self.settings.stable_sampling else uniform_sample
        drawn = sample(self.points, random)
        return drawn[1:] if len(drawn) > 1 and random.randrange(self.settings.full_every) else drawn

    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        lesson = teacher(batch.images) if teacher else None
        for point in drawn:
            output = student(batch.images, point)
            largest = point == self.points[-1]
            # Noise Calibration: labels correct a noisy teacher; without it only the largest point gets labels
            labels = batch.targets if self.settings.noise_calibration or largest or lesson is None else None
            weight = self.weight(point, drawn)
            yield Pass(point, self.task.loss(output, labels, lesson, self.settings), weight)
            yield from self.masked(batch, student, point, lesson, weight)
            if teacher and self.settings.teacher == "all":
                continue
            # Progressive Knowledge Transfer: each point teaches the next; without it the largest teaches all
            if self.settings.progressive_transfer or largest:
                lesson = output.detach()

    def weight(self, point: Point, drawn: Sequence[Point]) -> float:
        """Returns the weight of a point's loss: the narrowest width counts as much as all others of the step.

        All wider widths train its channels too, so otherwise it would have the least influence on the only
        channels it has. In a grid it is the one at the largest size with all tokens.
        """
        narrowest, *wider = whole(self.points)
        favoured = self.settings.favour_narrowest and wider and point == narrowest
        return max(1, len(drawn) - 1) if favoured else 1

    @classmethod
    def idle(cls, settings: MethodSettings, points: Sequence[Point]) -> str:
        if settings.stable_sampling or len(points) > PASSES:
            return ""
        return f"stable_sampling has no effect with {len(points)} widths: each step trains them all"

    @classmethod
    def effective(cls, settings: MethodSettings) -> MethodSettings:
        """Also turns off teaching from width to width if the frozen model teaches all widths."""
        settings = super().effective(settings)
        return replace(settings, progressive_transfer=False) if settings.teacher == "all" else settings
