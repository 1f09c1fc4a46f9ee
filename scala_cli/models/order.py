"""Orders the channels of a pretrained ViT by importance, so that slices keep the best; its function stays."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from scala_cli.errors import CheckpointError
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.slimmed import modules_of
from scala_cli.models.stages import HEAD_NORMS
from scala_cli.models.stream import centre_reading, linear_heads, make_norms_plain, mlp_readers, norms_of
from scala_cli.slicing.importance import (
    change_basis,
    channel_scores,
    permute_state,
    query_key_bases,
    stream_basis,
    value_basis,
)
from scala_cli.slicing.original import BASIS, ORIGINAL_MAPS, WEIGHT, identity_tensor
from scala_cli.slicing.table import Group

ORDER_TOLERANCE = 1e-4
"""Largest allowed difference between the outputs of the ordered and the pretrained model, relative to their
root mean square where that is above one."""


class GroupMoments:
    """Mean and second moment of vectors, accumulated for groups of channels.

    Args:
        size: channels of a group; a group has one moment matrix. With 1, only each channel's own moment.
    """

    def __init__(self, size: int = 1) -> None:
        self.size, self.count = size, 0
        self.sum: Any = 0.0
        self.outer: Any = 0.0

    def add(self, vectors: Tensor) -> None:
        """Adds vectors (..., channels)."""
        flat = vectors.detach().flatten(0, -2)
        self.count += len(flat)
        self.sum = self.sum + flat.sum(0).unflatten(0, (-1, self.size)).double()
        if self.size == 1:
            outer = flat.square().sum(0)[:, None, None]
        else:  # in the inputs' precision, as products in float64 would take most of the time
            grouped = flat.unflatten(-1, (-1, self.size)).transpose(0, 1)
            outer = grouped.mT @ grouped
        self.outer = self.outer + outer.double()

    @property
    def second(self) -> Tensor:
        """Second moment about zero, (groups, size, size)."""
        return self.outer / self.count

    @property
    def mean(self) -> Tensor:
        """Mean, (groups, size)."""
        return self.sum / self.count

    @property
    def central(self) -> Tensor:
        """Second moment about the mean, (groups, size, size)."""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel, (channels,), if size is 1."""
        return self.central.flatten().clamp_min(0).sqrt()


@torch.no_grad()
def order_channels(net: SlimmableViT, batches: Iterable[Tensor]) -> SlimmableViT:
    """Returns a model with the same function at full width, its channels ordered by importance on images.

    The residual stream is rotated to its principal directions, one basis for all layers (if its norms do not
    allow that, its channels are permuted). The hidden channels of each block are permuted. Every head gets
    the best basis for its values and, without a norm on them, for its queries and keys.

    Args:
        batches: images (B, C, H, W), normalised; a few hundred suffice.

    Raises:
        CheckpointError: if rounding changes the output by more than ORDER_TOLERANCE, or if the widths have
            been fitted, or trained with isolation.
    """
    if net.rule.isolated or net.vectors:
        raise CheckpointError(
            "the widths of this family are fitted or trained: in another order they are lost.",
            remedy="leave_out",
            setting="order",
        )
    spec, table = net.spec, net.rule.table
    blocks = [f"blocks.{number}" for number in range(len(net.vit.blocks))]
    norms = norms_of(net.vit)
    state = {
        name: tensor.double()
        for name, tensor in {**net.vit.state_dict(), **original_tensors(net), **net.positions}.items()
    }
    if WEIGHT in state:
        norms = {
            name: [*layers, "tokens"] if name in HEAD_NORMS else layers for name, layers in norms.items()
        }
    if norms:
        make_norms_plain(state, table, norms)
    vit = deepcopy(net.vit)
    vit.load_state_dict({name: state[name] for name in vit.state_dict()})

    readers = [f"{block}.attn.qkv" for block in blocks] + linear_heads(vit)
    readers += [name for block in blocks for name in mlp_readers(vit, block)]
    slimming = [f"blocks.{number}.tsm" for number in modules_of(vit)]
    readers += [f"{name}.key" for name in slimming]
    inputs = {name: GroupMoments(spec.embed_dim if norms else 1) for name in readers}
    hidden: list[tuple[str, Group]] = [(f"{block}.mlp.fc2", "hidden") for block in blocks] + [
        (f"{m}.query", "slim") for m in slimming
    ]
    inputs |= {name: GroupMoments() for name, _ in hidden}
    inputs |= {f"{block}.attn.proj": GroupMoments(spec.head_dim) for block in blocks}
    outputs = {f"{block}.attn.qkv": GroupMoments(spec.head_dim) for block in blocks}
    probe = observe(vit, batches, inputs, outputs)

    for block in blocks:
        change_bases(state, f"{block}.attn.", outputs[f"{block}.attn.qkv"], inputs[f"{block}.attn.proj"])
    for name, group in hidden:
        scores = channel_scores(inputs[name].deviation, state[f"{name}.weight"])
        order = scores.argsort(descending=True, stable=True)
        state = permute_state(state, table, group, order, within=name.rpartition(".")[0])
    if norms:
        basis = stream_basis(torch.stack([inputs[layers[0]].central[0] for layers in norms.values()]).sum(0))
        state = change_basis(state, table, "embed", basis)
        for norm, layers in norms.items():
            centre_reading(state, norm, layers, basis @ inputs[layers[0]].mean[0])
    else:
        stream = torch.stack([share_of_reading(inputs[name], state[f"{name}.weight"]) for name in readers])
        state = permute_state(state, table, "embed", stream.sum(0).argsort(descending=True, stable=True))
    vit.load_state_dict({name: state[name] for name in vit.state_dict()})
    original = spec.build_with(net.vit.state_dict())  # in evaluation mode, even if `net` is not
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 convolutions round to 10 bits
        expected = original(probe)
        difference = (vit(probe) - expected).abs().max()
    if not difference <= ORDER_TOLERANCE * expected.square().mean().sqrt().clamp_min(1):
        raise CheckpointError(
            f"in another order the full model would differ by {difference:.2g}.",
            remedy="try",
            setting="order",
            value="none",
        )
    like = next(vit.parameters())
    extra = {name: state[name].to(like) for name in (*original_tensors(net), *net.positions)}
    return net.like(vit=vit, spec=spec, extra=extra).eval()


