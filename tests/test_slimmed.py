"""Token slimming modules: SiT's checkpoints, compared with a forward by hand; sliced, ordered, fitted."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from conftest import build
from test_lvvit import CLASSES, by_hand, theirs
from torch.nn import functional as F

from scala_cli.cost import cost, macs, params_of
from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.calibrate import calibrate
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.slimmed import modules_of, start_slimming
from scala_cli.models.source import open_model
from scala_cli.models.vit import describe, skeleton
from scala_cli.slicing.point import parse_points
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.slim import default_stages, logits_of, pooling, slim_counts

pytestmark = pytest.mark.usefixtures("elsewhere")
HALVES = tuple(point.ratio for point in parse_points("0.5,1"))


def with_slimming(state, stages, keep, side, ratio=4):
    """Adds random token slimming modules and their reverse to a state dict, as SiT's authors name them."""
    dim, patches = state["norm.weight"].numel(), side**2
    counts = [int(patches * keep**i) for i in range(len(stages))]
    for number, count in enumerate(counts[1:]):
        for part, shape in (("0", (dim,)), ("1", (dim // 2, dim)), ("3", (count, dim // 2))):
            state[f"tsm.{number}.weight.{part}.weight"] = torch.randn(shape)
            state[f"tsm.{number}.weight.{part}.bias"] = torch.randn(shape[0])
        state[f"tsm.{number}.scale"] = torch.tensor([[[0.7 + number]]])
    ends = [sum(stages[:i]) for i in range(1, len(stages))]
    for block in range(sum(stages)):
        tokens = counts[sum(end <= block + 1 for end in ends)]
        if tokens < patches:
            state[f"rtsm.{block}.mlp1.fc1.weight"] = torch.randn(int(patches * ratio), tokens)
            state[f"rtsm.{block}.norm1.weight"] = torch.randn(dim)
    return state


def slimming_by_hand(state, stages):
    """Returns a function (block number, tokens) -> tokens, slimmed after the blocks that end a stage."""
    ends = [sum(stages[:i]) - 1 for i in range(1, len(stages))]

    def after(number, x):
        if number not in ends:
            return x
        name, patches = f"tsm.{ends.index(number)}", x[:, 1:]
        norm, key, query = (
            (state[f"{name}.weight.{part}.weight"], state[f"{name}.weight.{part}.bias"]) for part in "013"
        )
        logits = F.linear(F.gelu(F.linear(F.layer_norm(patches, patches.shape[-1:], *norm), *key)), *query)
        shares = (logits * state[f"{name}.scale"]).softmax(1)
        return torch.cat([x[:, :1], torch.einsum("bnm,bnc->bmc", shares, patches)], 1)

    return after


@pytest.mark.parametrize(
    ("kind", "dim", "heads", "side", "stages", "keep"),
    [("4c", 40, 5, 3, (1, 2, 1), 0.5), ("6c", 72, 9, 5, (2, 1, 1, 1), 0.5), ("", 36, 3, 4, (1, 1), 0.3)],
)
@torch.no_grad()
def test_released_checkpoints_give_the_same_logits(kind, dim, heads, side, stages, keep):
    state = with_slimming(theirs(kind, dim, sum(stages), 3 * dim - 1, side), stages, keep, side)
    torch.save({"model": state, "epoch": 3}, "sit.pth")
    net, record = open_model("sit.pth", parse_points("1"), heads=heads)
    images = torch.randn(2, 3, 16 * side, 16 * side)
    expected = by_hand(state, images, kind, heads, after=slimming_by_hand(state, stages))
    assert (net(images) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)
    assert [*net.spec.tsm.values()] == [int(side**2 * keep**i) for i in range(1, len(stages))]
    assert record.trained and net.spec.num_classes == CLASSES


def test_a_file_that_does_not_tell_its_stages_is_refused():
    state = with_slimming(theirs(dim=40, depth=3, side=3), (1, 1, 1), 0.5, 3)
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith("rtsm.")}}, "sit.pth")
    with pytest.raises(CheckpointError, match="does not tell behind which blocks"):
        open_model("sit.pth", None, heads=5)


