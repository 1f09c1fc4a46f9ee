"""The slicing rule, compared with lists of kept channels built by hand."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import KINDS, build, slimmable

from scala_cli.errors import CheckpointError, PointError
from scala_cli.slicing.point import Point, parse_points, ratios_of
from scala_cli.slicing.rule import Rule, kept_end, slice_tensor
from scala_cli.slicing.table import axes_of, vit_table

WIDTHS = ratios_of(parse_points("0.25,0.5,0.75,1"))
HEADS, HEAD_DIM, DIM = 2, 16, 32


def channels(length: int, ratio: float, end: str) -> list[int]:
    count = int(length * ratio)
    return list(range(count)) if end == "first" else list(range(length - count, length))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_row_that_fits_it(kind):
    vit, _ = build(kind)
    for layout in ("aligned", "fused"):
        table = vit_table(HEADS, layout)
        for name, parameter in vit.named_parameters():
            axes = axes_of(name, table)
            assert len(axes) == parameter.ndim, name
            for axis, length in zip(axes, parameter.shape, strict=True):
                assert axis is None or length % axis.blocks == 0, name


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.gate.weight", "attn_pool.query.weight", "blocks.0.norm1.weight.x"]
)
def test_an_unknown_parameter_is_an_error(name):
    rule = Rule(WIDTHS, HEADS)
    with pytest.raises(CheckpointError, match=name):
        rule.slice_state({name: torch.ones(4)}, WIDTHS[0])


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 1.0])
def test_attention_keeps_the_same_channels_of_every_head(ratio, isolated):
    """Layout aligned: q, k, v and each head keep the same channels, and layers reading a head read these."""
    end = "last" if isolated and ratio in (0.5, 0.75) else "first"
    stream, within = channels(DIM, ratio, end), channels(HEAD_DIM, ratio, end)

    def of_heads(count):
        return [head * HEAD_DIM + channel for head in range(count) for channel in within]

    rows, columns = torch.randn(3 * DIM, DIM), torch.randn(DIM, 2 * DIM)
    expected = {  # name: (the whole, what is kept)
        "blocks.7.attn.qkv.weight": (rows, rows[of_heads(3 * HEADS)][:, stream]),
        "blocks.7.attn.qkv.bias": (rows[:, 0], rows[of_heads(3 * HEADS), 0]),
        "blocks.7.attn.q_norm.weight": (rows[:HEAD_DIM, 0], rows[within, 0]),
        "blocks.7.attn.norm.weight": (rows[:DIM, 0], rows[of_heads(HEADS), 0]),
        "blocks.7.attn.proj.weight": (columns[:, :DIM], columns[stream][:, of_heads(HEADS)]),
        "attn_pool.q.weight": (rows[:DIM], rows[of_heads(HEADS)][:, stream]),
        "attn_pool.kv.weight": (rows[: 2 * DIM], rows[of_heads(2 * HEADS)][:, stream]),
        "attn_pool.kv.bias": (rows[: 2 * DIM, 0], rows[of_heads(2 * HEADS), 0]),
        "attn_pool.proj.weight": (columns[:, :DIM], columns[stream][:, of_heads(HEADS)]),
    }
    whole = {name: tensor for name, (tensor, _) in expected.items()}
    sliced = Rule(WIDTHS, HEADS, isolated).slice_state(whole, Point.of(ratio).ratio)
    for name, (_, kept) in expected.items():
        assert torch.equal(sliced[name], kept), name


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 1.0])
def test_fused_layout_is_the_authors_block_cut(ratio, isolated):
    weight = torch.randn(3 * DIM, DIM)
    proj = torch.randn(DIM, DIM)
    end = "last" if isolated and ratio in (0.5, 0.75) else "first"
    rule = Rule(WIDTHS, HEADS, isolated, layout="fused")
    state = {"blocks.0.attn.qkv.weight": weight, "blocks.0.attn.proj.weight": proj}
    sliced = rule.slice_state(state, Point.of(ratio).ratio)
    kept = channels(DIM, ratio, end)
    assert torch.equal(sliced["blocks.0.attn.qkv.weight"], weight[channels(3 * DIM, ratio, end)][:, kept])
    assert torch.equal(sliced["blocks.0.attn.proj.weight"], proj[kept][:, kept])


def test_isolated_activation_sends_only_the_widths_between_to_the_other_end():
    span = WIDTHS[0], WIDTHS[-1]
    assert [kept_end(p, span, True) for p in WIDTHS] == ["first", "last", "last", "first"]
    assert [kept_end(p, span, False) for p in WIDTHS] == ["first"] * 4
    two = ratios_of(parse_points("0.5,1"))
    assert [kept_end(p, (two[0], two[1]), True) for p in two] == ["first", "first"]


def test_slices_are_views_wherever_torch_can():
    weight = torch.randn(DIM, DIM)
    embed = axes_of("blocks.0.mlp.fc1.weight", vit_table(HEADS, "aligned"))
    view = slice_tensor(weight, embed, Fraction(1, 2), "last")
    assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", ["deit", "qk_norm"])
def test_fixed_scale_is_attention_scaled_as_at_full_width(kind, images):
    """Folding the scale into q equals the same slice with its attention scale set by hand."""
    net = slimmable(kind, attn_scale="fixed")
    plain = slimmable(kind, attn_scale="native").slice(0.25)
    for block in plain.blocks:
        block.attn.fused_attn = False  # timm reads `scale` on this path only
        block.attn.scale = HEAD_DIM**-0.5
    assert not math.isclose(plain.blocks[0].attn.scale, (HEAD_DIM / 4) ** -0.5)
    with torch.no_grad():
        torch.testing.assert_close(net(images, 0.25), plain(images), rtol=1e-5, atol=1e-5)


def test_a_width_that_does_not_divide_names_one_that_does():
    with pytest.raises(PointError, match=r"4\.8 of 16 channels"):
        slimmable(ratios="0.3,1")
    try:
        slimmable(ratios="0.3,1")
    except PointError as error:
        assert "4/16 or 5/16" in error.hint
    slimmable(ratios="5/16,1")
