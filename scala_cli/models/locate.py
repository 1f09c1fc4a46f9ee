"""Finds a checkpoint's directory. Imports neither torch nor timm, so that a wrong path fails at once."""

import json
from pathlib import Path
from typing import Any

from scala_cli.errors import CheckpointError

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
EXTRA = "extra.st"
"""Tensors that timm has no place for, in safetensors format; the file is missing if there are none.

timm before 1.0.29 refuses a directory with two files of a suffix that it knows, so this one has another.
"""
CHECKPOINT_FILES = {WEIGHTS, EXTRA, CONFIG, CARD}
INDEX = f"{WEIGHTS}.index.json"
"""Maps each tensor to one of several weight files, as written by transformers."""
WEIGHT_FILES = (WEIGHTS, INDEX, "pytorch_model.bin")
"""Weight files of a directory from elsewhere; the first that exists is read."""
STATE = "state.pt"
"""The file that a run directory resumes from."""
LAST_RUN = Path("runs/last")
ALIASES = {
    "deit_ti": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "deit_ti_distilled": "deit_tiny_distilled_patch16_224",
    "deit_s_distilled": "deit_small_distilled_patch16_224",
    "deit_b_distilled": "deit_base_distilled_patch16_224",
}
"""Short names of the papers' models -> timm's. A directory with such a name must be written ./deit_s."""


def resolve(checkpoint: str | Path | None) -> Path:
    """Returns the checkpoint directory that a user means.

    Args:
        checkpoint: a checkpoint directory (also as `local-dir:DIR`), a run directory (its `best`),
            `hf-hub:org/repo`, or None for the newest run.

    Raises:
        CheckpointError: if there is none.
    """
    if checkpoint is None:
        if not LAST_RUN.exists():
            raise CheckpointError(
                f"no checkpoint named, and no run yet at {LAST_RUN}.", remedy="name_or_train"
            )
        checkpoint = LAST_RUN
    name = str(checkpoint)
    if name.startswith("hf-hub:"):
        from scala_cli.models.hub import fetch

        return fetch(name.removeprefix("hf-hub:"), [CONFIG, WEIGHTS], [EXTRA])
    path = Path(name.removeprefix("local-dir:")).expanduser()
    for directory in (path, path / "best", path / "last"):
        if (directory / CONFIG).is_file():
            return directory
    if (path / STATE).is_file():
        raise CheckpointError(f"no epoch of the run {path} has ended.", remedy="resume", run=path)
    what = "has no config.json" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise CheckpointError(f"checkpoint {path} {what}.", remedy="make_checkpoint")


def short_name(model: str) -> str:
    """Returns the name for a directory made from MODEL: "vit" for local-dir:/models/vit."""
    return Path(model.rpartition(":")[2]).name


def path_of(model: str) -> Path | None:
    """Returns the existing file or directory that MODEL names, or None; an alias never names one."""
    path = Path(model.removeprefix("local-dir:")).expanduser()
    return path if model not in ALIASES and path.exists() else None


def read_config(directory: Path, name: str = CONFIG) -> dict[str, Any]:
    """Reads a JSON object from a directory. Raises CheckpointError if the file does not hold one."""
    file = directory / name
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}.", "Download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold an object.", "Download it again.")
    return config
