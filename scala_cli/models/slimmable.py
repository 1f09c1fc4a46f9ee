"""A slimmable ViT: an ordinary timm VisionTransformer plus a slicing rule."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from threading import RLock
from typing import Any, overload

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.models.dense import Features, features
from scala_cli.models.modes import copy_dropout, copy_modes, rebuilt
from scala_cli.models.resize import resized
from scala_cli.models.views import Stamp, fill, stamp, weights_of
from scala_cli.models.vit import Spec, embedding_at
from scala_cli.slicing.original import original_of
from scala_cli.slicing.own import at_size, own_of_widths, own_vectors, size_name
from scala_cli.slicing.point import Point, find_point, sized, widths_of
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.table import axes_of

Ratio = str | float | Fraction | Point


class SlimmableViT(nn.Module):
    """A family in one set of full-width weights: points of several widths, sizes and shares of tokens.

    The forward at a width is timm's own forward, run on views of the kept channels; in training the last
    block may skip tokens that the head does not read (`modes.skip_unread`). It is thread-safe. A point with a
    size resizes the images to it.

    Args:
        vit: the full-width timm model.
        spec: what `vit` is built from.
        rule: which channels each width keeps.
        extra: tensors that timm has no place for, as in `extra.st` of a checkpoint: the norms and
            biases that a width has of its own (`slicing/own.py`), the position embeddings of other sizes, and
            the untrained maps back to the original channels (`slicing/original.py`). A missing embedding is
            resampled.
        points: the members of the family; None means the widths of the rule.

    Raises:
        PointError: if a width does not divide the model's channels, a size is no multiple of the patch size,
            or the blocks cannot reduce tokens to a share.
        CheckpointError: if the slicing table has no row for a parameter.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        spec: Spec,
        rule: Rule,
        extra: Mapping[str, Tensor] | None = None,
        points: Sequence[Point] | None = None,
    ) -> None:
        super().__init__()
        extra = extra or {}
        self.vit, self.spec, self.rule = vit, spec, rule
        self.points = sized(map(Point, rule.ratios) if points is None else points, spec.size)
        """The members of the family, smallest first."""
        for name in weights_of(vit):
            axes_of(name, rule.table)
        for point in (*self.points, *map(Point, rule.ratios)):
            self.spec_at(point)
        own = own_of_widths(extra, rule.ratios)
        self.own = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in own.items()})
        self.positions = nn.ParameterDict(self.embeddings(extra))
        self.before = nn.Module()
        for name, tensor in original_of(extra).items():
            self.before.register_buffer(name.replace(".", "/"), tensor.detach())
        self._forget_skeletons()

    def embeddings(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the position embeddings for all sizes but the family's own: from `extra`, or resampled."""
        full: Any = self.vit
        others = {point.size: self.spec.at_point(Point(Fraction(1), point.size)) for point in self.points}
        wanted = {
            size_name(size): spec
            for size, spec in others.items()
            if size not in (None, self.spec.size) and full.pos_embed is not None
        }
        return {
            name: extra[name] if name in extra else embedding_at(full, spec) for name, spec in wanted.items()
        }

    def spec_at(self, point: Point) -> Spec:
        """Returns the Spec of the model of a point. Raises PointError if the model cannot have this point."""
        spec, full = self.spec.at_point(point), self.vit
        if point.keep < 1:
            depth, prefix = len(full.blocks), full.num_prefix_tokens
            spec.tokens.counts(spec.patches, prefix, depth, point.keep)
        return spec

    def find(self, wanted: Ratio | None = None) -> Point:
        """Returns one of `points`; None means the widest. A point without a size has the family's own.

        Raises PointError if it is not one of `points`.
        """
        return self.widest if wanted is None else find_point(wanted, self.points, self.spec.size)

    @property
    def extra(self) -> dict[str, Tensor]:
        """The tensors of `extra.st`, by name."""
        return {**self.vectors, **dict(self.positions.items()), **self.original}

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The norms and biases that a width has of its own, by their names in `extra`."""
        return {name.replace("/", "."): tensor for name, tensor in self.own.items()}

    @property
    def original(self) -> dict[str, Tensor]:
        """The maps back to the original channels, by name; empty if the channels were never reordered."""
        return {name.replace("/", "."): tensor for name, tensor in self.before.named_buffers()}

    @property
    def widest(self) -> Point:
        return self.points[-1]

    def with_points(self, points: Sequence[Point]) -> "SlimmableViT":
        """Returns the family with other points; each width still keeps the end that it was trained at."""
        bounds = self.rule.span if self.rule.isolated else None
        return self.like(rule=replace(self.rule, ratios=widths_of(points), bounds=bounds), points=points)

    def like(self, **others: Any) -> "SlimmableViT":
        """Returns the family with some arguments of the constructor replaced."""
        return SlimmableViT(**{**self.parts(), **others})

    def parts(self) -> dict[str, Any]:
        """Returns the constructor's arguments for this family."""
        names = {"vit": self.vit, "spec": self.spec, "rule": self.rule}
        return {**names, "extra": self.extra, "points": self.points}

    def copied(self) -> "SlimmableViT":
        """Returns a copy with its own weights, built for training (`modes.rebuilt`)."""
        extra = {name: tensor.detach().clone() for name, tensor in self.extra.items()}
        return self.like(vit=rebuilt(self.vit, self.spec), extra=extra)

    def forward(self, images: Tensor, ratio: Ratio | None = None) -> Tensor:
        """Returns the logits at a point, (B, num_classes).

        Without gradients the views of a width are cached until the weights change, so switching to it again
        costs a fraction of a millisecond (docs/performance.md). The cache does not notice changes made
        through `.data`.

        Args:
            images: (B, C, H, W), normalised.
            ratio: one of `points`, such as "0.5" or "0.5@160~0.7"; by default the widest.

        Raises:
            PointError: for a point that is not one of `points`.
        """
        point = self.find(ratio)
        return self.at(point)(self.fitting(images, point))

    def fitting(self, images: Tensor, point: Point) -> Tensor:
        """Returns images (B, C, H, W) at the size of a point; unchanged if it has none."""
        return images if point.size is None else resized(images, point.size, self.spec.resize)

    @overload
    def features(
        self, images: Tensor, ratio: Ratio | None = None, blocks: None = None, grid: bool = False
    ) -> Features: ...

    @overload
    def features(
        self, images: Tensor, ratio: Ratio | None = None, *, blocks: int | Sequence[int], grid: bool = False
    ) -> list[Features]: ...

    def features(
        self,
        images: Tensor,
        ratio: Ratio | None = None,
        blocks: int | Sequence[int] | None = None,
        grid: bool = False,
    ) -> Features | list[Features]:
        """Returns features of every token at a point, in the full model's C channels at every width.

        Without `blocks` they are the final normed tokens, in a model for features passed through its head.
        Those after a block are mapped back to the original channels, before these were put in order: at full
        width they equal the original model's up to their mean over channels, which no norm sees; at a
        narrower width they lie in the subspace that the width keeps.

        Args:
            images: (B, C, H, W), normalised.
            ratio: one of `points`; by default the widest.
            blocks: block numbers from 0, negative ones from the end; or how many of the last blocks.
            grid: return the patch tokens as a map (B, C, h, w) instead of (B, N, C).

        Returns:
            `Features`; with `blocks`, a list with one for each block.

        Raises:
            PointError: for a point that is not one of `points`, or a block that the model does not have.
        """
        point = self.find(ratio)
        return features(self, self.fitting(images, point), point, blocks, grid)

    def compile(self, **options: Any) -> None:
        """Compiles every point separately, at its first forward."""
        self.vit.compile(**options)
        for point in self.points:
            if not self.is_whole(point):
                for graded in (True, False):
                    self._empty_skeleton(point, graded).compile(**options)

    def is_whole(self, point: Point) -> bool:
        """Whether a point is the full model itself."""
        return point in (Point(Fraction(1)), Point(Fraction(1), self.spec.size))

    @torch.no_grad()
    def slice(self, ratio: Ratio, fixed_size: bool = False) -> VisionTransformer:
        """Returns a timm model of one point with its own copy of the weights, in evaluation mode.

        Args:
            fixed_size: make it take images of one size only, so that exporters can trace it.
        """
        point = self.find(ratio)
        spec, state = self.spec_at(point), self.cut(point, self.vit.state_dict(), copy=True)
        return (spec.of_fixed_size() if fixed_size else spec).build_with(state)

    def cut(self, point: Point, weights: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
        """Returns the tensors of a point, cut from the full model's `weights` (`Rule.slice_state`)."""
        extra = self.extra
        own = own_vectors(extra, point.ratio)
        return self.rule.slice_state(at_size(weights, extra, point.size), point.ratio, copy=copy, own=own)

    def at(self, point: Point | Fraction) -> VisionTransformer:
        """Returns the model of a point or a width, on views of the current weights.

        It is in the full model's modes and takes images of the point's size. Calls with and without gradients
        never share a skeleton, as views made without gradients are detached from the weights.
        """
        point = Point.of(point)
        if self.is_whole(point):
            return self.vit
        graded, weights = torch.is_grad_enabled(), self.weights(point.ratio)
        with self._lock:
            skeleton = self._empty_skeleton(point, graded)
            now = None if graded else stamp([*weights.values(), *self.extra.values()])
            if now is None or self._stamps.get(point) != now:
                fill(skeleton, self.views(point, weights, now))
                if now is not None:
                    self._stamps[point] = now
            copy_modes(skeleton, self.vit)
        return skeleton

    def weights(self, ratio: Fraction) -> dict[str, Tensor]:
        """Returns the tensors that a width is cut from."""
        return weights_of(self.vit)

    def views(self, point: Point, weights: Mapping[str, Tensor], now: Stamp | None) -> dict[str, Tensor]:
        """Returns the tensors of a point; without gradients all points of a width share one cached cut.

        Args:
            now: the stamp of the current weights; None with gradients, and then nothing is cached.
        """
        own_size = replace(point, size=None, keep=Fraction(1))
        held, state = self._cuts.get(point.ratio, (None, {}))
        if now is None or held != now:
            state = self.cut(own_size, weights)
            if now is not None and len(self.points) > len(self.rule.ratios):
                self._cuts[point.ratio] = now, state
        embedding = at_size({}, self.extra, point.size)
        return {**state, **self.rule.slice_state(embedding, point.ratio)}

    def _empty_skeleton(self, point: Point, graded: bool) -> VisionTransformer:
        if (point, graded) not in self._skeletons:
            skeleton = self.spec_at(point).build(slim=True)
            copy_dropout(skeleton, self.vit)
            self._skeletons[point, graded] = skeleton
        return self._skeletons[point, graded]

    def _forget_skeletons(self) -> None:
        self._skeletons: dict[tuple[Point, bool], VisionTransformer] = {}
        self._stamps: dict[Point, Stamp] = {}
        self._cuts: dict[Fraction, tuple[Stamp, dict[str, Tensor]]] = {}
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the skeletons, whose tensors are views of the weights; a copy makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in CACHE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_skeletons()


CACHE = {"_skeletons", "_stamps", "_cuts", "_lock"}
