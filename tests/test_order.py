"""Ordering channels: the full model computes the same, and important channels come first."""

import pytest
import timm
import torch
from conftest import KINDS, build, slimmable

from scala_cli.models.order import GroupMoments, observe, order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.stream import norms_of
from scala_cli.models.vit import describe
from scala_cli.slicing.importance import (
    change_basis,
    channel_scores,
    permute_state,
    query_key_bases,
    roots,
    stream_basis,
    value_basis,
)
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.rule import Rule
from scala_cli.slicing.table import vit_table

GENERATOR = torch.Generator().manual_seed(5)


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.double)


def moment(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.T @ vectors / len(vectors)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_full_model_is_the_same_function(kind, images):
    net = slimmable(kind)
    ordered = order_channels(net, [images, images.flip(0)])
    assert (ordered(images) - net(images)).abs().max() <= 1e-4
    changed = [n for n, p in ordered.vit.named_parameters() if not torch.equal(p, net.vit.get_parameter(n))]
    assert len(changed) > 20
    assert not torch.allclose(ordered(images, 0.5), net(images, 0.5), atol=1e-2)


@torch.no_grad()
def test_hidden_channels_come_by_their_score(images):
    ordered = order_channels(slimmable(), [images])
    read = {"blocks.1.mlp.fc2": GroupMoments()}
    observe(ordered.vit, [images], read, {})
    scores = channel_scores(read["blocks.1.mlp.fc2"].deviation, ordered.vit.blocks[1].mlp.fc2.weight.double())
    assert (scores.diff() <= 1e-6).all()


@torch.no_grad()
def test_dead_channels_go_last(images):
    """Makes every other hidden and head channel useless; ordering moves them to the second half."""
    net = slimmable()
    for block in net.vit.blocks:
        block.mlp.fc2.weight[:, ::2] = 0
        block.attn.proj.weight[:, ::2] = 0
        for head in block.attn.qkv.weight.unflatten(0, (6, 16))[:4]:  # q and k
            head[::2] = 0
        block.attn.qkv.bias.unflatten(0, (6, 16))[:4, ::2] = 0
    state = order_channels(net, [images]).vit.state_dict()
    for number, block in enumerate(net.vit.blocks):
        prefix = f"blocks.{number}."
        proj = state[f"{prefix}attn.proj.weight"].unflatten(1, (2, 16))
        assert proj[:, :, 8:].abs().max() < 1e-5
        assert state[f"{prefix}mlp.fc2.weight"][:, 64:].abs().max() == 0
        queries, keys = state[f"{prefix}attn.qkv.weight"].unflatten(0, (3, 2, 16))[:2].double()
        cut = queries[:, :8].mT @ keys[:, :8]  # the logits' bilinear form, (heads, C, C)
        assert (queries.mT @ keys - cut).abs().max() < 1e-5
        assert block.attn.qkv.weight.abs().sum() > 0


def test_query_and_key_bases_undo_each_other_and_truncate_best():
    queries, keys = sample(500, 8) @ sample(8, 8), sample(500, 8) @ sample(8, 8)
    q, k = query_key_bases(moment(queries), moment(keys))
    torch.testing.assert_close(q.T @ k, torch.eye(8, dtype=torch.double))

    def error(q: torch.Tensor, k: torch.Tensor, n: int) -> torch.Tensor:
        """Returns the mean squared error of all logits, if only the first n channels are kept."""
        left_out = q[n:].T @ k[n:]
        return torch.trace(left_out.T @ moment(queries) @ left_out @ moment(keys))

    best = torch.linalg.svdvals(roots(moment(queries))[0].T @ roots(moment(keys))[0])
    for n in range(1, 8):
        assert error(q, k, n) == pytest.approx(best[n:].square().sum().item(), rel=1e-6)
        other = torch.linalg.qr(sample(8, 8))[0]
        assert error(other, other, n) > error(q, k, n)


def test_the_value_basis_is_undone_by_the_projection_and_truncates_best():
    attended, projection = sample(500, 8) @ sample(8, 8), sample(20, 8)
    v, undone = value_basis(moment(attended), projection)
    torch.testing.assert_close(undone @ v, projection)
    exact = attended @ projection.T
    for n in range(1, 8):
        kept = attended @ v[:n].T @ undone[:, :n].T
        best = torch.linalg.svdvals(projection @ roots(moment(attended))[0])[n:].square().sum()
        assert (exact - kept).square().sum() / 500 == pytest.approx(best.item(), rel=1e-6)
        assert (exact - attended[:, :n] @ projection[:, :n].T).square().sum() / 500 > best


def test_the_value_basis_inverts_where_the_projection_reads_little_or_nothing():
    attended, projection = moment(sample(500, 8)), sample(20, 8)
    projection[:, :5] = 0
    for weight in (projection, 0 * projection):
        v, undone = value_basis(attended, weight)
        torch.testing.assert_close(undone @ v, weight)
        assert torch.linalg.cond(v) < 1e4
    v, undone = value_basis(0 * attended, projection)
    torch.testing.assert_close(undone @ v, projection)


def test_bases_of_queries_or_keys_that_are_always_zero():
    some, none = moment(sample(500, 8)), torch.zeros(8, 8, dtype=torch.double)
    for queries, keys in ((some, none), (none, some), (none, none)):
        q, k = query_key_bases(queries, keys)
        torch.testing.assert_close(q.T @ k, torch.eye(8, dtype=torch.double))


def test_a_root_inverts_also_where_the_moment_does_not():
    flat = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.double))
    root, inverse = roots(flat)
    torch.testing.assert_close(inverse @ root, torch.eye(3, dtype=torch.double))
    full = moment(sample(50, 4))
    root, _ = roots(full)
    torch.testing.assert_close(root @ root.T, full)


