"""Which of timm's Vision Transformers can be sliced, found by trying each without weights at depth 1."""

from fractions import Fraction
from typing import Any

import timm

from scala_cli.errors import ScalaError
from scala_cli.models.config import Config
from scala_cli.models.create import skeleton_of
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import MODULES, describe, refuse_misfit
from scala_cli.slicing.rule import Rule
from scala_cli.watch import Watcher

HALF = Fraction(1, 2)


def survey(watch: Watcher) -> list[dict[str, Any]]:
    """Returns {"architecture", "supported", "why_not"} for every architecture in MODULES."""
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    watch.phase("try", len(names), "models")
    rows = []
    for name in names:
        reason = obstacle(name)
        rows.append({"architecture": name, "supported": not reason, "why_not": reason or None})
        watch.step(1)
    return rows


def obstacle(name: str) -> str:
    """Returns why an architecture cannot be sliced, or "" if it can.

    It can if every parameter has a row in the slicing table, and its slice at half width has the shapes of
    the model that timm builds at half width.
    """
    args = {"depth": 1}
    try:
        vit = skeleton_of(Config(name, args))
        spec = describe(vit, args)
        net = SlimmableViT(vit, spec, Rule((HALF, Fraction(1)), spec.num_heads))
        refuse_misfit(spec.at(HALF).build(), net.rule.slice_state(vit.state_dict(), HALF), name)
    except ScalaError as error:
        return error.message.removeprefix("this model cannot be sliced: ").rstrip(".")
    return ""
