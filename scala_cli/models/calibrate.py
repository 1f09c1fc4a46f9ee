"""Fits all widths of a family to the full model in closed form, on a few hundred images without labels.

A slice keeps the first channels of a model in order (`order.py`), so its output differs from the full
model's, more with every block. This module fits its layers by ridge regression, first to last: it regresses
the full model's activations on the layer's inputs in the slice fitted so far. So each layer corrects the
errors of those before it. If several widths share a layer, their normal equations are added up; each width
has norms and biases of its own. A single slice is a family of one width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.errors import DataError
from scala_cli.models.fit import Fit, judge
from scala_cli.models.slimmable import Ratio, SlimmableViT
from scala_cli.models.stages import Stage, embed, hooked, read_by, stages
from scala_cli.models.views import evaluating
from scala_cli.slicing.own import own_name, own_vectors
from scala_cli.slicing.point import Point
from scala_cli.slicing.ridge import Moments, Normal, Part, best_solution, fit_shared
from scala_cli.slicing.rule import kept_channels
from scala_cli.watch import QUIET, Watcher

STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Ridge strengths, relative to the inputs' mean square; each layer picks one. The penalty is on the distance
to the ordered weights."""
BATCH = 64
"""Batch size if the images come as one tensor."""
HELD_OUT = 8
"""One image in this many is held out of the fit, to choose the strengths and to evaluate it."""
FULL_WEIGHT = 8.0
"""Weight of the full width in the fit of a family; each other width has weight 1."""


@dataclass(frozen=True)
class Streams:
    """Tokens between two stages, one tensor per batch.

    Args:
        wanted: the full model's, (B, N, C).
        own: each width's, (B, N, C_r).
        held: (B,) which images are held out from the fit.
    """

    wanted: list[Tensor]
    own: dict[Fraction, list[Tensor]]
    held: list[Tensor]


@torch.no_grad()
def calibrate(
    net: SlimmableViT, ratio: Ratio, batches: Tensor | Iterable[Tensor], **how: Any
) -> tuple[VisionTransformer, Fit]:
    """Returns a plain timm model of one width, fitted to the full model, in evaluation mode.

    Arguments and errors are those of `calibrate_family`.
    """
    point = net.find(ratio)
    family, fits = calibrate_family(net.with_points([point]), batches, **how)
    return family.slice(point), fits[Point(point.ratio)]


@torch.no_grad()
def calibrate_family(
    net: SlimmableViT,
    batches: Tensor | Iterable[Tensor],
    *,
    full_weight: float = FULL_WEIGHT,
    strengths: Sequence[float] = STRENGTHS,
    every_token: bool = False,
    watch: Watcher = QUIET,
) -> tuple[SlimmableViT, dict[Point, Fit]]:
    """Returns the family with all its widths fitted to the full model, and how well each fits.

    The output of the embedding (patches, class token, registers, positions) already equals the full model's.
    Every later linear layer and norm is fitted: the last of a branch to the full model's stream minus the
    width's stream so far, all others to the full model's activations. A layer without a bias gets none.
    Memory holds the streams and the targets of half a block.

    Args:
        net: a family with its channels in order (`order_channels`).
        batches: images (N, C, H, W), normalised, as one tensor or in batches; read once. One in eight is
            held out of the fit.
        full_weight: weight of the full width in the fit, if it is one of several; each other has weight 1.
        strengths: ridge strengths, as shares of the inputs' mean square. Each layer takes the one with the
            least error on the held-out images.
        every_token: whether the head is fitted to the patch tokens as well, as for features.
        watch: is notified of every half block.

    Raises:
        PointError: if the model has no such width.
        DataError: if there are no images.
    """
    family = with_own_vectors(net)
    weights = {ratio: full_weight if ratio == 1 else 1.0 for ratio in net.rule.ratios}
    with evaluating(net.vit):
        streams = embedded(net, family, batches.split(BATCH) if isinstance(batches, Tensor) else batches)
        todo = stages(net.vit, every_token)
        watch.phase("calibrate", len(todo), "stages")
        for stage in todo:
            before, streams = streams, fit_stage(net.vit, family, stage, streams, weights, strengths)
            watch.step(1)
    fits = {}
    for point in map(Point, net.rule.ratios):
        last = (family.at(point), before.own[point.ratio], streams.own[point.ratio])
        fits[point] = judge((net.vit, before.wanted, streams.wanted), last, streams.held)
    return family, fits


