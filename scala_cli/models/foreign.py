"""Somebody else's weight files, read without running anything in them."""

import argparse
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import read_weights


@dataclass(frozen=True)
class Foreign:
    """What a weight file holds.

    Args:
        state: the state dict, in the file's own names.
        named: the architecture it names; "" if none.
        options: those of the training script, where it left them.
        args: for `timm.create_model`, where the file's own configuration tells them.
        cfg: of timm's input and label settings what it tells.
    """

    state: dict[str, Tensor]
    named: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    cfg: Mapping[str, Any] = field(default_factory=dict)


def read_foreign(file: Path, average: bool = False) -> Foreign:
    """The contents of a weight file.

    Pickles are read for tensors and plain values only, so nothing in them runs; argparse.Namespace, in
    which many training scripts keep their options, is the one class allowed.

    Args:
        average: take the moving average of the weights, which training scripts keep as `model_ema`.

    Raises:
        CheckpointError: missing, truncated, unknown or unsafe files; no average where one is asked for.
    """
    if file.suffix == ".safetensors" or not file.is_file():
        if average:
            raise no_average(file)
        return Foreign(in_float32(read_weights(file)))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler fail in arbitrary ways
        unsafe = re.search(r"(?i)unsupported (?:global|class)s?:? *(?:global )?([\w.]+)", str(error))
        what = (
            f"pickles code ({unsafe[1]}), which is not run"
            if unsafe
            else "is truncated, or no file of tensors"
        )
        raise CheckpointError(
            f"{file} {what}.", "Ask for a .safetensors file, or download it again."
        ) from None
    if not isinstance(content, dict):
        content = {}
    if average and "model_ema" not in content:
        raise no_average(file)
    state = content["model_ema"] if average else content.get("state_dict", content.get("model", content))
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} holds no state dict.", "Save model.state_dict() instead.")
    options = content.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else {}
    named = content.get("arch") or options.get("model", "")
    return Foreign(in_float32(clean_state_dict(state)), named if isinstance(named, str) else "", options)


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that were saved in half the bits, as they are trained and compared."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def no_average(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} holds no moving average of weights (model_ema).", "Leave out --ema.")
