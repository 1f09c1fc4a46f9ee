"""scala_cli.slimmable on a timm model in memory; the caller's model is left alone."""

import pytest
import timm
import torch
from conftest import KINDS, build
from torch import nn
from torch.nn.utils import prune

from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.in_memory import slimmable
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import choose_attention, describe
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.rule import Rule

RATES = {
    "drop_rate": 0.1,
    "pos_drop_rate": 0.15,
    "patch_drop_rate": 0.2,
    "proj_drop_rate": 0.25,
    "attn_drop_rate": 0.3,
    "drop_path_rate": 0.35,
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_in_memory(kind, images):
    """Every kind of model, also those made with more arguments than a name."""
    vit, _ = build(kind)
    net = slimmable(vit.train(), "0.5,1")
    assert net.training and net.vit.training
    for name, parameter in vit.named_parameters():
        assert net.vit.get_parameter(name) is parameter
    net.eval()
    assert torch.equal(net(images), vit.eval()(images))
    assert (net(images, 0.5) - net.slice(0.5)(images)).abs().max() <= 1e-5


def test_a_model_in_memory_that_does_not_show_how_it_was_made():
    vit, _ = build("vit", act_layer="relu")
    with pytest.raises(CheckpointError, match="computes something else") as error:
        slimmable(vit)
    assert "save_for_hf" in error.value.hint and not error.value.remedy
    with pytest.raises(CheckpointError, match="ResNet"):
        slimmable(timm.create_model("resnet18"))
    with pytest.raises(PointError, match=r"0\.3"):
        slimmable(build("vit")[0], "0.3,1")


def dropouts(vit: nn.Module) -> dict[str, str]:
    """Returns every dropout layer, with its kind and rate as torch and timm print them."""
    return {name: repr(module) for name, module in vit.named_modules() if "drop" in name.rpartition(".")[2]}


@pytest.mark.parametrize("kind", ["deit", "distilled", "average pool, fc_norm"])
@pytest.mark.parametrize("rate", RATES)
def test_every_width_drops_as_the_model_does(kind, rate, tmp_path):
    """In memory, and after saving and loading."""
    vit, _ = build(kind, depth=3, **{rate: RATES[rate]})
    net = slimmable(vit, "0.5,1")
    assert dropouts(net.vit) == dropouts(vit) == dropouts(net.at(net.rule.ratios[0]))
    assert dropouts(vit) != dropouts(build(kind, depth=3)[0])
    save(net, Record(), tmp_path / "net")
    again = load(tmp_path / "net")
    assert dropouts(again.vit) == dropouts(again.at(again.rule.ratios[0])) == dropouts(vit)


def test_a_schedule_of_drop_path_that_no_argument_of_timm_gives():
    vit, _ = build("deit", depth=3, drop_path_rate=0.2)
    vit.blocks[0].drop_path1 = type(vit.blocks[1].drop_path1)(0.5)
    net = slimmable(vit, "0.5,1")
    assert dropouts(net.vit) == dropouts(vit) == dropouts(net.at(net.rule.ratios[0]))


@torch.no_grad()
def test_images_of_any_size(tmp_path):
    net = slimmable(build("deit", dynamic_img_size=True)[0], "0.5,1")
    save(net, Record(), tmp_path / "net")
    for each in (net, load(tmp_path / "net")):
        assert each.eval()(torch.randn(1, 3, 24, 32), 0.5).shape == (1, 5)


def everything(vit: nn.Module) -> dict[str, object]:
    """Returns all that a caller can see of a model: flags, attributes, parts, addresses of weights."""
    told: dict[str, object] = {"threads": torch.get_num_threads(), "fused": timm.layers.use_fused_attn()}
    told |= {"random": torch.get_rng_state().tolist(), "cfg": dict(vit.pretrained_cfg)}
    for name, module in vit.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        told[name] = (type(module), id(module), plain)
    told |= {f"{n}=": (id(p), p.device, p._version, p.requires_grad) for n, p in vit.named_parameters()}
    return told


@pytest.mark.parametrize("classes", [5, 0])
def test_the_callers_model_is_left_alone(classes, images, tmp_path):
    """Modes that differ between parts, and frozen weights, stay as they were."""
    vit, _ = build("deit", num_classes=classes, drop_rate=0.1)
    vit.train()
    vit.blocks[0].eval()
    vit.cls_token.requires_grad_(False)
    before = everything(vit)
    net = slimmable(vit, "0.5,1")
    net.eval()
    choose_attention(net.vit, torch.device("cpu"), bfloat16=True)
    with torch.no_grad():
        net(images, 0.5)
        order_channels(net, [images])
        save(net, Record(), tmp_path / "net")
    net.vit.reset_classifier(7)
    after = everything(vit)
    after["random"] = before["random"]  # a new head draws random numbers
    assert after == before


def test_saving_leaves_a_models_settings_alone(tmp_path):
    vit, args = build()
    spec, settings = describe(vit, args).naming(["ant", "bee", "cow", "doe", "eel"]), vit.pretrained_cfg
    save(
        SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,1")), spec.num_heads)),
        Record(),
        tmp_path / "net",
    )
    assert vit.pretrained_cfg is settings and load(tmp_path / "net").spec.label_names == spec.label_names


def test_making_a_model_slimmable_draws_nothing():
    for classes in (5, 0):
        vit = build("deit", num_classes=classes)[0]
        before = torch.get_rng_state()
        slimmable(vit)
        assert torch.equal(torch.get_rng_state(), before)


def test_attention_is_chosen_for_a_model_and_its_widths_not_for_the_process(images):
    net = slimmable(build()[0], "0.5,1").eval()
    net(images, 0.5)
    choose_attention(net.vit, torch.device("cpu"), bfloat16=True)
    net(images, 0.5)
    for vit in (net.vit, net.at(net.rule.ratios[0])):
        assert not any(block.attn.fused_attn for block in vit.blocks)
    assert build()[0].blocks[0].attn.fused_attn


def narrowed(layer: nn.Linear, outputs: int, inputs: int) -> nn.Linear:
    """Returns a layer as a pruner leaves it."""
    less = nn.Linear(inputs, outputs)
    less.weight.data, less.bias.data = layer.weight.data[:outputs, :inputs], layer.bias.data[:outputs]
    return less


def test_a_model_pruned_unevenly_is_told_which_layer_is_odd():
    vit, _ = build()
    mlp = vit.blocks[1].mlp
    mlp.fc1, mlp.fc2 = narrowed(mlp.fc1, 96, 32), narrowed(mlp.fc2, 32, 96)
    with pytest.raises(CheckpointError) as error:
        slimmable(vit)
    assert "blocks.1.mlp.fc1.weight is 96 x 32, blocks.0.mlp.fc1.weight 128 x 32" in error.value.message
    assert "prune" in error.value.hint and not error.value.remedy


def test_a_model_whose_heads_were_pruned_is_told_their_sizes():
    vit, _ = build()
    for block in vit.blocks:
        block.attn.qkv, block.attn.proj = narrowed(block.attn.qkv, 48, 32), narrowed(block.attn.proj, 32, 16)
        block.attn.num_heads = 1
    with pytest.raises(CheckpointError, match="qkv has 48 outputs, not 3 x 32"):
        slimmable(vit)


@torch.no_grad()
def test_a_model_pruned_evenly_is_a_vit_of_another_size(images, tmp_path):
    vit, _ = build()
    for block in vit.blocks:
        block.mlp.fc1, block.mlp.fc2 = narrowed(block.mlp.fc1, 96, 32), narrowed(block.mlp.fc2, 32, 96)
    net = slimmable(vit, "0.5,1").eval()
    assert torch.equal(net(images), vit(images)) and net.spec.hidden_dim == 96


@torch.no_grad()
def test_a_stream_pruned_evenly_leaves_stale_sizes_that_nobody_reads(images, tmp_path):
    """Torch-Pruning leaves the old embed_dim."""
    wide, _ = build()
    vit, _ = build(embed_dim=16)
    vit.embed_dim = wide.embed_dim
    net = slimmable(vit, "0.5,1").eval()
    assert torch.equal(net(images), vit(images)) and net.spec.embed_dim == 16
    save(net, Record(), tmp_path / "net")
    assert torch.equal(load(tmp_path / "net")(images, 0.5), net(images, 0.5))


def test_layers_that_are_not_as_timm_makes_them_are_named():
    vit, _ = build()
    prune.l1_unstructured(vit.blocks[1].mlp.fc1, "weight", 0.5)
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.mlp\.fc1\.weight'") as error:
        slimmable(vit)
    assert "config.json" not in error.value.hint
