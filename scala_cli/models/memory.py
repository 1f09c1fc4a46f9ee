"""From a timm model that is in memory to a slimmable ViT."""

import torch
from torch import nn

from scala_cli.errors import CheckpointError
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import random_images, read_off, refuse_unless_plain
from scala_cli.settings import DEFAULT_RATIOS
from scala_cli.slicing.point import parse_points
from scala_cli.slicing.rule import Rule


def slimmable(model: nn.Module, ratios: str = DEFAULT_RATIOS) -> SlimmableViT:
    """A timm model that is in memory already, at every width; it keeps its weights, and shares them.

    Args:
        ratios: the widths, "0.25,0.5,0.75,1".

    Raises:
        CheckpointError: a model that cannot be sliced, or that timm does not build again from what it shows.
        PointError: a width that does not divide its channels.
    """
    vit, spec, points = refuse_unless_plain(model), read_off(model), parse_points(ratios)
    for point in points:
        spec.at(point)
    again = spec.build_with(vit.state_dict(), f"this {spec.architecture}")
    probe, was_training = random_images(spec, 2).to(next(vit.parameters())), vit.training
    with torch.no_grad():
        same = torch.equal(again(probe), vit.eval()(probe))
    vit.train(was_training)
    if not same:
        raise CheckpointError(
            f"timm's {spec.architecture} computes something else than this model.",
            "Save it with what it was created with, and load that: "
            "timm.models.save_for_hf(model, DIR, model_args=...); scala convert DIR",
        )
    return SlimmableViT(vit, spec, Rule(points, spec.num_heads)).train(was_training)