def original_tensors(net: SlimmableViT) -> dict[str, Tensor]:
    """Returns the tensors that map back to the original channels; identities if never reordered."""
    names = (BASIS,) if net.spec.features else ORIGINAL_MAPS
    like = next(net.vit.parameters())
    return {
        name: net.original.get(name, identity_tensor(name, net.spec.embed_dim)).to(like) for name in names
    }


def share_of_reading(seen: GroupMoments, weight: Tensor) -> Tensor:
    """Returns each channel's share in the variance of a layer's output, (channels,); they add up to one."""
    scores = channel_scores(seen.deviation, weight).square()
    return scores / scores.sum().clamp_min(torch.finfo(scores.dtype).tiny)  # zeros if the inputs are constant


def observe(
    vit: nn.Module,
    batches: Iterable[Tensor],
    inputs: Mapping[str, GroupMoments],
    outputs: Mapping[str, GroupMoments],
) -> Tensor:
    """Adds the inputs and outputs of the named layers to their moments. Returns a few of the images."""
    hooks = [
        vit.get_submodule(name).register_forward_hook(lambda _, read, wrote, m=m: m.add(read[0]))
        for name, m in inputs.items()
    ] + [
        vit.get_submodule(name).register_forward_hook(lambda _, read, wrote, m=m: m.add(wrote))
        for name, m in outputs.items()
    ]
    device = next(vit.parameters()).device
    try:
        vit.eval()
        for images in batches:
            vit(images.to(device))
        return images[:8].to(device)
    finally:
        for hook in hooks:
            hook.remove()


def change_bases(state: dict[str, Tensor], attn: str, qkv: GroupMoments, attended: GroupMoments) -> None:
    """Changes every head of an attention layer to its best bases, in place.

    Args:
        attn: the layer's name, ending in a dot.
        qkv: moments of the queries, keys and values: 3 x heads groups of head_dim.
        attended: moments of the projection's input: heads groups of head_dim.
    """
    heads, size, _ = attended.second.shape
    parts = [name for name in (f"{attn}qkv.weight", f"{attn}qkv.bias") if name in state]
    grouped = {name: state[name].unflatten(0, (3, heads, size)).clone() for name in parts}
    projection = state[f"{attn}proj.weight"].unflatten(1, (heads, size)).clone()
    for head in range(heads):
        bases = {}
        if f"{attn}norm.weight" not in state:
            bases[2], projection[:, head] = value_basis(attended.second[head], projection[:, head])
        if f"{attn}q_norm.weight" not in state:
            bases[0], bases[1] = query_key_bases(qkv.second[head], qkv.central[heads + head])
        for tensor in grouped.values():
            for which, basis in bases.items():
                tensor[which, head] = basis @ tensor[which, head]
    state.update({name: tensor.flatten(0, 2) for name, tensor in grouped.items()})
    state[f"{attn}proj.weight"] = projection.flatten(1, 2)
