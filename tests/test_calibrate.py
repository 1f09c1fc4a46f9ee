"""Slices fitted to the full model: the target of each layer, for every kind of model."""

import math
from typing import Any

import pytest
import timm
import torch
from conftest import KINDS, TINY, slimmable
from runs import backbone
from torch import Tensor, nn

from scala_cli.errors import DataError, PointError
from scala_cli.models.calibrate import HELD_OUT, calibrate
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.stages import embed, stages
from scala_cli.models.vit import describe
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.ridge import Moments, Normal, best_solution
from scala_cli.slicing.rule import Rule
from scala_cli.watch import Watcher

RARE = {
    "gated, RMSNorm, no biases": ("aimv2_large_patch14_224", 2),
    "norms behind the branches": ("vit_base_patch16_rpn_224", 2),
    "norms within the branches": ("beit3_base_patch16_224", 2),
    "pooled by attention": ("vit_base_patch16_siglip_224", 12),  # timm's pool has 12 heads if all blocks have
}


def sample(count: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def rare(kind: str) -> SlimmableViT:
    """Returns a tiny random family, as in conftest, of a rare kind."""
    name, heads = RARE[kind]
    args = {**TINY, "num_heads": heads, "embed_dim": 16 * heads}
    torch.manual_seed(0)
    vit = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    spec = describe(vit, args)
    return SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,1")), heads)).eval()


def ordered(kind: str, images: Tensor) -> SlimmableViT:
    net = rare(kind) if kind in RARE else slimmable(kind)
    return order_channels(net, [images])


def error(vit: nn.Module, net: SlimmableViT, images: Tensor) -> float:
    with torch.no_grad():
        return (vit(images) - net(images)).square().mean().item()


@pytest.mark.parametrize("kind", [*KINDS, *RARE])
@torch.no_grad()
def test_the_stages_in_turn_are_the_forward(kind):
    vit = (rare(kind) if kind in RARE else slimmable(kind)).vit
    images = sample(3)
    tokens = embed(vit, images)
    for stage in stages(vit):
        tokens = stage.run(vit, tokens)
    assert torch.equal(tokens, vit(images))
    fitted = {name for stage in stages(vit) for name in stage.layers(vit)}
    has_weight = {name.removesuffix(".weight") for name in vit.state_dict() if name.endswith(".weight")}
    assert {"patch_embed.proj"} <= has_weight - fitted <= {"patch_embed.proj", "patch_embed.norm"}


@pytest.mark.parametrize("kind", [*KINDS, *RARE])
def test_a_fitted_slice_is_nearer_to_the_full_model(kind):
    images = sample(128)
    net = ordered(kind, images)
    before = {name: tensor.clone() for name, tensor in net.vit.state_dict().items()}
    fitted, _ = calibrate(net, 0.5, images.split(16))
    assert error(fitted, net, images) < 0.95 * error(net.slice(0.5), net, images)
    assert fitted.state_dict().keys() == net.slice(0.5).state_dict().keys()  # no bias is added
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.vit.state_dict().items())


@pytest.mark.parametrize("kind", [*KINDS, *RARE])
def test_at_full_width_nothing_changes(kind):
    images = sample()
    net = ordered(kind, images)
    fitted, fit = calibrate(net, 1, images.split(16))
    assert error(fitted, net, images) < 1e-6 * net(images).var()
    assert min(r2 for r2 in (fit.class_token, fit.patches, fit.output) if r2 is not None) > 0.9999


