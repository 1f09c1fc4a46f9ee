"""Token slimming modules (SiT, arXiv 2111.12624): a ViT whose tokens are merged by a learnt soft assignment.

timm builds such a model as a separate architecture, `slimmed_vit` (models/registered.py). The other weights
are an ordinary ViT's, so a checkpoint holds those of the modules in `extra.st`.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scala_cli.models.block import Reverse, SlimBlock
from scala_cli.slicing.slim import logits_of, pooling, slim_counts

MODULE = ".tsm."
"""Part of the names of the modules' parameters."""
SLIMMED_ARGS = ("base", "tsm", "stages", "keep")
"""Arguments that `slimmed_vit` takes besides those of the model that is slimmed."""


class TokenSlimming(nn.Module):
    """Merges patch tokens into fewer, each a weighted mean of all (section 3.1); prefix tokens are unchanged.

    The paper computes the logits from the tokens alone. Here each pair of an output and an input token also
    has a learnt bias, so that the module can start as a mean of neighbours. With zeros it is the paper's.

    Args:
        dim: channels of the stream.
        given: number of patch tokens coming in.
        tokens: number of patch tokens going out.
        prefix: number of tokens before the patches.
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
        """Returns the weights of the means, (B, given, C) -> (B, tokens, given); rows add up to one."""
        logits = self.query(F.gelu(self.key(self.norm(patches)))).mT * self.scale
        return (logits + self.bias).softmax(-1)

    @torch.no_grad()
    def reverse(self, read: tuple[Tensor], wrote: Tensor) -> Reverse:
        """Returns a function that gives each patch the mean of the tokens it was merged into."""
        shares = self.shares(read[0][:, self.prefix :])
        weights = (shares / shares.sum(1, keepdim=True)).mT
        return lambda patches, norm: weights @ patches

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, prefix + given, C) to (B, prefix + tokens, C)."""
        patches = x[:, self.prefix :]
        return torch.cat([x[:, : self.prefix], self.shares(patches) @ patches], 1)


class SlimmedBlock(SlimBlock):
    """A block that may be followed by a token slimming module."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.tsm: nn.Module = nn.Identity()

    def forward(self, x: Tensor, *masks: Any, **named: Any) -> Tensor:
        """Maps (B, N, C) to (B, M, C)."""
        return self.tsm(super().forward(x, *masks, **named))


def put_behind(vit: Any, counts: Mapping[int, int]) -> None:
    """Adds a token slimming module behind some blocks, in place.

    Args:
        vit: a model of SlimmedBlocks.
        counts: block number -> how many patch tokens it passes on.
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
    """Returns {block number: patch tokens that it passes on} for the blocks with a token slimming module."""
    return {number: module.tokens for number, module in modules_of(vit).items()}


def apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict into the tensors of the ViT and those of its token slimming modules."""
    slim = {name: t for name, t in state.items() if MODULE in name and name.startswith("blocks.")}
    return {name: tensor for name, tensor in state.items() if name not in slim}, slim


@torch.no_grad()
def start_slimming(vit: Any, start: str, seed: int) -> None:
    """Initialises the token slimming modules for training, in place.

    Args:
        start: "pool", each token the mean of neighbouring patches; or "random", as in the paper, each token
            about the mean of all.
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
    """Returns timm's model `base` with token slimming modules: as in `tsm`, else from `stages` and `keep`."""
    vit: Any = timm.create_model(base, block_fn=SlimmedBlock, **args)
    vit.base = base
    share = Fraction(keep).limit_denominator(1 << 14)
    counts = {int(number): tokens for number, tokens in (tsm or {}).items()} or slim_counts(
        stages, share, vit.patch_embed.num_patches, len(vit.blocks)
    )
    put_behind(vit, counts)
    return vit
