"""Dropping and merging tokens, compared with slow loops over tokens."""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
import timm
import torch
from conftest import KINDS, build
from torch.nn import functional as F

from scala_cli.cost import macs
from scala_cli.errors import PointError
from scala_cli.models.vit import describe
from scala_cli.slicing.point import Point
from scala_cli.slicing.tokens import Merged, TokenRule, merge, parse_blocks

HALF = Fraction(1, 2)


def attention(block, x, sizes=None):
    """Returns (attention weights, output, keys) of a block's attention for one image (N, C)."""
    attn = block.attn
    n, h = len(x), attn.num_heads
    q, k, v = attn.qkv(block.norm1(x)).view(n, 3, h, -1).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if sizes is not None:
        logits = logits + sizes.log()
    weights = logits.softmax(-1)
    out = attn.proj(attn.norm((weights @ v).transpose(0, 1).reshape(n, -1)))
    return weights, block.ls1(out), k


def embedded(vit, image):
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]


def headed(vit, x):
    return vit.forward_head(vit.norm(x[None]))[0]


def dropped(vit, image, places, keep):
    x, prefix = embedded(vit, image), vit.num_prefix_tokens
    for number, block in enumerate(vit.blocks, 1):
        weights, out, _ = attention(block, x)
        x = x + out
        if number in places:
            received = [
                sum(float(weights[h, 0, j]) for h in range(len(weights)))
                if vit.cls_token is not None
                else float(weights[:, :, j].sum())
                for j in range(prefix, len(x))
            ]
            count = min(ceil(keep * len(x)), len(x) - prefix)
            ranked = sorted(range(len(received)), key=lambda j: -received[j])[:count]
            x = torch.stack([*x[:prefix], *(x[prefix + j] for j in ranked)])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return headed(vit, x)


def merged(vit, image, counts):
    """ToMe with lists: each token is (vector, number of its patches, its patches)."""
    x, prefix = embedded(vit, image), vit.num_prefix_tokens
    groups = [[j] for j in range(len(x) - prefix)]
    for number, block in enumerate(vit.blocks, 1):
        sizes = torch.tensor([1.0] * prefix + [float(len(group)) for group in groups])
        _, out, keys = attention(block, x, sizes)
        x = x + out
        keys = keys.mean(0)[prefix:]
        pairs = []
        for a in range(1, len(groups), 2):
            alike = [
                (float(F.cosine_similarity(keys[a], keys[b], dim=0)), b) for b in range(0, len(groups), 2)
            ]
            pairs.append((*max(alike), a))
        pairs.sort(reverse=True)
        tokens = [vector * len(group) for vector, group in zip(x[prefix:], groups, strict=True)]
        gone = set()
        for _, b, a in pairs[: len(groups) - counts[number]]:
            tokens[b] = tokens[b] + tokens[a]
            groups[b] = groups[b] + groups[a]
            gone.add(a)
        stay = [j for j in range(len(groups)) if j not in gone]
        groups = [groups[j] for j in stay]
        x = torch.stack(
            [*x[:prefix], *(tokens[j] / len(group) for j, group in zip(stay, groups, strict=True))]
        )
        x = x + block.ls2(block.mlp(block.norm2(x)))
    patches = {j: x[prefix + place] for place, group in enumerate(groups) for j in group}
    return headed(vit, torch.stack([*x[:prefix], *(patches[j] for j in sorted(patches))]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["drop", "merge"])
@torch.no_grad()
def test_a_loop_over_tokens_says_the_same(kind, rule):
    vit, args = build(kind, depth=4)
    spec = describe(vit, args)
    spec = replace(spec, tokens=TokenRule(rule), keep=Fraction(7, 10))
    image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2))
    counts = spec.tokens.counts(16, vit.num_prefix_tokens, 4, spec.keep)
    naive = dropped(vit, image, (2, 3, 4), 0.7) if rule == "drop" else merged(vit, image, counts)
    found = spec.build_with(vit.state_dict())(image[None])[0]
    assert not torch.allclose(found, vit(image[None])[0], atol=1e-4)
    torch.testing.assert_close(found, naive, atol=2e-5, rtol=1e-4)


