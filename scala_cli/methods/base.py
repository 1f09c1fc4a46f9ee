"""The interface of a training method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import DEFAULT_RATIOS, MethodSettings
from scala_cli.slicing.point import Point
from scala_cli.slicing.rule import AttnScale
from scala_cli.slicing.table import Layout
from scala_cli.tasks.base import Task

Student = Callable[[Tensor, Point], Any]
"""images (B, C, H, W), point -> the task's output, such as logits (B, classes); or `Output`"""

Teacher = Callable[[Tensor], Any]
"""images (B, C, H, W) -> the same of the frozen model, without gradient"""

OFF: Mapping[str, Any] = {
    "order": "none",
    "teacher": "none",
    **{part.name: False for part in fields(MethodSettings) if part.type in (bool, bool | None)},
}
"""The optional parts of methods, as fields of MethodSettings, each with the value that turns it off."""


class Batch(NamedTuple):
    """Images (B, C, H, W) and targets: (B,) class numbers, or (B, classes) probabilities.

    Where the task asks for it, the same images with hidden patches, and which these are: (B, patches); where
    there is a second teacher, `hints`, the (B,) class numbers that it gives.
    """

    images: Tensor
    targets: Tensor
    masked: Tensor | None = None
    hidden: Tensor | None = None
    hints: Tensor | None = None

    def parts(self, count: int) -> "Iterator[Batch]":
        """Yields the batch in so many parts."""
        given = {name: tensor.chunk(count) for name, tensor in self._asdict().items() if tensor is not None}
        for some in zip(*given.values(), strict=True):
            yield Batch(**dict(zip(given, some, strict=True)))


class Output(NamedTuple):
    """What a model gives to a method that reads its blocks.

    Args:
        answer: the task's output.
        tokens: patch tokens after each block, (B, N, C).
        distilled: (B, classes) logits of the distillation head, where there is one.
    """

    answer: Tensor
    tokens: Sequence[Tensor]
    distilled: Tensor | None


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

    own: ClassVar[frozenset[str]] = frozenset()
    """Fields of MethodSettings that mean something to this method alone."""

    one_point: ClassVar[bool] = False
    """Whether a run trains one point only; a family then needs one run per point."""

    adds_modules: ClassVar[bool] = False
    """Whether `prepared` changes the full width, so that this one too is taught by the model from before."""

    reads_blocks: ClassVar[bool] = False
    """Whether `passes` reads the tokens after every block: student and teacher then return an `Output`."""

    rate: ClassVar[float] = 1.0
    """The default learning rate, relative to the task's."""

    module_rate: ClassVar[float] = 1.0
    """The learning rate of `modules`, relative to the model's."""

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

    def prepared(self, start: SlimmableViT, seed: int) -> SlimmableViT:
        """Returns the model to train: the starting one, or one with modules of its own added.

        Args:
            seed: of what is random in them.
        """
        return start

    def modules(self, net: SlimmableViT) -> nn.Module:
        """Returns the modules that only training needs: trained and resumed, but in no checkpoint.

        Args:
            net: the model to train.
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
