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
"""Function: images (B, C, H, W), point -> the task's output with gradient, such as logits (B, classes), or a
`BlockOutput`. A method that teaches with this output detaches it."""

Teacher = Callable[[Tensor], Any]
"""Function: images (B, C, H, W) -> the frozen model's output of the same kind, without gradient."""

OFF: Mapping[str, Any] = {
    "order": "none",
    "teacher": "none",
    **{part.name: False for part in fields(MethodSettings) if part.type in (bool, bool | None)},
}
"""The optional parts of methods: fields of MethodSettings -> the value that turns the part off."""


class Batch(NamedTuple):
    """A batch of images and targets.

    Args:
        images: (B, C, H, W)
        targets: (B,) class numbers, or (B, classes) probabilities.
        masked: the images with hidden patches, if the task uses them.
        hidden: (B, patches) which patches are hidden in `masked`.
        hints: (B,) class numbers predicted by a second teacher, if there is one.
    """

    images: Tensor
    targets: Tensor
    masked: Tensor | None = None
    hidden: Tensor | None = None
    hints: Tensor | None = None

    def parts(self, count: int) -> "Iterator[Batch]":
        """Yields the batch in `count` parts."""
        given = {name: tensor.chunk(count) for name, tensor in self._asdict().items() if tensor is not None}
        for some in zip(*given.values(), strict=True):
            yield Batch(**dict(zip(given, some, strict=True)))


class BlockOutput(NamedTuple):
    """A model's output for a method that reads its blocks.

    Args:
        answer: the task's output.
        tokens: patch tokens after each block, (B, N, C).
        distilled: (B, classes) logits of the distillation head, if there is one.
    """

    answer: Tensor
    tokens: Sequence[Tensor]
    distilled: Tensor | None


class Pass(NamedTuple):
    """One forward pass of a step: the point, its loss, and the weight of the loss in the sum."""

    point: Point
    loss: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A method's settings, and how the starting weights are cut for it."""

    settings: MethodSettings
    layout: Layout = "aligned"
    attn_scale: AttnScale = "native"


class Method(ABC):
    """A training method: defines each step as a sequence of passes.

    Args:
        points: the points to train, smallest first.
        settings: which parts of the method are on.
        task: what the model is for.
    """

    parts: ClassVar[frozenset[str]] = frozenset()
    """The optional parts, keys of OFF, that this method has.

    They decide how a run prepares its start: "order" reorders the channels, "calibrate" fits the widths, and
    "teacher" keeps the frozen starting model to teach (for features it always does). All others are off.
    """

    own: ClassVar[frozenset[str]] = frozenset()
    """Fields of MethodSettings that only this method uses."""

    one_point: ClassVar[bool] = False
    """Whether a run trains only one point; a family then needs one run per point."""

    adds_modules: ClassVar[bool] = False
    """Whether `prepared` changes the full width; the unchanged model then teaches the full width as well."""

    reads_blocks: ClassVar[bool] = False
    """Whether `passes` reads the tokens after every block; both models then return a `BlockOutput`."""

    masks_patches: ClassVar[bool] = False
    """Whether `passes` also yields the passes of `masked`, which --mask-patches asks for."""

    rate: ClassVar[float] = 1.0
    """The default learning rate, relative to the task's."""

    module_rate: ClassVar[float] = 1.0
    """The learning rate of `modules`, relative to the model's."""

    isolated: ClassVar[bool] = False
    """Whether the method trains with Isolated Activation unless the user says otherwise."""

    ratios: ClassVar[str] = DEFAULT_RATIOS
    """The widths to train by default."""

    keeps: ClassVar[str] = ""
    """The shares of tokens to train by default; empty means all tokens only."""

    recipes: ClassVar[Mapping[str, Recipe]] = {}
    """Variants of the method that `scala compare` offers, by name."""

    def __init__(self, points: Sequence[Point], settings: MethodSettings, task: Task) -> None:
        self.points, self.settings, self.task = tuple(sorted(points)), settings, task

    @abstractmethod
    def draw(self, random: Random) -> list[Point]:
        """Returns the points that one step trains, in the order of their passes (see `sampling.py`).

        Args:
            random: the generator of this step, the same in every process.
        """

    @abstractmethod
    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        """Yields one pass at a time; the caller backpropagates each at once and then updates the weights.

        Args:
            teacher: the frozen full-width model, or None.
            drawn: the points that `draw` returned.
        """

    def masked(
        self, batch: Batch, student: Student, point: Point, lesson: Tensor | None, weight: float = 1.0
    ) -> Iterator[Pass]:
        """Yields a second pass of a point, on the images with hidden patches; nothing if there are none.

        Args:
            lesson: the teacher's output for the whole images.
        """
        if batch.masked is not None:
            output = student(batch.masked, point)
            loss = self.task.loss(output, None, lesson, self.settings, batch.hidden)
            yield Pass(point, loss, weight)

    def prepared(self, start: SlimmableViT, seed: int) -> SlimmableViT:
        """Returns the model to train: the starting model, or a copy with the method's modules added.

        Args:
            seed: seed of the modules' random weights.
        """
        return start

    def modules(self, net: SlimmableViT) -> nn.Module:
        """Returns modules needed only in training: trained, and saved for resuming, but in no checkpoint.

        Args:
            net: the model to train.
        """
        return nn.Module()

    @classmethod
    def idle(cls, settings: MethodSettings, points: Sequence[Point]) -> str:
        """Returns why turning a part off has no effect with these points; "" if it has one."""
        return ""

    @classmethod
    def effective(cls, settings: MethodSettings) -> MethodSettings:
        """Returns the settings, with every part turned off that this method does not use.

        The default of `isolation`, None, becomes the method's own choice.
        """
        settings = replace(settings, **{part: off for part, off in OFF.items() if part not in cls.parts})
        if settings.order == "none" or settings.isolation:
            settings = replace(settings, calibrate=False)
        if settings.isolation is None:
            settings = replace(settings, isolation=cls.isolated and settings.order != "importance")
        return settings
