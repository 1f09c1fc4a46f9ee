"""Features of every token and block; every width gives them in the full model's channels."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import KINDS, build, slimmable
from test_calibrate import sample

from scala_cli.deploy.slice import slice_model
from scala_cli.errors import PointError
from scala_cli.models.calibrate import calibrate_family
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.dense import WithTokens, back_of, pooled, reader_of
from scala_cli.models.fitted import fit_widths
from scala_cli.models.in_memory import slimmable as from_memory
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.source import Changes, open_model
from scala_cli.models.stages import embed, normed
from scala_cli.slicing.original import BASIS, BIAS, ORIGINAL_MAPS, WEIGHT
from scala_cli.slicing.point import Point
from scala_cli.slicing.tokens import TokenRule
from scala_cli.training.start import with_new_head

HALF = Fraction(1, 2)


def centred(tokens):
    return tokens - tokens.mean(-1, keepdim=True)


def streams(vit, images, **how):
    """Returns timm's tokens (B, P + N, C) after every block."""
    found = vit.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True, **how)[1]
    return [torch.cat([each[1], each[0]], 1) if isinstance(each, tuple) else each for each in found]


def close(found, wanted):
    scale = wanted.square().mean().sqrt().clamp_min(1).item()
    torch.testing.assert_close(found, wanted, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("state", ["as it came", "in order", "in order twice"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_full_width_has_the_original_models_features(kind, state, classes, images):
    vit, _ = build(kind, num_classes=classes)
    net = from_memory(vit)
    for _ in range(["as it came", "in order", "in order twice"].index(state)):
        net = order_channels(net, [images, images.flip(0)])
    prefix, wanted = vit.num_prefix_tokens, streams(vit, images)
    for found, stream in zip(net.features(images, blocks=2), wanted, strict=True):
        together = torch.cat([found.prefix, found.tokens], 1)
        close(centred(together), centred(stream))
        assert found.prefix.shape == (3, prefix, 32) and found.tokens.shape == (3, 16, 32)
    last = net.features(images)
    close(torch.cat([last.prefix, last.tokens], 1), normed(vit, wanted[-1]))
    close(pooled(net, images, Fraction(1)), vit.forward_head(vit.forward_features(images), pre_logits=True))


@torch.no_grad()
def test_a_model_as_it_came_is_timms_bit_for_bit(images):
    vit, _ = build("class token, registers", num_classes=0)
    net = from_memory(vit)
    assert not net.extra
    for found, stream in zip(net.features(images, blocks=2), streams(vit, images), strict=True):
        assert torch.equal(torch.cat([found.prefix, found.tokens], 1), stream)


@torch.no_grad()
def test_a_map_has_rows_and_columns_and_blocks_come_as_they_are_asked(images):
    net = slimmable("class token, registers")
    plain, grid = net.features(images, 0.5), net.features(images, 0.5, grid=True)
    assert torch.equal(grid.tokens.flatten(2).mT, plain.tokens) and grid.tokens.shape == (3, 32, 4, 4)
    assert torch.equal(grid.prefix, plain.prefix) and plain.prefix.shape == (3, 5, 32)
    wanted = net.vit.forward_intermediates(images, indices=[0, 1], norm=False)[1]
    found = net.features(images, blocks=[-1, 0, 1], grid=True)
    for number, each in zip([1, 0, 1], found, strict=True):
        assert torch.equal(each.tokens, wanted[number])
    assert net.features(images, blocks=[]) == []


@pytest.mark.parametrize("isolated", [False, True])
@torch.no_grad()
def test_an_unordered_width_fills_only_the_channels_it_keeps(isolated, images):
    net = slimmable(isolated=isolated)
    (found,) = net.features(images, 0.5, blocks=[0])
    narrow = net.slice(0.5).forward_intermediates(images, indices=[0], output_fmt="NLC")[1][0]
    kept = slice(16, 32) if isolated else slice(0, 16)
    torch.testing.assert_close(found.tokens[..., kept], narrow)
    assert found.tokens.count_nonzero() == narrow.count_nonzero()


@pytest.mark.parametrize("kind", ["deit", "norm before the blocks"])
@torch.no_grad()
def test_a_narrow_stream_lies_in_the_kept_rows_of_the_basis(kind, images):
    """It is the channels times rows of the basis; the rest of the space is empty."""
    net = order_channels(slimmable(kind), [images, images.flip(0)])
    (found,) = net.features(images, 0.5, blocks=1)
    narrow = net.slice(0.5).forward_intermediates(images, indices=1, output_fmt="NLC")[1][0]
    by_hand = sum(narrow[..., [n]] * net.extra[BASIS][n] for n in range(16))
    torch.testing.assert_close(found.tokens, by_hand, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(net.extra[BASIS][:16]) == 16
    orthonormal = net.extra[BASIS] @ net.extra[BASIS].T
    if kind == "norm before the blocks":
        assert torch.equal(orthonormal, torch.eye(32)) and set(net.extra[BASIS].unique().tolist()) == {0, 1}
    else:
        torch.testing.assert_close(orthonormal, torch.eye(32) - 1 / 32, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_first_channels_say_the_most_of_the_full_stream():
    images = sample(64)
    net = order_channels(slimmable("deit3, layer scale"), [images])
    (full,) = net.features(images, blocks=[0])
    stream = net.vit.forward_intermediates(images, indices=[0], output_fmt="NLC")[1][0]
    left = [
        (stream[..., :count] @ net.extra[BASIS][:count] - full.tokens).square().sum().item()
        for count in (4, 8, 16, 24, 32)
    ]
    assert left == sorted(left, reverse=True) and left[-1] < 1e-6 * full.tokens.square().sum().item()


@torch.no_grad()
def test_the_first_prefix_token_is_the_output_of_a_class_token_model(images):
    """If the model reads its class token, the first prefix token is its output, at every width."""
    net = from_memory(build("class token, registers", num_classes=0)[0])
    net = order_channels(net, [images, images.flip(0)])
    for point in net.points:
        torch.testing.assert_close(net.features(images, point).prefix[:, 0], net(images, point))
        assert torch.equal(pooled(net, images, point.ratio), net(images, point))


@pytest.mark.parametrize(("kind", "names"), [("deit", "class"), ("no class token, registers", "mean")])
@torch.no_grad()
def test_the_embedding_of_a_model_without_pooling(kind, names, images):
    net = from_memory(build(kind, num_classes=0, global_pool="")[0])
    every = net.vit.forward_features(images)
    wanted = every[:, 0] if names == "class" else every.mean(1)
    torch.testing.assert_close(pooled(net, images, Fraction(1)), wanted)
    assert pooled(net, images, HALF).shape == (3, 32)


@pytest.mark.parametrize("classes", [0, 5])
@torch.no_grad()
def test_fitted_widths_answer_with_their_own_weights(classes):
    images = sample(96)
    net = order_channels(from_memory(build("deit", num_classes=classes)[0]), images.split(32))
    apart = fit_widths(net, net.points, images.split(32), every_token=True)
    family, _ = calibrate_family(net, images.split(32), every_token=True)
    (truth,), final = net.features(images, blocks=1), net.features(images)
    for model in (apart, family):
        (found,), last = model.features(images, 0.5, blocks=1), model.features(images, 0.5)
        (cut,), cut_last = net.features(images, 0.5, blocks=1), net.features(images, 0.5)
        error, before = ((each.tokens - truth.tokens).square().mean() for each in (found, cut))
        assert error < before
        error, before = ((each.tokens - final.tokens).square().mean() for each in (last, cut_last))
        assert error < before
    assert torch.equal(apart(images, 0.5), apart.slice(0.5)(images))
    assert torch.equal(apart(images), net(images))
    assert torch.equal(apart(images, 0.5), apart.fitted(HALF)(images))


@pytest.mark.parametrize("classes", [0, 5])
@torch.no_grad()
def test_the_basis_is_saved_and_not_trained(classes, images, tmp_path):
    net = order_channels(from_memory(build("deit", num_classes=classes)[0]), [images])
    assert {*net.extra} == ({*ORIGINAL_MAPS} if classes else {BASIS}) and not net.vectors
    assert all(not tensor.requires_grad for tensor in net.extra.values())
    assert {name for name, _ in net.named_parameters()} == {f"vit.{n}" for n, _ in net.vit.named_parameters()}
    save(net, Record(order="importance"), tmp_path / "net")
    again = load(tmp_path / "net")
    for other in (again, again.copied(), again.with_points([again.points[1], again.points[-1]])):
        (found,) = other.features(images, 0.5, blocks=1)
        assert torch.equal(found.tokens, net.features(images, 0.5, blocks=1)[0].tokens)
        assert torch.equal(other.features(images, 0.5).tokens, net.features(images, 0.5).tokens)
    (tmp_path / "net/extra.st").unlink()
    assert torch.equal(load(tmp_path / "net")(images, 0.5), net(images, 0.5))


@torch.no_grad()
def test_a_model_converted_again_or_given_another_head_keeps_its_basis(images, tmp_path):
    net = order_channels(from_memory(build("deit", num_classes=0)[0]), [images])
    save(net, Record(order="importance"), tmp_path / "net")
    half = net.points[1], net.points[-1]
    headed = open_model(str(tmp_path / "net"), half, Changes(num_classes=3))[0]
    for other in (open_model(str(tmp_path / "net"), half)[0], headed, with_new_head(net, ["a", "b"], 0)):
        for ratio in (0.5, 1):
            (found,), (wanted,) = (each.features(images, ratio, blocks=1) for each in (other, net))
            assert torch.equal(found.tokens, wanted.tokens)
            torch.testing.assert_close(
                other.features(images, ratio).tokens, net.features(images, ratio).tokens, atol=1e-5, rtol=1e-5
            )
    assert headed(images).shape == (3, 3) and {*headed.extra} == {*ORIGINAL_MAPS}
    slice_model(tmp_path / "net", 0.5, tmp_path / "half")
    assert not open_model(str(tmp_path / "half"), half)[0].extra


def test_gradients_reach_the_weights_of_the_width(images):
    net = slimmable(ratios="0.5,1")
    net.features(images, 0.5).tokens.square().mean().backward()
    grad = net.vit.blocks[0].mlp.fc1.weight.grad
    assert grad[:64, :16].any() and not grad[64:].any()


@pytest.mark.parametrize(("blocks", "named"), [([2], "2"), ([-3], "-3"), (3, "-3"), (0, "2")])
def test_blocks_that_are_not_there(blocks, named, images):
    with pytest.raises(PointError, match=f"has 2 blocks: there is none to take for {named}"):
        slimmable().features(images, blocks=blocks)


def test_a_width_that_is_not_there(images):
    with pytest.raises(PointError, match=r"0\.3 was not trained"):
        slimmable().features(images, 0.3)


def test_other_image_sizes_if_the_model_takes_them():
    vit, _ = build("deit", dynamic_img_size=True, num_classes=0)
    net = from_memory(vit)
    assert net.features(torch.randn(2, 3, 24, 16), 0.5, grid=True).tokens.shape == (2, 32, 6, 4)


def test_the_map_back_to_full_width_is_sliced():
    net = slimmable()
    full = {BASIS: torch.eye(32), WEIGHT: torch.eye(32), BIAS: torch.zeros(32)}
    cut = net.rule.slice_state(full, HALF)
    assert [tuple(cut[name].shape) for name in ORIGINAL_MAPS] == [(16, 32), (32, 16), (32,)]
    assert isinstance(net, SlimmableViT) and not net.original


def with_fewer_tokens(kind, how):
    net = slimmable(kind)
    points = [Point.of("0.5~0.7"), Point.of("1~0.7")]
    return net.like(spec=replace(net.spec, tokens=TokenRule(how, (1, 2))), points=points)


@pytest.mark.parametrize("ratio", ["0.5~0.7", "1~0.7"])
@pytest.mark.parametrize("kind", ["class token, registers", "no class token, registers"])
@torch.no_grad()
def test_a_dropped_patch_keeps_the_last_token_that_it_had(kind, ratio, images):
    net = with_fewer_tokens(kind, "drop")
    vit, prefix = net.at(Point.of(ratio)), net.vit.num_prefix_tokens
    stream = embed(vit, images)
    carried, numbers = stream[:, prefix:].clone(), torch.arange(16).expand(3, -1)
    after = []
    for block in vit.blocks:
        inside = block.norm1(stream)
        q, k, _ = block.attn.qkv(inside).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = (q @ k.mT * block.attn.scale).softmax(-1).mean(1)
        scores = (seen[:, 0] if vit.cls_token is not None else seen.mean(1))[:, prefix:]
        stream = stream + block.ls1(block.attn(inside))
        for image, of_image in enumerate(numbers):
            carried[image, of_image] = stream[image, prefix:]
        chosen = scores.topk(block.passing.kept).indices
        numbers = numbers.gather(1, chosen)
        kept = torch.stack([each[prefix:][some] for each, some in zip(stream, chosen, strict=True)])
        stream = torch.cat([stream[:, :prefix], kept], 1)
        stream = stream + block.ls2(block.mlp(block.norm2(stream)))
        for image, of_image in enumerate(numbers):
            carried[image, of_image] = stream[image, prefix:]
        after.append(carried.clone())
    assert numbers.shape[1] < 16
    for found, wanted in zip(net.features(images, ratio, blocks=2), after, strict=True):
        close(found.tokens, back_of(net, Point.of(ratio).ratio)(wanted))
    last = net.features(images, ratio, grid=True).tokens
    close(last.flatten(2).mT, reader_of(net, vit, Point.of(ratio).ratio)(normed(vit, carried)))
    both, dense = WithTokens(vit, reader_of(net, vit, Point.of(ratio).ratio)).eval()(images)
    close(dense, last.flatten(2).mT)
    close(both, net(images, ratio))


@pytest.mark.parametrize("kind", ["class token, registers", "no class token, registers"])
@torch.no_grad()
def test_merged_patches_have_the_token_that_they_went_into_after_every_block(kind, images):
    net = with_fewer_tokens(kind, "merge")
    vit, prefix = net.at(Point.of("1~0.7")), net.vit.num_prefix_tokens
    merged = vit.blocks[0](embed(vit, images))
    wanted = torch.stack([each[prefix:][of] for each, of in zip(merged.tokens, merged.places, strict=True)])
    first, last = net.features(images, "1~0.7", blocks=2)
    assert merged.tokens.shape[1] < prefix + 16
    close(first.tokens, wanted)
    close(first.prefix, merged.tokens[:, :prefix])
    close(last.tokens, vit.blocks[1](merged)[:, prefix:])
