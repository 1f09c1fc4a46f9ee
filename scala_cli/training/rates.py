"""The default optimizer and its learning rate; rates relative to the size of each weight."""

from torch import nn
from torch.optim import Optimizer

from scala_cli.models.slimmable import SlimmableViT
from scala_cli.tasks.base import Task

SIZE_OF_ZEROS = 0.02
"""Size assumed for a tensor of zeros: the standard deviation of timm's initialisation."""
SMALLEST = 1e-3


def default_optimizer(start: SlimmableViT, task: Task) -> str:
    """Returns timm's name of the optimizer for a start: Muon where training begins near an optimum.

    That is so for fitted widths and for features. There AdamW loses what they have before it gains anything
    (docs/performance.md, docs/results/backbones.md).
    """
    return "muon" if start.vectors or not task.labelled else "adamw"


def default_rate(name: str) -> float:
    """Returns the default peak learning rate of the optimizer of this name."""
    return 2e-3 if has_relative_rates(name) else 1e-3


def has_relative_rates(name: str) -> bool:
    """Whether the optimizer of this name uses learning rates relative to the size of each weight."""
    return name.endswith("muon")


def make_relative(optimizer: Optimizer) -> None:
    """Multiplies the learning rate of every parameter by its root mean square, in place.

    In a deep ViT these differ by a factor of a hundred, because a LayerScale near zero makes the weight that
    it is folded into small. With one rate for all, an optimizer that moves every weight equally far destroys
    the small ones within a few steps (docs/results/backbones.md).
    """
    optimizer.param_groups = [
        {**group, "params": [p], "lr_scale": group.get("lr_scale", 1.0) * relative_rate(p)}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def relative_rate(parameter: nn.Parameter) -> float:
    """Returns the root mean square of a parameter's values, at least SMALLEST."""
    size = parameter.detach().square().mean().sqrt().item()
    return max(size, SMALLEST) if size else SIZE_OF_ZEROS
