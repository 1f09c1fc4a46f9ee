"""Converts checkpoints of LV-ViT's (arXiv 2104.10858) and SiT's authors (arXiv 2111.12624) to timm.

Their model divides each branch by a constant, folded here into the last layer of the branch, and has a
BatchNorm after each convolution of its stem, folded into the convolution. With fixed statistics it is then
an ordinary ViT. Their second classifier, of the patches, is left out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model_in_modules
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from scala_cli.errors import CheckpointError
from scala_cli.models.config import Config, settings_for
from scala_cli.models.foreign import Source
from scala_cli.models.lvvit import SIZES
from scala_cli.models.vit import describe, skeleton

State = dict[str, Tensor]
BN_EPS = 1e-5
LAYOUTS = {
    (3, 3, 3, 3): "4c",
    (3, 3, 3, 3, 3, 3): "6c",
    (7, 3, 3, 8): "4_2",
}
"""Kernels of a stem's convolutions -> its name in lvvit.STEMS."""
DIVISORS = {("4_2", 12, 240): 1.0, ("4_2", 24, 768): 3.0, ("6c", 24, 768): 3.0}
"""Divisor of the branches (skip_lam) by stem, depth and width; 2 in all other models."""
HEADS = {("4_2", 12, 240): 4}
"""Number of heads of models whose heads are not 64 channels wide, by stem, depth and width."""
ELSEWHERE = re.compile(r"patch_embed\.|r?tsm\.|aux_head\.")
"""Parameters that are renamed or left out."""
HEAD_DIM = 64
TIMM_NAMES = {
    "sit_lvvit_tiny": "sit_t",
    "sit_lvvit_xsmall": "sit_xs",
    "sit_lvvit_small": "sit_s",
    "sit_lvvit_medium": "sit_m",
    "sit_lvvit_large": "sit_l",
}
"""Names that SiT's authors give their models -> names registered here."""


