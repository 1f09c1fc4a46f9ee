"""The residual stream of a ViT and the norms through which its layers read it."""

import math
import re
from collections.abc import Mapping

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.models.slimmed import modules_of
from scala_cli.models.vit import Spec, has_bare_stream, random_images
from scala_cli.slicing.table import Table, axes_of

PARTS = ("weight", "bias")
WRITERS = re.compile(
    r"(cls|dist|reg)_token|pos_embed|patch_embed\.proj\.(weight|bias)|blocks\.\d+\.(attn\.proj|mlp\.fc2)\..*"
)
"""Parameters that write to the stream of a DeiT or a plain ViT."""
NEGLIGIBLE = 1e-4
"""Largest change of a logit that counts as none, as for `order.ORDER_TOLERANCE`."""
Norms = dict[str, list[str]]
"""Name of a norm -> the linear layers that read the stream through it."""


def norms_of(vit: VisionTransformer) -> Norms:
    """Returns the norms through which layers read the stream, first to last; {} if it must not be rotated.

    Rotation needs that the stream passes no norm itself (such as norm_pre), that it is read only through
    LayerNorms with scale and bias, by linear layers with a bias, and that it is not pooled by attention or
    maximum.
    """
    norms: Norms = {}
    for number in range(len(vit.blocks)):
        block = f"blocks.{number}"
        norms[f"{block}.norm1"] = [f"{block}.attn.qkv"]
        norms[f"{block}.norm2"] = mlp_readers(vit, block)
    norms |= {f"blocks.{number}.tsm.norm": [f"blocks.{number}.tsm.key"] for number in modules_of(vit)}
    for name in ("norm", "fc_norm"):
        if not isinstance(vit.get_submodule(name), nn.Identity):
            norms[name] = linear_heads(vit)
    layers = [vit.get_submodule(name) for readers in norms.values() for name in readers]
    free = (
        has_bare_stream(vit)
        and ("norm" in norms or "fc_norm" in norms)
        and all(readers and is_affine_layer_norm(vit.get_submodule(name)) for name, readers in norms.items())
        and all(layer.bias is not None for layer in layers)
    )
    return norms if free else {}


def mlp_readers(vit: nn.Module, block: str) -> list[str]:
    """Returns the names of the layers that read a block's MLP input; a gated MLP has two."""
    mlp = vit.get_submodule(f"{block}.mlp")
    return [f"{block}.mlp.{name}" for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]


def linear_heads(vit: nn.Module) -> list[str]:
    """Returns the names of the model's linear classifiers."""
    return [name for name in ("head", "head_dist") if isinstance(getattr(vit, name, None), nn.Linear)]


def is_affine_layer_norm(module: nn.Module) -> bool:
    """Returns whether a module is a LayerNorm with weight and bias."""
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def make_norms_plain(state: dict[str, Tensor], table: Table, norms: Norms) -> None:
    """Rewrites the state, in place, so that rotating the stream does not change the function.

    Scale and bias of each norm are folded into the layers that read it, each LayerScale into the layer before
    it. The mean over channels is removed from all that is written to the stream; no norm sees it.
    """
    gammas = [name for name in state if name.endswith(".gamma")]
    for name in gammas:
        block, last, _ = name.rsplit(".", 2)
        writer = f"{block}.{'attn.proj' if last == 'ls1' else 'mlp.fc2'}"
        gamma = state[name]
        state[f"{writer}.weight"] = gamma[:, None] * state[f"{writer}.weight"]
        if f"{writer}.bias" in state:
            state[f"{writer}.bias"] = gamma * state[f"{writer}.bias"]
        state[name] = gamma.new_ones(gamma.shape)
    for norm, readers in norms.items():
        scale, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
        for reader in readers:
            weight = state[f"{reader}.weight"]
            state[f"{reader}.bias"] = state[f"{reader}.bias"] + weight @ shift
            state[f"{reader}.weight"] = weight * scale
        state[f"{norm}.weight"], state[f"{norm}.bias"] = scale.new_ones(scale.shape), 0 * shift
    others = {
        *gammas,
        *(f"{layer}.{part}" for norm in norms for layer in (norm, *norms[norm]) for part in PARTS),
    }
    for name in state.keys() - others:
        for dim, axis in enumerate(axes_of(name, table)):
            if axis is not None and axis.group == "embed":
                state[name] = state[name] - state[name].mean(dim, keepdim=True)


def centre_reading(state: dict[str, Tensor], norm: str, readers: list[str], mean: Tensor) -> None:
    """Moves the mean of a plain norm's output over tokens into its readers' biases, in place.

    Cutting a channel then loses only its deviation from the mean.

    Args:
        mean: (C,) of the norm's output.
    """
    state[f"{norm}.bias"] = -mean
    for reader in readers:
        state[f"{reader}.bias"] = state[f"{reader}.bias"] + state[f"{reader}.weight"] @ mean


@torch.no_grad()
def with_eps(state: Mapping[str, Tensor], spec: Spec, eps: float) -> dict[str, Tensor]:
    """Returns weights that compute the same with timm's eps as the given ones with `eps` in every norm.

    x / sqrt(var(x) + eps) is s x / sqrt(var(s x) + own) for s = sqrt(own / eps), and the residual stream is
    read only through norms: so all that is written to it is multiplied by s. If the difference is NEGLIGIBLE
    the weights are returned unchanged: AdamW's steps do not grow with a weight, so weights a thousand times
    as large would hardly learn.
    """
    theirs, probe = spec.build_with(state), random_images(spec, 2)
    ours = theirs(probe)
    own = next(module.eps for module in theirs.modules() if isinstance(module, nn.LayerNorm))
    scale = math.sqrt(own / eps)
    if (norms_with_eps(theirs, eps)(probe) - ours).abs().max() <= NEGLIGIBLE:
        return dict(state)
    return {name: tensor * scale if WRITERS.fullmatch(name) else tensor for name, tensor in state.items()}


def norms_with_eps(vit: VisionTransformer, eps: float) -> VisionTransformer:
    """Sets `eps` in every LayerNorm of a model, in place, and returns the model."""
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return vit
