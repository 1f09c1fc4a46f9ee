"""ViTs of Hugging Face's transformers, in timm's terms: the same function under other names."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scala_cli.errors import CheckpointError
from scala_cli.models.foreign import Foreign, read_foreign
from scala_cli.models.hub import fetch
from scala_cli.models.locate import CONFIG, read_config
from scala_cli.models.stream import with_eps
from scala_cli.models.vit import refuse_misfit, spec_of

KINDS = {
    "ViTForImageClassification": "vit_base",
    "DeiTForImageClassification": "deit_base",
    "DeiTForImageClassificationWithTeacher": "deit_base_distilled",
}
"""Their classes, and the timm architecture whose settings fit."""

FILES = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
NAMES = {
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
"""Their parameters without the leading `vit.` or `deit.`, as saved and as version 5 names them; timm's."""


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of transformers' own, not timm's."""
    return "model_type" in config and "architecture" not in config


def directory_of(model: str) -> Path | None:
    """The directory of transformers that MODEL names, itself, by a file within or on the Hub; else None."""
    if model.startswith("hf-hub:"):
        repo = model.removeprefix("hf-hub:")
        directory = fetch(repo, [CONFIG])
        if not is_transformers(read_config(directory)):
            return None
        with suppress(CheckpointError):  # not every repository has one
            fetch(repo, [PREPROCESSOR])
        try:
            return fetch(repo, [CONFIG, FILES[0]])
        except CheckpointError:
            return fetch(repo, [CONFIG, FILES[1]])
    path = Path(model.removeprefix("local-dir:")).expanduser()
    directory = path.parent if path.is_file() and path.name in FILES else path
    known = (directory / CONFIG).is_file() and is_transformers(read_config(directory))
    return directory if known else None


def read_transformers(directory: Path) -> Foreign:
    """The model in a directory of transformers, as timm computes it.

    Raises:
        CheckpointError: another kind of model, a missing or damaged file, weights that are not its config's.
    """
    config = read_config(directory)
    kind, *_ = config.get("architectures") or [config["model_type"]]
    if kind not in KINDS or config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{directory} holds a {kind} of transformers, which timm does not compute.",
            f"Convert a {' or a '.join(KINDS)}.",
        )
    file = next((directory / name for name in FILES if (directory / name).is_file()), directory / FILES[0])
    state = renamed(read_foreign(file).state)
    try:
        args = timm_args(config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / CONFIG} lacks {error}.", "Download it again.") from None
    if kind == "DeiTForImageClassification":  # its head does not read the distillation token: a register
        args["reg_tokens"] = 1
        if "dist_token" in state:
            state["reg_token"] = state.pop("dist_token")
    size = {192: "tiny", 384: "small"}.get(config["hidden_size"], "base")
    architecture = f"{KINDS[kind].replace('base', size)}_patch16_224"
    args["num_classes"] = len(state.get("head.bias", ()))
    spec = spec_of({"architecture": architecture, "model_args": args, "pretrained_cfg": {}})
    refuse_misfit(spec.build(), state, file)
    state = with_eps(state, spec, config.get("layer_norm_eps", 1e-12))
    return Foreign(state, architecture, args=args, cfg=timm_cfg(directory, config))


def timm_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the model, for `timm.create_model`. Raises KeyError for what is missing."""
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


def timm_cfg(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's settings take over: the names of the classes, mean and deviation of the pixels."""
    cfg: dict[str, Any] = {}
    if config.get("id2label"):
        names = config["id2label"]
        cfg["label_names"] = [names[number] for number in sorted(names, key=int)]  # "10" may precede "2"
    if (directory / PREPROCESSOR).is_file():
        seen = read_config(directory, PREPROCESSOR)
        settings = {"mean": "image_mean", "std": "image_std"}
        cfg |= {ours: tuple(seen[its]) for ours, its in settings.items() if its in seen}
    return cfg


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under timm's names, queries, keys and values as one weight."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = re.sub(r"^(vit|deit)\.", "", name)
        new = next((re.sub(f"^{old}", new, bare) for old, new in NAMES.items() if re.match(old, bare)), name)
        ours[new] = tensor
    for name in [name for name in ours if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in ours for part in parts):  # else what is missing is named, as of any other
            ours[name.replace("query", "qkv")] = torch.cat([ours.pop(part) for part in parts])
    return ours
