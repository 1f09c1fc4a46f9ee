"""Reads untrusted weight files without running any code in them."""

import argparse
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import read_weights
from scala_cli.models.config import Config
from scala_cli.models.locate import read_config
from scala_cli.models.nested import find_state


@dataclass(frozen=True)
class Source:
    """Configuration and weights of a model to open.

    Args:
        config: what timm builds; for a weight file alone, only the architecture that it names, or "".
        weights: returns the state dict under timm's names; None if timm itself downloads the weights.
        eps: eps of every norm in the original model, if it differs from timm's.
        options: options of the training script, if the file holds them.
        notes: notes for the user.
    """

    config: Config
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    eps: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_foreign(file: Path, average: bool = False) -> Source:
    """Returns the model in a weight file.

    Pickles may hold only tensors and plain values, so no code in them runs; the one class allowed is
    argparse.Namespace, in which many training scripts keep their options.

    Args:
        average: take the moving average that training scripts save beside the weights.

    Raises:
        CheckpointError: for missing, truncated, unknown or unsafe files; if `average` is set and there is
            none; or if the file holds no model, or several.
    """
    if file.is_dir():
        raise CheckpointError(f"{file} is a directory.", "Name the weight file in it.")
    content: Any = read_weights(file) if is_safe(file) else read_pickle(file)
    state, notes = find_state(content, average, file)
    state = in_float32(state)
    content = content if isinstance(content, dict) else {}
    options = content.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    options = options if isinstance(options, dict) else {}
    named = content.get("arch") or options.get("model", "")
    config = Config(named if isinstance(named, str) else "")
    return Source(config, lambda: state, options=options, notes=tuple(notes))


def is_safe(file: Path) -> bool:
    """Whether a file is no pickle; a missing file counts, as `read_weights` reports it."""
    return file.suffix == ".safetensors" or not file.is_file()


def read_pickle(file: Path) -> Any:
    """Reads a file of torch.save. Raises CheckpointError unless it holds only tensors and plain values."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler fail in arbitrary ways
        unsafe = re.search(r"(?i)unsupported (?:global|class)s?:? *(?:global )?([\w.]+)", str(error))
        if unsafe is None:
            raise CheckpointError(
                f"{file} is truncated, or no file of tensors.",
                "Ask for a .safetensors file, or download it again.",
            ) from None
        raise CheckpointError(
            f"{file} pickles code ({unsafe[1]}), which is not run.",
            "Save the weights alone, where it was made: torch.save(model.state_dict(), FILE); "
            "or ask for a .safetensors file.",
        ) from None


class ScalarKind:
    """Replaces numpy.dtype in a pickle: numpy's own, given a bad state, can read invalid memory."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])


def scalar(kind: ScalarKind, data: bytes) -> Any:
    """Returns a numpy scalar in a pickle as a plain number; None if it is not a number."""
    dtype = np.dtype(str(kind.code)).newbyteorder(kind.order)  # type: ignore[arg-type]
    if dtype.kind not in "biufc":
        return None
    return np.frombuffer(data, dtype, count=1).item()


HARMLESS: list[Any] = [
    argparse.Namespace,
    (ScalarKind, "numpy.dtype"),
    (scalar, "numpy._core.multiarray.scalar"),
    (scalar, "numpy.core.multiarray.scalar"),
]
"""What a pickle may hold besides tensors and plain values."""


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with all floating-point tensors in float32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def read_shards(index: Path) -> dict[str, Tensor]:
    """Returns the tensors of all safetensors files that an index file lists. Raises CheckpointError."""
    parts = read_config(index.parent, index.name).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index} does not list files beside it.", "Download it again.")
    return {
        key: tensor for name in sorted(names) for key, tensor in read_weights(index.parent / name).items()
    }
