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
from scala_cli.models.views import Stamp, fill, stamp, weights_of
from scala_cli.models.vit import Spec, drop_alike, imitate, rebuilt
from scala_cli.slicing.original import original_of
from scala_cli.slicing.own import own_of_widths, own_vectors
from scala_cli.slicing.point import Point, find_point, ratios_of
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.table import axes_of

Ratio = str | float | Fraction | Point


class SlimmableViT(nn.Module):
    """Every width of one ViT in one set of full-width weights.

    The forward at a width is timm's own forward, run on views of the kept channels; in training the last
    block may skip tokens that are not read (`vit.skip_unread`). Several threads may call it at once.

    Args:
        vit: the full-width timm model.
        spec: what `vit` is built from.
        rule: which channels each width keeps; its ratios are the widths this model answers at.
        extra: tensors that timm has no place for, as in `extra.safetensors` of a checkpoint: the vectors that
            single widths have of their own (`slicing/own.py`), and what leads back to the channels that the
            model had before these were put in order (`slicing/original.py`), which is not trained.

    Raises:
        PointError: where a width does not divide the model's channels.
        CheckpointError: where the slicing table does not know a parameter.
    """

    def __init__(
        self, vit: VisionTransformer, spec: Spec, rule: Rule, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.vit, self.spec, self.rule = vit, spec, rule
        own = own_of_widths(extra or {}, rule.ratios)
        self.own = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in own.items()})
        self.before = nn.Module()
        for name, tensor in original_of(extra or {}).items():
            self.before.register_buffer(name.replace(".", "/"), tensor.detach())
        self.points = tuple(map(Point, rule.ratios))
        """The members of the family, smallest first."""
        self._forget_skeletons()
        for name in weights_of(vit):
            axes_of(name, rule.table)
        for ratio in rule.ratios:
            spec.at(ratio)

    @property
    def extra(self) -> dict[str, Tensor]:
        """The tensors of `extra.safetensors`, by name."""
        return {**self.vectors, **self.original}

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
        return self.with_rule(replace(self.rule, ratios=ratios_of(points), bounds=bounds))

    def with_rule(self, rule: Rule) -> "SlimmableViT":
        """The same weights, cut by another rule."""
        return SlimmableViT(self.vit, self.spec, rule, self.extra)

    def copied(self) -> "SlimmableViT":
        """A copy with weights of its own, built for training (`vit.rebuilt`)."""
        extra = {name: tensor.detach().clone() for name, tensor in self.extra.items()}
        return SlimmableViT(rebuilt(self.vit, self.spec), self.spec, self.rule, extra)

    def forward(self, images: Tensor, ratio: Ratio | None = None) -> Tensor:
        """Logits at a width.

        Without gradients the views of a width are kept until the weights change, so switching to it
        again costs a fraction of a millisecond (docs/performance.md). Changes made to weights through `.data`
        are not noticed.

        Args:
            images: (B, C, H, W), normalised.
            ratio: one of `points`; left out, the widest.

        Returns:
            (B, num_classes)

        Raises:
            PointError: for a width that is not one of `points`.
        """
        return self.model_at(ratio)(images)

    def model_at(self, ratio: Ratio | None = None) -> VisionTransformer:
        """Returns the timm model that answers at a width, in the same mode as the full model.

        Arguments and errors are those of `forward`.
        """
        point = self.widest if ratio is None else find_point(ratio, self.points)
        return self.at(point.ratio)

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
        point = self.widest if ratio is None else find_point(ratio, self.points)
        return features(self, images, point.ratio, blocks, grid)

    def compile(self, **options: Any) -> None:
        """Compiles every width by itself, at its first forward."""
        self.vit.compile(**options)
        for ratio in self.rule.ratios:
            if ratio != 1:
                for graded in (True, False):
                    self._empty_skeleton(ratio, graded).compile(**options)

    @torch.no_grad()
    def slice(self, ratio: Ratio, fixed_size: bool = False) -> VisionTransformer:
        """A plain timm model of one width with its own copy of the weights, in evaluation mode.

        Args:
            fixed_size: return a model that takes only images of its own size, which exporters can trace, even
                if timm's takes any size.
        """
        ratio = find_point(ratio, self.points).ratio
        own = {name: tensor.detach() for name, tensor in own_vectors(self.extra, ratio).items()}
        state = self.rule.slice_state(self.vit.state_dict(), ratio, copy=True, own=own)
        spec = self.spec.at(ratio)
        return (spec.of_fixed_size() if fixed_size else spec).build_with(state)

    def at(self, ratio: Fraction) -> VisionTransformer:
        """Returns the model of a width, on views of the current weights, in the same mode as the full model.

        Threads with and without gradients never share a skeleton: views made without gradients are detached
        from the weights.
        """
        if ratio == 1:
            return self.vit
        graded, weights, extra = torch.is_grad_enabled(), weights_of(self.vit), self.extra
        with self._lock:
            skeleton = self._empty_skeleton(ratio, graded)
            now = None if graded else stamp([*weights.values(), *extra.values()])
            if now is None or self._stamps.get(ratio) != now:
                own = own_vectors(extra, ratio)
                fill(skeleton, self.rule.slice_state(weights, ratio, own=own))
                if now is not None:
                    self._stamps[ratio] = now
            imitate(skeleton, self.vit)
        return skeleton

    def _empty_skeleton(self, ratio: Fraction, graded: bool) -> VisionTransformer:
        if (ratio, graded) not in self._skeletons:
            skeleton = self.spec.at(ratio).build(slim=True)
            drop_alike(skeleton, self.vit)
            self._skeletons[ratio, graded] = skeleton
        return self._skeletons[ratio, graded]

    def _forget_skeletons(self) -> None:
        self._skeletons: dict[tuple[Fraction, bool], VisionTransformer] = {}
        self._stamps: dict[Fraction, Stamp | None] = {}
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the skeletons, whose tensors are views of the weights: a copy makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in CACHE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_skeletons()


CACHE = {"_skeletons", "_stamps", "_lock"}
