"""The Scala authors' checkpoints, compared with their forward written out by hand."""

import argparse
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.source import open_model, open_slimmable
from scala_cli.slicing.point import parse_points

pytestmark = pytest.mark.usefixtures("elsewhere")
CLASSES = 7


def theirs(kind="tiny", smallest=0.25, largest=1.0, step=0.0625, file="theirs.pth", **more) -> Path:
    """Writes a file as their training script does, with random weights and another random average."""
    size, _, distilled = kind.partition("_")
    torch.manual_seed(0)
    name = f"deit_tiny{'_distilled' if distilled else ''}_patch16_224"
    narrow = {"embed_dim": 96, "num_heads": 3} if size == "so" else {}
    states = []
    for _ in range(2):
        vit = timm.create_model(name, num_classes=CLASSES, **narrow)
        states.append(
            {key: value + torch.randn_like(value) * 0.05 for key, value in vit.state_dict().items()}
        )
    size = "so_tiny" if size == "so" else "tiny"
    args = argparse.Namespace(
        model=f"deit_{size}{'_distilled' if distilled else ''}_patch16_224_scala",
        smallest_ratio=smallest,
        largest_ratio=largest,
        granularity=step,
    )
    saved = {"model": states[0], "model_ema": states[1], "args": args, "epoch": 3, "optimizer": {"state": {}}}
    torch.save({**saved, **more}, file)
    return Path(file)


def by_hand(state, images, ratio: Fraction, first: bool, heads=3) -> torch.Tensor:
    """Returns their logits at one width: plain products of the kept rows and columns."""

    def kept(length):
        count = int(length * ratio)
        return slice(0, count) if first else slice(length - count, length)

    width = state["norm.weight"].numel()
    dim, embed = int(width * ratio), kept(width)

    def linear(x, name, out=True):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        rows = kept(len(weight)) if out else slice(None)
        return F.linear(x, weight[rows][:, kept(weight.shape[1])], bias[rows])

    def norm(x, name):
        return F.layer_norm(x, (dim,), state[f"{name}.weight"][embed], state[f"{name}.bias"][embed], eps=1e-5)

    patches = F.conv2d(
        images, state["patch_embed.proj.weight"][embed], state["patch_embed.proj.bias"][embed], stride=16
    )
    tokens = [state[name][..., embed] for name in ("cls_token", "dist_token") if name in state]
    x = torch.cat([*(token.expand(len(images), -1, -1) for token in tokens), patches.flatten(2).mT], 1)
    x = x + state["pos_embed"][..., embed]
    for number in range(sum(key.endswith("norm1.weight") for key in state)):
        block = f"blocks.{number}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (width // heads) ** -0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    x = norm(x, "norm")
    logits = linear(x[:, 0], "head", out=False)
    return (logits + linear(x[:, 1], "head_dist", out=False)) / 2 if "dist_token" in state else logits


@pytest.fixture
def photos224():
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "so_tiny", "tiny_distilled"])
@torch.no_grad()
def test_logits_at_every_width_are_theirs(kind, average, photos224):
    file = theirs(kind.replace("so_tiny", "so"))
    state = torch.load(file, weights_only=False)["model_ema" if average else "model"]
    net, record = open_model(str(file), None, average=average)
    assert record.trained and record.method == "scala"
    assert [point.ratio for point in net.points] == [Fraction(n, 16) for n in range(4, 17)]
    for point in net.points if kind == "so_tiny" else net.points[::4]:
        first = point in (net.points[0], net.points[-1])
        expected = by_hand(state, photos224, point.ratio, first)
        scale = expected.abs().max()
        assert (net(photos224, point) - expected).abs().max() <= 1e-4 * scale
        assert (net.slice(point)(photos224) - expected).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize(
    ("kind", "smallest", "largest", "firsts"),
    [("so", 0.5, 0.75, {0.5, 0.75}), ("so_distilled", 0.5, 1.0, {1.0}), ("so_distilled", 0.25, 0.75, {0.25})],
)
@torch.no_grad()
def test_which_end_a_width_keeps(kind, smallest, largest, firsts, photos224):
    """Widths that keep the first channels: smallest and largest if plain, 0.25 and 1 if distilled."""
    file = theirs(kind, smallest, largest, 0.125)
    state = torch.load(file, weights_only=False)["model"]
    net, _ = open_model(str(file), None)
    assert len(net.points) == round((largest - smallest) / 0.125) + 1
    for point in net.points:
        expected = by_hand(state, photos224, point.ratio, float(point.ratio) in firsts)
        assert (net(photos224, point) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_from_the_command_line_to_a_slice_that_timm_loads(scala, photos224):
    file = theirs("so", step=0.25)
    answer = scala("convert", file, "-o", "family", "--ratios", "0.25,0.5,1", "--json").json
    assert [point["ratio"] for point in answer["points"]] == [0.25, 0.5, 1.0]
    cut = scala("slice", "family", "--ratio", "0.5", "-o", "half", "--json").json
    assert cut["max_abs_diff"] <= 1e-5
    state = torch.load(file, weights_only=False)["model"]
    with torch.no_grad():
        found = timm.create_model("local-dir:half", pretrained=True).eval()(photos224)
        expected = by_hand(state, photos224, Fraction(1, 2), first=False)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert open_slimmable("family", None)[1].order == "none"  # trained weights are not reordered


def test_what_does_not_fit_is_refused(scala):
    state = torch.load(theirs("so"), weights_only=False)["model"]
    for spoil, message in (
        ({"blocks.3.mlp.fc1.weight": None}, r"no 'blocks\.3\.mlp\.fc1\.weight'"),
        ({"blocks.3.mlp.fc1.weight": torch.zeros(4, 4)}, r"'blocks\.3\.mlp\.fc1\.weight' has shape \(4, 4\)"),
        ({"extra": torch.zeros(1)}, "holds 'extra'"),
    ):
        changed = {key: value for key, value in (state | spoil).items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            open_model(str(theirs("so", model=changed)), None)
    with pytest.raises(CheckpointError, match="does not tell its widths"):
        open_model(str(theirs("so", args=argparse.Namespace(model="deit_tiny_patch16_224_scala"))), None)
    for widths in (
        (0.25, 1.0, 0.0),
        (0.25, 1.0, -0.25),
        (1.0, 0.25, -0.25),
        (0.0, 1.0, 0.25),
        (0.5, 2.0, 0.25),
    ):
        with pytest.raises(CheckpointError, match="widths that cannot be"):
            open_model(str(theirs("so", *widths)), None)
    for step in (float("inf"), float("nan"), "1e9999999", None, [1]):
        with pytest.raises(CheckpointError, match="does not tell its widths"):
            open_model(str(theirs("so", step=step)), None)
    with pytest.raises(PointError, match="not a whole number"):
        open_model(str(theirs("so", step=1e-4)), None)
    with pytest.raises(PointError, match="not trained"):
        open_model(str(theirs("so", step=0.25)), parse_points("0.375,1"))
    with pytest.raises(CheckpointError, match="converted as it is"):
        open_model(str(theirs("so")), None, layout="fused")
    without = theirs("so", model_ema=None)
    with pytest.raises(CheckpointError, match="no moving average"):
        open_model(str(without), None, average=True)
    torch.save({"model": state}, "plain.pth")
    with pytest.raises(CheckpointError, match="no moving average"):
        open_model("deit_ti", None, weights=Path("plain.pth"), average=True)
    with pytest.raises(CheckpointError, match="is no file, so there is no moving average"):
        open_model("deit_ti", None, average=True)
    assert scala("convert", theirs("so"), "-o", "family", "--order", "importance").code == 2
