"""Resamples patch features to the grid of another image size."""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from scala_cli.errors import PointError


def on_the_grid_of(features: Tensor, other: Tensor) -> Tensor:
    """Returns features with their patches resampled to as many as `other` has; unchanged if it has as many.

    Bilinear, with antialiasing. The first token, of the whole image, stays as it is.

    Args:
        features: (B, 1 + N, C), patches row by row.
        other: (B, 1 + n, C).

    Raises PointError for patches that are not a square.
    """
    count = other.shape[1] - 1
    answer, patches = features[:, :1], features[:, 1:]
    if patches.shape[1] == count:
        return features
    side, other_side = isqrt(patches.shape[1]), isqrt(count)
    if (side**2, other_side**2) != (patches.shape[1], count):
        raise PointError(
            "features of other image sizes are compared only for square images and patches.",
            "Leave out the sizes.",
        )
    maps = patches.float().mT.unflatten(2, (side, side))  # antialiasing knows no bfloat16 on a CPU
    resampled = F.interpolate(maps, (other_side, other_side), mode="bilinear", antialias=True)
    return torch.cat([answer, resampled.flatten(2).mT.to(features.dtype)], 1)
