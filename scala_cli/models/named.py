"""Resolves the name of a model (MODEL) to its configuration and weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.authors import is_scala
from scala_cli.models.config import Config, read_settings, settings_for
from scala_cli.models.foreign import Source, read_foreign
from scala_cli.models.hub import fetch
from scala_cli.models.huggingface import PREPROCESSOR, is_transformers, read_transformers, state_in
from scala_cli.models.locate import ALIASES, CONFIG, INDEX, STATE, WEIGHT_FILES, path_of, read_config
from scala_cli.models.lvvit_files import is_lvvit, read_lvvit, refuse_other_kind
from scala_cli.models.supervit import is_supervit

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Suffixes of weight files; a name with one is never taken for a timm name, even if the file is missing."""
LOCAL, HUB = "local-dir:", "hf-hub:"


def find_source(
    model: str, weights: Path | None, scratch: bool, average: bool, num_heads: int | None = None
) -> Source:
    """Returns the source of MODEL, with the weights of the file `weights` if given.

    Args:
        num_heads: number of heads, for a weight file that does not show it.

    Raises CheckpointError if there is no such model, or not exactly one source of weights.
    """
    file = weight_file(model)
    if weights is not None and (scratch or file):
        raise CheckpointError(
            "two sources of weights are given.",
            remedy="leave_out_one",
            setting="weights",
            other="the other one",
        )
    if weights is not None or file is not None:
        return source_in_file(weights or Path(file or ""), model if weights else None, average, num_heads)
    if average:
        raise CheckpointError(
            f"{model} is no file, so there is no moving average to take.", remedy="name_weights"
        )
    directory = directory_of(model)
    if directory is not None and is_transformers(read_config(directory)):
        return read_transformers(directory if scratch else with_weights(model, directory))
    config = config_of(model)
    if directory is None or scratch:
        return Source(config)
    return Source(with_classes(config), partial(own_weights, model, directory))


def source_in_file(file: Path, model: str | None, average: bool, num_heads: int | None = None) -> Source:
    """Returns the weights of a file for a named model, or for the model that the file names."""
    beside = file.parent / CONFIG
    if (
        model is None
        and file.name in WEIGHT_FILES
        and beside.is_file()
        and is_transformers(read_config(file.parent))
    ):
        return read_transformers(file.parent)
    held = read_foreign(file, average)
    if is_scala(held) or (held.weights is not None and is_supervit(held.weights())):
        return held
    assert held.weights is not None
    if is_lvvit(held.weights()):
        if model is not None:
            refuse_other_kind(config_of(model), file)
        return read_lvvit(held, file.name, num_heads)
    config = config_of(held.config.architecture if model is None else model)
    args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
    strange = {"label_names": None, "label_descriptions": None, "license": None}
    cfg = {**config.pretrained_cfg, **strange} if config.pretrained_cfg else settings_for(config.architecture)
    return replace(held, config=Config(config.architecture, args, cfg))  # with the head of the file


def config_of(model: str) -> Config:
    """Returns the Config of MODEL: an alias, a timm name, a directory or `hf-hub:org/repo`.

    Raises CheckpointError if there is none of that name, or its config.json is not timm's.
    """
    if not model:
        raise CheckpointError(
            "the weight file does not say which architecture it holds.", remedy="name_architecture"
        )
    directory = directory_of(model)
    if directory is not None:
        config = read_config(directory)
        if is_transformers(config):
            raise CheckpointError(
                f"{model} holds a model of transformers, whose weights lie beside its {CONFIG}.",
                remedy="convert_directory",
                model=model,
            )
        return read_settings(config, directory / CONFIG)
    path = Path(model.removeprefix(LOCAL)).expanduser()
    named = model.startswith(LOCAL) or "/" in model or path.is_dir() or path.suffix in SUFFIXES
    if model not in ALIASES and named:
        raise no_model(path)
    name = ALIASES.get(model, model)
    if not timm.is_model(name.partition(".")[0]):
        close = timm.list_models(f"*{name.partition('.')[0]}*")[:3]
        raise CheckpointError(
            f"there is no model {model!r}.",
            f"Did you mean {', '.join(close)}?"
            if close
            else f"Try one of {', '.join(ALIASES)}, or a timm name.",
        )
    return Config(name)


def directory_of(model: str) -> Path | None:
    """Returns the directory of MODEL's config.json, local or from the Hub; None for a timm name."""
    if model in ALIASES:
        return None
    if model.startswith(HUB):
        return fetch(model.removeprefix(HUB), [CONFIG], [PREPROCESSOR])
    path = Path(model.removeprefix(LOCAL)).expanduser()
    return path if (path / CONFIG).is_file() else None


def with_weights(model: str, directory: Path) -> Path:
    """Returns the directory with its weights, fetched from the same commit if MODEL is on the Hub."""
    if not model.startswith(HUB):
        return directory
    repo, _, _ = model.removeprefix(HUB).partition("@")
    for name in WEIGHT_FILES:
        shards = ["model-*.safetensors"] if name == INDEX else []
        directory = fetch(f"{repo}@{directory.name}", [CONFIG], [PREPROCESSOR, name, *shards])
        if (directory / name).is_file():
            break
    return directory


def own_weights(model: str, directory: Path) -> dict[str, Tensor]:
    """Returns the weights of a directory in timm's format. Raises CheckpointError."""
    return state_in(with_weights(model, directory))


def with_classes(config: Config) -> Config:
    """Adds the number of classes to the model's arguments, so that its head fits the weights."""
    count = config.pretrained_cfg.get("num_classes")
    declared = "num_classes" in config.model_args or count is None
    return config if declared else config.with_args(num_classes=count)


def weight_file(model: str) -> Path | None:
    """Returns the weight file that MODEL names, or None."""
    path = None if model.startswith(LOCAL) else path_of(model)
    return path if path and path.is_file() else None


def no_model(path: Path) -> CheckpointError:
    """Returns the error for a path that holds no model."""
    if (path / STATE).is_file():
        if not (path / "last" / CONFIG).is_file():
            return CheckpointError(f"no epoch of the run {path} has ended.", remedy="resume", run=path)
        return CheckpointError(f"{path} is a training run.", remedy="resume_or_slice", run=path)
    if path.is_dir():
        return CheckpointError(f"{path} has no config.json.", "Name a directory in timm's format.")
    if path.exists():
        return CheckpointError(f"{path} is a file, not a directory.", "Name it without local-dir:")
    return CheckpointError(
        f"{path} does not exist.", "Check the path; what lies on the Hub is hf-hub:org/name."
    )