def with_own_vectors(net: SlimmableViT) -> SlimmableViT:
    """Returns a copy in which every narrower width has norms and biases of its own.

    If widths share their weights, the norms that read the stream are multiplied by ratio^-1/2: a narrow norm
    divides by the deviation of few channels, which hold nearly all the energy. Attention keeps the full
    model's scale at every width. LayerScale, which may be close to zero, is folded into the layer before it.
    """
    vit = net.spec.build_with({name: tensor.clone() for name, tensor in net.vit.state_dict().items()})
    absorb_layer_scale(vit)
    weights = vit.state_dict()
    kept = {**net.original, **dict(net.positions.items())}
    extra = {name: tensor.detach().clone() for name, tensor in kept.items()}
    vectors = [
        name
        for name, tensor in weights.items()
        if tensor.ndim == 1 and not name.startswith("patch_embed.") and not name.endswith(".gamma")
    ]
    unscaled = replace(net.rule, attn_scale="native")
    share = len(net.rule.ratios) > 1
    gained = {f"{norm}.weight" for stage in stages(vit) for norm in stage.norms if share}
    for ratio in net.rule.ratios:
        if ratio < 1:
            own = own_vectors(net.extra, ratio)
            cut = unscaled.slice_state(weights, ratio, copy=True, own=own)
            for name in gained & (cut.keys() - own.keys()):
                cut[name] *= ratio**-0.5
            extra |= {own_name(ratio, name): cut[name] for name in vectors}
    return net.like(vit=vit, rule=replace(net.rule, attn_scale="fixed"), extra=extra).eval()


def absorb_layer_scale(vit: VisionTransformer) -> None:
    """Folds each LayerScale into the layer before it, in place."""
    blocks: Any = vit.blocks
    for block in blocks:
        for scale, writer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            gamma = getattr(getattr(block, scale, None), "gamma", None)
            if gamma is not None:
                writer.weight.mul_(gamma[:, None])
                if writer.bias is not None:
                    writer.bias.mul_(gamma)
                gamma.fill_(1)


def embedded(net: SlimmableViT, family: SlimmableViT, batches: Iterable[Tensor]) -> Streams:
    """Returns all models' tokens before the first block, for images (B, C, H, W)."""
    device = next(net.vit.parameters()).device
    streams, seen = Streams([], {ratio: [] for ratio in net.rule.ratios}, []), 0
    for images in batches:
        numbers, images = torch.arange(seen, seen + len(images), device=device), images.to(device)
        streams.held.append(numbers % HELD_OUT == HELD_OUT - 1)
        streams.wanted.append(embed(net.vit, images))
        for ratio, tokens in streams.own.items():
            tokens.append(embed(family.at(ratio), images))
        seen += len(images)
    if not seen:
        raise DataError("there are no images to fit the slice to.", "Give some images.")
    return streams


def fit_stage(
    full: VisionTransformer,
    family: SlimmableViT,
    stage: Stage,
    streams: Streams,
    weights: Mapping[Fraction, float],
    strengths: Sequence[float],
) -> Streams:
    """Fits the family's layers of a stage, in place. Returns the streams after the stage."""
    targets: dict[str, list[Tensor]] = {}
    layers = stage.layers(full)
    hooks = [
        layer.register_forward_hook(
            lambda _, read, wrote, name=name: targets.setdefault(name, []).append(wrote)
        )
        for name, layer in layers.items()
    ]
    with hooked(hooks):
        wanted = [stage.run(full, tokens) for tokens in streams.wanted]
    writer = list(targets)[-1] if stage.residual else None
    if writer:
        targets[writer] = wanted
    for name, values in targets.items():
        if name in stage.norms and len(weights) > 1:
            continue  # already scaled by `with_own_vectors`, which suits shared weights better than a fit
        parts = {
            ratio: moments_of(family, ratio, name, stage, streams, values, name == writer)
            for ratio in weights
        }
        if layers[name].weight.ndim == 1:
            fit_norm(family, name, parts, strengths)
        else:
            fit_linear(family, name, parts, weights, strengths)
    own = {ratio: [stage.run(family.at(ratio), tokens) for tokens in streams.own[ratio]] for ratio in weights}
    return Streams(wanted, own, streams.held)


