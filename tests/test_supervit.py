"""Families of sizes and shares of tokens: forward, checkpoints, the authors' files, training."""

from dataclasses import replace
from fractions import Fraction
from math import ceil
from random import Random

import pytest
import timm
import torch
from conftest import build, slimmable
from torch.nn import functional as F

from scala_cli.cascade import Cascade
from scala_cli.deploy.slice import slice_model
from scala_cli.errors import CheckpointError, PointError
from scala_cli.evaluate import widths
from scala_cli.methods.base import Batch
from scala_cli.methods.scala import Scala
from scala_cli.methods.supervit import SuperViT
from scala_cli.models.checkpoint import Record, load, load_with_record, save
from scala_cli.models.in_memory import slimmable as of_memory
from scala_cli.models.order import order_channels
from scala_cli.models.points import in_grid, open_grid, with_untrained
from scala_cli.models.source import open_source
from scala_cli.models.vit import embedding_at
from scala_cli.settings import (
    DeviceSettings,
    GridSettings,
    MethodSettings,
    OptimizerSettings,
    Settings,
    TokenSettings,
)
from scala_cli.slicing.point import Point, grid, parse_points, sized
from scala_cli.tasks import task_named
from scala_cli.training.step import Step
from scala_cli.world import ALONE

GRID = GridSettings("8,12,16", "0.5,0.7,1")


def family(kind="deit", ratios="0.5,1", depth=4):
    """Returns a family of two widths, three sizes and three shares of tokens, with random embeddings."""
    vit, _ = build(kind, depth=depth)
    net = in_grid(of_memory(vit, ratios), GRID).eval()
    with torch.no_grad():
        for number, embedding in enumerate(net.positions.values()):
            noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(number))
            embedding.add_(0.1 * noise)
    return net


def test_a_grid_of_points():
    points = grid(parse_points("0.5,1"), (8, 16), (Fraction(1, 2), Fraction(1)))
    assert [str(p) for p in points][:4] == ["0.5@8~0.5", "0.5@8", "0.5@16~0.5", "0.5@16"]
    assert len(points) == 8
    assert grid(parse_points("0.5,1")) == parse_points("0.5,1")
    with pytest.raises(PointError, match="1@8 has a size"):
        grid(parse_points("1@8"), (16,))


def test_points_have_their_size_only_in_a_family_of_several():
    assert [str(p) for p in sized(parse_points("0.5,1@16"), 16)] == ["0.5", "1"]
    assert [str(p) for p in sized(parse_points("1@8,1"), 16)] == ["1@8", "1@16"]
    net = family()
    assert net.find("1") == Point.of("1@16") and net.find("0.5~0.7") == Point.of("0.5@16~0.7")
    assert slimmable().find("0.5@16") == Point.of("0.5")
    near = r"point 1@8~0\.6 was not trained; the nearest trained: 1@8~0\.5, 1@8~0\.7"
    with pytest.raises(PointError, match=near):
        net.find("1@8~0.6")


@torch.no_grad()
def test_the_forward_at_a_point_is_its_slice_on_resized_images(images):
    net = family()
    for point in net.points:
        size = {"size": (point.size, point.size), "mode": "bilinear", "align_corners": True}
        there = images if point.size == 16 else F.interpolate(images, **size)
        assert torch.equal(net(images, point), net.slice(point)(there)), point
    assert torch.equal(net(images, "1"), net.vit(images))


@torch.no_grad()
def test_a_new_size_starts_from_the_resampled_embedding():
    net = in_grid(slimmable(), GridSettings("8,16"))
    small = embedding_at(net.vit, net.spec.at_point(Point.of("1@8")))
    assert torch.equal(net.positions["@8:pos_embed"], small) and small.shape == (1, 5, 32)
    assert torch.equal(small[:, :1], net.vit.pos_embed[:, :1])


@torch.no_grad()
def test_a_trained_size_keeps_its_embedding_when_the_widths_are_chosen_anew(tmp_path):
    net = in_grid(slimmable(), GridSettings("8,16"))
    net.positions["@8:pos_embed"].add_(1)
    save(net, Record(method="scala"), tmp_path / "net")
    again, _ = open_grid(str(tmp_path / "net"), "0.5,1", GridSettings("8,12,16"))
    assert torch.equal(again.positions["@8:pos_embed"], net.positions["@8:pos_embed"])
    assert again.points == grid(parse_points("0.5,1"), (8, 12, 16))


