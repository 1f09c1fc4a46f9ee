"""Reads timm's config.json. It is untrusted: it decides what is built, never where weights come from."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, VisionTransformer, get_pretrained_cfg

from scala_cli.errors import CheckpointError, naming_failure
from scala_cli.models.inputs import RGB, checked
from scala_cli.models.slimmed import SLIMMED_ARGS
from scala_cli.models.vit import Spec, describe, skeleton

SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
"""Fields of timm's `pretrained_cfg` that say where its weights come from and how to read them."""
RUNTIME = {"device", "dtype", "weight_init"}
"""Arguments for device, dtype and initialisation, which do not define the model."""
ARGS = {*inspect.signature(VisionTransformer).parameters, "stem", "stem_width", *SLIMMED_ARGS} - RUNTIME
"""Arguments that define a ViT, including this package's own (models/lvvit.py, slimmed.py)."""
REDUCED = "scala_vit"
"""The architecture of a slice with fewer tokens (models/registered.py)."""
FACTORY = {*inspect.signature(timm.create_model).parameters, *RUNTIME, "pretrained_strict", "out_indices"}
"""Other arguments of timm, such as the weights to read and the cache directory."""


@dataclass(frozen=True)
class Config:
    """A model for timm to build.

    Args:
        architecture: timm's name, with a tag if timm's own weights are meant.
        model_args: for timm's constructor, JSON-able.
        pretrained_cfg: timm's settings of input and labels; None for the defaults of the name.
    """

    architecture: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)

    def with_args(self, **args: Any) -> "Config":
        return replace(self, model_args={**self.model_args, **args})

    def create(self, **more: Any) -> Any:
        """Returns timm's model, of any class, with random weights unless `more` says otherwise."""
        more["pretrained_cfg"] = {**self.pretrained_cfg, **more.pop("pretrained_cfg", {})}
        return timm.create_model(self.architecture, **{**self.model_args, **more})

    def skeleton(self) -> Any:
        """Returns the same model on the meta device, without weights."""
        return skeleton(self.architecture, pretrained_cfg=dict(self.pretrained_cfg), **self.model_args)


def read_settings(config: Mapping[str, Any], file: Path) -> Config:
    """Returns the model that a config.json of timm describes; `file` is its path, for messages.

    Every config.json passes through here before timm sees it. Anything that would make timm download or
    open something is removed.

    Raises CheckpointError for a missing key, an architecture that timm lacks, a setting of the wrong type,
    or an argument that VisionTransformer does not take.
    """
    hint = "Convert or download it again."
    if "architecture" not in config:
        raise CheckpointError(f"{file} lacks 'architecture'.", hint)
    name, args = config["architecture"], config.get("model_args") or {}
    cfg = config.get("pretrained_cfg", single_object(config))
    if not (isinstance(name, str) and isinstance(args, dict) and isinstance(cfg, dict)):
        raise CheckpointError(f"{file} is damaged: a name, or an object, is something else.", hint)
    if not timm.is_model(name):  # for others, such as hf-hub:org/name, timm would read the weights
        raise CheckpointError(
            f"{file} is damaged: this timm ({timm.__version__}) has no architecture {name!r}.",
            "Name one that it has; or upgrade: pip install -U timm",
        )
    if name == REDUCED:
        raise CheckpointError(
            f"{file.parent} is a slice with fewer tokens; it is a finished model, which timm loads.",
            "Name the family, or the model, that it was cut from.",
        )
    odd = [key for key, value in args.items() if key not in ARGS | FACTORY and value not in (None, False)]
    if odd:
        raise CheckpointError(
            f"{file} is damaged: it builds {name} with {odd[0]!r}, which no VisionTransformer takes.",
            "DeiT, DeiT-III and plain vit_* models of timm can be cut.",
        )
    classes = ("num_classes", "label_names", "label_descriptions")
    cfg = {**cfg, **{key: config[key] for key in classes if key in config}}
    cfg = {key: value for key, value in cfg.items() if key not in SOURCES}
    args = {key: value for key, value in args.items() if key in ARGS}
    input_size = cfg.get("input_size") or [RGB]
    if not (isinstance(input_size, list) and all(type(size) is int and size > 0 for size in input_size)):
        raise CheckpointError(f"{file} is damaged: input_size is {input_size!r}.", hint)
    channels: Any = args.get("in_chans", input_size[0])
    cfg = checked(cfg, channels, cfg.get("num_classes"), file)
    return Config(name, args, {**cfg, "architecture": name.partition(".")[0]})


def single_object(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's settings from the older format, in which they are top-level keys."""
    names = {"label_names": config["labels"]} if "labels" in config else {}
    return {**{key: value for key, value in config.items() if key in vars(PretrainedCfg())}, **names}


def settings_for(architecture: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns timm's settings of an architecture for other weights: without timm's license and labels.

    Args:
        changes: settings that replace timm's.
    """
    known = asdict(get_pretrained_cfg(architecture) or PretrainedCfg())
    not_theirs = {*SOURCES, "license", "label_names", "label_descriptions"}
    ours = {key: value for key, value in known.items() if key not in not_theirs}
    return {**ours, "architecture": architecture.partition(".")[0], **(changes or {})}


def spec_of(config: Mapping[str, Any], file: Path) -> Spec:
    """Returns the Spec of timm's config.json, which is at `file`.

    Raises CheckpointError as `read_settings` and `spec_for`.
    """
    for key in ("model_args", "pretrained_cfg"):
        if key not in config:
            raise CheckpointError(f"{file} lacks {key!r}.", "Convert or download it again.")
    about = config.get("scala")
    features = isinstance(about, dict) and about.get("features") is True
    return replace(spec_for(read_settings(config, file), file), features=features)


def spec_for(config: Config, file: Path) -> Spec:
    """Returns the Spec of the model timm builds; `file` is its config.json, for messages.

    Raises CheckpointError if that fails or is no plain ViT.
    """
    damaged = f"{file} is damaged: timm cannot build {config.architecture}"
    with naming_failure(damaged, "Convert or download it again.", CheckpointError):
        return describe(config.skeleton(), config.model_args)
