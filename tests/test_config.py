"""A config.json from others describes the model; it cannot make timm read anything else."""

import json

import pytest
import timm
import torch
from conftest import build, slimmable, write_timm_directory

from scala_cli.bench.subject import other
from scala_cli.deploy.slice import slice_model
from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.source import open_model

WEIGHTS = "http://evil.invalid/weights.pth"
HOSTILE = {
    "a download": ({"pretrained": True}, {"url": WEIGHTS}),
    "a download of another name": (
        {"pretrained": True, "pretrained_cfg": {"url": [WEIGHTS, "any name"], "num_classes": 5}},
        {},
    ),
    "settings laid over": ({"pretrained": True, "pretrained_cfg_overlay": {"url": WEIGHTS}}, {}),
    "a loader of its own": ({"pretrained": True}, {"url": WEIGHTS, "custom_load": True}),
    "a file here": ({"checkpoint_path": "secret.pth"}, {}),
    "a file in its settings": ({"pretrained": True}, {"file": "secret.pth"}),
    "a repository": ({"pretrained": True}, {"hf_hub_id": "evil/net", "hf_hub_filename": "any.bin"}),
    "a repository that tells how to read it": (
        {"pretrained": True, "cache_dir": "cache"},
        {"source": "hf-hub", "hf_hub_id": "evil/net", "hf_hub_filename": "x", "custom_load": "hf"},
    ),
    "a directory": ({"pretrained": True}, {"source": "local-dir", "file": "secret"}),
    "tensors": ({"pretrained": True}, {"state_dict": {"head.weight": [1]}}),
}
READERS = {
    "timm.models._builder": (
        "load_state_dict",
        "load_state_dict_from_url",
        "load_state_dict_from_hf",
        "load_custom_from_hf",
        "download_cached_file",
    ),
    "timm.models._factory": ("load_checkpoint",),
    "torch.hub": ("load_state_dict_from_url", "download_url_to_file"),
    "socket.socket": ("connect",),
    "socket": ("getaddrinfo",),
}
"""All functions through which timm reads weights; a state dict in memory uses none of them."""


@pytest.fixture
def touched(monkeypatch) -> list[str]:
    """Traps all READERS; returns the list of those that were called."""
    found: list[str] = []

    def trap(name):
        def read(*_args, **_kwargs):
            found.append(name)
            raise OSError(f"{name} was called")

        return read

    for module, names in READERS.items():
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", trap(f"{module}.{name}"))
    return found


@pytest.mark.parametrize("kind", HOSTILE)
def test_somebody_elses_config_reads_nothing(kind, touched, elsewhere, images):
    save(slimmable(), Record(), elsewhere / "net")
    vit = write_timm_directory(elsewhere / "plain")
    (elsewhere / "secret.pth").write_bytes(b"no weights")
    args, cfg = HOSTILE[kind]
    for folder in ("net", "plain"):
        file = elsewhere / folder / "config.json"
        config = json.loads(file.read_text())
        config["model_args"] |= args
        config["pretrained_cfg"] |= cfg
        file.write_text(json.dumps(config))
    before = {*elsewhere.iterdir()}
    with torch.no_grad():
        assert torch.equal(load("net")(images), vit(images))
        assert torch.equal(open_model("plain", None)[0](images), vit(images))
    open_model("plain", None, scratch=True)
    slice_model("net", 0.5, "half")
    other("plain").build(False)
    assert touched == []
    assert {*elsewhere.iterdir()} - before == {elsewhere / "half"}
    kept = (elsewhere / "half/config.json").read_text()  # plain timm can read what we write
    assert not any(word in kept for word in ("evil", "secret", "cache_dir", "checkpoint_path"))


@pytest.mark.parametrize("name", ["hf-hub:evil/net", "local-dir:secret", "../secret", 7])
def test_an_architecture_is_a_name_of_timms(name, touched, elsewhere, monkeypatch):
    write_timm_directory(elsewhere / "plain")
    file = elsewhere / "plain/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": name}))
    built: list[str] = []
    monkeypatch.setattr("timm.create_model", lambda name, *_args, **_kwargs: built.append(name))
    for use in (lambda: open_model("plain", None), lambda: other("plain")):
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            use()
    assert touched == [] == built


FLAWS = [
    {"mean": "x"},
    {"mean": [0.5, 0.5]},
    {"mean": ["a", "b", "c"]},
    {"mean": [10**400, 0, 0]},
    {"std": [0, 0, 0]},
    {"std": [0.5, float("nan"), 0.5]},
    {"crop_pct": "x"},
    {"crop_pct": 0},
    {"interpolation": "evil"},
    {"crop_mode": "evil"},
    {"label_names": 5},
    {"label_names": [1, 2, 3]},
    {"label_names": ["a", "b"]},
    {"input_size": "x"},
]


@pytest.mark.parametrize("flaw", FLAWS)
def test_invalid_settings_are_named(flaw, elsewhere):
    save(slimmable(), Record(), elsewhere / "net")
    write_timm_directory(elsewhere / "plain")
    for folder in ("net", "plain"):
        file = elsewhere / folder / "config.json"
        config = json.loads(file.read_text())
        config["pretrained_cfg"] |= flaw
        file.write_text(json.dumps(config))
    for use in (lambda: load("net"), lambda: open_model("plain", None)):
        with pytest.raises(CheckpointError, match=rf"config\.json is damaged: {next(iter(flaw))} is"):
            use()


def test_one_number_is_for_all_channels_and_null_is_timms_default(elsewhere):
    write_timm_directory(elsewhere / "plain")
    file = elsewhere / "plain/config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= {"mean": [0.25], "std": None, "crop_pct": None}
    config["model_args"] |= {"weight_init": "nonsense"}
    file.write_text(json.dumps(config))
    spec = open_model("plain", None)[0].spec
    assert spec.pretrained_cfg["mean"] == [0.25] * 3 and len(spec.pretrained_cfg["std"]) == 3
    assert "weight_init" not in spec.model_args


def test_an_argument_that_no_vit_takes_is_refused(elsewhere):
    write_timm_directory(elsewhere / "plain")
    file = elsewhere / "plain/config.json"
    config = json.loads(file.read_text())
    config["model_args"]["features_only"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'features_only', which no VisionTransformer takes"):
        open_model("plain", None)


@torch.no_grad()
def test_an_older_config_is_one_object(elsewhere, images):
    """timm wrote configs so before it nested `pretrained_cfg`."""
    vit, args = build("deit")
    timm.models.save_for_hf(vit, str(elsewhere / "old"), model_args=args, safe_serialization=True)
    file = elsewhere / "old/config.json"
    config = json.loads(file.read_text())
    older = {"architecture": config["architecture"], "model_args": config["model_args"], "num_classes": 5}
    file.write_text(json.dumps(config["pretrained_cfg"] | older | {"labels": list("abcde")}))
    net, _ = open_model("old", None)
    assert torch.equal(net(images), vit(images)) and net.spec.label_names == tuple("abcde")
