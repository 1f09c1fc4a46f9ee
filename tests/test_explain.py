"""scala explain: which patches go into which token."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import slimmable
from PIL import Image
from test_slimmed import slimmed

from scala_cli.explain import Merging, mergings, painted, pixels_of, read_image
from scala_cli.models.checkpoint import Record, save
from scala_cli.models.slimmed import modules_of, start_slimming
from scala_cli.slicing.point import parse_points
from scala_cli.slicing.tokens import TokenRule


@torch.no_grad()
def test_shares_are_those_of_the_patches_themselves(images):
    """After two modules the shares are the product of both modules' shares."""
    net = slimmed(stages=(1, 1, 1), depth=3)
    first, second = modules_of(net.vit).values()
    stages = mergings(net.vit, images[0])
    assert [stage.block for stage in stages] == [0, 1]
    tokens = net.vit._pos_embed(net.vit.patch_embed(images[:1]))
    x = super(type(net.vit.blocks[0]), net.vit.blocks[0]).forward(tokens)
    share = first.shares(x[:, 1:])
    x = super(type(net.vit.blocks[1]), net.vit.blocks[1]).forward(first(x))
    torch.testing.assert_close(stages[0].shares, share[0])
    torch.testing.assert_close(stages[1].shares, (second.shares(x[:, 1:]) @ share)[0])
    for stage in stages:
        assert torch.allclose(stage.shares.sum(1), torch.ones(len(stage.shares)))


@torch.no_grad()
def test_dropped_patches_are_those_that_did_not_go_on(images):
    """Finds the kept patches in the output of a dropping block by their values."""
    net = slimmable("deit", "1").with_points(parse_points("1~0.5"))
    vit = net.at(net.points[0])
    stage, last = mergings(vit, images[0])
    block, x = vit.blocks[stage.block], vit._pos_embed(vit.patch_embed(images[:1]))
    after = x + block.attn(block.norm1(x))
    whole = (after + block.mlp(block.norm2(after)))[0, 1:]
    kept = block(x)[0, 1:]
    distance = torch.cdist(kept, whole)
    assert (distance.min(1).values < 1e-4).all()
    assert torch.equal(stage.shares.argmax(1), distance.argmin(1))
    assert (stage.owners >= 0).sum() == len(kept) < 16
    assert {*last.shares.argmax(1).tolist()} < {*stage.shares.argmax(1).tolist()}
    assert (painted(torch.ones(16, 16, 3), stage, (4, 4)).sum(-1) == 0).any()


@torch.no_grad()
def test_merged_patches_are_those_that_share_a_token(images):
    net = slimmable("deit", "1")
    rule = TokenRule("merge")
    net = net.like(spec=replace(net.spec, tokens=rule)).with_points(parse_points("1~0.5"))
    vit = net.at(net.points[0])
    stages = mergings(vit, images[0])
    counts = rule.counts(16, 1, 2, Fraction(1, 2))
    assert [len(stage.shares) for stage in stages] == [*counts.values()]
    first = vit.blocks[0](vit._pos_embed(vit.patch_embed(images[:1])))
    assert torch.equal(stages[0].owners, first.places[0])
    assert all((stage.owners >= 0).all() for stage in stages)
    groups = [{tuple(row.nonzero().flatten().tolist()) for row in stage.shares} for stage in stages]
    assert all(any({*small} <= {*large} for large in groups[1]) for small in groups[0])


def test_a_picture_shows_tokens_in_their_colour():
    """Of two by two patches, the upper two share a token, and the lower two have one each."""
    shares = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    pixels = torch.zeros(8, 8, 3)
    pixels[:4, :4], pixels[:4, 4:], pixels[4:, :4], pixels[4:, 4:] = 0.2, 0.4, 0.6, 0.8
    picture = painted(pixels, Merging(0, shares), (2, 2))[..., 0]
    assert torch.allclose(picture[:3], torch.full((3, 8), 0.3))  # no line between the upper two
    assert torch.equal(picture[3], torch.zeros(8))
    assert torch.allclose(picture[4:, :3], torch.full((4, 3), 0.6))
    assert torch.equal(picture[4:, 3], torch.zeros(4))
    assert torch.allclose(picture[4:, 4:], torch.full((4, 4), 0.8))
    told = Merging(0, shares).as_row()
    assert told["owners"] == [0, 0, 1, 2] and told["effective"] == pytest.approx(4 / 3, abs=0.01)


def test_the_command_draws_and_tells(scala, elsewhere):
    pytest.importorskip("matplotlib")
    net = slimmed(stages=(1, 1, 1), depth=3)
    start_slimming(net.vit, "pool", 0)
    save(net, Record(method="sit"), elsewhere / "net")
    Image.linear_gradient("L").save("cat.png")
    for ratio in ((), ("--ratio", "0.5")):
        told = scala("explain", "cat.png", "net", *ratio, "-o", "out.png", "--json")
        assert told.code == 0, told.stderr
        assert [stage["tokens"] for stage in told.json["stages"]] == [8, 4]
        assert all(len(stage["owners"]) == 16 for stage in told.json["stages"])
        with Image.open("out.png") as picture:
            assert picture.size[0] > picture.size[1]
    owners = told.json["stages"][0]["owners"]
    assert owners[0] == owners[1] != owners[2]  # untrained modules pool neighbours
    pixels = pixels_of(read_image(elsewhere / "cat.png", net.spec), net.spec)
    assert pixels.shape == (16, 16, 3) and 0 <= pixels.min() < pixels.max() <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cat.png", "tiny", "--ratio", "0.5"), "this model keeps every token"),
        (("dog.png", "net"), "dog.png does not exist"),
        (("text.png", "net"), "cannot be read as an image"),
        (("cat.png", "net", "--ratio", "0.3"), "was not trained"),
        (("cat.png", "net", "-o", "out.txt"), "not a picture file"),
    ],
)
def test_what_cannot_be_explained(words, said, scala, tiny, elsewhere):
    save(slimmed(), Record(method="sit"), elsewhere / "net")
    Image.new("RGB", (20, 20)).save("cat.png")
    (elsewhere / "text.png").write_text("no image")
    told = scala("explain", *words)
    assert told.code == 2 and said in told.told, told.stderr
    assert not (elsewhere / "explained.png").exists()
