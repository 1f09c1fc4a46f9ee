"""Gives a ViT without a classifier the identity as its classifier.

Its stream can then be rotated like any other, the full width computes the same as before, and every slice
returns features in all channels of the full model. To timm it is an ordinary ViT.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

from timm.models import VisionTransformer
from torch import nn
from torch.nn.utils import skip_init

from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import Record
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import describe


def give_identity_head(vit: Any) -> bool:
    """Sets the identity as the classifier of a timm ViT that has none, in place.

    Returns:
        Whether the model had no classifier.
    """
    if vit.num_classes:
        return False
    weight = vit.patch_embed.proj.weight
    channels = len(weight)
    for name in ("head", "head_dist"):
        if hasattr(vit, name):
            head = skip_init(nn.Linear, channels, channels, device=weight.device, dtype=weight.dtype)
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)
            setattr(vit, name, head)
    vit.num_classes = channels
    return True


def headless(vit: VisionTransformer) -> VisionTransformer:
    """Returns a copy of a timm ViT without its classifier."""
    again = deepcopy(vit)
    again.reset_classifier(0)
    return again


def for_task(net: SlimmableViT, record: Record, task: str | None) -> tuple[SlimmableViT, Record]:
    """Returns the model prepared for a task.

    For features, a classifier is replaced by the identity. For classification, a backbone is unchanged: it
    gets a classifier once the classes are known.

    Args:
        task: a name of tasks.TASKS; None keeps the model's own.

    Raises:
        CheckpointError: if the channels were put in order together with a classifier, as without it the
            features would not be the original ones; or if widths have been trained or fitted.
    """
    if task in (None, record.task):
        return net, record
    record = replace(record, task=str(task))
    if task != "features" or net.spec.features:
        return net, record
    if record.order == "importance" or record.method or net.vectors:
        raise CheckpointError(
            "this model was slimmed with its classifier: without it, its features are not the original ones.",
            "Give the model it came from.",
        )
    vit = headless(net.vit)
    give_identity_head(vit)
    spec = describe(vit, net.spec.model_args)
    spec = replace(spec, features=True, tokens=net.spec.tokens, resize=net.spec.resize)
    record = replace(record, metrics=(), new_head=False)
    return net.like(vit=vit, spec=spec, extra={}).train(net.training), record


def refuse_without_classes(net: SlimmableViT, record: Record) -> None:
    """Raises CheckpointError if a model for classification has no classifier."""
    if record.task == "classification" and net.spec.features:
        raise CheckpointError("this model has no classifier.", remedy="add_classes")
