"""Converts checkpoints of the SuperViT authors (arXiv 2205.11397) to a family of sizes and shares of tokens.

Such a checkpoint is a DeiT under timm's names, but has one position embedding for each size,
`pos_embed_list.0` and so on, each including the class token. All sizes are read off the tensors, except the
number of heads and the shares of tokens, which no tensor shows; the shares are the paper's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.foreign import Source
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import describe, refuse_misfit, skeleton
from scala_cli.slicing.own import POSITIONS, size_name
from scala_cli.slicing.point import grid, parse_keeps, parse_points
from scala_cli.slicing.rule import Rule

LIST = "pos_embed_list."
KEEPS = "0.5,0.7,1"
HEAD_DIM = 64
"""Channels per head in all released models."""


def is_supervit(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the parameter names of SuperViT."""
    return f"{LIST}0" in state


@dataclass(frozen=True)
class Shape:
    """Dimensions of a SuperViT.

    Args:
        args: arguments of timm's VisionTransformer.
        sizes: image side in pixels for each position embedding, in the order of the list.
    """

    args: dict[str, Any]
    sizes: tuple[int, ...]


def shape_of(state: Mapping[str, Tensor], heads: int | None, origin: str) -> Shape:
    """Reads the dimensions off the tensors.

    Raises CheckpointError if they are not a SuperViT's, or its number of heads is unknown.
    """
    try:
        channels, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        hidden, _ = state["blocks.0.mlp.fc1.weight"].shape
        names = [name for name in state if name.startswith(LIST)]
        grids = [state[f"{LIST}{number}"].shape[1] - 1 for number in range(len(names))]
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{origin} is damaged: it is no SuperViT ({error}).", "Download it again."
        ) from None
    odd = [number for number in grids if math.isqrt(max(number, 0)) ** 2 != number or number < 1]
    if odd:
        raise CheckpointError(
            f"{origin} has a position embedding for {odd[0]} patches, which are no square.",
            "Only models for square images are read.",
        )
    if heads is None and channels % HEAD_DIM:
        raise CheckpointError(
            f"{origin} does not tell its heads: {channels} channels are no multiple of {HEAD_DIM}.",
            remedy="example",
            setting="num-heads",
            value=max(n for n in range(1, 17) if channels % n == 0),
        )
    heads = heads or channels // HEAD_DIM
    if channels % heads:
        raise CheckpointError(
            f"{heads} heads do not divide the {channels} channels of {origin}.",
            "Give the number it was trained with.",
        )
    sizes = tuple(math.isqrt(number) * patch for number in grids)
    if len({*sizes}) < len(sizes):
        raise CheckpointError(f"{origin} has two position embeddings for one size.", "Download it again.")
    args = {
        "img_size": max(sizes),
        "patch_size": patch,
        "in_chans": in_chans,
        "embed_dim": channels,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": (hidden + 0.5) / channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_classes": len(state.get("head.weight", ())),
    }
    return Shape(args, sizes)


def open_supervit(source: Source, heads: int | None, origin: str) -> tuple[SlimmableViT, VisionTransformer]:
    """Returns a family equal to the released model at every size and share of tokens, and its full model.

    Args:
        heads: number of heads; None means one per 64 channels.
        origin: the file, for messages.

    Raises CheckpointError as `shape_of`, and for the first key that does not fit.
    """
    assert source.weights is not None
    state = dict(source.weights())
    shape = shape_of(state, heads, origin)
    embeddings = {size: state.pop(f"{LIST}{number}") for number, size in enumerate(shape.sizes)}
    state[POSITIONS] = embeddings[max(shape.sizes)]
    spec = describe(skeleton("deit_small_patch16_224", **shape.args), shape.args)
    refuse_misfit(spec.build(), state, origin)
    extra = {size_name(size): tensor for size, tensor in embeddings.items() if size != max(shape.sizes)}
    points = grid(parse_points("1"), shape.sizes, parse_keeps(KEEPS))
    rule = Rule((points[0].ratio,), spec.num_heads)
    net = SlimmableViT(spec.build_with(state), spec, rule, extra, points)
    return net, spec.build_with(state)
