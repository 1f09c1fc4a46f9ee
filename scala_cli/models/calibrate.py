"""One slice, fitted to the full model in closed form on a few hundred images without labels.

A slice keeps the first channels of a model in order (`order.py`), so its output differs from the full
model's, more with every block. This module fits its layers by ridge regression, first to last: from the
inputs of a layer in the slice so far to the full model's activations at the same place. So each layer
corrects the errors of those before it. A slice stands alone: nothing has to nest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.errors import DataError
from scala_cli.models.slimmable import Ratio, SlimmableViT
from scala_cli.models.stages import Stage, embed, hooked, normed, read_by, stages
from scala_cli.models.views import evaluating
from scala_cli.slicing.point import Point, find_point
from scala_cli.slicing.ridge import Moments, best_ridge, in_double, ridge
from scala_cli.slicing.rule import Rule, kept_end, slice_tensor
from scala_cli.slicing.table import axes_of
from scala_cli.watch import QUIET, Watcher

STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Strengths of the pull to the ordered weights, relative to the inputs' mean square; each layer picks one."""
BATCH = 64
"""Batch size if the images come as one tensor."""
HELD_OUT = 8
"""One image in this many is held out of the fit, to choose the strengths and to evaluate it."""


@dataclass(frozen=True)
class Streams:
    """Tokens at one place of both models, batch by batch.

    Args:
        wanted: of the full model, (B, N, C).
        own: of the slice, (B, N, C_r).
        held: (B,) which images are held out from the fit.
    """

    wanted: list[Tensor]
    own: list[Tensor]
    held: list[Tensor]

    def of_images(self, held_out: bool) -> list[tuple[Tensor, Tensor]]:
        """Returns the slice's and the full model's tokens of the held-out images, or of the others."""
        batches = zip(self.own, self.wanted, self.held, strict=True)
        return [(own[held == held_out], wanted[held == held_out]) for own, wanted, held in batches]


@dataclass(frozen=True)
class Fit:
    """How well the fitted slice does on images it was not fitted to.

    Each figure is R^2 = 1 - (squared errors) / (squared deviations from the mean), summed over all channels
    and tokens: 1 is the full model itself, 0 is its mean. None if there is no such image or token.

    Args:
        images: how many the slice was fitted to.
        held_out: how many it was judged on.
        class_token: of the full model's final normed class token, by the best linear map from the slice's.
        patches: likewise of the patch tokens.
        output: of the full model's output, predicted by the slice's output.
    """

    images: int
    held_out: int
    class_token: float | None
    patches: float | None
    output: float | None

    def told(self) -> dict[str, Any]:
        """Returns the figures for rows and JSON; "r2" is that of the output."""
        judged = {"r2": self.output, "class_token": self.class_token, "patches": self.patches}
        rounded = {name: None if r2 is None else round(r2, 4) for name, r2 in judged.items()}
        return {**rounded, "images": self.images, "held_out": self.held_out}


@dataclass(frozen=True)
class Pair:
    """The full model, and the slice that is being fitted to it."""

    full: VisionTransformer
    narrow: VisionTransformer
    rule: Rule
    point: Point

    def embed(self, batches: Iterable[Tensor]) -> Streams:
        """Returns both models' tokens before the first block, for images (B, C, H, W)."""
        device = next(self.full.parameters()).device
        streams, seen = Streams([], [], []), 0
        for images in batches:
            numbers = torch.arange(seen, seen + len(images), device=device)
            streams.held.append(numbers % HELD_OUT == HELD_OUT - 1)
            for vit, stream in ((self.full, streams.wanted), (self.narrow, streams.own)):
                stream.append(embed(vit, images.to(device)))
            seen += len(images)
        if not seen:
            raise DataError("there are no images to fit the slice to.", "Give some images.")
        return streams

    def keep(self, name: str, values: Tensor) -> Tensor:
        """Copies the channels that the slice keeps from (..., channels) of the full layer of this name."""
        axis = axes_of(f"{name}.weight", self.rule.table)[0]
        end = kept_end(self.point.ratio, self.rule.span, self.rule.isolated)
        kept = slice_tensor(values, [None] * (values.ndim - 1) + [axis], self.point.ratio, end).clone()
        queries_of(self.full, name, kept).mul_(math.sqrt(self.point.ratio))
        return kept


@torch.no_grad()
def calibrate(
    net: SlimmableViT,
    ratio: Ratio,
    batches: Tensor | Iterable[Tensor],
    strengths: Sequence[float] = STRENGTHS,
    every_token: bool = False,
    watch: Watcher = QUIET,
) -> tuple[VisionTransformer, Fit]:
    """Returns a plain timm model of one width, fitted to the full one, in evaluation mode.

    The output of the embedding (patches, class token, registers, positions) already equals the full model's.
    Every later linear layer and norm is fitted: the last of a branch to the full model's stream minus the
    slice's stream so far, all others to the full model's activations. A layer without a bias is fitted
    without one. Memory holds the two streams and the targets of half a block.

    Args:
        net: a family with its channels in order (`put_first_what_matters`).
        batches: images (N, C, H, W), normalised, as one tensor or in batches; read once. One in eight is
            held out of the fit.
        strengths: of the pull to the ordered weights, as a share of the inputs' mean square. Each layer takes
            the one that does best on the held-out images.
        every_token: whether the head is applied to every token, not only the pooled one, as for features.
        watch: is notified of every half block.

    Raises:
        PointError: where the model has no such width.
        DataError: where there is no image to fit to.
    """
    point = find_point(ratio, net.points)
    rule = replace(net.rule, attn_scale="fixed")
    state = rule.slice_state(net.vit.state_dict(), point.ratio, copy=True)
    narrow = net.spec.at(point.ratio).build_with(state)
    absorb_layer_scale(narrow)
    pair = Pair(net.vit, narrow, rule, point)
    with evaluating(net.vit):
        streams = pair.embed(batches.split(BATCH) if isinstance(batches, Tensor) else batches)
        todo = stages(pair.full, every_token)
        watch.phase("calibrate", len(todo), "stages")
        for stage in todo:
            before, streams = streams, fit_stage(pair, stage, streams, strengths)
            watch.step(1)
        return narrow, judge(pair, before, streams)


