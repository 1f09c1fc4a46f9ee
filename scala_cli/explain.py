"""Follows the patches of one image: which token each goes into, at every stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.data.images import as_rgb, open_image
from scala_cli.data.transform import transform_for
from scala_cli.errors import CheckpointError, DataError
from scala_cli.models.block import MergeBlock
from scala_cli.models.slimmed import TokenSlimming, modules_of
from scala_cli.models.stages import hooked
from scala_cli.models.vit import Spec
from scala_cli.slicing.tokens import Merged


@dataclass(frozen=True)
class Merging:
    """Which patches make up the tokens that a block passes on.

    Args:
        block: the number of the block, from 0.
        shares: (tokens, patches) how much of each patch of the image is in each token; rows add up to one.
    """

    block: int
    shares: Tensor

    @property
    def owners(self) -> Tensor:
        """(patches,) the token that has most of each patch; -1 for a patch that is in none."""
        most, owners = self.shares.max(0)
        return owners.where(most > 0, -1)

    def as_row(self) -> dict[str, Any]:
        """Returns {"block", "tokens", "effective", "owners"}.

        A token is effectively made of 1 / sum(share^2) patches; "effective" is the mean over tokens. "owners"
        lists `owners` row by row.
        """
        effective = (1 / self.shares.square().sum(1)).mean().item()
        return {
            "block": self.block,
            "tokens": len(self.shares),
            "effective": round(effective, 2),
            "owners": self.owners.tolist(),
        }


@torch.inference_mode()
def mergings(vit: VisionTransformer, image: Tensor) -> list[Merging]:
    """Returns which patches make up the tokens after each block that passes on fewer tokens.

    Args:
        image: (C, H, W), normalised.

    Raises CheckpointError for a model that passes on every token.
    """
    full: Any = vit
    stages = [Merging(-1, torch.eye(full.patch_embed.num_patches, device=image.device))]

    def note(number: int, reducer: nn.Module, read: tuple[Any, ...], wrote: Any) -> None:
        stages.append(Merging(number, passed_on(reducer, read[0], wrote, stages[-1].shares)))

    blocks = {n: b for n, b in enumerate(full.blocks) if getattr(b, "passing", None)}
    places: dict[int, nn.Module] = {n: b.dropping or b for n, b in blocks.items()}
    places |= modules_of(vit)
    if not places:
        raise CheckpointError(
            "this model keeps every token to the end: there is nothing to explain.", remedy="slim_tokens"
        )
    with hooked([place.register_forward_hook(partial(note, number)) for number, place in places.items()]):
        vit.eval()(image[None])
    return stages[1:]


def passed_on(reducer: Any, read: Any, wrote: Any, shares: Tensor) -> Tensor:
    """Returns the shares, as in `Merging`, of one image's tokens after a module that passes on fewer.

    Args:
        reducer: a token slimming module, the dropping part of a block, or a block that merges tokens.
        read, wrote: its input and its output.
        shares: those of the tokens before the module.
    """
    if isinstance(reducer, TokenSlimming):
        return reducer.shares(read[:, reducer.prefix :])[0] @ shares
    if isinstance(reducer, MergeBlock):
        if isinstance(wrote, Merged):
            places = wrote.places[0]
        else:  # the last block gives every patch its token: patches of one token are equal
            passing: Any = reducer.passing
            places = wrote[0, passing.prefix :].unique(dim=0, return_inverse=True)[1]
        stands = (places == torch.arange(int(places.max()) + 1, device=places.device)[:, None]).float()
        return stands / stands.sum(1, keepdim=True)
    return shares[wrote[1][0]]


def read_image(file: Path, spec: Spec, upright: bool = True) -> Tensor:
    """Returns an image as the model takes it, (C, H, W). Raises DataError if it cannot be read."""
    try:
        with open_image(str(file)) as opened:
            return transform_for(spec)(as_rgb(opened, upright))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.", "Name an image.") from None
    except Exception as error:  # a broken file makes Pillow fail in arbitrary ways
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read as an image: {error}.", "Name another one.") from None


def pixels_of(image: Tensor, spec: Spec) -> Tensor:
    """Undoes the normalisation of an image (C, H, W); returns it as (H, W, C) from 0 to 1."""
    mean, std = (torch.tensor(spec.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0)


def painted(pixels: Tensor, merging: Merging, grid: Sequence[int]) -> Tensor:
    """Returns the picture with every patch in the mean colour of its token, black if it is in none.

    Lines separate patches whose tokens differ.

    Args:
        pixels: (H, W, C)
        grid: rows and columns of patches.
    """
    rows, columns = grid
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    patches = pixels.unflatten(1, (columns, wide)).unflatten(0, (rows, high))
    colours = merging.shares @ patches.mean((1, 3)).flatten(0, 1)
    owners = merging.owners.unflatten(0, (rows, columns))
    colours = torch.cat([colours, colours.new_zeros(1, colours.shape[1])])  # for -1
    picture = colours[owners][:, None, :, None].expand(patches.shape).clone()
    below, beside = owners[1:] != owners[:-1], owners[:, 1:] != owners[:, :-1]
    picture[:-1, -1][below] = 0  # the last line of pixels of a patch
    picture[:, :, :-1, -1] *= ~beside[:, None, :, None]  # and its last column
    return picture.flatten(2, 3).flatten(0, 1)
