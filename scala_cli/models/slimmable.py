"""A slimmable ViT: an ordinary timm VisionTransformer plus a slicing rule."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.models.vit import LastBlock, Spec, attend_alike, drop_alike, skip_unread
from scala_cli.slicing.point import Point, find_point
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.table import axes_of

Ratio = str | float | Fraction | Point


class SlimmableViT(nn.Module):
    """Every width of one ViT in one set of full-width weights.

    The forward at a width is timm's own forward, run on views of the kept channels; in training the last
    block may be spared what is not read (`vit.skip_unread`).

    Args:
        vit: the full-width timm model.
        spec: what `vit` is built from.
        rule: which channels each width keeps; its points are the widths this model answers at.

    Raises:
        PointError: where a width does not divide the model's channels.
        CheckpointError: where the slicing table does not know a parameter.
    """

    def __init__(self, vit: VisionTransformer, spec: Spec, rule: Rule) -> None:
        super().__init__()
        self.vit, self.spec, self.rule = vit, spec, rule
        self._skeletons: dict[Point, VisionTransformer] = {}
        self._filled: dict[Point, Stamp | None] = {}
        for name, _ in vit.named_parameters():
            axes_of(name, rule.table)
        for point in rule.points:
            spec.at(point)

    @property
    def points(self) -> tuple[Point, ...]:
        """The widths, narrowest first."""
        return self.rule.points

    @property
    def widest(self) -> Point:
        return self.points[-1]

    def with_points(self, points: Sequence[Point]) -> "SlimmableViT":
        """The same weights, answering at other widths, each cut from the end it was trained at."""
        bounds = self.rule.span if self.rule.isolated else None
        rule = replace(self.rule, points=tuple(sorted(points)), bounds=bounds)
        return SlimmableViT(self.vit, self.spec, rule)

    def forward(self, images: Tensor, ratio: Ratio | None = None) -> Tensor:
        """Logits at a width.

        Without gradients the views of a width are kept until the weights change, so that switching to it
        again costs a fraction of a millisecond (docs/performance.md). What changes weights through `.data`
        is not noticed.

        Args:
            images: (B, C, H, W), normalised.
            ratio: one of `points`; left out, the widest.

        Returns:
            (B, num_classes)

        Raises:
            PointError: for a width that is not one of `points`.
        """
        point = self.widest if ratio is None else find_point(ratio, self.points)
        if point.ratio == 1:
            return self.vit(images)
        skeleton, weights = self._skeleton(point), dict(self.vit.named_parameters())
        now = None if torch.is_grad_enabled() else stamp(weights.values())
        if now is None or self._filled.get(point) != now:
            fill(skeleton, self.rule.slice_state(weights, point))
            self._filled[point] = now
        return skeleton(images)

    def compile(self, **options: Any) -> None:
        """Compiles every width by itself, at its first forward."""
        self.vit.compile(**options)
        for point in self.points:
            if point.ratio != 1:
                self._skeleton(point).compile(**options)

    @torch.no_grad()
    def slice(self, ratio: Ratio, fixed_size: bool = False) -> VisionTransformer:
        """A plain timm model of one width with its own copy of the weights, in evaluation mode.

        Args:
            fixed_size: where timm's model takes images of any size, one that takes those of its own size
                only: what exporters can trace.
        """
        point = find_point(ratio, self.points)
        state, spec = self.rule.slice_state(self.vit.state_dict(), point, copy=True), self.spec.at(point)
        return (spec.of_fixed_size() if fixed_size else spec).build_with(state)

    def _skeleton(self, point: Point) -> VisionTransformer:
        if point not in self._skeletons:
            self._skeletons[point] = self.spec.at(point).build()
            drop_alike(self._skeletons[point], self.vit)
        skeleton = self._skeletons[point]
        attend_alike(skeleton, self.vit)
        if skeleton.training != self.training:
            skeleton.train(self.training)
        skeleton.set_grad_checkpointing(self.vit.grad_checkpointing)
        if isinstance(self.vit.blocks[-1], LastBlock):
            skip_unread(skeleton)
        return skeleton

    def __getstate__(self) -> dict[str, Any]:
        """Without the skeletons, whose tensors are views of the weights: a copy makes its own."""
        return {**self.__dict__, "_skeletons": {}, "_filled": {}}


Stamp = tuple[tuple[int, int], ...]


def stamp(tensors: Iterable[Tensor]) -> Stamp | None:
    """What changes whenever one of these tensors does: where it lies, and how often it was written to.

    None where nobody counts that: of tensors that were made in inference mode.
    """
    try:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    except RuntimeError:
        return None


def fill(skeleton: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a model these tensors in place of its parameters, by name.

    They stay until the next, because a backward pass may run a block again (gradient checkpointing).
    """
    for name, tensor in state.items():
        layer, _, parameter = name.rpartition(".")
        module = skeleton.get_submodule(layer)
        delattr(module, parameter)
        setattr(module, parameter, tensor)
