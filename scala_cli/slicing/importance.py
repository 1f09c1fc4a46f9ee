"""Computes channel importance, and changes of basis that put important channels first, function unchanged.

A slice keeps the first channels of every axis, so a pretrained model should be cut after its channels have
been put in order. Hidden channels pass a nonlinearity and can only be permuted. Within a head, queries and
keys are used only in q.k and values only in the projection, so the function stays under any invertible
change of basis that the other side undoes. The residual stream is read through LayerNorms, which commute
with every rotation that keeps the mean over channels (SliceGPT, arXiv 2401.15024, rotates it for RMSNorm,
without this constraint).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from scala_cli.slicing.table import Group, Table, axes_of

SMALLEST = 1e-4
"""Eigenvalues and singular values are raised to this share of the largest before dividing by them."""
NOTHING = 1e-12
"""Second moments below this count as zero: they give no reason to prefer a basis."""


def channel_scores(deviation: Tensor, weight: Tensor) -> Tensor:
    """Returns how much each channel moves the output of the layer that reads it, (channels,).

    Args:
        deviation: (channels,) standard deviation of each channel over tokens.
        weight: (outputs, channels) of that layer.
    """
    return deviation * weight.norm(dim=0)


def stream_basis(moment: Tensor) -> Tensor:
    """Returns the basis of the residual stream whose first n channels carry the most, for every n.

    Let u_1, u_2, ... be the principal directions, which are perpendicular to 1 = (1, ..., 1) like LayerNorm's
    output. Rows q_i = 1/C + sum_j L_ij u_j, with L lower triangular and L L^T = I - 1 1^T / C, are
    orthonormal and each sums to one. So the mean over channels is the same in both bases, and the first n
    rows lie in the span of the first n principal directions and 1.

    Args:
        moment: (C, C) second moment about the mean of the centred stream, in float64.

    Returns:
        (C, C) orthogonal Q with Q 1 = 1: x' = Q x, and LayerNorm(Q x) = Q LayerNorm(x).
    """
    channels = len(moment)
    identity = torch.eye(channels, dtype=moment.dtype, device=moment.device)
    centre = identity - 1 / channels
    # raise the eigenvalue of the eigenvector 1 above all others, so that it comes last and can be dropped
    _, directions = torch.linalg.eigh(centre @ moment @ centre + (torch.trace(moment) + 1) / channels)
    directions = directions[:, :-1].flip(1)
    mixing = torch.linalg.cholesky(centre[:-1, :-1])
    rows = mixing @ directions.T
    return torch.cat([rows, -rows.sum(0, keepdim=True)]) + 1 / channels


def query_key_bases(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bases for the queries and keys of a head whose first n channels approximate q.k best.

    They come from a singular value decomposition of the product of both moments' roots, so for every n the
    first n channels give the best rank-n approximation of the logits in the mean over tokens. The keys' mean
    shifts all logits of a query equally, which softmax ignores; so keys are taken about their mean.

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
    """Returns a basis for the values of a head whose first n channels carry the projection's output best.

    Args:
        attended: (d, d) second moment of the head's output, before the projection.
        projection: (C, d) the projection's columns for this head.

    Returns:
        (d, d), (C, d): V with v' = V v, and the projection that undoes it. V is invertible even if the
        projection is rank-deficient, so no value is lost to later training.
    """
    root, inverse = roots(attended)
    left, values, right = torch.linalg.svd(projection @ root, full_matrices=False)
    share = lifted(values).sqrt()
    return share[:, None] * (right @ inverse), left * (values / share)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a root R of a symmetric positive matrix R R^T, and the inverse of R.

    Small eigenvalues are raised (`lifted`), so that R inverts well; it only serves to choose a basis.
    """
    values, vectors = torch.linalg.eigh(moment)
    scale = lifted(values).sqrt()
    return vectors * scale, (vectors / scale).T


def lifted(values: Tensor) -> Tensor:
    """Raises values to at least SMALLEST times the largest; returns ones if all are below NOTHING."""
    largest = values.max()
    return values.clamp_min(largest * SMALLEST) if largest > NOTHING else torch.ones_like(values)


def change_basis(state: Mapping[str, Tensor], table: Table, group: Group, basis: Tensor) -> dict[str, Tensor]:
    """Returns the state with the channels of a group in another basis, on every axis that carries them.

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
    """Returns the state with the channels of a group in another order.

    Args:
        order: (channels,) the old index of each new channel.
        within: prefix of the parameters to change, as the hidden channels of each block have their own order.
    """
    permuted = dict(state)
    for name, tensor in state.items():
        for dim, axis in enumerate(axes_of(name, table)):
            if axis is not None and axis.group == group and name.startswith(within):
                tensor = tensor.index_select(dim, order)
        permuted[name] = tensor
    return permuted
