"""Scala: Slicing Vision Transformer for Flexible Inference (arXiv 2412.04786)."""

from collections.abc import Iterator, Sequence
from random import Random

from torch import Tensor

from scala_cli.methods.base import Method, Student, Teacher
from scala_cli.methods.losses import cross_entropy, distillation
from scala_cli.slicing.point import Point

PASSES = 4
"""Widths trained in one step, where there are as many."""


class Scala(Method):
    """Four widths a step, largest first (section 3 of the paper).

    In the paper each width is taught by the one before it, and the first by the frozen pretrained model. From
    pretrained weights that model is the best teacher for every width (docs/results/pretrained.md), so here
    it teaches all where there is one. Isolated Activation is the fourth part; it lives in the slicing rule.
    """

    isolated = True

    def passes(
        self, net: Student, images: Tensor, targets: Tensor, teacher: Teacher | None, random: Random
    ) -> Iterator[tuple[Point, Tensor]]:
        lesson = teacher(images) if teacher else None
        for point in self.sample(random):
            logits = net(images, point)
            largest = point == self.points[-1]
            loss = logits.new_zeros(())
            # Noise Calibration: the label corrects a noisy teacher; without it only the largest sees labels
            if self.settings.noise_calibration or largest:
                loss = loss + cross_entropy(logits, targets, self.settings.smoothing)
            if lesson is not None:
                loss = loss + distillation(logits, lesson)
            yield point, loss
            if teacher and self.settings.teacher == "all":
                continue
            # Progressive Knowledge Transfer: each width teaches the next; without it the largest teaches all
            if self.settings.progressive_transfer or largest:
                lesson = logits.detach()

    def weight(self, point: Point) -> int:
        """The narrowest counts as much as all others together.

        Its channels are pulled at by every wider width as well, so that it has the least say in what is
        all it has; trained alone it would have them to itself.
        """
        favoured = self.settings.favour_narrowest and point == self.points[0]
        return max(1, min(PASSES, len(self.points)) - 1) if favoured else 1

    def sample(self, random: Random) -> list[Point]:
        """The widths of one step: the largest, two between, the smallest."""
        draw = stable_sample if self.settings.stable_sampling else uniform_sample
        return draw(self.points, random)


def stable_sample(points: Sequence[Point], random: Random) -> list[Point]:
    """Stable Sampling: l > m2 > m1 > s with m1 drawn from (s, m] and m2 from (m, l), m = (s + l) / 2.

    So the gap in capacity between the four stays even. An interval that holds no width gives none, so
    one, two and three widths are all trained every step.
    """
    smallest, largest = points[0].ratio, points[-1].ratio
    middle = (smallest + largest) / 2
    lower = [p for p in points if smallest < p.ratio <= middle]
    upper = [p for p in points if middle < p.ratio < largest]
    between = [random.choice(half) for half in (lower, upper) if half]
    return sorted({points[0], *between, points[-1]}, reverse=True)


def uniform_sample(points: Sequence[Point], random: Random) -> list[Point]:
    """The sandwich rule of US-Net (arXiv 1903.05134): the largest, two random widths, the smallest."""
    between = list(points[1:-1])
    drawn = random.sample(between, min(2, len(between)))
    return sorted({points[0], *drawn, points[-1]}, reverse=True)
