"""Converts ViTs of Hugging Face's transformers to timm: the same function under other parameter names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.config import Config, settings_for, spec_for
from scala_cli.models.foreign import Source, in_float32, read_foreign, read_shards
from scala_cli.models.locate import CONFIG, INDEX, WEIGHT_FILES, read_config
from scala_cli.models.preprocessing import timm_settings
from scala_cli.models.vit import refuse_misfit

KINDS = {
    "ViTForImageClassification": "vit_base",
    "DeiTForImageClassification": "deit_base",
    "DeiTForImageClassificationWithTeacher": "deit_base_distilled",
    "ViTModel": "vit_base",
    "DeiTModel": "deit_base",
}
"""Classes of transformers, and the timm architecture whose settings fit. The last two have no head."""

PREPROCESSOR = "preprocessor_config.json"
BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
TIMM_NAMES = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    BLOCK + r"layernorm_before\.": r"blocks.\1.norm1.",
    BLOCK + r"attention\.attention\.(query|key|value)\.": r"blocks.\1.attn.\2.",
    BLOCK + r"attention\.q_proj\.": r"blocks.\1.attn.query.",
    BLOCK + r"attention\.k_proj\.": r"blocks.\1.attn.key.",
    BLOCK + r"attention\.v_proj\.": r"blocks.\1.attn.value.",
    BLOCK + r"attention\.(?:output\.dense|o_proj)\.": r"blocks.\1.attn.proj.",
    BLOCK + r"layernorm_after\.": r"blocks.\1.norm2.",
    BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.": r"blocks.\1.mlp.fc1.",
    BLOCK + r"(?:output\.dense|mlp\.fc2)\.": r"blocks.\1.mlp.fc2.",
    r"layernorm\.": "norm.",
    r"(?:cls_)?classifier\.": "head.",
    r"distillation_classifier\.": "head_dist.",
}
"""Patterns of transformers' names, as saved and as in version 5, without `vit.` or `deit.` -> timm's."""


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is from transformers, not timm."""
    return "model_type" in config and "architecture" not in config


def read_transformers(directory: Path) -> Source:
    """Returns the model in a directory of transformers, under timm's names; its eps is not yet applied.

    Raises:
        CheckpointError: for another kind of model, a missing or damaged file, or weights that do not fit
            the config.
    """
    config = read_config(directory)
    kind = kind_of(config, directory)
    state = renamed(state_in(directory))
    pooler = [name for name in state if name.startswith("pooler.")]
    for name in pooler:
        del state[name]
    try:
        args = timm_args(config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / CONFIG} lacks {error}.", "Download it again.") from None
    if kind in ("DeiTForImageClassification", "DeiTModel"):
        # no head reads the distillation token, so it is a register token of timm
        args["reg_tokens"] = 1
        if "dist_token" in state:
            state["reg_token"] = state.pop("dist_token")
    size = {192: "tiny", 384: "small"}.get(config["hidden_size"], "base")
    architecture = f"{KINDS[kind].replace('base', size)}_patch16_224"
    args["num_classes"] = len(state.get("head.bias", ()))
    cfg, notes = timm_cfg(directory, config)
    if pooler:
        notes.append(
            f"{directory}: its pooler, which no class of timm has, is left out; its features are kept"
        )
    ours = Config(architecture, args, settings_for(architecture, cfg))
    refuse_misfit(spec_for(ours, directory / CONFIG).build(), state, directory)
    return Source(ours, lambda: state, eps=config.get("layer_norm_eps", 1e-12), notes=tuple(notes))


def kind_of(config: Mapping[str, Any], directory: Path) -> str:
    """Returns the model's class in transformers. Raises CheckpointError unless timm can compute the same."""
    kind, *_ = config.get("architectures") or [config["model_type"]]
    if kind not in KINDS:
        raise CheckpointError(
            f"{directory} holds a {kind} of transformers, which timm does not compute.",
            f"Convert one of {', '.join(KINDS)}.",
        )
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(
            f"{directory} holds a {kind} with the activation {activation!r} (hidden_act in {CONFIG}); "
            "only 'gelu' can be converted.",
            "Convert one that was trained with 'gelu'.",
        )
    return str(kind)


def state_in(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors of a directory, from one weight file or several. Raises CheckpointError."""
    file = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{directory} holds no weights: none of {', '.join(WEIGHT_FILES)}.", "Download them as well."
        )
    if file.name == INDEX:
        return in_float32(read_shards(file))
    weights = read_foreign(file).weights
    assert weights is not None
    return dict(weights())


def timm_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the model's sizes as arguments of `timm.create_model`. Raises KeyError for a missing one."""
    return {
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": (config["intermediate_size"] + 0.5) / config["hidden_size"],
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["num_channels"],
        "qkv_bias": config.get("qkv_bias", True),
    }


def timm_cfg(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns timm's settings for class names and image preprocessing, and notes for the user."""
    cfg: dict[str, Any] = {}
    notes: list[str] = []
    if config.get("id2label"):
        names = config["id2label"]
        numbered = isinstance(names, dict) and all(number.isdecimal() for number in names)
        if not numbered or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(
                f"{directory / CONFIG} is damaged: id2label does not name numbered classes.",
                "Mend it, or leave it out.",
            )
        cfg["label_names"] = [names[number] for number in sorted(names, key=int)]  # "10" may precede "2"
    if (directory / PREPROCESSOR).is_file():
        processor, size = read_config(directory, PREPROCESSOR), config["image_size"]
        image = (size, size) if isinstance(size, int) else tuple(size)
        settings, notes = timm_settings(processor, image, directory / PREPROCESSOR, config["num_channels"])
        cfg |= settings
    return cfg, notes


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict under timm's names, with queries, keys and values joined into one weight."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = re.sub(r"^(vit|deit)\.", "", name)
        new = next(
            (re.sub(f"^{old}", new, bare) for old, new in TIMM_NAMES.items() if re.match(old, bare)), name
        )
        ours[new] = tensor
    for name in [name for name in ours if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in ours for part in parts):  # if not, `refuse_misfit` reports the missing key
            ours[name.replace("query", "qkv")] = torch.cat([ours.pop(part) for part in parts])
    return ours
