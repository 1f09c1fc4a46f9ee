"""Token slimming modules (SiT, arXiv 2111.12624): a ViT whose tokens are merged by a learnt soft assignment.

To timm such a model is an architecture of its own, `slimmed_vit` (models/registered.py). Without the modules
its weights are an ordinary ViT's, so they lie beside it in a checkpoint (`extra.safetensors`).
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scala_cli.models.block import SlimBlock
from scala_cli.slicing.slim import logits_of, pooling, slim_counts

MODULE = ".tsm."
"""In the names of the modules' parameters."""
SLIMMED_ARGS = ("base", "tsm", "stages", "keep")
"""Arguments of `slimmed_vit` beside those of the model that is slimmed."""


class TokenSlimming(nn.Module):
    """Merges tokens into fewer, each a weighted mean of all (section 3.1); tokens before the patches pass by.

    Beside the paper's logits, which come from what a token holds, each place has one of its own, so that the
    module can start as a mean of neighbours. Where it is zero, the module is the paper's.

    Args:
        dim: channels of the stream.
        given: patch tokens that come in.
        tokens: those that go on.
        prefix: tokens before the patches.
    """

    def __init__(self, dim: int, given: int, tokens: int, prefix: int) -> None:
        super().__init__()
        self.given, self.tokens, self.prefix = given, tokens, prefix
        self.norm = nn.LayerNorm(dim)
        self.key = nn.Linear(dim, dim // 2)
        self.query = nn.Linear(dim // 2, tokens)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(tokens, given))

    def shares(self, patches: Tensor) -> Tensor:
        """(B, given, C) -> (B, tokens, given): what each that goes on is made of; rows add up to one."""
        logits = self.query(F.gelu(self.key(self.norm(patches)))).mT * self.scale
        return (logits + self.bias).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + given, C) -> (B, prefix + tokens, C)"""
        patches = x[:, self.prefix :]
        return torch.cat([x[:, : self.prefix], self.shares(patches) @ patches], 1)


class SlimmedBlock(SlimBlock):
    """A block that may have a token slimming module behind it."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.tsm: nn.Module = nn.Identity()

    def forward(self, x: Tensor, *masks: Any, **named: Any) -> Tensor:
        """(B, N, C) -> (B, M, C)"""
        return self.tsm(super().forward(x, *masks, **named))


def put_behind(vit: Any, counts: Mapping[int, int]) -> None:
    """Gives some blocks, in place, a token slimming module.

    Args:
        vit: a model of SlimmedBlocks.
        counts: as `slim_counts`.
    """
    given, like = vit.patch_embed.num_patches, vit.patch_embed.proj.weight
    for number, tokens in sorted(counts.items()):
        with torch.device(like.device):
            vit.blocks[number].tsm = TokenSlimming(len(like), given, tokens, vit.num_prefix_tokens)
        given = tokens


def modules_of(vit: Any) -> dict[int, TokenSlimming]:
    """Returns the token slimming modules by the number of the block before them."""
    found = {number: getattr(block, "tsm", None) for number, block in enumerate(vit.blocks)}
    return {number: module for number, module in found.items() if isinstance(module, TokenSlimming)}


def counts_of(vit: Any) -> dict[int, int]:
    """Returns the counts that a model was built with, as `slim_counts`."""
    return {number: module.tokens for number, module in modules_of(vit).items()}


def apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of the ViT, and those of its token slimming modules."""
    slim = {name: t for name, t in state.items() if MODULE in name and name.startswith("blocks.")}
    return {name: tensor for name, tensor in state.items() if name not in slim}, slim


@torch.no_grad()
def start_slimming(vit: Any, start: str, seed: int) -> None:
    """Sets the weights with which training begins, in place.

    Args:
        start: "pool", means of neighbouring patches; or "random", the paper's, every token of all alike.
    """
    grid = vit.patch_embed.grid_size
    random = torch.Generator().manual_seed(seed)
    for module in modules_of(vit).values():
        nn.init.ones_(module.norm.weight)
        nn.init.ones_(module.scale)
        for constant in (module.norm.bias, module.bias):
            nn.init.zeros_(constant)
        for layer in (module.key, module.query):
            nn.init.trunc_normal_(layer.weight, std=0.02, generator=random)
            nn.init.zeros_(layer.bias)
        if start == "pool":
            module.bias.copy_(logits_of(pooling(module.tokens, grid, module.given)))
        grid = None


def build(base: str, tsm: Mapping[str, int] | None, stages: Sequence[int], keep: float, **args: Any) -> Any:
    """Returns timm's model `base` with token slimming modules: at `tsm`, or behind `stages`."""
    vit: Any = timm.create_model(base, block_fn=SlimmedBlock, **args)
    vit.base = base
    share = Fraction(keep).limit_denominator(1 << 14)
    counts = {int(number): tokens for number, tokens in (tsm or {}).items()} or slim_counts(
        stages, share, vit.patch_embed.num_patches, len(vit.blocks)
    )
    put_behind(vit, counts)
    return vit