def test_the_streams_basis_is_orthogonal_keeps_the_mean_and_comes_by_variance():
    stream = sample(500, 12) @ sample(12, 12)
    stream = stream - stream.mean(1, keepdim=True)
    moment = torch.cov(stream.T, correction=0)
    basis = stream_basis(moment)
    identity = torch.eye(12, dtype=torch.double)
    torch.testing.assert_close(basis @ basis.T, identity)
    torch.testing.assert_close(basis.sum(1), torch.ones(12, dtype=torch.double))
    norm = torch.nn.LayerNorm(12, dtype=torch.double)
    torch.testing.assert_close(norm(stream @ basis.T), norm(stream) @ basis.T)
    principal = torch.linalg.eigh(moment)[1].flip(1)
    ones = identity.new_ones(12, 1)
    for n in range(1, 12):
        allowed = torch.linalg.qr(torch.cat([principal[:, :n], ones], 1))[0]
        torch.testing.assert_close(basis[:n] @ allowed @ allowed.T, basis[:n])


def test_the_streams_basis_handles_a_stream_of_few_directions():
    moment = torch.zeros(12, 12, dtype=torch.double)
    for flat in (moment, moment + torch.outer(*[torch.arange(12.0, dtype=torch.double) - 5.5] * 2)):
        basis = stream_basis(flat)
        torch.testing.assert_close(basis @ basis.T, torch.eye(12, dtype=torch.double))
        torch.testing.assert_close(basis.sum(1), torch.ones(12, dtype=torch.double))


@torch.no_grad()
def test_a_stream_of_few_directions_is_cut_at_almost_no_cost(images):
    """The stream lies in 6 of 32 directions, none of them a channel."""
    net = slimmable()
    directions = torch.linalg.qr(torch.randn(32, 6, generator=torch.Generator().manual_seed(2)))[0]
    inside = directions @ directions.T
    vit = net.vit
    for layer in [vit.patch_embed.proj, *(part for b in vit.blocks for part in (b.attn.proj, b.mlp.fc2))]:
        layer.weight.copy_((inside @ layer.weight.flatten(1)).view_as(layer.weight))
        layer.bias.copy_(inside @ layer.bias)
    for tokens in (vit.cls_token, vit.pos_embed):
        tokens.copy_(tokens @ inside)
    ordered = order_channels(net, [images])
    kept = slice(0, 8)
    stream: list[torch.Tensor] = []
    ordered.vit.norm.register_forward_hook(lambda _, read, wrote: stream.append(read[0]))
    ordered(images)
    energy = (stream[0] - stream[0].mean(-1, keepdim=True)).square().sum((0, 1))
    assert energy[kept].sum() > 0.9 * energy.sum()
    torch.testing.assert_close(stream[0].mean(-1), torch.zeros(stream[0].shape[:2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_which_streams_can_be_rotated(kind):
    norms = norms_of(slimmable(kind).vit)
    assert bool(norms) == (kind not in ("norm before the blocks", "no final norm"))
    if norms:
        assert len(norms) == 2 * len(slimmable(kind).vit.blocks) + 1


@pytest.mark.parametrize("pool", ["max", "avgmax"])
@pytest.mark.parametrize("fc_norm", [True, False])
@torch.no_grad()
def test_a_max_pooled_stream_is_only_permuted(pool, fc_norm, images):
    """A maximum over tokens is not the same in another basis."""
    vit, args = build("vit", global_pool=pool, fc_norm=fc_norm)
    spec = describe(vit, args)
    net = SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,1")), spec.num_heads)).eval()
    assert norms_of(vit) == {}
    assert (order_channels(net, [images])(images) - net(images)).abs().max() <= 1e-4


def useless(part: str, net: SlimmableViT) -> None:
    """Zeroes a part of a model, as pruning and training do."""
    block, width = net.vit.blocks[1], net.spec.embed_dim
    head = slice(0, net.spec.head_dim)
    if part == "values":
        head = slice(2 * width, 2 * width + net.spec.head_dim)
    if part in ("keys", "keys but a bias"):
        head = slice(width, width + net.spec.head_dim)
    if part in ("queries", "keys", "keys but a bias", "values"):
        block.attn.qkv.weight[head] = 0
        block.attn.qkv.bias[head] *= part == "keys but a bias"
    if part == "projection":
        block.attn.proj.weight[:, head] = 0
    if part == "attention":
        for parameter in block.attn.parameters():
            parameter.zero_()
    if part == "hidden channels":
        block.mlp.fc1.weight[:20], block.mlp.fc1.bias[:20] = 0, 0
        block.mlp.fc2.weight[:, 10:30] = 0
    if part in ("mlp", "block"):
        for parameter in (block if part == "block" else block.mlp).parameters():
            parameter.zero_()
    if part == "all blocks":
        for parameter in net.vit.blocks.parameters():
            parameter.zero_()
    if part == "head":
        net.vit.head.weight.zero_()


USELESS = ("queries", "keys", "keys but a bias", "values", "projection", "attention", "hidden channels")
USELESS += ("mlp", "block", "all blocks", "head")


@pytest.mark.parametrize("kind", ["deit", "norm before the blocks"])
@pytest.mark.parametrize("part", USELESS)
def test_useless_parts_are_ordered_and_can_learn_again(kind, part, images):
    """Every head that had a gradient before has one in the new basis."""
    net = slimmable(kind)
    with torch.no_grad():
        useless(part, net)
    ordered = order_channels(net, [images])
    answers = ordered(images), net(images)
    assert (answers[0] - answers[1]).abs().max() <= 1e-4
    for answer in answers:
        answer.square().mean().backward()
    for before, now in zip(net.vit.blocks, ordered.vit.blocks, strict=True):
        arrives = [[bool(part.any()) for part in gradients_of(block.attn)] for block in (before, now)]
        assert arrives[0] == arrives[1]


def gradients_of(attn) -> list[torch.Tensor]:
    """Returns each head's gradients of q, k and v, then of its columns of the projection."""
    size = attn.head_dim
    return [*attn.qkv.weight.grad.split(size), *attn.proj.weight.grad.split(size, dim=1)]


@torch.no_grad()
def test_large_outputs_may_differ_in_proportion(images):
    net = slimmable()
    net.vit.head.weight.mul_(1e4)
    ordered = order_channels(net, [images])
    assert (ordered(images) - net(images)).abs().max() <= 1e-5 * net(images).abs().max()


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"num_classes": 0}])
def test_streams_read_without_a_bias_or_a_head_are_only_permuted(change):
    assert norms_of(timm.create_model("deit_tiny_patch16_224", depth=1, **change)) == {}