def test_the_counts_of_the_paper():
    """Of 197 tokens, 99 patches and the class token are kept; then half of 100, then half of 51."""
    assert TokenRule().counts(196, 1, 12, HALF) == {4: 99, 7: 50, 10: 26}
    assert TokenRule().places(24) == (7, 13, 19)
    assert TokenRule().places(6) == (2, 4, 5)
    assert TokenRule(blocks=(3,)).counts(196, 1, 12, HALF) == {3: 99}


def test_merging_ends_with_as_many_tokens_and_takes_equally_many_in_every_block():
    counts = TokenRule("merge").counts(196, 1, 12, HALF)
    assert list(counts) == [*range(1, 13)] and counts[12] == 26
    steps = [a - b for a, b in zip([196, *counts.values()], counts.values(), strict=False)]
    assert set(steps) == {14, 15}


def test_merging_more_than_half_in_a_block_is_refused():
    with pytest.raises(PointError, match=r"keep 0\.2 cannot be merged"):
        TokenRule("merge").counts(16, 1, 2, Fraction(1, 5))


def test_blocks_beyond_the_depth_are_refused():
    with pytest.raises(PointError, match="in block 13: the model has blocks 1 to 12") as error:
        TokenRule(blocks=(4, 13)).counts(196, 1, 12, HALF)
    assert error.value.facts["value"] == "4,7,10"
    for text in ("", "4,x", "-1", "4.5"):
        with pytest.raises(PointError, match="no numbers of blocks"):
            parse_blocks(text)
    assert parse_blocks("10, 4,7") == (4, 7, 10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["drop", "merge"])
def test_autocast_chooses_the_same_tokens(kind):
    """Tokens so alike that their scores and cosines tie in bfloat16."""
    vit, args = build("deit", depth=4)
    blocks = (1,) if kind == "drop" else ()
    spec = replace(describe(vit, args), tokens=TokenRule(kind, blocks), keep=HALF)
    block = spec.build_with(vit.state_dict()).blocks[0]
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(8, n, 32, generator=generator) for n in (1, 17))
    chosen: list[torch.Tensor] = []
    if kind == "drop":
        block.dropping.register_forward_hook(lambda module, read, wrote: chosen.append(wrote[1]))
    for bfloat16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            passed = block(x + 0.02 * noise)
        if kind == "merge":
            chosen.append(passed.places)
    assert torch.equal(*chosen) and len(chosen[0].unique()) > 1


def test_merged_tokens_are_the_mean_of_their_patches_and_can_be_put_back():
    tokens = torch.randn(2, 1 + 11, 8, generator=torch.Generator().manual_seed(0))
    state = Merged.none(tokens, 1)
    for count in (8, 5):
        state = merge(state, state.tokens[:, 1:], count)
    assert state.sizes.shape == (2, 5) and (state.sizes.sum(1) == 11).all()
    for image in range(2):
        for token in range(5):
            patches = tokens[image, 1:][state.places[image] == token]
            assert len(patches) == state.sizes[image, token]
            torch.testing.assert_close(state.tokens[image, 1 + token], patches.mean(0))
    back = state.put_back()
    assert back.shape == tokens.shape and torch.equal(back[:, 0], tokens[:, 0])


TABLE = {  # GMACs of DeiT-S as published (arXiv 2205.11397), keep .5, .7, 1
    128: (0.7, 1.0, 1.4),
    160: (1.2, 1.5, 2.3),
    192: (1.7, 2.2, 3.3),
    224: (2.3, 3.0, 4.6),
}


def test_gmacs_of_deit_small_are_those_published():
    with torch.device("meta"):
        spec = describe(timm.create_model("deit_small_patch16_224"))
    for size, published in TABLE.items():
        for keep, gmacs in zip(("0.5", "0.7", "1"), published, strict=True):
            counted = macs(spec.at_point(Point.of(f"1@{size}~{keep}"))) / 1e9
            assert abs(counted - gmacs) <= 0.1, (size, keep, counted)
