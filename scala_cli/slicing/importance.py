"""Which channels matter, and changes of basis that put them first without changing the function.

A slice keeps the first channels of every axis, so a pretrained model is best cut after its channels have
been put in order. Hidden channels pass a nonlinearity and can only be permuted. Within a head queries and
keys meet only in q.k, values only in the projection that follows, so any invertible change of basis that one
side undoes leaves the function alone. The residual stream is read through LayerNorms, which commute with
every rotation that keeps the mean over channels (the rotation of SliceGPT, arXiv 2401.15024, for RMSNorm,
with that one constraint more).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from scala_cli.slicing.table import Group, Table, axes_of

SMALLEST = 1e-4
"""Smaller eigenvalues and singular values are raised to this share of the largest before dividing by them."""
NOTHING = 1e-12
"""A second moment below which there is nothing to choose a basis by: channels that are always zero."""


def channel_scores(deviation: Tensor, weight: Tensor) -> Tensor:
    """Returns how much each channel moves the output of the layer that reads it.

    Args:
        deviation: (channels,) standard deviation of the channel over tokens.
        weight: (outputs, channels) of that layer.

    Returns:
        (channels,)
    """
    return deviation * weight.norm(dim=0)


def stream_basis(moment: Tensor) -> Tensor:
    """The basis of the residual stream in which the first n channels carry the most, LayerNorm unchanged.

    Let u_1, u_2, ... be the principal directions, perpendicular to 1 = (1, ..., 1) as what LayerNorm gives
    is. Rows q_i = 1/C + sum_j L_ij u_j with L L^T = I - 1 1^T / C, L lower triangular, are orthonormal and
    each sums to one: the mean over channels is the same in both bases, and the first n rows span no more
    than the first n principal directions and 1.

    Args:
        moment: (C, C) second moment about the mean of the centred stream, in float64.

    Returns:
        (C, C) orthogonal Q with Q 1 = 1: x' = Q x, and LayerNorm(Q x) = Q LayerNorm(x).
    """
    channels = len(moment)
    identity = torch.eye(channels, dtype=moment.dtype, device=moment.device)
    centre = identity - 1 / channels
    # 1 is an eigenvector whose value is raised above all others, so that it comes last and can be left out
    _, directions = torch.linalg.eigh(centre @ moment @ centre + (torch.trace(moment) + 1) / channels)
    directions = directions[:, :-1].flip(1)
    mixing = torch.linalg.cholesky(centre[:-1, :-1])
    rows = mixing @ directions.T
    return torch.cat([rows, -rows.sum(0, keepdim=True)]) + 1 / channels


def query_key_bases(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Bases of one head in which the first n channels approximate q.k best.

    The singular value decomposition of the product of both moments' roots: every n is the optimal rank-n
    approximation of the logits, in the mean over tokens. What all keys share shifts all logits of a query
    alike and is lost in the softmax, so keys count about their mean.

    Args:
        queries: (d, d) second moment of q about zero.
        keys: (d, d) second moment of k about its mean.

    Returns:
        (d, d), (d, d): q' = Q q and k' = K k, with Q^T K = 1, so that q'.k' = q.k.
    """
    root_q, inverse_q = roots(queries)
    root_k, inverse_k = roots(keys)
    left, values, right = torch.linalg.svd(root_q.T @ root_k)
    share = values.sqrt()[:, None]
    return share * (left.T @ inverse_q), share * (right @ inverse_k)


def value_basis(attended: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """The basis of one head in which the first n channels carry the projection's output best.

    Args:
        attended: (d, d) second moment of the head's output, before the projection.
        projection: (C, d) the projection's columns for this head.

    Returns:
        (d, d), (C, d): v' = V v, and the projection that undoes it. V can be inverted, also where the
        projection reads nothing: values that stay what they are let it learn again.
    """
    root, inverse = roots(attended)
    left, values, right = torch.linalg.svd(projection @ root, full_matrices=False)
    share = lifted(values).sqrt()
    return share[:, None] * (right @ inverse), left * (values / share)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """A root R of a symmetric positive matrix, R R^T, and its inverse.

    Small eigenvalues are lifted: R only chooses a basis, and must invert well.
    """
    values, vectors = torch.linalg.eigh(moment)
    scale = lifted(values).sqrt()
    return vectors * scale, (vectors / scale).T


def lifted(values: Tensor) -> Tensor:
    """Values of which none is less than SMALLEST of the largest; ones where all of them are NOTHING."""
    largest = values.max()
    return values.clamp_min(largest * SMALLEST) if largest > NOTHING else torch.ones_like(values)


def change_basis(state: Mapping[str, Tensor], table: Table, group: Group, basis: Tensor) -> dict[str, Tensor]:
    """The state with the channels of a group in another basis, on every axis that carries them.

    Args:
        basis: (channels, channels), orthogonal: x' = basis x, whether an axis writes x or reads it.
    """
    changed = dict(state)
    for name, tensor in state.items():
        for dim, axis in enumerate(axes_of(name, table)):
            if axis is not None and axis.group == group:
                tensor = (tensor.movedim(dim, -1) @ basis.T).movedim(-1, dim)
        changed[name] = tensor
    return changed


def permute_state(
    state: Mapping[str, Tensor], table: Table, group: Group, order: Tensor, within: str = ""
) -> dict[str, Tensor]:
    """The state with the channels of a group in another order.

    Args:
        order: (channels,) the old number of each new channel.
        within: only parameters whose name begins so; the hidden channels of each block have their own order.
    """
    permuted = dict(state)
    for name, tensor in state.items():
        for dim, axis in enumerate(axes_of(name, table)):
            if axis is not None and axis.group == group and name.startswith(within):
                tensor = tensor.index_select(dim, order)
        permuted[name] = tensor
    return permuted