@torch.no_grad()
def test_gradients_reach_the_embedding_of_the_size_alone(images):
    net = family()
    with torch.enable_grad():
        net(images, "0.5@8~0.7").square().sum().backward()
    grad = net.positions["@8:pos_embed"].grad
    assert grad[..., :16].abs().sum() > 0 and not grad[..., 16:].any()
    assert net.positions["@12:pos_embed"].grad is None and net.vit.pos_embed.grad is None


@torch.no_grad()
def test_a_checkpoint_keeps_points_and_embeddings(tmp_path, images):
    net = family()
    record = Record(method="supervit", metrics=[{**p.columns(), "top1": 1.0} for p in net.points])
    save(net, record, tmp_path / "family")
    again, told = load_with_record(tmp_path / "family")
    assert again.points == net.points and told.measured(Point.of("0.5@8~0.7"), "top1") == 1.0
    for point in net.points:
        assert torch.equal(again(images, point), net(images, point))
    plain = timm.create_model(f"local-dir:{tmp_path / 'family'}", pretrained=True).eval()
    assert torch.equal(plain(images), net(images, "1"))


@torch.no_grad()
@pytest.mark.parametrize("label", ["0.5@8", "1@12", "0.5@12~0.7", "1@16~0.5"])
def test_a_slice_of_a_point_loads_in_timm(tmp_path, images, label):
    net = family()
    save(net, Record(method="supervit"), tmp_path / "family")
    slice_model(tmp_path / "family", label, tmp_path / "slice")
    point = Point.of(label)
    plain = timm.create_model(f"local-dir:{tmp_path / 'slice'}", pretrained=True).eval()
    there = net.fitting(images, point)
    torch.testing.assert_close(plain(there), net(images, label), atol=1e-6, rtol=1e-5)
    assert tuple(plain.pretrained_cfg["input_size"][1:]) == (point.size, point.size)
    text = (tmp_path / "slice" / "config.json").read_text()
    assert ("scala_vit" in text) == (point.keep < 1)


@torch.no_grad()
def test_channels_in_order_take_the_embeddings_along(images):
    net = family(ratios="1")
    ordered = order_channels(net, [torch.randn(64, 3, 16, 16)])
    for label in ("1@8", "1@12~0.7", "1@16~0.5"):
        torch.testing.assert_close(ordered(images, label), net(images, label), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_points_that_need_no_training(images):
    net, record = slimmable(), Record(method="scala")
    more, points = with_untrained(net, record, ["0.5~0.7", "1"], TokenSettings())
    assert [str(p) for p in points] == ["0.5~0.7", "1"] and more.spec.tokens.kind == "merge"
    assert not torch.equal(more(images, "0.5~0.7"), net(images, "0.5"))
    assert torch.equal(more(images, "0.5"), net(images, "0.5"))
    dropped, _ = with_untrained(net, record, ["1~0.7"], TokenSettings("drop", "2"))
    assert dropped.spec.tokens.places(2) == (2,)
    with pytest.raises(PointError, match="was not trained"):
        with_untrained(net, record, ["0.5@8"], TokenSettings())
    with pytest.raises(PointError, match="was not trained"):
        with_untrained(family(), Record(method="supervit"), ["1@8~0.6"], TokenSettings())
    sized, _ = with_untrained(net, Record(), ["0.5@8~0.7"], TokenSettings())
    assert sized(images, "0.5@8~0.7").shape == (3, 5)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("1@10", "size 10 is not a multiple of the patch size, 4"),
        ("1~0", "share of tokens must be above 0"),
    ],
)
def test_invalid_points_are_refused(points, message):
    with pytest.raises(PointError, match=message):
        slimmable().with_points(parse_points(points))


def test_missing_blocks_are_refused():
    with pytest.raises(PointError, match="block 9: the model has blocks 1 to 2"):
        in_grid(slimmable(), GridSettings(keeps="0.5,1", drop_blocks="9"))


