"""The residual stream of a ViT and the norms it is read through."""

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
"""All that is written to the stream of a DeiT or a plain ViT."""
NEGLIGIBLE = 1e-4
"""Largest change of a logit that counts as none; putting channels in order is held to the same."""
Norms = dict[str, list[str]]
"""name of a norm -> the linear layers that read the stream through it"""


def norms_of(vit: VisionTransformer) -> Norms:
    """The norms between the stream and its readers, first to last.

    Empty where the stream has no free basis: where it passes a norm itself (norm_pre), or is read past one,
    or through anything but LayerNorm, or by a layer without a bias to take a norm's up, or is pooled by
    attention.
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
    """The names of the layers with which a block's MLP reads its input; a gated one has two."""
    mlp = vit.get_submodule(f"{block}.mlp")
    return [f"{block}.mlp.{name}" for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]


def linear_heads(vit: nn.Module) -> list[str]:
    """The names of the classifiers that read the stream; without classes there are none."""
    return [name for name in ("head", "head_dist") if isinstance(getattr(vit, name, None), nn.Linear)]


def is_affine_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def make_norms_plain(state: dict[str, Tensor], table: Table, norms: Norms) -> None:
    """Rewrites the state, in place, so that the stream can be rotated and the function stays.

    Scale and bias of the norms move into the layers that read them, those of LayerScale into the layers
    before; and all that is written to the stream loses its mean over channels, which no reader sees.
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
    """Takes its mean over tokens from a plain norm's output and adds it to the readers' biases, in place.

    A channel that is cut then takes only its deviation away.

    Args:
        mean: (C,) of the norm's output.
    """
    state[f"{norm}.bias"] = -mean
    for reader in readers:
        state[f"{reader}.bias"] = state[f"{reader}.bias"] + state[f"{reader}.weight"] @ mean


@torch.no_grad()
def with_eps(state: Mapping[str, Tensor], spec: Spec, eps: float) -> dict[str, Tensor]:
    """The weights with which timm, with its own eps, computes what these do where every norm has `eps`.

    x / sqrt(var(x) + eps) is s x / sqrt(var(s x) + own) for s = sqrt(own / eps), and the residual stream is
    read through norms alone: so all that is written to it is multiplied by s. Where the difference is
    NEGLIGIBLE the weights stay as they are: AdamW moves large weights no further than small ones, so that
    weights multiplied by a thousand would hardly learn.
    """
    theirs, probe = spec.build_with(state), random_images(spec, 2)
    ours = theirs(probe)
    own = next(module.eps for module in theirs.modules() if isinstance(module, nn.LayerNorm))
    scale = math.sqrt(own / eps)
    if (norms_with_eps(theirs, eps)(probe) - ours).abs().max() <= NEGLIGIBLE:
        return dict(state)
    return {name: tensor * scale if WRITERS.fullmatch(name) else tensor for name, tensor in state.items()}


def norms_with_eps(vit: VisionTransformer, eps: float) -> VisionTransformer:
    """The same model, changed in place, with `eps` in every norm."""
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return vit
