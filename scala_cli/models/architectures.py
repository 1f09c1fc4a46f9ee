"""Which of timm's Vision Transformers can be sliced: each is tried, without weights and one block deep."""

from typing import Any

import timm

from scala_cli.errors import ScalaError
from scala_cli.models.skeleton import without_weights
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.source import create
from scala_cli.models.vit import describe, refuse_misfit
from scala_cli.slicing.point import parse_points
from scala_cli.slicing.rule import Rule
from scala_cli.watch import Watcher

MODULES = ("deit", "vision_transformer", "vision_transformer_hybrid", "vitamin")
"""timm's files that build its class VisionTransformer; all other architectures are other classes."""


def survey(watch: Watcher) -> list[dict[str, Any]]:
    """{"architecture", "supported", "why_not"} of every architecture in MODULES."""
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    watch.phase("try", len(names), "models")
    rows = []
    for name in names:
        reason = obstacle(name)
        rows.append({"architecture": name, "supported": not reason, "why_not": reason or None})
        watch.step(1)
    return rows


def obstacle(name: str) -> str:
    """Why an architecture cannot be sliced; empty where it can.

    It can where every parameter has its row in the slicing table, and what the rule leaves of them at half
    width is what timm builds at half width.
    """
    args = {"depth": 1}
    try:
        with without_weights():
            vit = create(name, args)
        spec, points = describe(vit, args), parse_points("0.5,1")
        net = SlimmableViT(vit, spec, Rule(points, spec.num_heads))
        refuse_misfit(spec.at(points[0]).build(), net.rule.slice_state(vit.state_dict(), points[0]), name)
    except ScalaError as error:
        return error.message.removeprefix("this model cannot be sliced: ").rstrip(".")
    return ""
