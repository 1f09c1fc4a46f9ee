"""The slicing rule: which channels a width keeps, and how a state dict is cut to them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from scala_cli.errors import PointError
from scala_cli.slicing.point import decimal
from scala_cli.slicing.table import Axis, Layout, Table, axes_of, vit_table

AttnScale = Literal["native", "fixed"]
End = Literal["first", "last"]


@dataclass(frozen=True)
class Rule:
    """Which channels every parameter of a full-width ViT keeps at each width.

    Args:
        ratios: the widths, narrowest first.
        num_heads: heads of the full model; every width keeps all of them, with fewer channels each.
        isolated: whether the widths between smallest and largest keep the last channels (`kept_end`).
        bounds: the smallest and the largest width that the weights were trained with, if they are not the
            first and the last of `ratios`.
        layout: how qkv is cut (`vit_table`).
        attn_scale: `native` is timm's head_dim_r^-0.5 of each width; `fixed` is the full width's
            head_dim^-0.5 at every width, as in the paper (`fold_fixed_scale`).
    """

    ratios: tuple[Fraction, ...]
    num_heads: int
    isolated: bool = False
    layout: Layout = "aligned"
    attn_scale: AttnScale = "native"
    bounds: tuple[Fraction, Fraction] | None = None

    @property
    def span(self) -> tuple[Fraction, Fraction]:
        """The smallest and the largest width that the weights were trained with."""
        return self.bounds or (min(self.ratios), max(self.ratios))

    @cached_property
    def table(self) -> Table:
        return vit_table(self.num_heads, self.layout)

    def slice_state(
        self,
        state: Mapping[str, Tensor],
        ratio: Fraction,
        copy: bool = False,
        own: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Returns the tensors of the ViT at a width, as views of the full ones wherever possible.

        Differentiable: gradients reach exactly the kept channels.

        Args:
            copy: return contiguous copies. They are made one by one, so a `state` that reads its tensors on
                access is never in memory as a whole.
            own: norms and biases that the width has of its own (`own.py`), by name; they replace cut ones.

        Raises:
            CheckpointError: for a parameter without a row in the table.
            PointError: if the width leaves no whole number of channels.
        """
        end = kept_end(ratio, self.span, self.isolated)
        sliced = {}
        for name, tensor in state.items():
            axes = axes_of(name, self.table)
            part = own[name] if name in own else slice_tensor(tensor, axes, ratio, end)
            sliced[name] = part.clone(memory_format=torch.contiguous_format) if copy else part
        return fold_fixed_scale(sliced, ratio) if self.attn_scale == "fixed" else sliced


def kept_channels(rule: Rule, name: str, dim: int, length: int, ratio: Fraction) -> Tensor:
    """Returns the indices, ascending, that a width keeps on an axis of a parameter.

    Args:
        dim: the axis.
        length: length of the axis at full width.
    """
    end = kept_end(ratio, rule.span, rule.isolated)
    return slice_tensor(torch.arange(length), [axes_of(name, rule.table)[dim]], ratio, end)


def kept_end(ratio: Fraction, span: tuple[Fraction, Fraction], isolated: bool) -> End:
    """Returns which end of every axis a width keeps: Isolated Activation (Scala, section 3.2).

    If isolated, the smallest and the largest width keep the first channels and those between keep the last,
    so that the smallest, trained in every step, disturbs them less. If not, all widths keep the first.
    """
    return "last" if isolated and ratio not in span else "first"


def kept_count(length: int, ratio: Fraction) -> int:
    """Returns how many of `length` channels a width keeps. Raises PointError unless it is a whole number."""
    count = length * ratio
    if count.denominator != 1:
        below, above = math.floor(count) or 1, math.ceil(count)
        near = " or ".join(dict.fromkeys(f"{n}/{length}" for n in (below, above)))
        raise PointError(
            f"ratio {decimal(ratio)} leaves {float(count):.6g} of {length} channels: not a whole number.",
            f"This model has {length} channels a head or layer; the nearest ratio is {near}.",
        )
    return count.numerator


def slice_tensor(tensor: Tensor, axes: Sequence[Axis | None], ratio: Fraction, end: End) -> Tensor:
    """Returns the kept part of a parameter; `axes` has one entry per dimension.

    An axis of several blocks is viewed as (blocks, run), cut within each run, and flattened again.
    """
    narrowing = [(dim, axis) for dim, axis in enumerate(axes) if axis]
    for dim, axis in sorted(narrowing, key=lambda pair: pair[1].blocks):  # axes that need a copy come last
        run = tensor.shape[dim] // axis.blocks
        count = kept_count(run, ratio)
        start = run - count if end == "last" else 0
        if axis.blocks == 1:
            tensor = tensor.narrow(dim, start, count)
        else:
            tensor = tensor.unflatten(dim, (axis.blocks, run)).narrow(dim + 1, start, count)
            tensor = tensor.flatten(dim, dim + 1)
    return tensor


def fold_fixed_scale(sliced: dict[str, Tensor], ratio: Fraction) -> dict[str, Tensor]:
    """Returns the sliced state with the full width's attention scale, head_dim^-0.5.

    timm scales by head_dim_r^-0.5, so q is multiplied by sqrt(head_dim_r / head_dim): its rows of qkv, or the
    scale and bias of its norm if it has one. The full-width weights are not changed.
    """
    factor = math.sqrt(ratio)
    folded = dict(sliced)
    for name, tensor in sliced.items():
        prefix = name.partition(".attn.")[0]
        if ".attn.q_norm." in name or name.startswith("attn_pool.q."):
            folded[name] = tensor * factor
        elif ".attn.qkv." in name and f"{prefix}.attn.q_norm.weight" not in sliced:
            q, kv = tensor.tensor_split([len(tensor) // 3])
            folded[name] = torch.cat([q * factor, kv])
    return folded
