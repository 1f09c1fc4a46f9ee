"""Evaluates a fitted slice on images that it was not fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.models.stages import normed
from scala_cli.slicing.ridge import Moments, Normal, in_double

Run = tuple[VisionTransformer, Sequence[Tensor], Sequence[Tensor]]
"""A model, its tokens after the last block and its outputs, one tensor per batch."""


@dataclass(frozen=True)
class Fit:
    """How well a slice is fitted.

    Each figure is R^2 = 1 - (squared errors) / (squared deviations from the mean), summed over all channels
    and tokens: 1 if the prediction equals the full model, 0 if it is no better than its mean; None without
    such images or tokens.

    Args:
        images: how many images the slice was fitted to.
        held_out: how many held-out images the figures are measured on.
        class_token: of the full model's final normed class token, predicted from the slice's by the best
            linear map.
        patches: of the patch tokens, by the same map.
        output: of the full model's output, predicted by the slice's output.
        embedding: of the first token of that output alone, in a model for features.
    """

    images: int
    held_out: int
    class_token: float | None
    patches: float | None
    output: float | None
    embedding: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the figures for rows and JSON; "r2" is that of the output."""
        figures = {"r2": self.output, "class_token": self.class_token, "patches": self.patches}
        if self.embedding is not None:
            figures["embedding"] = self.embedding
        rounded = {name: None if r2 is None else round(r2, 4) for name, r2 in figures.items()}
        return {**rounded, "images": self.images, "held_out": self.held_out}


def judge(full: Run, narrow: Run, held: Sequence[Tensor]) -> Fit:
    """Measures the fit on the held-out images.

    Args:
        held: (B,) which images are held out.
    """
    (wide, wanted, answers), (vit, own, given) = full, narrow
    seen = Moments()
    for a, b, out in zip(own, wanted, held, strict=True):
        seen.add(normed(vit, a[~out]), normed(wide, b[~out]))
    origins = (seen.mean_x, seen.mean_t)
    weight = Normal.of(seen, origins).solutions(torch.zeros_like(seen.products_tx), [1e-6])[0]
    guess = torch.cat(
        [in_double(normed(vit, a[out])) - seen.mean_x for a, out in zip(own, held, strict=True)]
    )
    guess = guess @ weight.mT + seen.mean_t
    truth = torch.cat([normed(wide, b[out]) for b, out in zip(wanted, held, strict=True)])
    output, answer = (
        torch.cat([a[out] for a, out in zip(side, held, strict=True)]) for side in (given, answers)
    )
    classes, prefix = int(wide.cls_token is not None), wide.num_prefix_tokens
    return Fit(
        images=sum(map(len, held)) - len(truth),
        held_out=len(truth),
        class_token=explained(guess[:, :classes], truth[:, :classes]),
        patches=explained(guess[:, prefix:], truth[:, prefix:]),
        output=explained(output, answer),
        embedding=explained(output[:, 0], answer[:, 0]) if answer.ndim == 3 else None,
    )


def explained(guess: Tensor, truth: Tensor) -> float | None:
    """Returns R^2 over (..., channels); None if `truth` is constant."""
    guess, truth = in_double(guess).flatten(0, -2), in_double(truth).flatten(0, -2)
    spread = (truth - truth.mean(0)).square().sum().item() if len(truth) else 0.0
    return 1 - (guess - truth).square().sum().item() / spread if spread else None
