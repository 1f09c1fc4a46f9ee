"""Resamples patch features to the grid of another image size."""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F


def on_the_grid_of(features: Tensor, other: Tensor) -> Tensor:
    """Returns features with their patches resampled to as many as `other` has; unchanged if it has as many.

    Bilinear, with antialiasing. The first token, of the whole image, stays as it is.

    Args:
        features: (B, 1 + N, C), patches of a square image row by row.
        other: (B, 1 + n, C).
    """
    count = other.shape[1] - 1
    answer, patches = features[:, :1], features[:, 1:]
    if patches.shape[1] == count:
        return features
    side = isqrt(patches.shape[1])
    maps = patches.mT.unflatten(2, (side, side))
    resampled = F.interpolate(maps, (isqrt(count),) * 2, mode="bilinear", antialias=True)
    return torch.cat([answer, resampled.flatten(2).mT], 1)