@torch.no_grad()
def test_biases_absorb_the_mean_of_dropped_channels(images):
    ordered = order_channels(slimmable(), [images])
    read: list[torch.Tensor] = []
    ordered.vit.blocks[1].norm2.register_forward_hook(lambda _, read_, wrote: read.append(wrote))
    ordered(images)
    assert read[0].mean((0, 1)).abs().max() < 1e-5


def test_changing_basis_is_multiplying_by_hand():
    state = {
        "blocks.0.attn.proj.weight": sample(4, 6),
        "head.weight": sample(3, 4),
        "pos_embed": sample(1, 5, 4),
    }
    basis = torch.linalg.qr(sample(4, 4))[0]
    changed = change_basis(state, vit_table(2, "aligned"), "embed", basis)
    torch.testing.assert_close(
        changed["blocks.0.attn.proj.weight"], basis @ state["blocks.0.attn.proj.weight"]
    )
    torch.testing.assert_close(changed["head.weight"], state["head.weight"] @ basis.T)
    torch.testing.assert_close(changed["pos_embed"], state["pos_embed"] @ basis.T)


def test_permuting_is_indexing_by_hand():
    state = {
        "blocks.0.mlp.fc1.weight": sample(6, 4),
        "blocks.1.mlp.fc1.weight": sample(6, 4),
        "head.weight": sample(3, 4),
    }
    table, hidden, embed = (
        vit_table(2, "aligned"),
        torch.tensor([5, 3, 1, 0, 2, 4]),
        torch.tensor([3, 1, 0, 2]),
    )
    one = permute_state(state, table, "hidden", hidden, within="blocks.1.")
    assert torch.equal(one["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"][hidden])
    assert torch.equal(one["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    two = permute_state(state, table, "embed", embed)
    assert all(torch.equal(two[name], state[name][:, embed]) for name in state)


def test_moments_are_those_of_all_batches_together():
    vectors = sample(40, 3, 6)
    moments = GroupMoments(2)
    for part in vectors.split(7):
        moments.add(part)
    flat = vectors.reshape(-1, 3, 2)
    torch.testing.assert_close(moments.second, torch.einsum("ngi,ngj->gij", flat, flat) / len(flat))
    torch.testing.assert_close(moments.central[1], torch.cov(flat[:, 1].T, correction=0))
    single = GroupMoments()
    single.add(vectors)
    torch.testing.assert_close(single.deviation, vectors.reshape(-1, 6).std(0, correction=0))
