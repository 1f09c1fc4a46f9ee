"""Small random models of Hugging Face's transformers, compared with their conversion to timm."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessorPil,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from scala_cli.data.transform import transform_for
from scala_cli.errors import CheckpointError
from scala_cli.models.source import Changes, open_model, open_slimmable

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
}
pytestmark = pytest.mark.usefixtures("elsewhere")
KINDS = {
    ViTForImageClassification: ViTConfig,
    DeiTForImageClassification: DeiTConfig,
    DeiTForImageClassificationWithTeacher: DeiTConfig,
}
HEADLESS = {ViTModel: ViTConfig, DeiTModel: DeiTConfig}


def write(kind=ViTForImageClassification, folder="theirs", scale=0.1, shards="5GB", **changes):
    torch.manual_seed(0)
    model = kind((KINDS | HEADLESS)[kind](**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


@pytest.mark.parametrize("scale", [0.1, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"layer_norm_eps": 1e-3}])
@torch.no_grad()
def test_logits_are_those_of_the_source(kind, changes, scale, images):
    """Also with transformers' initial weights, whose stream is so small that eps matters."""
    model = write(kind, scale=scale, **changes)
    net, record = open_model("theirs", None)
    difference = (net(images) - model(images).logits).abs().max()
    same_size = torch.equal(
        net.vit.pos_embed.flatten(), model.base_model.embeddings.position_embeddings.flatten()
    )
    assert difference <= (1e-4 if same_size else 1e-5)
    if scale:
        assert same_size is ("layer_norm_eps" not in changes), "as large as they were they learn as fast"
    assert net.spec.label_names == ("cat", "dog", "owl") and record.trained
    assert (net(images, 0.5) - net.slice(0.5)(images)).abs().max() <= 1e-5


