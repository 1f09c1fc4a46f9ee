"""Learning rates relative to the size of each weight, for optimizers whose steps do not depend on it."""

from typing import Any

from torch import nn

SIZE_OF_ZEROS = 0.02
"""A tensor of zeros counts as one that timm has just initialised (standard deviation 0.02)."""
SMALLEST = 1e-3


def relative_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns a group for every parameter, with a learning rate relative to its root mean square.

    In a deep ViT these differ by a factor of a hundred: a LayerScale near zero, once it is part of a weight,
    makes that weight small. At one rate for all, an optimizer that moves every weight equally far loses what
    the small ones hold within a few steps (docs/results/backbones.md).

    Args:
        weight_decay: of matrices; vectors have none.
    """
    return [
        {
            "params": [parameter],
            "lr_scale": relative_rate(parameter),
            "weight_decay": weight_decay if parameter.ndim > 1 else 0.0,
        }
        for parameter in model.parameters()
        if parameter.requires_grad
    ]


def relative_rate(parameter: nn.Parameter) -> float:
    """Returns the root mean square of a parameter's values, at least SMALLEST."""
    size = parameter.detach().square().mean().sqrt().item()
    return max(size, SMALLEST) if size else SIZE_OF_ZEROS
