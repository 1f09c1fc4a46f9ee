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
    """Every point of a family, widths, sizes and shares of tokens, in one set of full-width weights.

    The forward at a width is timm's own forward, run on views of the kept channels; in training the last
    block may skip tokens that are not read (`modes.skip_unread`). Several threads may call it. A point
    with a size resizes the images to it.

    Args:
        vit: the full-width timm model.
        spec: what `vit` is built from.
        rule: which channels each width keeps; its ratios are the widths this model answers at.
        extra: tensors that timm has no place for, as in `extra.safetensors` of a checkpoint: the vectors that
            single widths have of their own (`slicing/own.py`), the position embeddings of other sizes, and
            what leads back to the channels that the model had before these were put in order
            (`slicing/original.py`), which is not trained. An embedding that is missing is resampled.
        points: what it answers at; None is the widths of the rule.

    Raises:
        PointError: where a width does not divide the model's channels, a size is no multiple of the patch,
            or a share of tokens cannot be passed on.
        CheckpointError: where the slicing table does not know a parameter.
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
        """Returns the position embedding of every size but the family's own: from `extra`, or resampled."""
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
        """Returns what the model of a point is built from. Raises PointError where there can be none."""
        spec, full = self.spec.at_point(point), self.vit
        if point.keep < 1:
            depth, prefix = len(full.blocks), full.num_prefix_tokens
            spec.tokens.counts(spec.patches, prefix, depth, point.keep)
        return spec

    def find(self, wanted: Ratio | None = None) -> Point:
        """Returns the point that is meant; None the widest. Without a size it is the family's own.

        Raises PointError for one that is not one of `points`.
        """
        return self.widest if wanted is None else find_point(wanted, self.points, self.spec.size)

    @property
    def extra(self) -> dict[str, Tensor]:
        """The tensors of `extra.safetensors`, by name."""
        return {**self.vectors, **dict(self.positions.items()), **self.original}

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The vectors that single widths have of their own, by their names in `extra`."""
        return {name.replace("/", "."): tensor for name, tensor in self.own.items()}

    @property
    def original(self) -> dict[str, Tensor]:
        """What leads back to the channels before they were put in order, by name; empty if they were not."""
        return {name.replace("/", "."): tensor for name, tensor in self.before.named_buffers()}

    @property
    def widest(self) -> Point:
        return self.points[-1]

    def with_points(self, points: Sequence[Point]) -> "SlimmableViT":
        """Returns the same weights with other points, each cut from the end it was trained at."""
        bounds = self.rule.span if self.rule.isolated else None
        return self.like(rule=replace(self.rule, ratios=widths_of(points), bounds=bounds), points=points)

    def like(self, **others: Any) -> "SlimmableViT":
        """Returns the same family with some of its parts replaced: the arguments of the constructor."""
        return SlimmableViT(**{**self.parts(), **others})

    def parts(self) -> dict[str, Any]:
        """Returns the arguments of the constructor that make this family."""
        names = {"vit": self.vit, "spec": self.spec, "rule": self.rule}
        return {**names, "extra": self.extra, "points": self.points}

    def copied(self) -> "SlimmableViT":
        """A copy with weights of its own, built for training (`modes.rebuilt`)."""
        extra = {name: tensor.detach().clone() for name, tensor in self.extra.items()}
        return self.like(vit=rebuilt(self.vit, self.spec), extra=extra)

    def forward(self, images: Tensor, ratio: Ratio | None = None) -> Tensor:
        """Logits at a point.

        Without gradients the views of a width are kept until the weights change, so switching to it
        again costs a fraction of a millisecond (docs/performance.md). Changes made to weights through `.data`
        are not noticed.

        Args:
            images: (B, C, H, W), normalised.
            ratio: one of `points`, such as "0.5" or "0.5@160~0.7"; left out, the widest.

        Returns:
            (B, num_classes)

        Raises:
            PointError: for a point that is not one of `points`.
        """
        point = self.find(ratio)
        return self.at(point)(self.fitting(images, point))

    def fitting(self, images: Tensor, point: Point) -> Tensor:
        """Returns images (B, C, H, W) at the size of a point; as they are if it has none."""
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
        """Returns features of every token at a width, C of them, in the full model's space at every width.

        Without `blocks` they are the final normed tokens, in a model for features as its head reads them.
        Those after a block are mapped back into the channels that the model had before these were put in
        order: at full width they are those of the original model, up to their mean over channels, which no
        norm notices; at a narrower width they lie in the part of that space that the width keeps.

        Args:
            images: (B, C, H, W), normalised.
            ratio: one of `points`; left out, the widest.
            blocks: numbers of blocks, from 0, or from the end where negative; or how many of the last.
            grid: return the patch tokens as a map (B, C, h, w) instead of (B, N, C).

        Returns:
            `Features`, or a list of them with one for each block.

        Raises:
            PointError: for a width that is not one of `points`, and a block that the model does not have.
        """
        point = self.find(ratio)
        return features(self, self.fitting(images, point), point, blocks, grid)

    def compile(self, **options: Any) -> None:
        """Compiles every point by itself, at its first forward."""
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
        """A timm model of one point with its own copy of the weights, in evaluation mode.

        Args:
            fixed_size: return a model that takes only images of its own size, which exporters can trace, even
                if timm's takes any size.
        """
        point = self.find(ratio)
        spec, state = self.spec_at(point), self.cut(point, self.vit.state_dict(), copy=True)
        return (spec.of_fixed_size() if fixed_size else spec).build_with(state)

    def cut(self, point: Point, weights: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
        """Returns the tensors of a point, cut from those of the full model (`Rule.slice_state`)."""
        extra = self.extra
        own = own_vectors(extra, point.ratio)
        return self.rule.slice_state(at_size(weights, extra, point.size), point.ratio, copy=copy, own=own)

    def at(self, point: Point | Fraction) -> VisionTransformer:
        """Returns the model of a point, or of a width, on views of the current weights.

        It is in the same mode as the full model and takes images of the point's size. Threads with and
        without gradients never share a skeleton: views made without gradients are detached from the weights.
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
        """Returns the tensors of a point; without gradients all points of a width share what is cut."""
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
        """Without the skeletons, whose tensors are views of the weights: a copy makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in CACHE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_skeletons()


CACHE = {"_skeletons", "_stamps", "_cuts", "_lock"}
