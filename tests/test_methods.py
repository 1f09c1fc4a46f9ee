"""Each method's step against the same step written out by hand on separate narrow models."""

from collections import Counter
from dataclasses import replace
from random import Random
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import build, slimmable
from torch.nn import functional as F

from scala_cli.errors import PointError
from scala_cli.methods import METHODS
from scala_cli.methods.losses import cross_entropy, distillation
from scala_cli.methods.scala import Scala, stable_sample, uniform_sample
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point, parse_points

FOUR = parse_points("0.25,0.5,0.75,1")
TARGETS = torch.tensor([0, 3, 4])


def test_the_narrowest_weighs_as_much_as_all_others_of_a_step():
    for text, said in (("1", 1), ("0.5,1", 1), ("0.25,0.5,1", 2), ("0.25,0.375,0.5,0.75,1", 3)):
        method = Scala(parse_points(text), MethodSettings())
        assert [method.weight(point) for point in method.points] == [said] + [1] * (len(method.points) - 1)
        drawn = method.sample(Random(0))
        if len(drawn) > 1:
            assert method.weight(drawn[-1]) == sum(method.weight(point) for point in drawn[:-1])
    alike = Scala(FOUR, MethodSettings(favour_narrowest=False))
    assert {alike.weight(point) for point in FOUR} == {1}


