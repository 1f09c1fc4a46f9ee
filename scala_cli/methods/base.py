"""The interface of a training method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import starmap
from random import Random
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from scala_cli.settings import DEFAULT_RATIOS, MethodSettings
from scala_cli.slicing.point import Point
from scala_cli.slicing.rule import AttnScale
from scala_cli.slicing.table import Layout
from scala_cli.tasks.base import Task

Student = Callable[[Tensor, Point], Tensor]
"""images (B, C, H, W), point -> the task's output, such as logits (B, classes)"""

Teacher = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> the task's output, without gradient"""

OFF: Mapping[str, Any] = {
    "order": "none",
    "teacher": "none",
    **{part.name: False for part in fields(MethodSettings) if part.type in (bool, bool | None)},
}
"""The optional parts of methods, as fields of MethodSettings, each with the value that turns it off."""


class Batch(NamedTuple):
    """Images (B, C, H, W) and targets: (B,) class numbers, or (B, classes) probabilities.

    Where the task asks for it, the same images with hidden patches, and which these are: (B, patches).
    """

    images: Tensor
    targets: Tensor
    masked: Tensor | None = None
    hidden: Tensor | None = None

    def parts(self, count: int) -> "Iterator[Batch]":
        """Yields the batch in so many parts."""
        given = (tensor.chunk(count) for tensor in self if tensor is not None)
        return starmap(Batch, zip(*given, strict=True))


class Pass(NamedTuple):
    """One forward of a step: the point, its loss, and the weight of that loss in the sum."""

    point: Point
    loss: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, and how the starting weights are cut for it."""

    settings: MethodSettings
    layout: Layout = "aligned"
    attn_scale: AttnScale = "native"


class Method(ABC):
    """One training step as a sequence of passes.

    Args:
        points: what to train, smallest first.
        settings: which parts of the method are on.
        task: what the model is for.
    """

    parts: ClassVar[frozenset[str]] = frozenset()
    """The keys of OFF that affect the method. With "teacher", the frozen starting model takes part."""

    one_point: ClassVar[bool] = False
    """Whether a run trains one point only; a family then needs one run per point."""

    isolated: ClassVar[bool] = False
    """Whether the method trains with Isolated Activation unless the user says otherwise."""

    ratios: ClassVar[str] = DEFAULT_RATIOS
    """The widths that a model is trained at unless told."""

    keeps: ClassVar[str] = ""
    """The shares of tokens likewise; none of its own if empty."""

    recipes: ClassVar[Mapping[str, Recipe]] = {}
    """Variants of the method that `scala compare` offers, by their names."""

    def __init__(self, points: Sequence[Point], settings: MethodSettings, task: Task) -> None:
        self.points, self.settings, self.task = tuple(sorted(points)), settings, task

    @abstractmethod
    def draw(self, random: Random) -> list[Point]:
        """Returns the points that one step trains, largest first.

        Args:
            random: the generator of this step, the same in every process.
        """

    @abstractmethod
    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        """Yields one pass at a time; the caller backpropagates each as it comes, then moves the weights.

        Args:
            teacher: the frozen full-width model, or None.
            drawn: the points that `draw` returned.
        """

    def masked(
        self, batch: Batch, student: Student, point: Point, lesson: Tensor | None, weight: float = 1.0
    ) -> Iterator[Pass]:
        """Yields the second pass of a point, on the images with hidden patches; none if there are no such.

        Args:
            lesson: what a teacher makes of the whole images.
        """
        if batch.masked is not None:
            output = student(batch.masked, point)
            loss = self.task.loss(output, None, lesson, self.settings, batch.hidden)
            yield Pass(point, loss, weight)

    def modules(self, width: int) -> nn.Module:
        """Returns the modules that only training needs: trained and resumed, but in no checkpoint.

        Args:
            width: channels of the full model.
        """
        return nn.Module()

    @classmethod
    def idle(cls, settings: MethodSettings, points: Sequence[Point]) -> str:
        """Returns why turning a part off has no effect for so few points; empty if it has one."""
        return ""

    @classmethod
    def effective(cls, settings: MethodSettings) -> MethodSettings:
        """Returns the settings with every part turned off that has no effect in this method."""
        settings = replace(settings, **{part: off for part, off in OFF.items() if part not in cls.parts})
        if settings.order == "none" or settings.isolation:
            settings = replace(settings, calibrate=False)
        if settings.isolation is None:
            settings = replace(settings, isolation=cls.isolated and settings.order != "importance")
        return settings