def absorb_layer_scale(vit: VisionTransformer) -> None:
    """Moves LayerScale, which may be close to zero, into the layers before it."""
    blocks: Any = vit.blocks
    for block in blocks:
        for scale, writer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            gamma = getattr(getattr(block, scale, None), "gamma", None)
            if gamma is not None:
                writer.weight.mul_(gamma[:, None])
                if writer.bias is not None:
                    writer.bias.mul_(gamma)
                gamma.fill_(1)


def fit_stage(pair: Pair, stage: Stage, streams: Streams, strengths: Sequence[float]) -> Streams:
    """Fits the slice's layers of a stage, in place. Returns the streams after the stage."""
    targets: dict[str, list[Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _, read, wrote: targets.setdefault(name, []).append(pair.keep(name, wrote))

    layers = stage.layers(pair.full)
    with hooked(layers[name].register_forward_hook(record(name)) for name in layers):
        wanted = [stage.run(pair.full, tokens) for tokens in streams.wanted]
    if stage.residual:
        writer = list(targets)[-1]
        steps = zip(wanted, streams.own, strict=True)
        targets[writer] = [pair.keep(writer, after) - tokens for after, tokens in steps]
    for name, values in targets.items():
        layer: Any = pair.narrow.get_submodule(name)
        read = (read_by(layer, stage, pair.narrow, tokens) for tokens in streams.own)
        fit_layer(layer, zip(read, values, streams.held, strict=True), strengths)
    return Streams(wanted, [stage.run(pair.narrow, tokens) for tokens in streams.own], streams.held)


def queries_of(vit: VisionTransformer, name: str, written: Tensor) -> Tensor:
    """Returns the part of a layer's kept output that scales the logits: timm divides by a smaller root."""
    if name.endswith(("attn.q_norm", "attn_pool.q")):
        return written
    if name.endswith("attn.qkv") and isinstance(vit.get_submodule(name[:-3] + "q_norm"), nn.Identity):
        return written[..., : written.shape[-1] // 3]
    return written[..., :0]


def fit_layer(
    layer: Any, batches: Iterable[tuple[Tensor, Tensor, Tensor]], strengths: Sequence[float]
) -> None:
    """Fits a linear layer, or the scale and shift of a norm, in place.

    Args:
        batches: its inputs, its targets, and which images are held out.
    """
    is_norm = layer.weight.ndim == 1
    seen, unseen = Moments(diagonal=is_norm), Moments(diagonal=is_norm)
    for read, target, held in batches:
        inputs = layer(read) if is_norm else read
        seen.add(inputs[~held], target[~held])
        unseen.add(inputs[held], target[held])
    start = torch.ones_like(layer.weight) if is_norm else layer.weight
    shift = getattr(layer, "bias", None)  # RMSNorm has none
    weight, bias = best_ridge(seen, unseen, start, strengths, shift is not None)
    if is_norm:  # fitted on the norm's output, so combined with its scale and shift
        bias = None if bias is None or shift is None else bias + weight * shift.to(weight)
        weight = weight * layer.weight.to(weight)
    layer.weight.copy_(weight)
    if shift is not None:
        shift.copy_(bias)


def judge(pair: Pair, last: Streams, output: Streams) -> Fit:
    """Measures the fit on the held-out images.

    Args:
        last: tokens after the last block.
        output: outputs of the head.
    """
    full, narrow, seen = pair.full, pair.narrow, Moments()
    for own, wanted in last.of_images(held_out=False):
        seen.add(normed(narrow, own), normed(full, wanted))
    weight = ridge(seen, torch.zeros_like(seen.products_tx), [1e-6], bias=True)[0][0]
    judged = last.of_images(held_out=True)
    guess = torch.cat([in_double(normed(narrow, own)) - seen.mean_x for own, _ in judged]) @ weight.mT
    guess += seen.mean_t
    truth = torch.cat([normed(full, wanted) for _, wanted in judged])
    own, wanted = (torch.cat(side) for side in zip(*output.of_images(held_out=True), strict=True))
    classes, prefix = int(full.cls_token is not None), full.num_prefix_tokens
    return Fit(
        images=sum(map(len, last.own)) - len(own),
        held_out=len(own),
        class_token=explained(guess[:, :classes], truth[:, :classes]),
        patches=explained(guess[:, prefix:], truth[:, prefix:]),
        output=explained(own, wanted),
    )


def explained(guess: Tensor, truth: Tensor) -> float | None:
    """Returns R^2 over (..., channels); None if `truth` is constant."""
    guess, truth = in_double(guess).flatten(0, -2), in_double(truth).flatten(0, -2)
    spread = (truth - truth.mean(0)).square().sum().item() if len(truth) else 0.0
    return 1 - (guess - truth).square().sum().item() / spread if spread else None
