"""Norms and biases that a width has of its own, and position embeddings that a size has of its own.

Norms and biases are few (0.3 % of a ViT-S's parameters). The narrower a slice, the less those of the full
width suit it, as its activations have other means and deviations (compare the switchable norms of arXiv
1812.08928).
"""

from collections import ChainMap
from collections.abc import Iterable, Mapping
from fractions import Fraction

from torch import Tensor

from scala_cli.slicing.point import decimal


def own_name(ratio: Fraction, name: str) -> str:
    """Returns the name of a width's own vector in `extra.st`: "0.5:blocks.0.norm1.weight"."""
    return f"{decimal(ratio)}:{name}"


def own_vectors(extra: Mapping[str, Tensor], ratio: Fraction) -> dict[str, Tensor]:
    """Returns the vectors that a width has of its own, by timm's names."""
    prefix = own_name(ratio, "")
    return {name.removeprefix(prefix): extra[name] for name in extra if name.startswith(prefix)}


def own_of_widths(extra: Mapping[str, Tensor], ratios: Iterable[Fraction]) -> dict[str, Tensor]:
    """Returns the vectors of these widths, by their names in `extra`."""
    labels = {decimal(ratio) for ratio in ratios}
    return {name: tensor for name, tensor in extra.items() if name.partition(":")[0] in labels}


POSITIONS = "pos_embed"


def size_name(size: int) -> str:
    """Returns the name in `extra.st` of the position embedding for a size: "@160:pos_embed"."""
    return f"@{size}:{POSITIONS}"


def at_size(
    weights: Mapping[str, Tensor], extra: Mapping[str, Tensor], size: int | None
) -> Mapping[str, Tensor]:
    """Returns the full width's weights with the position embedding of a size, if `extra` has one."""
    embedding = None if size is None else extra.get(size_name(size))
    return weights if embedding is None else ChainMap({POSITIONS: embedding}, weights)  # type: ignore[arg-type]
