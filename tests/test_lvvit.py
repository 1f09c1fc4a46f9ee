"""LV-ViT: the authors' checkpoints, compared with a forward by hand; sliced, trained and exported."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from torch import nn
from torch.nn import functional as F

from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import load
from scala_cli.models.source import open_model
from scala_cli.slicing.point import parse_points

pytestmark = pytest.mark.usefixtures("elsewhere")
CLASSES = 3
STRIDES = {"4c": (2, 2, 2, 2), "6c": (2, 1, 1, 2, 2, 2), "4_2": (2, 1, 1, 8)}


def shapes_of_stem(kind: str, dim: int) -> list[tuple[int, int]]:
    """Returns (channels, kernel) of each convolution, as in the papers' code."""
    eighth = dim // 8
    if kind == "4c":
        return [(eighth, 3), (dim // 4, 3), (dim // 2, 3), (dim, 3)]
    if kind == "6c":
        return [(eighth, 3)] * 3 + [(dim // 4, 3), (dim // 2, 3), (dim, 3)]
    return [(8, 7), (8, 3), (8, 3), (dim, 8)]


def theirs(kind="4c", dim=40, depth=3, hidden=96, side=2, heads=5) -> dict[str, torch.Tensor]:
    """Returns a random state dict with their names, including the aux head."""
    torch.manual_seed(0)
    state = {}

    def layer(name, *shape, bias=True):
        state[f"{name}.weight"] = torch.randn(shape) / max(shape[-1], 4) ** 0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0]) * 0.1

    given = 3
    stem = shapes_of_stem(kind, dim) if kind else []
    for number, (channels, kernel) in enumerate(stem, 1):
        if kernel == 8:
            layer("patch_embed.proj", channels, given, 8, 8)
            break
        layer(f"patch_embed.conv{number}", channels, given, kernel, kernel, bias=False)
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        state |= {f"patch_embed.bn{number}.{name}": t.detach() for name, t in norm.state_dict().items()}
        given = channels
    if not kind:
        layer("patch_embed.proj", dim, 3, 16, 16)
    state["cls_token"], state["pos_embed"] = torch.randn(1, 1, dim), torch.randn(1, side**2 + 1, dim)
    for block in (f"blocks.{number}" for number in range(depth)):
        for norm in ("norm1", "norm2"):
            layer(f"{block}.{norm}", dim)
        layer(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
        layer(f"{block}.attn.proj", dim, dim)
        layer(f"{block}.mlp.fc1", hidden, dim)
        layer(f"{block}.mlp.fc2", dim, hidden)
    layer("norm", dim)
    for name in ("head", "aux_head"):
        layer(name, CLASSES, dim)
    return state


def tokens_by_hand(state, images, kind):
    """Returns the tokens (B, 1 + N, C) before the first block."""
    x, act = images, F.relu if kind == "4_2" else F.gelu
    if not kind:
        x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    for number, stride in enumerate(STRIDES.get(kind, ()), 1):
        if stride == 8:
            x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
            break
        weight, norm = state[f"patch_embed.conv{number}.weight"], f"patch_embed.bn{number}"
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        x = F.batch_norm(
            x, *(state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        )
        if number < len(STRIDES[kind]):
            x = act(x)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    return x + state["pos_embed"]


def block_by_hand(state, x, number, heads, skip):
    def norm(x, name):
        weight, bias = state[f"blocks.{number}.{name}.weight"], state[f"blocks.{number}.{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)

    def linear(x, name):
        prefix = f"blocks.{number}.{name}"
        return F.linear(x, state[f"{prefix}.weight"], state.get(f"{prefix}.bias"))

    q, k, v = linear(norm(x, "norm1"), "attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    x = x + linear((weights @ v).transpose(1, 2).flatten(2), "attn.proj") / skip
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2") / skip


def by_hand(state, images, kind, heads, skip=2.0, after=lambda number, x: x):
    """Returns their logits. `after` changes the tokens after a block."""
    x = tokens_by_hand(state, images, kind)
    depth = sum(name.endswith(".norm1.weight") for name in state if name.startswith("blocks."))
    for number in range(depth):
        x = after(number, block_by_hand(state, x, number, heads, skip))
    x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], eps=1e-5)
    return F.linear(x[:, 0], state["head.weight"], state["head.bias"])


CASES = [("4c", 40, 5, 2), ("6c", 72, 9, 3), ("4_2", 44, 2, 1)]


@pytest.mark.parametrize(("kind", "dim", "heads", "side"), CASES)
@pytest.mark.parametrize("wrapped", [True, False])
@torch.no_grad()
def test_released_checkpoints_give_the_same_logits(kind, dim, heads, side, wrapped):
    state = theirs(kind, dim, hidden=3 * dim - 1, side=side)
    torch.save({"state_dict": state} if wrapped else state, "theirs.pth")
    net, record = open_model("theirs.pth", parse_points("1"), heads=heads)
    images = torch.randn(2, 3, 16 * side, 16 * side)
    expected = by_hand(state, images, kind, heads)
    assert (net(images) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)
    assert record.trained and net.spec.architecture == "lvvit_s"


@torch.no_grad()
def test_the_released_sizes_have_their_own_heads_and_divisors():
    """LV-ViT-T has heads of 60 channels and divides by 1; its file says neither."""
    state = theirs("4_2", 240, depth=12, hidden=64)
    torch.save(state, "tiny.pth")
    net, _ = open_model("tiny.pth", parse_points("1"))
    images = torch.randn(1, 3, 32, 32)
    expected = by_hand(state, images, "4_2", heads=4, skip=1.0)
    assert (net(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def small(**changes):
    torch.manual_seed(0)
    args = {**TINY, "patch_size": 16, "img_size": 32, "stem_width": 64, **changes}
    return timm.create_model("lvvit_s", **args).eval(), args


@torch.no_grad()
def test_a_width_cuts_the_last_convolution_of_the_stem(scala):
    vit, args = small()
    timm.models.save_for_hf(vit, "lv", model_args=args, safe_serialization=True)
    assert scala("convert", "lv", "-o", "family").code == 0
    net = load("family")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(images), vit(images))
    half = net.slice("0.5")
    stem = half.patch_embed.proj
    assert [len(p) for p in stem.before.parameters()] == [8, 8, 16, 16, 32, 32]
    assert torch.equal(stem.weight, vit.patch_embed.proj.weight[:16])
    assert torch.equal(half(images), net(images, "0.5"))
    cut = scala("slice", "family", "--ratio", "0.5", "-o", "half", "--json").json
    assert cut["max_abs_diff"] <= 1e-5
    assert torch.equal(timm.create_model("local-dir:half", pretrained=True).eval()(images), half(images))


def test_it_is_trained_and_exported_as_the_others(scala, photos):
    vit, args = small(num_classes=3)
    timm.models.save_for_hf(vit, "lv", model_args=args, safe_serialization=True)
    done = scala(
        "finetune", "lv", "--data", photos, "--ratios", "0.5,1", "--epochs", "1", "-b", "4", "-o", "run",
        "--workers", "0", "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    before, after = load("run/start"), load("run/last")
    for name, tensor in after.vit.state_dict().items():
        if "patch_embed" in name:
            assert not torch.equal(tensor, before.vit.state_dict()[name]), name
    told = scala("export", "run", "--ratio", "0.5", "--format", "onnx", "-o", "half.onnx", "--json")
    assert told.code == 0, told.stderr
    assert told.json["max_abs_diff"] <= 1e-4


def test_what_is_none_of_theirs_is_refused():
    state = theirs()
    spoilt = {
        "no LV-ViT has": {name: t for name, t in state.items() if "conv4" not in name and "bn4" not in name},
        "does not tell its number of heads": state,
        "make no square": {**state, "pos_embed": torch.zeros(1, 4, 40)},
    }
    for said, tensors in spoilt.items():
        torch.save(tensors, "bad.pth")
        heads = None if "heads" in said else 5
        with pytest.raises(CheckpointError, match=said):
            open_model("bad.pth", parse_points("1"), heads=heads)
    torch.save(state, "good.pth")
    with pytest.raises(CheckpointError, match="holds an LV-ViT, no deit_small"):
        open_model("deit_s", None, weights=Path("good.pth"))