@torch.no_grad()
def test_every_way_to_name_it(images, scala):
    model = write()
    for folder, state in (("old", load_file("theirs/model.safetensors")), ("new", model.state_dict())):
        Path(folder).mkdir()
        torch.save(state, f"{folder}/pytorch_model.bin")
        Path(folder, "config.json").write_text(Path("theirs/config.json").read_text())
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.4]}
    Path("old/preprocessor_config.json").write_text(json.dumps(settings))
    for name in ("theirs", "local-dir:theirs", "theirs/model.safetensors", "old", "new/pytorch_model.bin"):
        net, _ = open_slimmable(name, None)
        assert (net(images) - model(images).logits).abs().max() <= 1e-5
    assert scala("convert", "old", "-o", "ours", "--json").json["max_abs_diff"] <= 1e-4
    again = timm.create_model("local-dir:ours", pretrained=True).eval()
    assert (again(images) - model(images).logits).abs().max() <= 1e-5
    assert list(again.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert open_model("old", None, Changes(num_classes=7, img_size=24))[0].spec.input_size == (3, 24, 24)


def test_classes_are_told_by_their_numbers():
    names = {number: f"class {number}" for number in range(12)}
    write(id2label=names)
    config = json.loads(Path("theirs/config.json").read_text())
    as_text = {str(number): name for number, name in names.items()}
    config["id2label"] = dict(sorted(as_text.items()))  # "0", "1", "10", "11", "2": as many files list them
    Path("theirs/config.json").write_text(json.dumps(config))
    assert open_model("theirs", None)[0].spec.label_names == tuple(names.values())


def test_where_it_came_from_is_told(scala, monkeypatch):
    write()
    net, record = open_model("theirs", None)
    assert record.provenance == {"model": "theirs", "weights": "theirs"}
    assert "license" not in net.spec.pretrained_cfg, "timm's is not that of somebody else's weights"
    fetched = []

    def fetch(repo, names, also=()):
        fetched.extend([*names, *also])
        return Path("theirs")

    monkeypatch.setattr("scala_cli.models.named.fetch", fetch)
    _, record = open_model("hf-hub:me/vit", None)
    assert record.provenance == {"model": "hf-hub:me/vit", "weights": "hf-hub:me/vit"}
    assert {"model.safetensors", "preprocessor_config.json"} <= {*fetched}


def test_its_size_alone_is_enough_to_time_it(scala):
    write()
    rows = scala("bench", "theirs", "--ratio", "0.5", "--runs", 1, "-b", 1, "--json").json["points"]
    assert rows[0]["latency_ms"] > 0
    net, record = open_model("theirs", None, scratch=True)
    assert not record.trained and net.spec.num_classes == 3


def test_what_timm_does_not_compute_is_refused():
    write(hidden_act="relu", folder="relu")
    write(hidden_act="gelu_new", folder="new")
    write(folder="half")
    weights = Path("half/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    write(folder="lacking")
    config = json.loads(Path("lacking/config.json").read_text())
    Path("lacking/config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    write(folder="sizeless")
    Path("sizeless/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "patch_size"})
    )
    write(folder="heads")
    Path("heads/config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    write(folder="keyless")
    state = load_file("keyless/model.safetensors")
    save_file({name: t for name, t in state.items() if "key" not in name}, "keyless/model.safetensors")
    write(folder="twice")
    Path("twice/config.json").write_text(json.dumps({**config, "architectures": ["A", "B"]}))
    write(folder="pixels")
    Path("pixels/preprocessor_config.json").write_text("{")
    Path("bert").mkdir()
    Path("bert/config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    for name, message in {
        "relu": "with the activation 'relu'",
        "bert": "BertModel",
        "half": "truncated",
        "lacking": r"has shape \(1, 1, 32\), not \(1, 1, 64\)",
        "sizeless": "lacks 'patch_size'",
        "heads": "timm cannot build",
        "keyless": r"no 'blocks\.0\.attn\.qkv\.weight'",
        "new": r"activation 'gelu_new' \(hidden_act in config.json\); only 'gelu'",
        "twice": "holds a A of transformers",
        "pixels": r"preprocessor_config\.json is not JSON",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_model(name, None)


@pytest.mark.parametrize("kind", HEADLESS)
@torch.no_grad()
def test_features_alone(kind, images, scala):
    """Features are the class token after the last norm; transformers' pooler is left out, with a note."""
    model = write(kind)
    answer = scala("convert", "theirs", "-o", "ours", "--json")
    assert answer.code == 0 and "pooler" in answer.told and answer.json["max_abs_diff"] <= 1e-4
    again = timm.create_model("local-dir:ours", pretrained=True).eval()
    assert again.num_classes == 32  # the head is the identity
    assert (again(images) - model(images).last_hidden_state[:, 0]).abs().max() <= 1e-4
    assert open_model("theirs", None, Changes(num_classes=4))[1].new_head


@torch.no_grad()
def test_weights_in_several_files(images):
    model = write(shards="10KB")
    assert not Path("theirs/model.safetensors").exists()
    assert len([*Path("theirs").glob("model-*.safetensors")]) > 1
    assert (open_model("theirs", None)[0](images) - model(images).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_the_number_told_is_against_the_sources_own_eps(scala, monkeypatch):
    """With transformers' initial weights eps matters, so weights not scaled for it are detected."""
    write(scale=0.0, layer_norm_eps=1e-3)
    told = scala("convert", "theirs", "-o", "ours", "--json").json["max_abs_diff"]
    assert 0 < told <= 1e-4
    monkeypatch.setattr("scala_cli.models.source.with_eps", lambda state, spec, eps: state)
    answer = scala("convert", "theirs", "-o", "again")
    assert answer.code == 2 and "would not compute" in answer.told


SQUARE, SHORTEST = {"height": 224, "width": 224}, {"shortest_edge": 256}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.5, 0.4]
PROCESSORS = {
    "all of it, squashed": ViTImageProcessorPil(size=SQUARE, image_mean=MEAN, image_std=STD),
    "bicubic": ViTImageProcessorPil(size=SQUARE, resample=3),
    "nearest": ViTImageProcessorPil(size=SQUARE, resample=0),
    "the middle": ViTImageProcessorPil(size=SHORTEST, do_center_crop=True, crop_size=SQUARE, resample=3),
    "the middle of a few pixels more": ViTImageProcessorPil(
        size={"shortest_edge": 248}, do_center_crop=True, crop_size=SQUARE
    ),
    "DeiT's own": DeiTImageProcessorPil(),
    "between -1 and 1 by its scale": ViTImageProcessorPil(
        rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    ),
    "not normalised": ViTImageProcessorPil(do_normalize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_there(name):
    """Compares pixels of a picture that is not square, to one step of 255."""
    processor = PROCESSORS[name]
    write(image_size=224, patch_size=32)
    processor.save_pretrained("theirs")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    picture = picture.resize((400, 300), Image.Resampling.BICUBIC, (0, 0, 60, 45))
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    net, _ = open_model("theirs", None)
    found = transform_for(net.spec)(picture)
    assert found.shape == expected.shape
    step = 1 / 255 / min(net.spec.pretrained_cfg["std"])
    assert (found - expected).abs().max() <= 1.01 * step
    assert net.spec.pretrained_cfg["interpolation"] != "bicubic" or processor.resample == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_resize": False}, "not resized there"),
        ({"size": 64}, "pictures of 64 x 64 pixels are made there, the model takes 16 x 16"),
        ({"size": {"shortest_edge": 16}}, "keep their shape there"),
        (
            {"size": {"height": 32, "width": 16}, "do_center_crop": True, "crop_size": 16},
            "timm does not do alike",
        ),
        ({"size": 16}, ""),
    ],
)
def test_what_timm_does_otherwise_is_told(settings, told, scala):
    write()
    Path("theirs/preprocessor_config.json").write_text(json.dumps(settings))
    answer = scala("convert", "theirs", "-o", "ours")
    assert answer.code == 0 and told in answer.told and ("preprocessor" in answer.told) is bool(told)


@pytest.mark.parametrize(
    "settings",
    [{"resample": 9}, {"resample": -1}, {"size": "big"}, {"size": {"longest_edge": 4}}, {"size": 0}],
)
def test_invalid_settings(settings):
    write()
    Path("theirs/preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json cannot be read"):
        open_model("theirs", None)


@pytest.mark.parametrize("names", [5, ["a"], {"a": "b"}, {"0": 1}])
def test_invalid_class_names(names):
    write()
    file = Path("theirs/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": names}))
    with pytest.raises(CheckpointError, match="id2label does not name numbered classes"):
        open_model("theirs", None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_std": [0, 0, 0]}, "std is .*, not 3 numbers above 0"),
        ({"image_mean": [0.5, 0.5]}, "mean is .*, not 3 numbers"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "std is"),
    ],
)
def test_pictures_that_could_not_be_prepared(settings, named):
    write()
    Path("theirs/preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json is damaged: {named}"):
        open_model("theirs", None)