def observed(vit: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns name -> the layer's inputs and outputs, (tokens, channels), in float64."""
    seen = {}
    for name in names:
        vit.get_submodule(name).register_forward_hook(
            lambda _, read, wrote, name=name: seen.update(
                {name: (read[0].flatten(0, -2).double(), wrote.flatten(0, -2).double())}
            )
        )
    vit(images)
    return seen


@torch.no_grad()
def test_every_linear_layer_solves_its_normal_equations():
    """(T - W X) X^T = lambda (W - W0) about the means: X of the finished slice, T of the full model."""
    images, kept = sample(), torch.arange(16)
    heads = torch.arange(6)[:, None] * 16 + torch.arange(8)
    net = ordered("deit3, layer scale", images)
    fitted, _ = calibrate(net, 0.5, images.split(16), strengths=[0.02])
    used = images[torch.arange(len(images)) % HELD_OUT != HELD_OUT - 1]
    layers = [
        f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    places = [f"blocks.{n}{part}" for n in (0, 1) for part in ("", ".norm1", ".norm2")]
    start, own = net.slice(0.5), observed(fitted, [*layers, *places, "head"], used)
    full = observed(net.vit, [*layers, *places, "head"], used)
    for name in [*layers, "head"]:
        block = name.rpartition(".")[0].rpartition(".")[0]
        target, weight = full[name][1], start.get_submodule(name).weight.double()
        if name.endswith("qkv"):
            target = target[:, heads.flatten()]
            target[:, :16] *= math.sqrt(0.5)
            weight[:16] *= math.sqrt(0.5)
        elif name.endswith("proj"):
            target = full[f"{block}.norm2"][0][:, kept] - own[f"{block}.norm1"][0]
        elif name.endswith("fc1"):
            target = target[:, :64]
        elif name.endswith("fc2"):
            target = full[block][1][:, kept] - own[f"{block}.norm2"][0]
        layer = fitted.get_submodule(name)
        read = own[name][0] - own[name][0].mean(0)
        left = target - own[name][0] @ layer.weight.double().T - layer.bias
        pull = 0.02 * read.square().mean() * len(read) * (layer.weight.double() - weight)
        assert left.mean(0).abs().max() < 1e-5 * target.abs().max(), name
        assert (left.T @ read - pull).abs().max() < 1e-4 * (target.T @ read).abs().max(), name


def test_images_held_out_judge_and_do_not_fit():
    images = sample(32)
    net = ordered("deit", images)
    others = images.clone()
    others[HELD_OUT - 1 :: HELD_OUT] = sample(4, seed=7)
    fitted, fit = calibrate(net, 0.5, images.split(16), strengths=[0.1])
    again, other = calibrate(net, 0.5, others.split(16), strengths=[0.1])
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), again.parameters(), strict=True))
    assert (fit.images, fit.held_out) == (other.images, other.held_out) == (28, 4)
    assert fit.output != other.output and fit.embedding is None


