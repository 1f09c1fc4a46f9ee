"""Opening a slimmable model by every kind of name, and the errors of each."""

import argparse
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, Bomb, build, write_timm_directory
from safetensors.torch import save_file

from scala_cli.deploy.slice import slice_model
from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.checkpoint import Record, save
from scala_cli.models.create import check_patches
from scala_cli.models.in_memory import slimmable
from scala_cli.models.source import Changes, is_checkpoint, open_model, open_slimmable
from scala_cli.models.vit import describe
from scala_cli.slicing.point import parse_points

FOUR = parse_points("0.25,0.5,0.75,1")


@pytest.fixture
def timm_directory(tmp_path) -> Path:
    write_timm_directory(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def released(tmp_path) -> Path:
    """Writes a training checkpoint as DeiT releases them: a pickle of weights and options."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48)
    options = argparse.Namespace(model="deit_tiny_patch16_224", lr=1e-3)
    torch.save(
        {"model": timm.create_model("deit_tiny_patch16_224").state_dict(), "args": options},
        tmp_path / "r.pth",
    )
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "other.pth"
    )
    return tmp_path / "r.pth"


@torch.no_grad()
def test_a_timm_directory(timm_directory, images):
    for name in (f"local-dir:{timm_directory}", str(timm_directory)):
        net, record = open_model(name, FOUR)
        assert torch.equal(net(images), build("deit")[0](images))
        assert record.trained and record.method is None
        assert net.spec.model_args["depth"] == TINY["depth"]


@torch.no_grad()
def test_a_weight_file_that_names_its_architecture(released):
    net, record = open_model(str(released), FOUR)
    reference = timm.create_model("deit_tiny_patch16_224").eval()
    reference.load_state_dict(torch.load(released, weights_only=False)["model"])
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(net(x), reference(x))
    assert record.provenance == {"model": "deit_tiny_patch16_224", "weights": "r.pth"}


@torch.no_grad()
def test_weights_for_a_named_architecture(tmp_path, released):
    state = torch.load(released, weights_only=False)["model"]
    save_file(state, tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 224, 224)
    reference = timm.create_model("deit_tiny_patch16_224").eval()
    reference.load_state_dict(state)
    for file in (tmp_path / "w.safetensors", released):
        assert torch.equal(open_model("deit_ti", FOUR, weights=file)[0](x), reference(x))


def test_another_number_of_classes_gets_a_new_head(released):
    net, _ = open_model("deit_ti", FOUR, Changes(num_classes=7), weights=released)
    state = torch.load(released, weights_only=False)["model"]
    assert net.vit.head.out_features == net.spec.num_classes == 7
    assert torch.equal(net.vit.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


@torch.no_grad()
def test_a_file_keeps_its_head_beside_a_directory_of_other_classes(timm_directory, tmp_path, images):
    config = json.loads((timm_directory / "config.json").read_text())
    config["label_names"] = ["one", "two", "three", "four", "five"]
    (timm_directory / "config.json").write_text(json.dumps(config))
    assert open_model(str(timm_directory), FOUR)[0].spec.label_names[4] == "five"
    other = write_timm_directory(tmp_path / "other", num_classes=7)
    file = tmp_path / "other/model.safetensors"
    net, record = open_model(str(timm_directory), FOUR, weights=file)
    assert torch.equal(net(images), other(images)) and not record.new_head
    assert net.spec.label_names is None
    assert open_model(str(timm_directory), FOUR, Changes(num_classes=4), weights=file)[1].new_head


@torch.no_grad()
def test_image_and_patch_size_are_resampled_by_timm(timm_directory):
    net, _ = open_model(str(timm_directory), FOUR, Changes(img_size=24, patch_size=8))
    expected = timm.create_model(
        f"local-dir:{timm_directory}", pretrained=True, img_size=24, patch_size=8
    ).eval()
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(net(x), expected(x))
    assert net.spec.input_size == (3, 24, 24) == tuple(net.spec.pretrained_cfg["input_size"])


def test_scratch_is_not_trained():
    net, record = open_model("test_vit", FOUR, Changes(num_classes=4), scratch=True)
    assert not record.trained and record.provenance["weights"] == "random"
    assert net.spec.num_classes == 4
    again, _ = open_model("test_vit", FOUR, Changes(num_classes=4), scratch=True)
    assert torch.equal(net.vit.head.weight, again.vit.head.weight)


def test_a_checkpoint_keeps_its_widths_unless_told(timm_directory, tmp_path):
    net, record = open_model(str(timm_directory), FOUR)
    save(net, record, tmp_path / "net")
    assert open_slimmable(str(tmp_path / "net"), None)[0].points == FOUR
    assert open_slimmable(str(tmp_path / "net"), "0.5,1")[0].points == parse_points("0.5,1")
    assert open_slimmable(str(timm_directory), None)[0].points == FOUR


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("deit_s", "no network"),
        ("hf-hub:org/repo", "no network"),
        ("vit_giant_patch14_224", "no pretrained weights"),
        ("deit_huge", "no model 'deit_huge'"),
        ("resnet18", "ResNet"),
        ("local-dir:nowhere", "does not exist"),
        ("", "does not say which architecture"),
    ],
)
def test_what_cannot_be_opened_is_said_with_a_remedy(model, message):
    with pytest.raises(CheckpointError, match=message) as error:
        open_model(model, FOUR)
    assert error.value.hint or error.value.remedy


def test_no_network_names_other_weights():
    with pytest.raises(CheckpointError) as error:
        open_model("deit_s", FOUR)
    assert error.value.remedy == "other_weights"


def test_widths_are_checked_before_anything_is_downloaded():
    with pytest.raises(PointError, match="of 64 channels"):
        open_model("deit_s", parse_points("0.3,1"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: torch.save({"model": Bomb()}, f), r"pickles code \(posix.mkdir\)"),
        (lambda f: f.write_bytes(pickle.dumps({"model": Bomb()})), "truncated|pickles code"),
        (lambda f: f.write_bytes(b"hello"), "truncated"),
        (lambda f: f.write_bytes(b""), "truncated"),
        (lambda f: torch.save([1, 2], f), "no dictionary of tensors; it holds a list"),
        (lambda f: torch.save({"model": {"head.weight": 3}}, f), "tensors; it holds 'model'"),
        (lambda f: None, "does not exist"),
    ],
)
def test_unsafe_and_damaged_pickles(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(CheckpointError, match=message):
        open_model("deit_ti", FOUR, weights=file)
    assert not (tmp_path / "exploded").exists()


def test_half_a_download(tmp_path, released):
    half = tmp_path / "half.pth"
    half.write_bytes(released.read_bytes()[:2_000_000])
    with pytest.raises(CheckpointError, match="truncated"):
        open_model(str(half), FOUR)


def test_weights_of_another_model_name_the_first_key(tmp_path, released):
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.weight"):
        open_model("deit_ti", FOUR, weights=tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not say which architecture"):
        open_model(str(tmp_path / "other.pth"), FOUR)


def test_a_trained_family_is_not_converted_again(timm_directory, tmp_path):
    net, record = open_model(str(timm_directory), FOUR)
    save(net, record, tmp_path / "untrained")
    open_model(str(tmp_path / "untrained"), parse_points("0.5,1"))
    save(net, replace(record, method="scala"), tmp_path / "trained")
    with pytest.raises(CheckpointError, match="trained family"):
        open_model(str(tmp_path / "trained"), FOUR)


@torch.no_grad()
def test_a_full_width_that_was_trained_alone_is_converted(timm_directory, tmp_path, images):
    net, record = open_model(str(timm_directory), FOUR)
    full = net.with_points(parse_points("1"))
    trained = replace(record, method="separate", order="importance", metrics=({"ratio": 1.0, "top1": 50.0},))
    save(full, trained, tmp_path / "alone")
    again, record = open_model(str(tmp_path / "alone"), FOUR)
    assert torch.equal(again(images), net(images)) and again.points == net.points
    assert record.method is None and record.widths_are_free(again.rule)
    sizes = full.with_points(parse_points("1@16,1@32"))
    save(sizes, trained, tmp_path / "sizes")
    with pytest.raises(CheckpointError, match="trained family"):
        open_model(str(tmp_path / "sizes"), FOUR)


@pytest.mark.parametrize(
    "record",
    [
        Record(trained=False, provenance={"weights": "random"}),
        Record(new_head=True),
        Record(order="importance"),
        Record(order="none"),
    ],
)
def test_what_is_converted_again_stays_what_it_was(timm_directory, tmp_path, record):
    net, _ = open_model(str(timm_directory), FOUR)
    save(net, record, tmp_path / "net")
    slice_model(tmp_path / "net", 0.5, tmp_path / "cut")
    for name, order in (("net", record.order), ("cut", None)):
        again = open_model(str(tmp_path / name), FOUR)[1]
        assert (again.trained, again.new_head, again.order) == (record.trained, record.new_head, order)
        assert again.provenance["weights"] == record.provenance.get("weights", name)
    assert open_model(str(tmp_path / "net"), FOUR, scratch=True)[1].trained is False


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.half, torch.bfloat16])
def test_half_precision_files_are_read_as_float32(tmp_path, kind):
    vit = timm.create_model("test_vit").eval().to(kind)
    torch.save({"model": vit.state_dict(), "arch": "test_vit"}, tmp_path / "half.pth")
    assert slimmable(vit).vit.norm.weight is vit.norm.weight, "in memory it stays as it is"
    net, _ = open_model(str(tmp_path / "half.pth"), FOUR)
    x = torch.randn(1, *net.spec.input_size)
    assert torch.equal(net(x), vit.float()(x))


@torch.no_grad()
def test_weights_without_a_classifier(tmp_path):
    state = timm.create_model("deit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(state, tmp_path / "features.safetensors")
    net, record = open_model("deit_ti", FOUR, weights=tmp_path / "features.safetensors")
    assert net.spec.num_classes == 0 and record.trained and not record.new_head
    assert net.spec.features and net(torch.randn(1, 3, 224, 224), 0.5).shape == (1, 192)
    net, record = open_model(
        "deit_ti", FOUR, Changes(num_classes=3), weights=tmp_path / "features.safetensors"
    )
    assert net.spec.num_classes == 3 and record.new_head and not net.spec.features
    assert torch.equal(net.vit.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    save_file({name.replace("mlp", "ffn"): t for name, t in state.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="ffn"):  # a new head does not allow other differences
        open_model("deit_ti", FOUR, Changes(num_classes=3), weights=tmp_path / "odd.safetensors")


@torch.no_grad()
def test_weights_for_the_model_of_a_directory(timm_directory, tmp_path, images):
    """The file's weights are used, not those in the directory."""
    other, _ = build("deit")
    other.head.bias += 1
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    net, record = open_model(str(timm_directory), FOUR, weights=tmp_path / "other.safetensors")
    assert torch.equal(net(images), other(images)) and not torch.equal(net(images), build("deit")[0](images))
    assert record.provenance["weights"] == "other.safetensors"


def test_two_sources_of_weights(released):
    for source in ({"scratch": True}, {}):
        with pytest.raises(CheckpointError, match="two sources"):
            open_model("deit_ti" if source else str(released), FOUR, weights=released, **source)


def test_an_alias_is_not_shadowed_by_a_file_or_a_directory(timm_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("deit_b").write_text("no weights")
    with pytest.raises(CheckpointError, match="no network"):
        open_model("deit_b", FOUR)
    timm_directory.rename(tmp_path / "deit_s")
    with pytest.raises(CheckpointError, match="no network"):
        open_slimmable("deit_s", None)
    assert is_checkpoint("deit_s") is False
    assert open_slimmable("./deit_s", None)[0].spec.embed_dim == TINY["embed_dim"]


def test_what_timm_saved_with_dropout_drops_at_every_width(tmp_path):
    write_timm_directory(tmp_path / "vit", drop_path_rate=0.25, attn_drop_rate=0.125)
    net, _ = open_model(str(tmp_path / "vit"), FOUR)
    for vit in (net.vit, net.at(FOUR[0].ratio)):
        assert (vit.blocks[1].drop_path1.drop_prob, vit.blocks[0].attn.attn_drop.p) == (0.25, 0.125)


def test_an_image_size_that_is_no_multiple_of_the_patch(timm_directory):
    with pytest.raises(CheckpointError, match="not a multiple") as error:
        open_model(str(timm_directory), FOUR, Changes(img_size=30))
    assert (error.value.remedy, error.value.facts) == ("image_size", {"size": 28})
    args = {"img_size": [16, 18], "patch_size": 4}
    spec = describe(*build("vit", **args))
    with pytest.raises(CheckpointError, match="image width 18 is not a multiple of patch size 4") as error:
        check_patches(spec)
    assert error.value.remedy == "try"  # not an image size, as that would be square
    assert error.value.facts == {"setting": "patch-size", "value": 2}
    with pytest.raises(CheckpointError, match="100 is not a multiple of patch size 16"):
        open_model("test_vit", FOUR, Changes(img_size=100), scratch=True)