def theirs(depth=13, dim=36, heads=3, sizes=(8, 12, 20), patch=4, hidden=100, classes=7):
    """Returns a state dict as the SuperViT authors' code saves it, with unusual dimensions."""
    made = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=made) * 0.3

    state = {"cls_token": random(1, 1, dim), "patch_embed.proj.weight": random(dim, 3, patch, patch)}
    state["patch_embed.proj.bias"] = random(dim)
    for number, size in enumerate(sizes):
        state[f"pos_embed_list.{number}"] = random(1, 1 + (size // patch) ** 2, dim)
    for number in range(depth):
        for name, shape in {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (hidden, dim),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (dim, hidden),
            "mlp.fc2.bias": (dim,),
        }.items():
            state[f"blocks.{number}.{name}"] = random(*shape)
    for name, shape in {
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }.items():
        state[name] = random(*shape)
    return state


def their_logits(state, images, which, size, keep, heads, places=(4, 7, 10), patch=4):
    """Returns the logits of their code, written out from the paper."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=True)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state[f"pos_embed_list.{which}"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks"))
    for number in range(depth):
        block = f"blocks.{number}"
        b, n, c = x.shape
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(b, n, 3, heads, c // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (c // heads) ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(b, n, c), f"{block}.attn.proj")
        if number + 1 in places and keep < 1:
            count = ceil(keep * n)
            chosen = weights[:, :, 0, 1:].mean(1).argsort(1, descending=True)[:, :count]
            x = torch.cat([x[:, :1], torch.stack([x[i, 1:][chosen[i]] for i in range(b)])], 1)
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@torch.no_grad()
@pytest.mark.parametrize("depth", [12, 5])
def test_the_authors_checkpoint_computes_what_their_code_does(tmp_path, depth):
    state, sizes = theirs(depth), (8, 12, 20)
    torch.save({"model": state, "epoch": 3}, tmp_path / "super.pth")
    net = open_source(str(tmp_path / "super.pth"), None, heads=3).net
    images = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    places = (4, 7, 10) if depth == 12 else (2, 3, 4)
    assert len(net.points) == 9 and net.spec.num_heads == 3
    for which, size in enumerate(sizes):
        for keep in ("0.5", "0.7", "1"):
            found = net(images, f"1@{size}~{keep}")
            wanted = their_logits(state, images, which, size, float(keep), 3, places)
            assert (found - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max()), (size, keep)


def test_the_authors_checkpoint_by_the_command(scala, tmp_path):
    torch.save({"model": theirs(5)}, tmp_path / "super.pth")
    refused = scala("convert", "super.pth")
    assert refused.code == 2 and "does not tell its heads" in refused.told and "--num-heads" in refused.told
    done = scala("convert", "super.pth", "--num-heads", 3, "-o", "family", "--json")
    assert done.code == 0, done.stderr
    assert [row["size"] for row in done.json["points"]] == [8] * 3 + [12] * 3 + [20] * 3
    assert len(load(tmp_path / "family").points) == 9
    assert scala("slice", "family", "--ratio", "1@12~0.7", "-o", "small").code == 0


def test_heads_that_do_not_divide(tmp_path):
    torch.save({"model": theirs(2)}, tmp_path / "super.pth")
    with pytest.raises(CheckpointError, match="5 heads do not divide the 36 channels"):
        open_source(str(tmp_path / "super.pth"), None, heads=5)


def test_a_cascade_of_sizes_spends_less_first(images):
    net = family(ratios="1")
    asked = Cascade(net, ["1@8~0.5", "1@16~0.7"], 0.5)
    assert asked(images).shape == (3, 5)
    with pytest.raises(PointError, match="each costing more"):
        Cascade(net, ["1@16~0.7", "1@8~0.5"], 0.5)


def method(teacher="none", points=None):
    points = points or grid(parse_points("1"), (8, 12, 16), (Fraction(1, 2), Fraction(7, 10), Fraction(1)))
    settings = MethodSettings(method="supervit", teacher=teacher)
    return SuperViT(points, settings, task_named("classification"))


def test_a_step_draws_the_papers_four_points():
    drawn = [method().draw(Random(seed)) for seed in range(60)]
    for points in drawn:
        assert [p.size for p in points[:2]] == [16, 16] and points[2].size == points[3].size < 16
        assert [p.keep == 1 for p in points] == [True, False, True, False]
    assert {p for points in drawn for p in points} == {*method().points}


@pytest.mark.parametrize("teacher", ["none", "full", "all"])
def test_the_losses_of_a_step_written_out(images, teacher):
    net, settings = family(ratios="1"), method(teacher)
    targets = torch.tensor([0, 3, 1])
    drawn = [Point.of(label) for label in ("1@16", "1@16~0.5", "1@8", "1@8~0.7")]
    frozen = torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    logits = [net(images, point) for point in drawn]

    def kl(student, lesson):
        p = lesson.softmax(-1)
        return (p * (p.log() - student.log_softmax(-1))).sum() / len(p)

    def ce(output):
        return F.cross_entropy(output, targets, label_smoothing=0.1)

    first, fewer, other, its_fewer = logits
    wanted = {
        "none": [ce(first), kl(fewer, first), ce(other), kl(its_fewer, other)],
        "full": [ce(first) + kl(first, frozen), kl(fewer, first), ce(other), kl(its_fewer, other)],
        "all": [
            ce(first) + kl(first, frozen),
            kl(fewer, frozen),
            ce(other) + kl(other, frozen),
            kl(its_fewer, frozen),
        ],
    }[teacher]
    teach = None if teacher == "none" else lambda _: frozen
    passes = list(settings.passes(Batch(images, targets), net, teach, drawn))
    assert [p.point for p in passes] == drawn
    torch.testing.assert_close(torch.stack([p.loss for p in passes]), torch.stack(wanted))


def test_points_that_supervit_cannot_train():
    with pytest.raises(PointError, match="trains one width"):
        method(points=parse_points("0.5,1"))
    with pytest.raises(PointError, match=r"1@8~0\.5 learns from the point of its size"):
        method(points=parse_points("1@8~0.5,1@16"))


def test_scala_trains_every_point_of_a_grid():
    points = grid(parse_points("0.5,1"), (8, 16), (Fraction(1, 2), Fraction(1)))
    scala = Scala(points, MethodSettings(), task_named("classification"))
    drawn = [scala.draw(Random(seed)) for seed in range(80)]
    assert {point for some in drawn for point in some} == {*points}
    assert all({points[-1], Point.of("0.5@16")} <= {*some} for some in drawn)


@torch.no_grad()
def test_features_with_fewer_tokens_are_those_of_every_patch(images):
    vit, _ = build("deit", depth=4, num_classes=0)
    net, record, task = of_memory(vit, "0.5,1").eval(), Record(task="features"), task_named("features")
    merged, points = with_untrained(net, record, ["0.5~0.7"], TokenSettings())
    dropped, _ = with_untrained(net, record, ["0.5~0.7"], TokenSettings("drop"))
    for fewer in (merged, dropped):
        (predict,) = widths(fewer, task, points, DeviceSettings(device="cpu", amp=False)).values()
        dense = fewer.features(images, "0.5~0.7").tokens
        assert dense.shape == (3, 16, 32)
        torch.testing.assert_close(predict(images)[:, 1:], dense)


@torch.no_grad()
def test_features_of_smaller_images_are_compared_on_their_own_grid(images):
    """The full model's 4 x 4 map is resampled to 2 x 2, here by antialiasing's triangle filter by hand."""
    vit, _ = build("deit", depth=2, num_classes=0)
    net, task = of_memory(vit, "0.5,1").eval(), task_named("features")
    net, points = with_untrained(net, Record(task="features"), ["0.5@8"], TokenSettings())
    (predict,) = widths(net, task, points, DeviceSettings(device="cpu", amp=False)).values()
    small, full = predict(images), task.forward(net.vit, images)
    assert small.shape == (3, 1 + 4, 32)
    places = torch.arange(4) + 0.5
    filters = torch.stack([(1 - (places - centre).abs() / 2).clamp_min(0) for centre in (1.0, 3.0)])
    filters /= filters.sum(1, keepdim=True)
    wanted = torch.einsum("yr,xc,brcd->byxd", filters, filters, full[:, 1:].unflatten(1, (4, 4)))
    meter = task.meter()
    meter.update(small, full)
    found, wanted = meter.result(ALONE), wanted.flatten(1, 2)
    spread = (wanted - wanted.mean((0, 1))).square().sum()
    assert found["r2"] == pytest.approx(
        1 - ((small[:, 1:] - wanted).square().sum() / spread).item(), abs=1e-5
    )
    loss = task.loss(small, None, full, MethodSettings(class_token=0.0))
    assert loss.item() == pytest.approx((small[:, 1:] - wanted).square().mean().item(), rel=1e-4)


def test_the_default_rate_is_lower_than_that_of_widths():
    net = in_grid(slimmable("deit", "1"), GRID)
    settings = Settings("digits", method=MethodSettings(method="supervit", teacher="none"))
    given = replace(settings, optimizer=OptimizerSettings(lr=0.02))
    rates = [
        Step(net, task_named("classification"), None, each, torch.device("cpu")).rate
        for each in (settings, given)
    ]
    assert rates == pytest.approx([3e-4, 0.02])
