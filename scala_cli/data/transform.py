"""Builds timm's transforms from a model's and a user's settings."""

from functools import partial
from itertools import chain
from typing import Any

from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import posterize

from scala_cli.errors import DataError
from scala_cli.models.vit import Spec
from scala_cli.settings import AugmentSettings


def transform_for(spec: Spec, augment: AugmentSettings | None = None) -> Any:
    """Returns timm's transform for the model's size, mean and deviation; augmenting if `augment` is given."""
    if spec.input_size[0] != 3:
        raise DataError(
            f"the model takes images of {spec.input_size[0]} channels; only RGB images are read.",
            "Convert it from a model for RGB images.",
        )
    config = resolve_data_config(pretrained_cfg=dict(spec.pretrained_cfg))
    common: dict[str, Any] = {k: config[k] for k in ("input_size", "interpolation", "mean", "std")}
    if augment is None:
        return create_transform(**common, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    return keep_a_bit(
        create_transform(
            **common,
            is_training=True,
            scale=augment.scale,
            hflip=augment.hflip,
            auto_augment=augment.aa,
            re_prob=augment.reprob,
            color_jitter=None,  # type: ignore[arg-type]  # timm's value for none
        )
    )


def keep_a_bit(transform: Any) -> Any:
    """Makes posterize keep at least one bit (Pillow 13 raises an error for none); returns the transform."""
    for step in transform.transforms:
        for op in [*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))]:
            if op.aug_fn is posterize:
                op.level_fn = partial(at_least_a_bit, op.level_fn)
    return transform


def at_least_a_bit(bits: Any, level: float, hparams: Any) -> tuple[int]:
    """Returns how many bits timm keeps of a colour, at least one."""
    return (max(1, *bits(level, hparams)),)
