"""Models on the Hub, replaced by local files."""

import json

import pytest
import torch
from conftest import slimmable, write_timm_directory
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars, logging

from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.hub import TRANSPORT, quiet_hub
from scala_cli.models.source import is_checkpoint, open_model

COMMIT = "c0ffee"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Serves `org/net` like huggingface_hub, in a directory named after the commit; returns the requests."""
    save(slimmable(), Record(), tmp_path / COMMIT)
    asked = []

    def download(repo, revision=None, allow_patterns=()):
        asked.append((repo, revision, tuple(allow_patterns)))
        if repo != "org/net":
            raise FileNotFoundError(f"no {repo}")
        return str(tmp_path / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@torch.no_grad()
def test_a_checkpoint_on_the_hub(repository, images):
    assert torch.equal(load("hf-hub:org/net@v2")(images, 0.5), slimmable()(images, 0.5))
    files = ("config.json", "model.safetensors", "extra.st")
    assert ("org/net", "v2", files) in repository, "in one call, of one commit"
    assert is_checkpoint("hf-hub:org/net") and not is_checkpoint("hf-hub:org/other")


def test_a_repository_that_is_not_there(repository):
    with pytest.raises(CheckpointError, match="hf-hub:org/other"):
        load("hf-hub:org/other")


@pytest.mark.parametrize(
    "config", [{}, {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": None}]
)
def test_a_repository_that_is_no_model_of_timms(repository, tmp_path, config):
    (tmp_path / COMMIT / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks|cannot build"):
        open_model("hf-hub:org/net", None)


@pytest.mark.parametrize("call", [load, lambda name: open_model(name, None)])
def test_a_connection_that_breaks(repository, monkeypatch, call):
    def refuse(*_, **__):
        raise TRANSPORT("the proxy answers 403")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="could not download the weights of hf-hub:org/net"):
        call("hf-hub:org/net")


def test_a_model_of_timms_on_the_hub(repository, tmp_path, images):
    """Its weights come from the same commit as its config.json."""
    vit = write_timm_directory(tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "other" / name).replace(tmp_path / COMMIT / name)
    net, record = open_model("hf-hub:org/net@main", None)
    assert torch.equal(net.eval()(images), vit(images))
    assert record.provenance == {"model": "hf-hub:org/net@main", "weights": "hf-hub:org/net@main"}
    assert [revision for _, revision, names in repository if "model.safetensors" in names] == [COMMIT]


def test_a_file_that_the_repository_lacks_is_named(repository, tmp_path):
    (tmp_path / COMMIT / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hf-hub:org/net holds no model\.safetensors"):
        load("hf-hub:org/net")


def test_without_a_name_server_only_the_cache_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    with quiet_hub():
        assert not constants.HF_HUB_OFFLINE  # with a proxy the Hub may be reached without a name server
    monkeypatch.delenv("HTTPS_PROXY")
    with quiet_hub():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_what_the_caller_chose_for_the_hub_is_left_alone(monkeypatch):
    """Even if a call fails."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    logging.set_verbosity_info()
    enable_progress_bars()
    for call in (lambda: load("hf-hub:org/net"), lambda: open_model("deit_ti", None)):
        with pytest.raises(CheckpointError, match="there is no network"):
            call()
        assert not constants.HF_HUB_OFFLINE
        assert logging.get_verbosity() == logging.INFO and not are_progress_bars_disabled()
    logging.set_verbosity_warning()