def test_the_embedding_is_judged_alone_where_features_are_the_task():
    images = sample(32)
    net = order_channels(backbone(), [images])
    fitted, fit = calibrate(net, 0.5, [images], every_token=True)
    held = images[HELD_OUT - 1 :: HELD_OUT]
    with torch.no_grad():
        given, wanted = fitted(held).double(), net(held).double()
    by_hand = 1 - (given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert fit.embedding == pytest.approx(by_hand.item(), abs=1e-4) and fit.embedding != fit.output


def test_batches_of_any_size_come_to_the_same():
    images = sample(30)
    net = ordered("vit", images)
    whole, one = calibrate(net, 0.5, [images])
    parts, other = calibrate(net, 0.5, images.split(1))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert one.output == pytest.approx(other.output, rel=1e-3)


def test_few_images_leave_the_weights_in_order_nearly_alone():
    images = sample()
    net = ordered("deit", images)
    fitted, fit = calibrate(net, 0.5, [images[:1]])
    assert all(parameter.isfinite().all() for parameter in fitted.parameters())
    assert (fit.images, fit.held_out, fit.class_token, fit.patches, fit.output) == (1, 0, None, None, None)
    strong, _ = calibrate(net, 0.5, [images], strengths=[1e6])
    for name in ("blocks.0.mlp.fc1.weight", "blocks.1.attn.proj.weight", "head.weight"):
        torch.testing.assert_close(strong.get_parameter(name), net.slice(0.5).get_parameter(name))


@torch.no_grad()
def test_a_head_that_reads_every_token_is_fitted_to_every_token():
    images = sample()
    net = ordered("deit", images)

    def left(every_token: bool) -> float:
        fitted, _ = calibrate(net, 0.5, [images], every_token=every_token)
        dense = [vit.head(vit.forward_features(images))[:, 1:] for vit in (fitted, net.vit)]
        return (dense[0] - dense[1]).square().mean().item()

    assert left(True) < 0.5 * left(False)


def test_what_it_refuses():
    net = slimmable()
    with pytest.raises(DataError, match="no images"):
        calibrate(net, 0.5, [])
    with pytest.raises(PointError, match=r"0\.6"):
        calibrate(net, 0.6, [sample(2)])


def test_it_tells_how_far_it_is():
    told = []

    class Listener(Watcher):
        def phase(self, name, total, unit="images", done=0):
            told.append((name, total, unit))

        def step(self, count, losses=None):
            told.append(count)

    calibrate(slimmable(), 0.5, [sample(8)], watch=Listener())
    assert told == [
        ("calibrate", 6, "stages"),
        *[1] * 6,
    ]  # an optional norm, two halves of each block, the head


def ridge(seen: Moments, start: Tensor, strengths: list[float], bias: bool) -> list[tuple[Tensor, Any]]:
    """Returns (weights, bias) of each strength."""
    origins = seen.origins(bias)
    fits = Normal.of(seen, origins).solutions(start, strengths)
    mapped = [fit * seen.mean_x if seen.diagonal else fit @ seen.mean_x for fit in fits]
    return [(fit, seen.mean_t - mean if bias else None) for fit, mean in zip(fits, mapped, strict=True)]


def correlated(count: int, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns (count, 6) inputs, and (count, 4) targets that they partly explain."""
    generator = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(count, 6, generator=generator, dtype=torch.double) for _ in range(2))
    mixed = x @ torch.randn(6, 6, generator=generator, dtype=torch.double) + mean
    return mixed, mixed @ torch.randn(6, 4, generator=generator, dtype=torch.double) + noise[:, :4] - 2


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_is_least_squares_with_rows_that_pull(bias):
    """The penalty is a row sqrt(lambda n) e_i for each input, with the output of W0 as its target."""
    x, t = correlated(200, mean=3)
    start = torch.ones(4, 6, dtype=torch.double)
    seen = Moments()
    for a, b in zip(x.split(30), t.split(30), strict=True):
        seen.add(a, b)
    (weight, shift), _ = ridge(seen, start, [0.1, 1], bias)
    mean_x, mean_t = (x.mean(0), t.mean(0)) if bias else (0, 0)
    pull = math.sqrt(0.1 * (x - mean_x).square().mean() * len(x)) * torch.eye(6, dtype=torch.double)
    rows, targets = torch.cat([x - mean_x, pull]), torch.cat([t - mean_t, pull @ start.T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(weight, expected)
    if bias:
        torch.testing.assert_close(shift, t.mean(0) - expected @ x.mean(0))
    else:
        assert shift is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_diagonal_fit_is_a_fit_of_each_channel(bias):
    x, t = correlated(200, mean=3)
    seen = Moments(diagonal=True)
    seen.add(x[:, :4], t)
    [(scale, shift)] = ridge(seen, torch.ones(4), [0.0], bias)
    for channel in range(4):
        own = Moments()
        own.add(x[:, channel, None], t[:, channel, None])
        [(expected, offset)] = ridge(own, torch.ones(1, 1), [0.0], bias)
        torch.testing.assert_close(scale[channel], expected[0, 0])
        assert not bias or shift[channel] == pytest.approx(offset.item())


def test_a_large_mean_costs_no_digits():
    x, t = correlated(5000)
    fits = []
    for offset in (0, 1000):
        seen = Moments()
        for a, b in zip((x + offset).float().split(500), (t + offset).float().split(500), strict=True):
            seen.add(a, b)
        fits.append(ridge(seen, torch.zeros(4, 6), [1e-6], bias=True)[0][0])
    torch.testing.assert_close(fits[0], fits[1], atol=1e-3, rtol=1e-3)


def test_inputs_that_never_change_leave_a_layer_as_it_is():
    seen, start = Moments(), torch.randn(4, 6)
    seen.add(torch.ones(50, 6), torch.randn(50, 4))
    [(weight, bias)] = ridge(seen, start, [1e-3], bias=True)
    torch.testing.assert_close(weight, start.double())
    torch.testing.assert_close(bias, seen.mean_t - start.double().sum(1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_best_pull_is_the_one_that_errs_least_on_what_was_held_out(bias):
    x, t = correlated(60, mean=1)
    t = t + 6 * torch.randn(t.shape, generator=torch.Generator().manual_seed(4), dtype=t.dtype)
    strengths = [1e-4, 1e-2, 0.1, 1, 100]
    seen, held = Moments(), Moments()
    seen.add(x[:12], t[:12])
    held.add(x[12:], t[12:])
    errors = []
    for weight, shift in ridge(seen, torch.zeros(4, 6), strengths, bias):
        errors.append((x[12:] @ weight.T + (0 if shift is None else shift) - t[12:]).square().sum().item())
    best = ridge(seen, torch.zeros(4, 6), strengths, bias)[errors.index(min(errors))]
    assert 0 < errors.index(min(errors)) < 4
    origins = seen.origins(bias)
    equations = [Normal.of(moments, origins) for moments in (seen, held)]
    chosen = best_solution(*equations, torch.zeros(4, 6), strengths)
    torch.testing.assert_close(chosen, best[0])
