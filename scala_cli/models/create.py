"""Creates timm's model with given, pretrained or random weights."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
from timm.models import VisionTransformer
from torch import Tensor, nn

from scala_cli.errors import CheckpointError
from scala_cli.models.config import Config
from scala_cli.models.hub import TRANSPORT, quiet_hub, unreachable
from scala_cli.models.nested import examples
from scala_cli.models.vit import Spec, refuse_unless_plain

DAMAGED = (RuntimeError, LookupError, AssertionError, AttributeError, TypeError, ValueError)
"""What timm raises for arguments or weights that do not fit."""


def create(
    config: Config,
    state: Mapping[str, Tensor] | None = None,
    classes: int | None = None,
    pretrained: bool = False,
) -> VisionTransformer:
    """Returns timm's model with a given state dict, pretrained weights or random weights.

    timm resamples position and patch embeddings of another size. All other weights of a state dict must fit;
    then the head is replaced if it has another number of classes than wanted.

    Args:
        classes: number of classes wanted; None keeps the head.
        pretrained: load timm's weights, if no state dict is given.

    Raises CheckpointError for what timm cannot build, what cannot be sliced, and weights that do not fit.
    """
    name, more = config.architecture, {}
    if state is not None:
        own = len(state.get("head.weight", ()))  # 0 without a classifier
        own = config.model_args.get("num_classes", own)
        more = {"num_classes": own, "pretrained_cfg": {"num_classes": own, "state_dict": dict(state)}}
    elif pretrained and not timm.is_model_pretrained(name):
        raise CheckpointError(f"timm has no pretrained weights for {name}.", remedy="other_weights")
    elif classes is not None:
        more = {"num_classes": classes}
    with nullcontext() if state is not None or not pretrained else quiet_hub():
        try:
            vit = refuse_unless_plain(config.create(pretrained=pretrained or state is not None, **more))
            if classes not in (None, vit.num_classes):
                vit.reset_classifier(classes)
        except (OSError, TRANSPORT) as error:
            raise unreachable(name, error) from None
        except DAMAGED as error:
            raise misfit(config, state, error) from None
    settings: Any = vit.pretrained_cfg
    settings.pop("state_dict", None)  # loaded separately
    return vit


def skeleton_of(config: Config) -> VisionTransformer:
    """Returns timm's model without weights. Raises CheckpointError if that fails or it is no plain ViT."""
    try:
        return refuse_unless_plain(config.skeleton())
    except DAMAGED as error:
        raise misfit(config, None, error) from None


def misfit(config: Config, state: Mapping[str, Tensor] | None, error: Exception) -> CheckpointError:
    """Returns the error for a model that timm cannot build, or for weights that do not fit it."""
    key = re.search(r'(?:Missing|Unexpected) key[^"]*"[^"]+"|size mismatch for [^.]+[^,]+', str(error))
    reason = key[0] if key else " ".join(str(error).split())
    message = f"cannot build {config.architecture}: {reason}."
    if state is None:
        return CheckpointError(message, "Check the architecture and the sizes.")
    wanted = list(config.skeleton().state_dict())
    unknown = [name for name in state if name not in wanted]
    missing = [name for name in wanted if name not in state]
    if not unknown or not missing:
        return CheckpointError(message, "Name the architecture and sizes the weights were trained with.")
    if any(".attention.attention.query." in name or ".q_proj." in name for name in unknown):
        hint = "These are names of transformers: convert its directory, with the config.json in it"
    else:
        hint = "Rename them as timm does"
    return CheckpointError(
        f"the weights do not have timm's names: {examples(unknown)}, where {config.architecture} has "
        f"{examples(missing)}.",
        f"{hint}; or name the architecture they were trained with.",
    )


def refuse_broken(model: nn.Module, origin: str) -> None:
    """Raises CheckpointError for the first parameter with NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            what = "NaN" if tensor.isnan().any() else "infinity"
            raise CheckpointError(
                f"the weights of {origin} are broken: {name!r} holds {what}.",
                "Take weights from before training went wrong.",
            )


def check_patches(spec: Spec) -> None:
    """Raises CheckpointError unless the image size is a multiple of the patch size."""
    sides = spec.patch_size
    for what, pixels, side in zip(("height", "width"), spec.input_size[1:], sides, strict=True):
        if pixels % side:
            square = spec.input_size[1] == spec.input_size[2] and sides[0] == sides[1]
            message = f"image {'size' if square else what} {pixels} is not a multiple of patch size {side}."
            if square:
                size = max(pixels // side, 1) * side
                raise CheckpointError(message, remedy="image_size", size=size)
            fitting = max(
                size for size in range(1, side + 1) if not any(p % size for p in spec.input_size[1:])
            )
            raise CheckpointError(message, remedy="try", setting="patch-size", value=fitting)
