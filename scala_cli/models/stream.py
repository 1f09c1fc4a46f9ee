"""The residual stream of a ViT and the norms it is read through."""

from torch import Tensor, nn

from scala_cli.slicing.table import Table, axes_of

PARTS = ("weight", "bias")
Norms = dict[str, list[str]]
"""name of a norm -> the linear layers that read the stream through it"""


def norms_of(vit: nn.Module) -> Norms:
    """The norms between the stream and its readers, first to last.

    Empty where the stream has no free basis: where it passes a norm itself (norm_pre), or is read past one,
    or through anything but LayerNorm, or by a layer without a bias to take a norm's up.
    """
    norms: Norms = {}
    for name, module in vit.named_modules():
        prefix, _, last = name.rpartition(".")
        if last in ("norm1", "norm2"):
            norms[name] = [f"{prefix}.{'attn.qkv' if last == 'norm1' else 'mlp.fc1'}"]
        elif name in ("norm", "fc_norm") and not isinstance(module, nn.Identity):
            norms[name] = linear_heads(vit)
    layers = [vit.get_submodule(name) for readers in norms.values() for name in readers]
    free = (
        isinstance(vit.get_submodule("norm_pre"), nn.Identity)
        and ("norm" in norms or "fc_norm" in norms)
        and all(readers and is_affine_layer_norm(vit.get_submodule(name)) for name, readers in norms.items())
        and all(layer.bias is not None for layer in layers)
    )
    return norms if free else {}


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
