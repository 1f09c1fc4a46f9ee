"""A family whose widths were fitted to the full model one by one, so that each has weights of its own."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.models.calibrate import calibrate
from scala_cli.models.fit import Fit
from scala_cli.models.slimmable import Ratio, SlimmableViT
from scala_cli.slicing.point import Point, find_point
from scala_cli.slicing.rule import Rule
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
        super().__init__(net.vit, net.spec, net.rule, net.extra)
        self.fits = fits
        self.widths = list(slices)
        for number, vit in enumerate(slices.values()):
            self.add_module(f"slice_{number}", vit)

    def with_rule(self, rule: Rule) -> "FittedViT":
        """Returns the same weights with another rule, and the fitted slices of its widths."""
        kept = [width for width in self.widths if width in rule.ratios]
        slices = {width: vit for width in kept if (vit := self.fitted(width)) is not None}
        return FittedViT(super().with_rule(rule), slices, self.fits)

    def fitted(self, ratio: Ratio) -> VisionTransformer | None:
        """Returns the fitted slice of one of `points`, or None. Raises PointError for any other point."""
        width = find_point(ratio, self.points).ratio
        return self.get_submodule(f"slice_{self.widths.index(width)}") if width in self.widths else None  # type: ignore

    def at(self, ratio: Fraction) -> VisionTransformer:
        """As `SlimmableViT.at`; a fitted width is its slice, with weights of its own."""
        return (self.fitted(ratio) if ratio in self.widths else None) or super().at(ratio)

    def slice(self, ratio: Ratio, fixed_size: bool = False) -> VisionTransformer:
        """As `SlimmableViT.slice`."""
        vit, spec = self.fitted(ratio), self.spec.at(find_point(ratio, self.points).ratio)
        if vit is None:
            return super().slice(ratio, fixed_size)
        state = {name: tensor.detach().clone() for name, tensor in vit.state_dict().items()}
        return (spec.of_fixed_size() if fixed_size else spec).build_with(state)


def fit_widths(
    net: SlimmableViT, points: Iterable[Point], images: Iterable[Tensor], watch: Watcher = QUIET, **how: Any
) -> FittedViT:
    """Fits the slice of each point separately; the full width stays as it is.

    Args:
        net: a family with its channels in order.
        images: batches (B, C, H, W), normalised; read once per width.
        how: other arguments of `calibrate`.

    Raises as `calibrate`.
    """
    slices, fits = {}, {}
    for point in points:
        if point.ratio < 1:
            slices[point.ratio], fits[point.ratio] = calibrate(net, point, images, watch=watch, **how)
    return FittedViT(net, slices, fits)
