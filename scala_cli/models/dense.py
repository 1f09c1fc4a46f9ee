"""Features of every token after any block, mapped to the original channels of the full model.

"Original" means before the channels were put in order. The forward is timm's `forward_intermediates`. The
tensors of the map back are sliced like every weight (`slicing/original.py`).
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from scala_cli.errors import PointError
from scala_cli.models.stages import normed
from scala_cli.models.tokens import put_back, reductions
from scala_cli.slicing.original import BASIS, BIAS, WEIGHT, identity_tensor
from scala_cli.slicing.point import Point
from scala_cli.slicing.tokens import Merged

if TYPE_CHECKING:
    from scala_cli.models.slimmable import SlimmableViT


class Features(NamedTuple):
    """Features of an image at one depth of the model.

    Args:
        tokens: of the patches, (B, N, C), row by row, or as a map (B, C, h, w). A merged patch has the token
            that it went into, a dropped one the last token that it had.
        prefix: of the tokens before them, (B, P, C): class token, then distillation token or registers; P is
            0 in a model without any.
    """

    tokens: Tensor
    prefix: Tensor


class ToFull(nn.Module):
    """Linear map from the channels of a width to those of the full model: (..., C_r) -> (..., C).

    Args:
        weight: (C, C_r)
        bias: (C,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())  # exporters write the whole base of a view
        self.register_buffer("bias", bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight, self.bias)


class WithTokens(nn.Module):
    """A model with two outputs: its own, and the features of its patches.

    Args:
        vit: the model of a width.
        reader: maps normed tokens to the full model's channels, from `reader_of`.
    """

    def __init__(self, vit: VisionTransformer, reader: nn.Module) -> None:
        super().__init__()
        self.vit, self.reader = vit, reader

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, H, W) to (B, num_classes) and (B, N, C)."""
        with reductions(self.vit) as reduced:
            tokens = self.vit.forward_features(images)
        patches = put_back(tokens[:, self.vit.num_prefix_tokens :], reduced, self.vit.norm)
        patches = self.vit.fc_norm(patches)
        return self.vit.forward_head(tokens), self.reader(patches)


def features(
    net: "SlimmableViT", images: Tensor, point: Point, blocks: int | Sequence[int] | None, grid: bool
) -> Features | list[Features]:
    """Implements `SlimmableViT.features`, for images at the point's size."""
    vit: Any = net.at(point)
    ratio = point.ratio
    count = len(vit.blocks)
    asked = [count - 1] if blocks is None else block_numbers(blocks, count)
    numbers = sorted({*asked})
    if not numbers:
        return []
    with reductions(vit) as reduced:
        found = vit.forward_intermediates(
            images,
            indices=numbers,
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
    size = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
    back = back_of(net, ratio)
    reader = reader_of(net, vit, ratio)

    def in_full_space(stream: Tensor) -> Tensor:
        return reader(normed(vit, stream)) if blocks is None else back(stream)

    places = {}
    for number, each in zip(numbers, found, strict=True):
        if isinstance(each, Merged):  # of a model without prefix tokens
            each = each.put_back()
        tokens, prefix = each if isinstance(each, tuple) else (each, each[:, :0])
        tokens = put_back(tokens, [one for one in reduced if one.block <= number])
        tokens, prefix = in_full_space(tokens), in_full_space(prefix)
        places[number] = Features(tokens.mT.unflatten(-1, size).contiguous() if grid else tokens, prefix)
    return places[count - 1] if blocks is None else [places[number] for number in asked]


def pooled(net: "SlimmableViT", images: Tensor, point: Point | Fraction) -> Tensor:
    """Returns the features that a classifier reads, (B, C) in the full model's channels.

    A model for features returns its outputs. Any other returns its class token or the mean of its patches, as
    it pools; if it does not pool, the class token, or the mean of its tokens if it has none.
    """
    point = Point.of(point)
    vit: Any = net.at(point)
    images = net.fitting(images, point)
    if net.spec.features:
        found = vit(images)
    else:
        found = reader_of(net, vit, point.ratio)(
            vit.forward_head(vit.forward_features(images), pre_logits=True)
        )
    if found.ndim == 2:
        return found
    return found.mean(1) if vit.cls_token is None else found[:, 0]


def reader_of(net: "SlimmableViT", vit: VisionTransformer, ratio: Fraction) -> nn.Module:
    """Returns the map of a width's normed tokens to the full model's: (..., C_r) -> (..., C)."""
    if net.spec.features:
        return vit.head
    weight = cut(net, WEIGHT, ratio)
    return nn.Identity() if weight is None else ToFull(weight, net.original.get(BIAS))


def back_of(net: "SlimmableViT", ratio: Fraction) -> nn.Module:
    """Returns the map of a width's tokens between blocks to the full model's: (..., C_r) -> (..., C)."""
    basis = cut(net, BASIS, ratio)
    return nn.Identity() if basis is None else ToFull(basis.mT, None)


def kept_reader(net: "SlimmableViT") -> dict[str, Tensor]:
    """Returns the head of a model for features as `extra` tensors, to keep it when the head is replaced."""
    head: Any = net.vit.head
    return {WEIGHT: head.weight.detach(), BIAS: head.bias.detach()} if net.spec.features else {}


def cut(net: "SlimmableViT", name: str, ratio: Fraction) -> Tensor | None:
    """Returns a tensor of `slicing/original.py` cut to a width; None if it would change nothing."""
    tensor = net.original.get(name)
    if tensor is None:
        if ratio == 1:
            return None
        tensor = identity_tensor(name, net.spec.embed_dim).to(next(net.vit.parameters()))
    return net.rule.slice_state({name: tensor}, ratio)[name]


def block_numbers(blocks: int | Sequence[int], count: int) -> list[int]:
    """Returns the numbers of the wanted blocks, from 0.

    Args:
        blocks: how many of the last blocks, or their numbers; negative numbers count from the end.
        count: how many blocks the model has.

    Raises PointError for a block that does not exist.
    """
    if isinstance(blocks, int):
        blocks = range(-blocks, 0) or [count]
    for number in blocks:
        if not -count <= number < count:
            raise PointError(
                f"the model has {count} blocks: there is none to take for {number}.",
                f"Give numbers from 0 to {count - 1}, negative ones from the end, or how many of the last.",
            )
    return [number % count for number in blocks]
