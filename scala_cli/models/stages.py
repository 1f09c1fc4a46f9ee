"""Splits the forward of a ViT into stages along the residual stream, so that each can be run separately."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.models.slimmed import modules_of
from scala_cli.models.tokens import read_every

PRE_NORM = (("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2"))
"""The two branches of timm's Block, each a sequence of modules whose output is added to the stream."""
POST_NORM = (("attn", "norm1"), ("mlp", "norm2"))
"""The same for timm's ResPostBlock."""
HEAD = ("norm", "attn_pool", "fc_norm", "head", "head_dist")
HEAD_NORMS = ("norm", "fc_norm")


@dataclass(frozen=True)
class Stage:
    """One stage of the forward.

    Args:
        parts: names of its modules.
        run: (model, tokens) -> tokens after the stage.
        residual: whether `run` adds the output of its last layer to its input tokens.
        norms: names of the norms through which its linear layers read the tokens.
    """

    parts: tuple[str, ...]
    run: Callable[[Any, Tensor], Tensor]
    residual: bool = False
    norms: tuple[str, ...] = ()

    def layers(self, vit: VisionTransformer) -> dict[str, nn.Module]:
        """Returns the stage's linear layers and norms, by name."""
        inside = tuple(f"{part}." for part in self.parts)
        return {
            name: module
            for name, module in vit.named_modules()
            if f"{name}.".startswith(inside) and isinstance(getattr(module, "weight", None), Tensor)
        }


def stages(vit: VisionTransformer, every_token: bool = False) -> list[Stage]:
    """Returns all stages after the embedding: norm_pre, the two branches of each block, then the head.

    A token slimming module is a stage after its block.

    Args:
        every_token: whether the head reads the patch tokens as well, not only the pooled one.
    """
    found = [Stage(("norm_pre",), lambda vit, tokens: vit.norm_pre(tokens))]
    slimming = modules_of(vit)
    for number, block in enumerate(vit.blocks):
        pre_norm = hasattr(block, "ls1")
        for branch in PRE_NORM if pre_norm else POST_NORM:
            parts = tuple(f"blocks.{number}.{part}" for part in branch)
            found.append(Stage(parts, add_branch(parts), True, parts[:1] if pre_norm else ()))
        if number in slimming:
            found.append(Stage((), slim_behind(number), norms=(f"blocks.{number}.tsm.norm",)))
    pooled = Stage(HEAD, lambda vit, tokens: vit.forward_head(vit.norm(tokens)), norms=HEAD_NORMS)
    dense = Stage(HEAD, lambda vit, tokens: read_every(vit, vit.norm(tokens)), norms=HEAD_NORMS)
    return [*found, dense if every_token else pooled]


def add_branch(parts: tuple[str, ...]) -> Callable[[Any, Tensor], Tensor]:
    """Returns a function: tokens -> tokens plus the output of these modules, applied in sequence."""

    def run(vit: VisionTransformer, tokens: Tensor) -> Tensor:
        written = tokens
        for part in parts:
            written = vit.get_submodule(part)(written)
        return tokens + written

    return run


def slim_behind(number: int) -> Callable[[Any, Tensor], Tensor]:
    """Returns a function that runs the token slimming module behind a block."""
    return lambda vit, tokens: vit.blocks[number].tsm(tokens)


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Returns the tokens before the first stage: (B, C, H, W) images -> (B, N, C)."""
    return vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))


def normed(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Applies the model's final norm, which timm runs before or after pooling, to (B, N, C) tokens."""
    return vit.fc_norm(vit.norm(tokens))


class Reached(Exception):
    """Stops a forward at the layer whose input is wanted."""

    def __init__(self, read: Tensor) -> None:
        self.read = read


def read_by(layer: nn.Module, stage: Stage, vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Returns a layer's input, by running its stage on `tokens` and stopping at the layer."""

    def stop(_: nn.Module, read: tuple[Tensor, ...]) -> None:
        raise Reached(read[0])

    with hooked([layer.register_forward_pre_hook(stop)]):
        try:
            stage.run(vit, tokens)
        except Reached as reached:
            return reached.read
    raise AssertionError("the stage does not run this layer")


@contextmanager
def hooked(hooks: Iterable[Any]) -> Iterator[None]:
    """Removes the hooks at the end of the block."""
    placed = list(hooks)
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()
