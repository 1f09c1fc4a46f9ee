"""A backbone without a classifier: its head is the identity, and every width gives its features."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from conftest import KINDS, build, write_timm_directory
from huggingface_hub import ModelCard

from scala_cli.models.checkpoint import Record, load_with_record, save
from scala_cli.models.features import give_identity_head
from scala_cli.models.in_memory import slimmable
from scala_cli.models.order import order_channels
from scala_cli.models.source import Changes, open_model
from scala_cli.models.stream import norms_of
from scala_cli.slicing.point import parse_points


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_computes_what_it_did_and_can_be_put_in_order(kind, images):
    vit, _ = build(kind, num_classes=0)
    net = slimmable(vit)
    assert torch.equal(net(images), vit(images))
    ordered = order_channels(net, [images, images.flip(0)])
    assert (ordered(images) - vit(images)).abs().max() <= 1e-4
    assert bool(norms_of(net.vit)) == (kind not in ("norm before the blocks", "no final norm"))
    assert net(images, 0.25).shape == vit(images).shape


def test_a_model_with_a_classifier_keeps_it():
    vit, _ = build()
    head = vit.head
    assert not give_identity_head(vit) and vit.head is head


def test_a_backbone_as_a_user_has_it(scala, photos, images):
    """Converts in order, slices, loads in timm and shows it; training on classes adds a new head."""
    vit = write_timm_directory(Path("backbone"), num_classes=0)
    told = scala("convert", "backbone", "-o", "net", "--order", "importance", "--json")
    assert told.code == 0 and told.json["max_abs_diff"] <= 1e-4
    assert scala("slice", "net", "--ratio", "0.5", "-o", "half").code == 0
    with torch.no_grad():
        full, half = (timm.create_model(f"local-dir:{n}", pretrained=True).eval() for n in ("net", "half"))
        assert (full(images) - vit(images)).abs().max() <= 1e-4 and half(images).shape == (3, 32)
    for place in ("net", "half"):
        config = json.loads(Path(place, "config.json").read_text())
        assert config["scala"]["features"] is True and config["num_classes"] == 32
    assert scala("info", "net", "--json").json["classes"] == 0
    refused = scala("eval", "net", "--data", photos, "--cascade", "0.5,1")
    assert refused.code == 2 and "this model gives features. Train a head" in refused.told
    quick = ("--epochs", 1, "-b", 4, "-j", 0, "--no-amp", "--device", "cpu")
    words = ("finetune", "net", "--data", photos, *quick, "--task", "classification", "-o", "run")
    trained = scala(*words)
    assert trained.code == 0 and "no classes, it gives features: the head is new" in trained.told
    scala("push", "net", "org/net", "--dry-run", "-o", "pushed")
    card = ModelCard.load("pushed/README.md")
    assert card.data.pipeline_tag == "image-feature-extraction" and "its outputs are features" in card.text
    net, record = load_with_record(Path("run/best"))
    assert net.spec.num_classes == 3 and not net.spec.features and not record.new_head
    assert "features" not in json.loads(Path("run/best/config.json").read_text())["scala"]


def test_as_many_classes_as_features_are_classes_only_where_they_are_wanted(tmp_path):
    net = slimmable(build("deit", num_classes=0)[0], "0.5,1")
    assert net.spec.num_classes == 0
    save(net, Record(), tmp_path / "net")
    two = parse_points("0.5,1")
    again, record = open_model(str(tmp_path / "net"), two)
    assert again.spec.features and not record.new_head and torch.equal(again.vit.head.weight, torch.eye(32))
    again, record = open_model(str(tmp_path / "net"), two, Changes(num_classes=32))
    assert again.spec.num_classes == 32 and record.new_head
    assert not torch.equal(again.vit.head.weight, torch.eye(32))


def test_a_slice_of_a_backbone_converted_again_still_gives_features(scala):
    write_timm_directory(Path("backbone"), num_classes=0)
    for words in (["convert", "backbone", "-o", "net"], ["slice", "net", "--ratio", "0.5", "-o", "half"]):
        assert scala(*words).code == 0
    again, record = open_model("half", parse_points("0.5,1"))
    assert again.spec.features and not record.new_head
    assert again.spec.embed_dim == 16 and again.vit.head.out_features == 32


def test_features_are_no_classes_until_they_are_named():
    spec = slimmable(build("deit", num_classes=0)[0]).spec
    assert spec.at(Fraction(1, 2)).features
    assert not spec.naming(["a", "b"]).features and spec.naming(["a", "b"]).num_classes == 2
    assert replace(spec, features=False).num_classes == 32
