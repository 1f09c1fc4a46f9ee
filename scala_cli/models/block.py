"""timm's transformer block, able to pass on fewer tokens than it gets."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from scala_cli.slicing.tokens import Merged, TokenRule, best, in_float32, merge

Reverse = Callable[[Tensor, nn.Module], Tensor]
"""Maps patch tokens (B, k, C) after a reduction to those of all patches before it, (B, N, C).

Its second argument is a norm that the given tokens have passed."""


class Passing(NamedTuple):
    """How a block reduces its tokens.

    Args:
        kept: how many patch tokens it passes on.
        prefix: how many tokens come before the patches; it always passes these on.
        by_class: whether the first token is a class token, whose attention scores the patches.
        last: whether no later block reduces tokens.
    """

    kept: int
    prefix: int
    by_class: bool
    last: bool


class SlimBlock(Block):
    """timm's block, with equal outputs bit for bit unless `read` or `passing` is set.

    Pass this class to timm as `block_fn` to build a model of these blocks.
    """

    read: int | None = None
    """How many of the first tokens the block computes, attending to all tokens; None computes all."""
    passing: Passing | None = None
    """How many tokens pass from the attention to the MLP; None passes all."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.dropping: Any = None  # a `Dropping` if the block drops tokens

    def forward(self, x: Any, *masks: Any, **named: Any) -> Any:
        """Maps (B, N, C) to (B, N, C), (B, read, C) or (B, prefix + kept, C)."""
        if self.read is not None:
            x = x[:, : self.read] + self.drop_path1(self.ls1(self.attend(self.norm1(x), self.read)))
        elif self.dropping is not None:
            inside = self.norm1(x)
            with in_float32(inside):
                scores = attention_to_patches(self.attn, inside, self.dropping.passing)
            x, _ = self.dropping(x + self.drop_path1(self.ls1(self.attn(inside))), scores)
        else:
            return super().forward(x, *masks, **named)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attend(self, x: Tensor, read: int) -> Tensor:
        """Computes attention with only the first tokens as queries: (B, N, C) -> (B, read, C).

        torch's attention accepts fewer queries than keys. With so few queries, explicit attention, which
        computes the attention weights, is at least as fast as the fused kernel (docs/performance.md).
        """
        attn: Any = self.attn
        tokens = x.transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            tokens[:read],
            tokens,
            tokens,
            attn.attn_dim,
            attn.num_heads,
            attn.qkv.weight,
            attn.qkv.bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=attn.attn_drop.p,
            out_proj_weight=attn.proj.weight,
            out_proj_bias=attn.proj.bias,
            training=self.training,
            average_attn_weights=False,
        )
        return attn.proj_drop(attended.transpose(0, 1))


class Dropping(nn.Module):
    """Drops the patch tokens with the lowest scores. It is a module so that a hook sees which ones."""

    def __init__(self, passing: Passing) -> None:
        super().__init__()
        self.passing = passing

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, N, C) to (B, prefix + kept, C), and returns the numbers of the kept patches, (B, kept)."""
        return best(x, scores, self.passing.prefix, self.passing.kept)

    def reverse(self, read: tuple[Tensor, Tensor], wrote: tuple[Tensor, Tensor]) -> Reverse:
        """Returns a function that gives dropped patches the token they had before, after a norm."""
        before, chosen = read[0][:, self.passing.prefix :], wrote[1]

        def put_back(patches: Tensor, norm: nn.Module) -> Tensor:
            every = norm(before)
            return every.scatter(1, chosen[..., None].expand_as(patches), patches.to(every.dtype))

        return put_back


class MergeBlock(SlimBlock):
    """Merges tokens between attention and MLP (ToMe, arXiv 2210.09461); needs no training.

    From the first to the last merging block, a `Merged` replaces the tokens tensor. The last one gives every
    patch its token back, so a head that pools sees the usual number of tokens.
    """

    def forward(self, x: Any, *masks: Any, **named: Any) -> Any:
        """Maps (B, N, C) or Merged to Merged; the last merging block returns (B, N, C)."""
        if self.passing is None:
            return super().forward(x, *masks, **named)
        merged = x if isinstance(x, Merged) else Merged.none(x, self.passing.prefix)
        inside = self.norm1(merged.tokens)
        with in_float32(inside):
            keys = mean_keys(self.attn, inside[:, self.passing.prefix :])
        mask = None if merged is not x else merged.bias()
        attended = self.drop_path1(self.ls1(self.attn(inside, attn_mask=mask)))
        merged = merge(merged._replace(tokens=merged.tokens + attended), keys, self.passing.kept)
        tokens = merged.tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(merged.tokens))))
        merged = merged._replace(tokens=tokens)
        return merged.put_back() if self.passing.last else merged


def pass_on(vit: Any, rule: TokenRule, keep: Fraction) -> None:
    """Sets how many tokens each SlimBlock of a model passes on. Raises PointError as `TokenRule.counts`."""
    counts = rule.counts(vit.patch_embed.num_patches, vit.num_prefix_tokens, len(vit.blocks), keep)
    for number, count in counts.items():
        passing = Passing(count, vit.num_prefix_tokens, vit.cls_token is not None, number == max(counts))
        block = vit.blocks[number - 1]
        block.passing = passing
        if rule.kind == "drop":
            block.dropping = Dropping(passing)


@torch.no_grad()
def attention_to_patches(attn: Any, x: Tensor, passing: Passing) -> Tensor:
    """Returns the attention that each patch gets from the class token, mean over heads: (B, patches).

    In a model without a class token it is the mean over all tokens.

    Args:
        x: (B, N, C) input of the attention layer.
    """
    queries, keys, _ = attn.qkv.weight.chunk(3)
    x = x.to(keys.dtype)
    biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    q = attn.q_norm(heads(F.linear(x[:, :1] if passing.by_class else x, queries, biases[0]), attn))
    if passing.by_class and isinstance(attn.k_norm, nn.Identity):
        # q (W x) = (q W) x avoids computing all keys; softmax cancels their bias, the same for every token
        logits = (q @ keys.unflatten(0, (attn.num_heads, -1))).flatten(1, 2) @ x.mT
    else:
        k = attn.k_norm(heads(F.linear(x, keys, biases[1]), attn))
        logits = (q @ k.mT).flatten(1, 2)
    return (logits * attn.scale).softmax(-1).mean(1)[:, passing.prefix :]


def heads(x: Tensor, attn: Any) -> Tensor:
    """Splits the channels into heads: (B, N, heads * D) -> (B, heads, N, D)."""
    return x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


@torch.no_grad()
def mean_keys(attn: Any, x: Tensor) -> Tensor:
    """Returns the mean over heads of the keys of tokens: (B, N, C) -> (B, N, D)."""
    weight = attn.qkv.weight.chunk(3)[1]
    x = x.to(weight.dtype)
    bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)[1]
    if isinstance(attn.k_norm, nn.Identity):
        bias = None if bias is None else bias.unflatten(0, (attn.num_heads, -1)).mean(0)
        return F.linear(x, weight.unflatten(0, (attn.num_heads, -1)).mean(0), bias)
    return attn.k_norm(heads(F.linear(x, weight, bias), attn)).mean(1)