def slimmed(kind="deit", stages=(1, 1), keep=Fraction(1, 2), ratios=HALVES, depth=2) -> SlimmableViT:
    """Returns a tiny random family with token slimming modules."""
    vit, args = build(kind, depth=depth)
    spec = describe(vit, args)
    counts = slim_counts(stages, keep, spec.patches, depth)
    spec = replace(spec, tsm=counts)
    again = spec.build().to_empty(device="cpu")
    again.load_state_dict(vit.state_dict(), strict=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in modules_of(again).values():
            for parameter in module.parameters():
                parameter.normal_(0, 0.3)
    return SlimmableViT(again, spec, Rule(ratios, spec.num_heads)).eval()


@torch.no_grad()
def test_a_width_is_cut_with_its_modules(images, scala):
    net = slimmed()
    half = net.slice("0.5")
    full, cut = modules_of(net.vit)[0], modules_of(half)[0]
    assert torch.equal(cut.key.weight, full.key.weight[:8, :16])
    assert torch.equal(cut.query.weight, full.query.weight[:, :8])
    assert torch.equal(cut.bias, full.bias) and cut.tokens == 8
    assert torch.equal(half(images), net(images, "0.5"))
    save(net, Record(method="sit"), Path("family"))
    again = load("family")
    assert again.spec.tsm == {0: 8}
    assert torch.equal(again(images), net(images)) and torch.equal(again(images, "0.5"), half(images))
    plain = timm.create_model("local-dir:family", pretrained=True).eval()
    assert not modules_of(plain) and plain(images).shape == (3, 5)
    told = scala("slice", "family", "--ratio", "0.5", "-o", "half", "--json")
    assert told.code == 0, told.stderr
    assert torch.equal(timm.create_model("local-dir:half", pretrained=True).eval()(images), half(images))
    reopened, _ = open_model("local-dir:half", parse_points("0.5,1"))
    assert torch.equal(reopened(images), half(images)) and reopened.spec.tsm == {0: 8}


@pytest.mark.parametrize("kind", ["deit", "no class token, registers", "distilled"])
@torch.no_grad()
def test_putting_channels_in_order_changes_nothing(kind, images):
    net = slimmed(kind)
    ordered = order_channels(net, torch.randn(32, 3, 16, 16).split(16))
    assert (ordered(images) - net(images)).abs().max() <= 1e-4
    before, after = (modules_of(vit)[0].key.weight for vit in (net.vit, ordered.vit))
    assert not torch.allclose(before, after, atol=1e-2)


@torch.no_grad()
def test_a_slice_with_modules_is_fitted(images):
    net = order_channels(slimmed(), torch.randn(64, 3, 16, 16).split(16))
    fitted, fit = calibrate(net, "0.5", torch.randn(64, 3, 16, 16))
    assert fit.output is not None and modules_of(fitted)[0].tokens == 8
    assert (fitted(images) - net(images)).norm() < (net(images, "0.5") - net(images)).norm()


PAPER = {"sit_t": (15.9, 1.0), "sit_xs": (25.6, 1.5), "sit_s": (25.6, 4.0), "sit_m": (55.6, 8.1)}
PAPER["sit_l"] = (148.2, 34.4)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_cost_what_it_says(name):
    """Within 2 %: the paper also counts a second classifier, of the patches, which is never used."""
    spec = describe(skeleton(name))
    params, gmacs = PAPER[name]
    counted = params_of(spec.build()) + 1000 * (spec.embed_dim + 1)
    assert counted / 1e6 == pytest.approx(params, rel=0.02)
    assert macs(spec) / 1e9 == pytest.approx(gmacs, rel=0.02)


def test_the_work_of_a_module_is_counted():
    """Counted by hand: a block of 17 tokens, then, after the module, one of 9."""
    spec = slimmed().spec
    dim, given, tokens = 32, 16, 8

    def block(n):
        return n * dim * 3 * dim + 2 * n * n * dim + n * dim * dim + 2 * n * dim * 4 * dim

    module = given * dim * dim // 2 + given * dim // 2 * tokens + tokens * given * dim
    patches, head = 16 * 3 * 16 * dim, dim * 5
    assert macs(spec) == patches + block(17) + module + block(9) + head
    assert cost(spec)["params"] == params_of(slimmed().vit)


def test_counts_of_stages():
    assert slim_counts((3, 3, 3, 3), Fraction(1, 2), 196, 12) == {2: 98, 5: 49, 8: 24}
    assert slim_counts((2, 1), Fraction(3, 10), 9, 3) == {1: 2}
    assert default_stages(12) == (3, 3, 3, 3) and default_stages(14) == (4, 4, 3, 3)
    assert default_stages(2) == (1, 1)


@pytest.mark.parametrize(
    ("stages", "keep", "said"),
    [
        ((3, 3), 0.5, "6 blocks, the model has 12"),
        ((6, 0, 6), 0.5, "one block or more"),
        ((), 0.5, "0 blocks"),
        ((6, 6), 0.001, "leaves none of 196 tokens"),
        ((6, 6), 0.0, "leaves none"),
        ((6, 6), 1.5, "share of 1.5"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, keep, said):
    with pytest.raises(PointError) as refused:
        slim_counts(stages, Fraction(keep).limit_denominator(1000), 196, 12)
    assert said in f"{refused.value.message} {refused.value.hint}"


@torch.no_grad()
def test_the_pooling_start_is_the_mean_of_neighbours():
    """Halves 4 x 4 patches twice: pairs side by side, then squares of four."""
    first, second = pooling(8, (4, 4), 16), pooling(4, None, 8)
    assert torch.allclose(first.sum(1), torch.ones(8))
    assert first[0].nonzero().flatten().tolist() == [0, 1]
    squares = (second @ first)[0].nonzero().flatten().tolist()
    assert squares == [0, 1, 4, 5]
    assert torch.allclose(logits_of(first).softmax(-1), first, atol=0.05)
    net = slimmed(stages=(1, 1, 1), depth=3)
    start_slimming(net.vit, "pool", 0)
    x = torch.randn(2, 16, 32)
    found = modules_of(net.vit)[0].shares(x)
    assert (found - first).abs().max() < 0.1
    start_slimming(net.vit, "random", 0)
    modules_of(net.vit)[0].bias.zero_()
    assert (modules_of(net.vit)[0].shares(x) - 1 / 16).abs().max() < 0.01


def test_any_number_of_tokens_can_be_pooled():
    for tokens in (1, 3, 7, 24):
        weights = pooling(tokens, (5, 5), 25)
        assert weights.shape == (tokens, 25) and torch.allclose(weights.sum(1), torch.ones(tokens))
        assert (weights.sum(0) > 0).all()