def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """sum over classes of p log(p / q), mean over images"""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def ce(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    classes = logits.shape[-1]
    target = F.one_hot(TARGETS, classes) * (1 - smoothing) + smoothing / classes
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def run(method, net, images, teacher=None):
    return {point.label: loss for point, loss in method.passes(net, images, TARGETS, teacher, Random(0))}


@pytest.fixture
def teacher(images):
    vit, _ = build("vit")
    vit.requires_grad_(False)
    return vit


@pytest.mark.parametrize("isolated", [True, False])
def test_scala_step_and_its_gradients(images, teacher, isolated):
    """Four widths on slices with weights of their own; their gradients put back by index and summed."""
    net = slimmable("deit", isolated=isolated)
    settings = MethodSettings(smoothing=0.1, teacher="full")
    losses = run(Scala(FOUR, settings), net, images, teacher)
    sum(losses.values()).backward()

    slices = {ratio: net.slice(ratio) for ratio in (1, 0.75, 0.5, 0.25)}
    lesson, by_hand = teacher(images), {}
    for ratio, piece in slices.items():
        logits = piece(images)
        by_hand[f"{ratio:g}"] = ce(logits, 0.1) + kl(logits, lesson)
        lesson = logits.detach()
    assert list(losses) == list(by_hand) == ["1", "0.75", "0.5", "0.25"]
    for name, loss in by_hand.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-6)
    sum(by_hand.values()).backward()

    expected = torch.zeros(128, 32)  # mlp.fc1 of block 1: (hidden, embed)
    for ratio, piece in slices.items():
        gradient = piece.blocks[1].mlp.fc1.weight.grad
        hidden, embed = gradient.shape
        last = isolated and ratio in (0.5, 0.75)
        rows = slice(128 - hidden, 128) if last else slice(0, hidden)
        columns = slice(32 - embed, 32) if last else slice(0, embed)
        expected[rows, columns] += gradient
    torch.testing.assert_close(net.vit.blocks[1].mlp.fc1.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_frozen_teacher_teaches_every_width(images, teacher):
    net = slimmable()
    losses = run(Scala(FOUR, MethodSettings()), net, images, teacher)
    for ratio in (1, 0.75, 0.5, 0.25):
        logits = net(images, ratio)
        torch.testing.assert_close(losses[f"{ratio:g}"], ce(logits, 0.1) + kl(logits, teacher(images)))


def test_without_a_teacher_each_width_teaches_the_next(images):
    net = slimmable()
    losses = run(Scala(FOUR, MethodSettings()), net, images)
    half, quarter = net(images, 0.5), net(images, 0.25)
    torch.testing.assert_close(losses["0.25"], ce(quarter, 0.1) + kl(quarter, half))


def test_without_a_teacher_the_largest_learns_from_labels_alone(images):
    net = slimmable()
    losses = run(Scala(FOUR, MethodSettings()), net, images)
    torch.testing.assert_close(losses["1"], ce(net(images), 0.1), rtol=1e-5, atol=1e-6)


def test_progressive_transfer_off_lets_the_largest_teach_all(images, teacher):
    net = slimmable()
    losses = run(
        Scala(FOUR, MethodSettings(progressive_transfer=False, teacher="full")), net, images, teacher
    )
    largest = net(images).detach()
    for ratio in (0.75, 0.5, 0.25):
        logits = net(images, ratio)
        torch.testing.assert_close(losses[f"{ratio:g}"], ce(logits, 0.1) + kl(logits, largest))


def test_noise_calibration_off_leaves_labels_to_the_largest(images, teacher):
    net = slimmable()
    losses = run(Scala(FOUR, MethodSettings(noise_calibration=False, teacher="full")), net, images, teacher)
    full, three = net(images), net(images, 0.75)
    torch.testing.assert_close(losses["1"], ce(full, 0.1) + kl(full, teacher(images)))
    torch.testing.assert_close(losses["0.75"], kl(three, full))


def test_usnet_step(images):
    net = slimmable()
    losses = run(METHODS["usnet"](FOUR, MethodSettings()), net, images)
    full = net(images)
    assert list(losses) == ["1", "0.75", "0.5", "0.25"]
    torch.testing.assert_close(losses["1"], ce(full, 0.1))
    torch.testing.assert_close(losses["0.25"], kl(net(images, 0.25), full))


def test_separate_trains_one_width(images, teacher):
    net = slimmable(ratios="0.5")
    losses = run(METHODS["separate"](net.points, MethodSettings()), net, images, teacher)
    logits = net(images, 0.5)
    assert list(losses) == ["0.5"]
    torch.testing.assert_close(losses["0.5"], ce(logits, 0.1) + kl(logits, teacher(images)))
    with pytest.raises(PointError, match="one width a run"):
        METHODS["separate"](FOUR, MethodSettings())


@pytest.mark.parametrize("draw", [stable_sample, uniform_sample])
@pytest.mark.parametrize("ratios", ["1", "0.5,1", "0.25,0.5,1", "0.25,0.75,1", "0.25,0.5,0.75,1"])
def test_up_to_four_widths_are_all_trained_every_step(draw, ratios):
    points = parse_points(ratios)
    for seed in range(20):
        assert draw(points, Random(seed)) == sorted(points, reverse=True)


@pytest.mark.parametrize("count", [7, 13, 25])
def test_stable_sampling_draws_one_width_from_each_half(count):
    points = tuple(Point.of(f"{24 + i * 72 // (count - 1)}/96") for i in range(count))
    middle = Point.of("5/8")
    seen: Counter = Counter()
    for seed in range(600):
        largest, second, first, smallest = stable_sample(points, Random(seed))
        assert (largest, smallest) == (points[-1], points[0])
        assert smallest < first <= middle < second < largest
        seen.update([first, second])
    assert set(seen) == set(points[1:-1])


def test_uniform_sampling_may_take_both_from_one_half():
    points = tuple(Point.of(f"{n}/8") for n in range(2, 9))
    draws = [uniform_sample(points, Random(seed)) for seed in range(100)]
    assert any(all(p > Point.of("5/8") for p in draw[1:-1]) for draw in draws)
    assert all(len(draw) == 4 for draw in draws)


def test_losses_against_their_definitions():
    logits, other = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(cross_entropy(logits, TARGETS, 0.2), ce(logits, 0.2))
    torch.testing.assert_close(distillation(logits, other), kl(logits, other))
    soft = torch.randn(3, 5).softmax(-1)
    torch.testing.assert_close(
        cross_entropy(logits, soft, 0.2), -(soft * logits.log_softmax(-1)).sum(-1).mean()
    )


def test_the_teacher_gets_no_gradient():
    student, other = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    distillation(student, other).backward()
    assert other.grad is None and student.grad is not None


def test_every_method_can_be_named_on_the_command_line():
    named = get_args(get_type_hints(MethodSettings)["method"])
    assert set(named) == set(METHODS)
    assert replace(MethodSettings(), method="usnet").method in METHODS
