"""Reduces tokens: how many each block passes on, by dropping or by merging."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scala_cli.errors import PointError
from scala_cli.slicing.point import decimal, parts_of

Reduction = Literal["drop", "merge"]


@dataclass(frozen=True)
class TokenRule:
    """How many patch tokens each block of a ViT passes on; prefix tokens, like the class token, always stay.

    `drop` (SuperViT, arXiv 2205.11397): each of `blocks` keeps ceil(keep * N) patch tokens between attention
    and MLP, where N counts all tokens coming in. `merge` (ToMe, arXiv 2210.09461): the number of tokens after
    the last block is the same, but every block merges equally many.

    Args:
        blocks: numbers of the dropping blocks, from 1. Empty means the first block of the second, third and
            fourth quarter: 4, 7 and 10 of 12.
    """

    kind: Reduction = "drop"
    blocks: tuple[int, ...] = ()

    def places(self, depth: int) -> tuple[int, ...]:
        """Returns the dropping blocks' numbers, ascending. Raises PointError for one beyond the depth."""
        places = tuple(sorted({*(self.blocks or (depth * quarter // 4 + 1 for quarter in (1, 2, 3)))}))
        if not 1 <= places[0] <= places[-1] <= depth:
            odd = next(number for number in places if not 1 <= number <= depth)
            raise PointError(
                f"tokens cannot be dropped in block {odd}: the model has blocks 1 to {depth}.",
                remedy="example",
                setting="drop-blocks",
                value=",".join(map(str, TokenRule().places(depth))),
            )
        return places

    def counts(self, patches: int, prefix: int, depth: int, keep: Fraction) -> dict[int, int]:
        """Returns {number of a reducing block, from 1: how many patch tokens it passes on}.

        Args:
            patches, prefix: numbers of patch and prefix tokens before the first block.
            keep: share of the tokens that each dropping block passes on.

        Raises PointError for a block beyond the depth, or one that would have to merge more than half.
        """
        counts, left = {}, patches
        for number in self.places(depth):
            left = counts[number] = min(left, ceil(keep * (left + prefix)))
        if self.kind == "drop":
            return counts
        after = {
            number: left + (patches - left) * (depth - number) // depth for number in range(1, depth + 1)
        }
        before = patches
        for number, count in after.items():
            if before - count > before // 2:
                raise PointError(
                    f"keep {decimal(keep)} cannot be merged: block {number} would have to turn {before} "
                    f"tokens into {count}, and merging takes half of them at most.",
                    "Give a larger share of tokens.",
                )
            before = count
        return after


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Selects k tokens of each image: (B, N, C) tokens, (B, k) indices -> (B, k, C)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def best(tokens: Tensor, scores: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor]:
    """Returns the prefix with the `count` patch tokens of the highest scores, and the numbers of these.

    Args:
        tokens: (B, prefix + patches, C)
        scores: (B, patches)

    Returns:
        (B, prefix + count, C) and (B, count)
    """
    chosen = scores.topk(count, dim=1).indices
    return torch.cat([tokens[:, :prefix], take(tokens[:, prefix:], chosen)], 1), chosen


class Merged(NamedTuple):
    """Tokens, some of which represent several merged patches.

    Args:
        tokens: (B, prefix + k, C)
        sizes: (B, k) how many patches each patch token represents.
        places: (B, patches) which of the k tokens represents each patch.
    """

    tokens: Tensor
    sizes: Tensor
    places: Tensor

    @classmethod
    def none(cls, tokens: Tensor, prefix: int) -> "Merged":
        """Returns unmerged tokens, each of one patch."""
        sizes = torch.ones_like(tokens[:, prefix:, 0])
        places = torch.arange(sizes.shape[1], device=tokens.device)
        return cls(tokens, sizes, places.expand(tokens.shape[0], -1))

    def bias(self) -> Tensor:
        """Returns the logarithm of sizes, to be added to the attention logits: (B, 1, 1, prefix + k)."""
        prefix = self.tokens.shape[1] - self.sizes.shape[1]
        return F.pad(self.sizes.log(), (prefix, 0))[:, None, None]

    def put_back(self) -> Tensor:
        """Returns a token for every patch, the one that represents it: (B, prefix + patches, C)."""
        prefix = self.tokens.shape[1] - self.sizes.shape[1]
        return torch.cat([self.tokens[:, :prefix], take(self.tokens[:, prefix:], self.places)], 1)

    def __getitem__(self, index: Any) -> Any:
        """Cuts `put_back()`, as timm's `forward_intermediates` cuts tokens; or returns a field, by number."""
        return self.put_back()[index] if isinstance(index, tuple) else tuple.__getitem__(self, index)


def merge(merged: Merged, keys: Tensor, count: int) -> Merged:
    """Merges similar patch tokens until `count` are left (ToMe, section 3: bipartite soft matching).

    Every second token (set A) is paired with the most similar of the others (set B) by the cosine of their
    keys. The most similar pairs are merged, into the mean weighted by sizes. Tokens keep their order, so that
    neighbours stay in different sets.

    Args:
        keys: (B, k, D) of the patch tokens.
        count: at least half of k.
    """
    tokens, sizes, places = merged
    images, k = sizes.shape
    if count == k:
        return merged
    prefix = tokens.shape[1] - k
    with in_float32(keys):
        keys = F.normalize(keys.float(), dim=-1)
        likeness, partner = (keys[:, 1::2] @ keys[:, 0::2].mT).max(-1)  # of A with B, (B, |A|)
    left = likeness.topk(k - count, dim=1).indices
    gone, into = 2 * left + 1, 2 * partner.gather(1, left)  # indices among all k
    stays = torch.ones_like(sizes, dtype=torch.long).scatter(1, gone, 0)
    now = stays.cumsum(1) - 1
    now = now.scatter(1, gone, now.gather(1, into))  # (B, k) new index of each token
    total = sizes.new_zeros(images, count).scatter_add(1, now, sizes)
    patches = tokens[:, prefix:] * sizes[..., None]
    summed = tokens.new_zeros(images, count, tokens.shape[-1])
    patches = summed.scatter_add(1, now[..., None].expand_as(patches), patches) / total[..., None]
    return Merged(torch.cat([tokens[:, :prefix], patches], 1), total, now.gather(1, places))


def in_float32(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context without autocast; it does nothing where autocast is off, as in exporters.

    Tokens are chosen in it: keys are so alike that their cosines tie in bfloat16, and then the wrong ones are
    merged (docs/tokens.md).
    """
    kind = tensor.device.type  # "meta" while multiply-accumulates are counted
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def parse_blocks(text: str) -> tuple[int, ...]:
    """Returns the numbers of "4,7,10". Raises PointError for anything else."""
    parts = parts_of(text)
    if not parts or not all(part.isdecimal() and len(part) < 5 for part in parts):
        raise PointError(
            f"{text[:40]!r} are no numbers of blocks.",
            remedy="example",
            setting="drop-blocks",
            value="4,7,10",
        )
    return tuple(sorted({*map(int, parts)}))
