"""Self-slimmed Vision Transformer (SiT, arXiv 2111.12624) with feature recalibration distillation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scala_cli.errors import PointError, TrainingError
from scala_cli.methods.base import Batch, BlockOutput, Method, Pass, Student, Teacher
from scala_cli.models.modes import copy_dropout
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.slimmed import start_slimming
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point
from scala_cli.slicing.slim import default_stages, parse_stages, slim_counts, tokens_of_blocks
from scala_cli.tasks.base import Task
from scala_cli.tasks.losses import cross_entropy, mean_square

RATIO = 4
"""Hidden width of a reverse module's MLPs, relative to their output."""


class Reverse(nn.Module):
    """Maps slimmed tokens back to one token for every patch, to compare them (section 3.2).

    Args:
        dim: channels.
        given: number of input tokens.
        tokens: number of patches in the image.
    """

    def __init__(self, dim: int, given: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens, self.channels = mlp(given, tokens), mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, given, C) to (B, tokens, C)."""
        x = self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


def mlp(given: int, wanted: int) -> nn.Sequential:
    """Returns two linear layers with a GELU between, as in SiT's reverse module."""
    return nn.Sequential(nn.Linear(given, RATIO * wanted), nn.GELU(), nn.Linear(RATIO * wanted, wanted))


class SiT(Method):
    """Trains the full width with token slimming modules; the same model without them teaches every block.

    The loss is that of the task, plus `logit_weight` times the distance from the teacher's output, plus
    `token_weight` times the mean squared error of the patch tokens, mean over blocks (eq. 9). Slimmed tokens
    pass through a reverse module first. With a `teacher_model` the distillation head learns its hard labels.
    """

    parts = frozenset({"teacher"})
    own = frozenset({"stages", "slim_keep", "slim_start", "logit_weight", "token_weight", "teacher_model"})
    ratios: ClassVar[str] = "1"
    one_point = True
    adds_modules = True
    reads_blocks = True
    module_rate = 5.0

    def __init__(self, points: Sequence[Point], settings: MethodSettings, task: Task) -> None:
        super().__init__(points, settings, task)
        self.reverse = nn.ModuleDict()
        """Number of each block whose tokens are slimmed -> its reverse module."""
        if [point.label for point in points] != ["1"]:
            raise PointError(
                "method sit slims the tokens of the full width alone.",
                "To slim those of a narrower one, cut it first and start from the slice.",
                remedy="example",
                setting="ratios",
                value=1,
            )

    def prepared(self, start: SlimmableViT, seed: int) -> SlimmableViT:
        """Returns the model with token slimming modules.

        Raises:
            TrainingError: if it has some already, or has no distillation head for a second teacher.
            PointError: if the stages do not add up to all of its blocks, or leave no token.
        """
        if start.spec.tsm:
            raise TrainingError(
                "the tokens of this model are slimmed already: there is no unslimmed model to teach it.",
                "Give the model that it came from.",
            )
        if self.settings.teacher_model and not hasattr(start.vit, "head_dist"):
            raise TrainingError(
                "the model has no distillation head, so there is nothing for a second teacher to teach.",
                remedy="distilled",
            )
        depth = len(start.vit.blocks)
        stages = parse_stages(self.settings.stages) if self.settings.stages else default_stages(depth)
        keep = Point.of(f"1~{self.settings.slim_keep}").keep
        counts = slim_counts(stages, keep, start.spec.patches, depth)
        return with_modules(start, counts, self.settings.slim_start, seed)

    def modules(self, net: SlimmableViT) -> nn.Module:
        """Returns a reverse module for each block whose tokens are slimmed, by the block's number."""
        spec = net.spec
        for number, tokens in enumerate(tokens_of_blocks(spec.tsm, spec.patches, len(net.vit.blocks))):
            if tokens < spec.patches:
                self.reverse[str(number)] = Reverse(spec.embed_dim, tokens, spec.patches)
        return self.reverse

    def draw(self, random: Random) -> list[Point]:
        return [*self.points]

    def passes(
        self, batch: Batch, student: Student, teacher: Teacher | None, drawn: Sequence[Point]
    ) -> Iterator[Pass]:
        (point,), settings = drawn, self.settings
        found: Any = student(batch.images, point)
        lesson: Any = teacher(batch.images) if teacher else None
        loss = found.answer.new_zeros(())
        if self.task.labelled:
            loss = loss + self.task.loss(found.answer, batch.targets, None, settings)
        if lesson and settings.logit_weight:
            loss = loss + settings.logit_weight * self.task.loss(found.answer, None, lesson.answer, settings)
        if lesson and settings.token_weight:
            loss = loss + settings.token_weight * recalibrated_error(found, lesson, self.reverse)
        if batch.hints is not None:
            loss = loss + cross_entropy(found.distilled, batch.hints)
        yield Pass(point, loss)


@torch.no_grad()
def with_modules(net: SlimmableViT, counts: Mapping[int, int], start: str, seed: int) -> SlimmableViT:
    """Returns a copy of a model with newly initialised token slimming modules.

    Args:
        counts: block number -> how many patch tokens it passes on.
        start, seed: as in `start_slimming`.
    """
    spec = replace(net.spec, tsm=dict(counts))
    weights = {name: tensor.clone() for name, tensor in net.vit.state_dict().items()}
    wanted = spec.build().state_dict()
    fresh = {name: torch.zeros(t.shape) for name, t in wanted.items() if name not in weights}
    vit = spec.build_with({**weights, **fresh})
    copy_dropout(vit, net.vit)
    start_slimming(vit, start, seed)
    return SlimmableViT(vit, spec, net.rule, net.extra)


def recalibrated_error(found: BlockOutput, lesson: BlockOutput, reverse: nn.ModuleDict) -> Tensor:
    """Returns the mean squared error of the patch tokens, mean over blocks.

    Args:
        reverse: the reverse module of each block whose tokens are slimmed, by the block's number.
    """
    errors = []
    for number, (tokens, wanted) in enumerate(zip(found.tokens, lesson.tokens, strict=True)):
        again = reverse[str(number)](tokens) if str(number) in reverse else tokens
        errors.append(mean_square(again, wanted))
    return sum(errors[1:], errors[0]) / len(errors)
