"""Somebody else's weight files, read without running anything in them."""

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
    """What a model is made from.

    Args:
        config: what timm builds; of a weight file alone, the architecture that it names, or "".
        weights: returns the state dict under timm's names; None for those that timm itself downloads.
        eps: of every norm in the model it was trained in, where that is not timm's.
        options: those of the training script, where it left them.
        notes: what the user should know of it.
    """

    config: Config
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    eps: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_foreign(file: Path, average: bool = False) -> Source:
    """The contents of a weight file.

    Pickles are read for tensors and plain values only, so nothing in them runs; argparse.Namespace, in
    which many training scripts keep their options, is the one class allowed.

    Args:
        average: take the moving average of the weights, which training scripts keep beside them.

    Raises:
        CheckpointError: missing, truncated, unknown or unsafe files; no average where one is asked for;
            no model, or several.
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
    return file.suffix == ".safetensors" or not file.is_file()


def read_pickle(file: Path) -> Any:
    """Reads a file of torch.save. Raises CheckpointError if it holds more than tensors and plain values."""
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
    """Stands in for numpy.dtype in a pickle. numpy's own, given a false state, reads memory it should not."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])


def scalar(kind: ScalarKind, data: bytes) -> Any:
    """The plain number that a numpy scalar in a pickle stands for; None for one that is no number."""
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
"""What a pickle may name beside tensors and plain values."""


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that were saved in half the bits, as they are trained and compared."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in several parts, which `index` lists. Raises CheckpointError."""
    parts = read_config(index.parent, index.name).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index} does not list files beside it.", "Download it again.")
    return {
        key: tensor for name in sorted(names) for key, tensor in read_weights(index.parent / name).items()
    }
