"""The Hub, stood in for by files that are already here."""

import json

import pytest
import torch
from conftest import slimmable
from huggingface_hub import constants

from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.hub import TRANSPORT, fail_fast_offline
from scala_cli.models.source import is_checkpoint, open_model


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """`org/net` as huggingface_hub hands it out: a path for each file that the repository has."""
    save(slimmable(), Record(), tmp_path / "net")
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        if repo != "org/net":
            raise FileNotFoundError(f"no {repo}")
        return str(tmp_path / "net" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo, name, **_: download(repo, name))
    return asked


@torch.no_grad()
def test_a_checkpoint_on_the_hub(repository, images):
    assert torch.equal(load("hf-hub:org/net@v2")(images, 0.5), slimmable()(images, 0.5))
    assert ("org/net", "model.safetensors", "v2") in repository
    assert is_checkpoint("hf-hub:org/net") and not is_checkpoint("hf-hub:org/other")


def test_a_repository_that_is_not_there(repository):
    with pytest.raises(CheckpointError, match="hf-hub:org/other"):
        load("hf-hub:org/other")


@pytest.mark.parametrize(
    "config", [{}, {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": None}]
)
def test_a_repository_that_is_no_model_of_timms(repository, tmp_path, config):
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hf-hub:org/net"):
        open_model("hf-hub:org/net", None)


@pytest.mark.parametrize("call", [load, lambda name: open_model(name, None)])
def test_a_connection_that_breaks(repository, monkeypatch, call):
    def refuse(*_, **__):
        raise TRANSPORT("the proxy answers 403")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match="could not download the weights of hf-hub:org/net"):
        call("hf-hub:org/net")


def test_without_a_name_server_only_the_cache_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    fail_fast_offline()
    assert not constants.HF_HUB_OFFLINE  # a proxy resolves names itself
    monkeypatch.delenv("HTTPS_PROXY")
    fail_fast_offline()
    assert constants.HF_HUB_OFFLINE