def is_lvvit(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the parameter names of LV-ViT or SiT."""
    return "patch_embed.bn1.weight" in state or "tsm.0.scale" in state


def read_lvvit(held: Source, origin: str, num_heads: int | None = None) -> Source:
    """Returns the model under timm's names, with its configuration.

    Args:
        held: the contents of the weight file.
        origin: the file's name, for messages.
        num_heads: heads of each block, which no tensor shows; None means those of the released model, or
            heads of 64 channels.

    Raises CheckpointError for an unknown stem, or if heads of 64 channels do not divide the width.
    """
    assert held.weights is not None
    state = dict(held.weights())
    stem, embedding = read_stem(state, origin)
    others = {name: tensor for name, tensor in state.items() if not ELSEWHERE.match(name)}
    depth = 1 + max(int(name.split(".")[1]) for name in others if name.startswith("blocks."))
    width = others["norm.weight"].numel()
    args: dict[str, Any] = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads or heads_of(stem, depth, width, origin),
        "mlp_ratio": (others["blocks.0.mlp.fc1.bias"].numel() + 0.5) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in others,
        "img_size": image_size(others["pos_embed"], patch_of(stem, embedding), origin),
        "stem": stem,
        "stem_width": len(embedding["patch_embed.proj.before.0.weight"]) if stem == "4_2" else width,
    }
    if not stem:
        args |= {"patch_size": patch_of(stem, embedding)}
    divided = divide_branches(others, DIVISORS.get((stem, depth, width), 2.0))
    name = next(
        (n for n, size in SIZES.items() if (size["embed_dim"], size["depth"]) == (width, depth)), "lvvit_s"
    )
    slim, counts = read_slimming(state, depth, held, origin)
    config = Config(name, args, settings_for(name))
    if counts:
        tsm = {str(number): count for number, count in counts.items()}
        config = replace(config.with_args(base=name, tsm=tsm), architecture="slimmed_vit")
    return replace(held, config=config, weights=lambda: {**embedding, **divided, **slim})


def read_slimming(state: State, depth: int, held: Source, origin: str) -> tuple[State, dict[int, int]]:
    """Returns SiT's token slimming modules under our names, and {block: patch tokens that it passes on}.

    Which blocks have modules is read off the reverse modules, which only training needs, or known from the
    model's name. Raises CheckpointError if neither says it.
    """
    modules = sorted({int(name.split(".")[1]) for name in state if name.startswith("tsm.")})
    patches = state["pos_embed"].shape[1] - 1
    counts = [len(state[f"tsm.{number}.weight.3.bias"]) for number in modules]
    given = [patches, *counts]
    ends = ends_of(state, depth, patches) or named_ends(held)
    if counts and [count for _, count in ends] != counts:
        raise CheckpointError(
            f"{origin} has modules for {', '.join(map(str, counts))} tokens, but does not tell "
            "behind which blocks they stand.",
            "Take the file that the training script saved, with its rtsm.* tensors.",
        )
    slim = {}
    for number, (block, _) in zip(modules, ends, strict=True) if counts else ():
        theirs = f"tsm.{number}"
        for part, ours in (("weight.0", "norm"), ("weight.1", "key"), ("weight.3", "query")):
            for each in ("weight", "bias"):
                slim[f"blocks.{block}.tsm.{ours}.{each}"] = state[f"{theirs}.{part}.{each}"]
        slim[f"blocks.{block}.tsm.scale"] = state[f"{theirs}.scale"].flatten()
        slim[f"blocks.{block}.tsm.bias"] = torch.zeros(given[number + 1], given[number])
    return slim, dict(ends) if counts else {}


def ends_of(state: State, depth: int, patches: int) -> list[tuple[int, int]]:
    """Returns (block, tokens) of every block that passes on fewer tokens, read off the reverse modules.

    The first layer of a block's reverse module is as wide as the block has tokens.
    """
    tokens = [
        state[name].shape[1] if (name := f"rtsm.{number}.mlp1.fc1.weight") in state else patches
        for number in range(depth)
    ]
    before = [patches, *tokens]
    return [(number, tokens[number]) for number in range(depth) if tokens[number] != before[number]]


def named_ends(held: Source) -> list[tuple[int, int]]:
    """Returns (block, tokens) of a released model, by the name in the file; [] for an unknown name."""
    name = TIMM_NAMES.get(held.config.architecture)
    if name is None:
        return []
    return [*describe(skeleton(name)).tsm.items()]


def refuse_other_kind(config: Config, file: Path) -> None:
    """Raises CheckpointError if the architecture named for an LV-ViT file is not an LV-ViT."""
    if not is_model_in_modules(config.architecture, ("lvvit", "registered")):
        raise CheckpointError(
            f"{file} holds an LV-ViT, no {config.architecture}.",
            "Its architecture is read off its tensors: name the file alone.",
        )


def read_stem(state: State, origin: str) -> tuple[str, State]:
    """Returns the stem's name ("" for a single convolution) and the patch embedding's tensors.

    Raises CheckpointError for an unknown stem.
    """
    if "patch_embed.conv1.weight" not in state:
        return "", {name: state[name] for name in state if name.startswith("patch_embed.")}
    count = sum(re.fullmatch(r"patch_embed\.conv\d+\.weight", name) is not None for name in state)
    layers = [fused(state, number) for number in range(1, count + 1)]
    if "patch_embed.proj.weight" in state:
        layers.append((state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]))
    kernels = tuple(weight.shape[-1] for weight, _ in layers)
    if kernels not in LAYOUTS:
        raise CheckpointError(
            f"{origin} has a stem of convolutions {', '.join(map(str, kernels))} wide, which no LV-ViT has.",
            "Stems of four or six convolutions are known, as in LV-ViT's and SiT's released models.",
        )
    names = [f"proj.before.{2 * number}" for number in range(len(layers) - 1)] + ["proj"]
    return LAYOUTS[kernels], {
        f"patch_embed.{name}.{part}": tensor
        for name, layer in zip(names, layers, strict=True)
        for part, tensor in zip(("weight", "bias"), layer, strict=True)
    }


def fused(state: State, number: int) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of a convolution with its BatchNorm folded in, at fixed statistics."""
    mean, variance, scale, shift = (
        state[f"patch_embed.bn{number}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    weight = state[f"patch_embed.conv{number}.weight"]
    weight, bias = fuse_conv_bn_weights(weight, None, mean, variance, BN_EPS, scale, shift)
    return weight.detach(), bias.detach()


def divide_branches(state: State, divisor: float) -> State:
    """Returns the state with the last layer of each branch divided by a constant."""
    ends = re.compile(r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.(weight|bias)")
    return {name: tensor / divisor if ends.fullmatch(name) else tensor for name, tensor in state.items()}


def heads_of(stem: str, depth: int, width: int, origin: str) -> int:
    """Returns the number of heads of a released model, else that of heads 64 channels wide.

    Raises CheckpointError if 64 does not divide the width.
    """
    known = HEADS.get((stem, depth, width))
    if known is None and width % HEAD_DIM:
        raise CheckpointError(
            f"{origin} does not tell its number of heads, and its {width} channels are no multiple of 64.",
            remedy="name_heads",
        )
    return known or width // HEAD_DIM


def patch_of(stem: str, embedding: State) -> int:
    """Returns the side of a patch in pixels; 16 for every stem."""
    return 16 if stem else embedding["patch_embed.proj.weight"].shape[-1]


def image_size(pos_embed: Tensor, patch: int, origin: str) -> int:
    """Returns the side of the image in pixels. Raises CheckpointError unless the patches form a square."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if side * side != pos_embed.shape[1] - 1:
        raise CheckpointError(
            f"{origin} has positions for {pos_embed.shape[1] - 1} patches, which make no square.",
            "Only models of square images can be read.",
        )
    return side * patch
