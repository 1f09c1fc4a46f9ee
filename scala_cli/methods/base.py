"""What a training method is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from random import Random

from torch import Tensor

from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point

Student = Callable[[Tensor, Point], Tensor]
"""images (B, C, H, W), point -> logits (B, classes)"""

Teacher = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> logits (B, classes), without gradient"""


class Method(ABC):
    """One training step as a sequence of passes.

    Args:
        points: the widths to train, narrowest first.
        settings: which parts of the method are on.
    """

    isolated = False
    """Whether the method trains with Isolated Activation unless the user says otherwise."""

    taught = True
    """Whether the frozen starting model has a part in the method."""

    def __init__(self, points: Sequence[Point], settings: MethodSettings) -> None:
        self.points, self.settings = tuple(sorted(points)), settings

    @abstractmethod
    def passes(
        self, net: Student, images: Tensor, targets: Tensor, teacher: Teacher | None, random: Random
    ) -> Iterator[tuple[Point, Tensor]]:
        """Yields (width, loss) one pass at a time; the caller backpropagates each as it comes, then steps.

        Args:
            images: (B, C, H, W)
            targets: (B,) class numbers or (B, classes) probabilities.
            teacher: the frozen full-width model, or None.
            random: this step's own, alike on every machine that takes part.
        """

    def weight(self, point: Point) -> int:
        """How much the loss of a width counts in the sum that is minimised."""
        return 1
