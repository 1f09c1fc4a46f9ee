"""A family whose widths are fitted to the full model separately, so that each has weights of its own."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.models.calibrate import calibrate
from scala_cli.models.fit import Fit
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.views import weights_of
from scala_cli.slicing.own import at_size
from scala_cli.slicing.point import Point
from scala_cli.watch import QUIET, Watcher


class FittedViT(SlimmableViT):
    """Runs the fitted slice at each width that has one, and the original family at all others.

    Args:
        net: the family.
        slices: a plain timm model for each fitted width.
        fits: how well each slice fits.
    """

    def __init__(
        self, net: SlimmableViT, slices: Mapping[Fraction, VisionTransformer], fits: Mapping[Fraction, Fit]
    ) -> None:
        super().__init__(**net.parts())
        self.fits = fits
        self.widths = list(slices)
        for number, vit in enumerate(slices.values()):
            self.add_module(f"slice_{number}", vit)

    def like(self, **others: Any) -> "FittedViT":
        """Returns the family with some parts replaced, keeping the fitted slices of its widths."""
        net = super().like(**others)
        slices = {width: self.fitted(width) for width in self.widths if width in net.rule.ratios}
        return FittedViT(net, slices, self.fits)

    def fitted(self, ratio: Fraction) -> VisionTransformer:
        """Returns the fitted slice of a width in `widths`."""
        return self.get_submodule(f"slice_{self.widths.index(ratio)}")  # type: ignore

    def weights(self, ratio: Fraction) -> dict[str, Tensor]:
        """Returns the tensors that a width is cut from: for a fitted width those of its slice."""
        return weights_of(self.fitted(ratio)) if ratio in self.widths else super().weights(ratio)

    def cut(self, point: Point, weights: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
        """Returns the tensors of a point; those of a fitted width come from its slice, already cut."""
        if point.ratio not in self.widths:
            return super().cut(point, weights, copy)
        embedding = self.rule.slice_state(at_size({}, self.extra, point.size), point.ratio)
        state = {name: tensor.detach() for name, tensor in self.weights(point.ratio).items()} | embedding
        return {name: tensor.clone() for name, tensor in state.items()} if copy else state


def fit_widths(
    net: SlimmableViT, points: Iterable[Point], images: Iterable[Tensor], watch: Watcher = QUIET, **how: Any
) -> FittedViT:
    """Fits a slice of each width separately, at the largest of its points; the full width stays as it is.

    Args:
        net: a family with its channels in order.
        images: batches (B, C, H, W), normalised; read once per width.
        how: other arguments of `calibrate`.

    Raises as `calibrate`.
    """
    slices, fits = {}, {}
    largest = {point.ratio: point for point in sorted(points) if point.ratio < 1}
    for ratio, point in largest.items():
        slices[ratio], fits[ratio] = calibrate(net, point, images, watch=watch, **how)
    return FittedViT(net, slices, fits)
