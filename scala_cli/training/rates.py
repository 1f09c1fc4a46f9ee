"""Scales learning rates by the size of each weight, as an optimizer's step does not depend on it.

In a deep ViT weights differ in size by a factor of a hundred, because a LayerScale near zero makes the weight
that it is folded into small. With one rate for all, those are destroyed within a few steps
(docs/results/backbones.md, docs/results/calibration.md).
"""

from torch import nn
from torch.optim import Optimizer

SIZE_OF_ZEROS = 0.02
"""Size assumed for a tensor of zeros: the standard deviation of timm's initialisation."""
SMALLEST = 1e-3
SMALL = 0.015
"""Matrices below this size, less than timm's initialisation gives any, have lower rates with AdamW."""


def has_relative_rates(name: str) -> bool:
    """Whether the optimizer of this name uses learning rates relative to the size of each weight."""
    return name.endswith("muon")


def make_relative(optimizer: Optimizer) -> None:
    """Multiplies the learning rate of every parameter by its root mean square, in place."""
    optimizer.param_groups = [
        {**group, "params": [p], "lr_scale": group.get("lr_scale", 1.0) * relative_rate(p)}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def slow_small(optimizer: Optimizer) -> None:
    """Lowers the learning rate of every matrix below SMALL in proportion to its size, in place."""
    groups = []
    for group in optimizer.param_groups:
        scales = [min(1.0, relative_rate(p) / SMALL) if p.ndim > 1 else 1.0 for p in group["params"]]
        pairs = [*zip(group["params"], scales, strict=True)]
        groups.append({**group, "params": [p for p, scale in pairs if scale == 1]})
        groups += [
            {**group, "params": [p], "lr_scale": group.get("lr_scale", 1.0) * scale}
            for p, scale in pairs
            if scale < 1
        ]
    optimizer.param_groups = [group for group in groups if group["params"]]


def relative_rate(parameter: nn.Parameter) -> float:
    """Returns the root mean square of a parameter's values, at least SMALLEST."""
    size = parameter.detach().square().mean().sqrt().item()
    return max(size, SMALLEST) if size else SIZE_OF_ZEROS
