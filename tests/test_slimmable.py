"""The slimmable forward, compared with the slice, for every kind of model."""

import gc
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import product
from threading import Barrier

import pytest
import timm
import torch
from conftest import KINDS, build, slimmable
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block, ResPostBlock

from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.modes import skip_unread
from scala_cli.models.views import weights_of
from scala_cli.models.vit import describe
from scala_cli.slicing.point import parse_points

RULES = [
    {"layout": layout, "isolated": isolated, "attn_scale": scale}
    for layout, isolated, scale in product(("aligned", "fused"), (False, True), ("native", "fixed"))
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_at_a_width_is_the_slice_of_that_width(kind, rule, images):
    net = slimmable(kind, **rule)
    for point in net.points:
        piece = net.slice(point)
        assert piece.embed_dim == int(32 * point.ratio)
        assert (net(images, point) - piece(images)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_width_is_the_timm_model_bit_for_bit(kind, images):
    original, _ = build(kind)
    net = slimmable(kind, isolated=True)
    assert torch.equal(net(images), original(images))
    assert torch.equal(net.slice(1)(images), original(images))


def test_gradients_reach_exactly_the_kept_channels(images):
    net = slimmable("deit")
    net(images, 0.5).sum().backward()
    gradient = net.vit.blocks[1].mlp.fc1.weight.grad  # (hidden, embed), cut to the first halves
    hidden, embed = gradient.shape
    assert gradient[: hidden // 2, : embed // 2].abs().sum() > 0
    assert gradient[hidden // 2 :].abs().sum() == 0
    assert gradient[:, embed // 2 :].abs().sum() == 0


def test_gradients_equal_those_of_the_slice(images):
    net = slimmable("distilled", isolated=True)
    piece = net.slice(0.5)
    net(images, 0.5).square().mean().backward()
    piece(images).square().mean().backward()
    kept = net.rule.slice_state({k: p.grad for k, p in net.vit.named_parameters()}, net.rule.ratios[1])
    for name, parameter in piece.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_tokens_that_the_head_does_not_read_keeps_logits_and_gradients(kind, images):
    """After the last plain attention, patch tokens are skipped if the head reads only the class token."""
    whole = slimmable(kind)
    sparing = whole.copied()
    skip_unread(sparing.vit)
    tokens = []
    for vit in (sparing.vit, sparing.at(sparing.rule.ratios[1])):
        vit.blocks[-1].mlp.register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))
    for ratio in (1, 0.5):
        answers = whole(images, ratio), sparing(images, ratio)
        torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
        for answer in answers:
            answer.square().mean().backward()
    prefix, patches = whole.vit.num_prefix_tokens, whole.vit.patch_embed.num_patches
    plain = whole.vit.global_pool == "token" and kind != "qk_norm"
    read = {"distilled": 2}.get(kind, 1) if plain else prefix + patches
    assert tokens == [read] * 2
    for one, other in zip(whole.vit.parameters(), sparing.vit.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_training_mode_reaches_every_width(images):
    vit, args = build("deit", drop_rate=0.5)
    net = slimmable()
    net = type(net)(vit, describe(vit, args), net.rule)
    with torch.no_grad():
        assert not torch.equal(net.train()(images, 0.5), net(images, 0.5))
        assert torch.equal(net.eval()(images, 0.5), net(images, 0.5))


def test_a_slice_owns_its_weights(images):
    net = slimmable()
    piece = net.slice(0.5)
    with torch.no_grad():
        before = piece(images)
        net.vit.blocks[0].mlp.fc1.weight.zero_()
        assert torch.equal(piece(images), before)


def test_skeletons_are_not_initialised_and_configs_do_not_say_so(tmp_path, monkeypatch):
    net = slimmable()
    monkeypatch.delattr(VisionTransformer, "init_weights")
    assert net.spec.build().blocks[0].mlp.fc1.weight.is_meta
    timm.models.save_for_hf(net.slice(0.5), str(tmp_path / "timm"))
    save(net, Record(), tmp_path / "net")
    for name in ("timm", "net"):
        assert "weight_init" not in (tmp_path / name / "config.json").read_text()


CHANGES = {
    "in place": lambda net: net.vit.blocks[0].attn.qkv.weight.mul_(2),
    "another parameter": lambda net: setattr(
        net.vit.blocks[0].attn.qkv, "weight", torch.nn.Parameter(net.vit.blocks[0].attn.qkv.weight * 2)
    ),
    "loaded": lambda net: net.vit.load_state_dict({k: 2 * v for k, v in net.vit.state_dict().items()}),
    "an optimizer": lambda net: torch.optim.SGD(net.vit.parameters(), lr=1).step(),
    "another precision and back": lambda net: net.double().float().vit.norm.weight.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_views_are_kept_only_as_long_as_the_weights(images, change):
    net = slimmable()
    net(images, 0.5).sum().backward()
    with torch.no_grad():
        before = net(images, 0.5)
        first = net.at(net.rule.ratios[1]).blocks[0].attn.qkv.weight
        net(images, 0.25)
        assert torch.equal(net(images, 0.5), before)
        assert net.at(net.rule.ratios[1]).blocks[0].attn.qkv.weight is first
        CHANGES[change](net)
        assert torch.equal(net(images, 0.5), net.slice(0.5)(images))
        assert not torch.equal(net(images, 0.5), before)


def test_weights_made_in_inference_mode_are_cut_anew(images):
    with torch.inference_mode():
        net = slimmable()
        net.vit.load_state_dict({k: v.clone() for k, v in net.vit.state_dict().items()}, assign=True)
        net(images, 0.5)
        net.vit.blocks[0].attn.qkv.weight.mul_(2)
        assert torch.equal(net(images, 0.5), net.slice(0.5)(images))


@torch.no_grad()
def test_threads_may_share_a_family(images):
    """Threads share a new family, whose skeletons others are building; then the weights change."""
    kept = slimmable()
    for factor in (1, 2):
        for parameter in kept.vit.parameters():
            parameter.mul_(factor)
        expected = {point: kept.slice(point)(images) for point in kept.points}
        nets = [kept, *(deepcopy(kept) for _ in range(5))]
        for net in nets:
            start = Barrier(6)

            def answers(number, net=net, start=start):
                with torch.no_grad():  # no_grad holds for one thread only
                    start.wait()
                    points = [*net.points[number % 4 :], *net.points[: number % 4]] * 3
                    return [(point, net(images, point)) for point in points]

            with ThreadPoolExecutor(6) as pool:
                for told in pool.map(answers, range(6)):
                    assert all(torch.allclose(answer, expected[point], atol=1e-5) for point, answer in told)


def test_predicting_in_one_thread_keeps_gradients_in_another(images):
    """A thread predicts after another has filled the width's skeleton, before its forward."""
    net = slimmable()
    skeleton = net.at(net.rule.ratios[1])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: torch.no_grad()(net)(images, 0.5)).result()
    skeleton(images).sum().backward()
    assert net.vit.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_buffers_are_carried_as_parameters_are(images):
    """A buffer in place of a parameter, as in BatchNorm, is cut by the same row of the table."""
    net = slimmable()
    net(images, 0.5)  # the skeleton has a parameter of that name
    for name in ("weight", "bias"):
        value = getattr(net.vit.norm, name).detach()
        delattr(net.vit.norm, name)
        net.vit.norm.register_buffer(name, value * 3)
    assert "norm.weight" in weights_of(net.vit)
    piece = net.slice(0.5)
    assert torch.equal(piece.norm.weight, net.vit.norm.weight[:16])
    torch.testing.assert_close(net(images, 0.5), piece(images))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_copy_for_training_is_timms_model_bit_for_bit(kind, images):
    net = slimmable(kind)
    copied = net.copied()
    stock = {Block, ResPostBlock}
    assert all(type(block) in stock for block in net.vit.blocks)
    assert not any(type(block) is Block for block in copied.vit.blocks)
    for ratio in (1, 0.5):
        assert torch.equal(copied(images, ratio), net(images, ratio))
    for parameter in copied.vit.parameters():
        parameter.zero_()
    assert net.vit.patch_embed.proj.weight.abs().sum() > 0


def test_switching_widths_holds_no_more_each_time(images):
    net = slimmable()

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    with torch.inference_mode():
        [net(images, ratio) for ratio in net.points]
        before = held()
        [net(images, ratio) for ratio in net.points * 5]
        assert held() == before


@pytest.mark.parametrize("isolated", [True, False])
def test_among_other_widths_each_is_cut_from_the_end_it_was_trained_at(images, isolated, tmp_path):
    net = slimmable(isolated=isolated)
    for text in ("0.5,1", "0.25,0.5,1", "0.5,0.75"):
        fewer = net.with_points(parse_points(text)).with_points(parse_points("0.5"))
        save(fewer, Record(), tmp_path / "fewer")
        with torch.no_grad():
            assert torch.equal(fewer(images, 0.5), net(images, 0.5))
            assert torch.equal(load(tmp_path / "fewer")(images), net(images, 0.5))


def test_an_untrained_width_is_refused(images):
    net = slimmable(ratios="0.25,0.5,1")
    with pytest.raises(PointError, match="not trained"):
        net(images, 0.75)
    with pytest.raises(PointError, match="not trained"):
        net.slice(0.75)
    assert net(images).shape == net(images, "0.5").shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("resnet18", {}, "ResNet"),
        ("vit_pwee_patch16_reg1_gap_256", {"depth": 1}, "a ParallelScalingBlock"),
        ("vit_base_patch16_rope_224", {"depth": 1}, "Eva"),
        ("vit_small_r26_s32_224", {"depth": 1}, "HybridEmbed"),
        ("vit_giant_patch14_dinov2", {"depth": 1}, "a GluMlp"),
    ],
)
def test_models_that_are_not_plain_are_refused_with_the_reason(name, args, reason):
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    with pytest.raises(CheckpointError, match=reason):
        describe(model)