def moments_of(
    family: SlimmableViT,
    ratio: Fraction,
    name: str,
    stage: Stage,
    streams: Streams,
    values: Sequence[Tensor],
    is_writer: bool,
) -> tuple[Moments, Moments]:
    """Returns the moments of a layer's inputs and targets at a width: of the fitted and the held-out images.

    Args:
        values: the full model's activations (B, N, channels) that the layer is fitted to.
        is_writer: whether `values` are the stream after the stage and the layer writes to that stream.
    """
    vit = family.at(ratio)
    layer: Any = vit.get_submodule(name)
    is_norm = layer.weight.ndim == 1
    kept = kept_channels(family.rule, f"{name}.weight", 0, values[0].shape[-1], ratio).to(values[0].device)
    seen, unseen = Moments(diagonal=is_norm), Moments(diagonal=is_norm)
    for tokens, value, held in zip(streams.own[ratio], values, streams.held, strict=True):
        read = read_by(layer, stage, vit, tokens)
        if is_norm:
            # undo the attention scale that `fold_fixed_scale` puts into q_norm
            read = layer(read) / (math.sqrt(ratio) if name.endswith("attn.q_norm") else 1)
        target = value[..., kept] - tokens if is_writer else value[..., kept]
        seen.add(read[~held], target[~held])
        unseen.add(read[held], target[held])
    return seen, unseen


def fit_norm(
    family: SlimmableViT,
    name: str,
    parts: Mapping[Fraction, tuple[Moments, Moments]],
    strengths: Sequence[float],
) -> None:
    """Fits the scale and shift of a norm for each width, in place.

    Args:
        parts: for each width, moments of the norm's present output and of its targets.
    """
    for ratio, (seen, unseen) in parts.items():
        scale, shift = (vector_of(family, ratio, f"{name}.{part}") for part in ("weight", "bias"))
        origins = seen.origins(shift is not None)
        held = Normal.of(unseen, origins) if unseen.count else None
        factor = best_solution(Normal.of(seen, origins), held, torch.ones_like(scale), strengths)
        if shift is not None:
            shift.copy_(factor * shift.to(factor) + seen.mean_t - factor * seen.mean_x)
        scale.copy_(factor * scale.to(factor))


def fit_linear(
    family: SlimmableViT,
    name: str,
    moments: Mapping[Fraction, tuple[Moments, Moments]],
    weights: Mapping[Fraction, float],
    strengths: Sequence[float],
) -> None:
    """Fits a linear layer that all widths share, and each width's own bias, in place."""
    layer: Any = family.vit.get_submodule(name)
    parts = {}
    for ratio, (seen, held) in moments.items():
        rows, columns = (
            kept_channels(family.rule, f"{name}.weight", dim, length, ratio)
            for dim, length in enumerate(layer.weight.shape)
        )
        parts[ratio] = Part(seen, held, rows, columns, weights[ratio])
    fitted = fit_shared([*parts.values()], layer.weight, strengths, layer.bias is not None)
    layer.weight.copy_(fitted)
    if layer.bias is not None:
        for ratio, part in parts.items():
            bias = vector_of(family, ratio, f"{name}.bias")
            bias.copy_(part.shift(fitted[part.rows[:, None], part.columns]))


def vector_of(family: SlimmableViT, ratio: Fraction, name: str) -> Any:
    """Returns a width's norm or bias vector, or None if the model has none of this name."""
    if ratio < 1:
        return family.extra.get(own_name(ratio, name))
    return dict(family.vit.named_parameters()).get(name)
