"""Each method's step, compared with the same step by hand on separate narrow models."""

import subprocess
import sys
from collections import Counter
from fractions import Fraction
from random import Random
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import build, slimmable
from torch.nn import functional as F

from scala_cli.cli.app import app
from scala_cli.errors import PointError, TrainingError
from scala_cli.methods import METHODS, VARIANTS, method_named
from scala_cli.methods.base import OFF, Batch, Method
from scala_cli.methods.sampling import stable_sample, uniform_sample
from scala_cli.methods.scala import Scala
from scala_cli.methods.separate import Separate
from scala_cli.methods.usnet import USNet
from scala_cli.settings import MethodSettings
from scala_cli.slicing.point import Point, grid, parse_points
from scala_cli.tasks import task_named
from scala_cli.tasks.losses import cross_entropy, distillation
from scala_cli.training.compare import recipes
from scala_cli.training.start import refuse_foreign

TASK = task_named("classification")
FOUR = parse_points("0.25,0.5,0.75,1")
TARGETS = torch.tensor([0, 3, 4])


WEIGHTS = [
    ("1", 1),
    ("0.5,1", 1),
    ("0.25,0.5,1", 2),
    ("0.25,0.3125,0.375,1", 2),  # none lies in the upper half: three passes a step
    ("0.25,0.375,0.5,0.75,1", 3),
]


def test_the_narrowest_weighs_as_much_as_all_others_of_a_step():
    for text, said in WEIGHTS:
        method = Scala(parse_points(text), MethodSettings(), TASK)
        drawn = method.draw(Random(0))
        weights = [method.weight(point, drawn) for point in drawn]
        assert weights == [1] * (len(drawn) - 1) + [said]
        if len(drawn) > 1:
            assert weights[-1] == sum(weights[:-1])
    alike = Scala(FOUR, MethodSettings(favour_narrowest=False), TASK)
    assert {alike.weight(point, FOUR) for point in FOUR} == {1}


def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Returns the sum over classes of p log(p / q), mean over images."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def ce(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    classes = logits.shape[-1]
    target = F.one_hot(TARGETS, classes) * (1 - smoothing) + smoothing / classes
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def run(method, net, images, teacher=None):
    drawn = method.draw(Random(0))
    passes = method.passes(Batch(images, TARGETS), net, teacher, drawn)
    return {point.label: loss for point, loss, _ in passes}


@pytest.fixture
def teacher(images):
    vit, _ = build("vit")
    vit.requires_grad_(False)
    return vit


@pytest.mark.parametrize("isolated", [True, False])
def test_scala_step_and_its_gradients(images, teacher, isolated):
    """Sums the gradients of four separate slices, put back into the full weights by index."""
    net = slimmable("deit", isolated=isolated)
    settings = MethodSettings(smoothing=0.1, teacher="full")
    losses = run(Scala(FOUR, settings, TASK), net, images, teacher)
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
    losses = run(Scala(FOUR, MethodSettings(), TASK), net, images, teacher)
    for ratio in (1, 0.75, 0.5, 0.25):
        logits = net(images, ratio)
        torch.testing.assert_close(losses[f"{ratio:g}"], ce(logits, 0.1) + kl(logits, teacher(images)))


def test_without_a_teacher_each_width_teaches_the_next(images):
    net = slimmable()
    losses = run(Scala(FOUR, MethodSettings(), TASK), net, images)
    half, quarter = net(images, 0.5), net(images, 0.25)
    torch.testing.assert_close(losses["0.25"], ce(quarter, 0.1) + kl(quarter, half))


def test_without_a_teacher_the_largest_learns_from_labels_alone(images):
    net = slimmable()
    losses = run(Scala(FOUR, MethodSettings(), TASK), net, images)
    torch.testing.assert_close(losses["1"], ce(net(images), 0.1), rtol=1e-5, atol=1e-6)


def test_progressive_transfer_off_lets_the_largest_teach_all(images, teacher):
    net = slimmable()
    losses = run(
        Scala(FOUR, MethodSettings(progressive_transfer=False, teacher="full"), TASK), net, images, teacher
    )
    largest = net(images).detach()
    for ratio in (0.75, 0.5, 0.25):
        logits = net(images, ratio)
        torch.testing.assert_close(losses[f"{ratio:g}"], ce(logits, 0.1) + kl(logits, largest))


def test_noise_calibration_off_leaves_labels_to_the_largest(images, teacher):
    net = slimmable()
    losses = run(
        Scala(FOUR, MethodSettings(noise_calibration=False, teacher="full"), TASK), net, images, teacher
    )
    full, three = net(images), net(images, 0.75)
    torch.testing.assert_close(losses["1"], ce(full, 0.1) + kl(full, teacher(images)))
    torch.testing.assert_close(losses["0.75"], kl(three, full))


def test_usnet_step(images):
    net = slimmable()
    losses = run(USNet(FOUR, MethodSettings(), TASK), net, images)
    full = net(images)
    assert list(losses) == ["1", "0.75", "0.5", "0.25"]
    torch.testing.assert_close(losses["1"], ce(full, 0.1))
    torch.testing.assert_close(losses["0.25"], kl(net(images, 0.25), full))


def test_separate_trains_one_width(images, teacher):
    net = slimmable(ratios="0.5")
    losses = run(Separate(net.points, MethodSettings(), TASK), net, images, teacher)
    logits = net(images, 0.5)
    assert list(losses) == ["0.5"]
    torch.testing.assert_close(losses["0.5"], ce(logits, 0.1) + kl(logits, teacher(images)))
    with pytest.raises(PointError, match="one width a run"):
        Separate(FOUR, MethodSettings(), TASK)


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


def test_a_step_of_a_grid_trains_the_whole_widths_and_one_point_of_the_rest():
    points = grid(parse_points("0.25,0.5,0.75,1"), (16, 20, 24, 32), (Fraction(1, 2), Fraction(1)))
    widths = parse_points("0.25@32,0.5@32,0.75@32,1@32")
    drawn = [stable_sample(points, Random(seed)) for seed in range(1000)]
    assert all(
        len(some) == 5 and {*widths} <= {*some} and some == sorted(some, reverse=True) for some in drawn
    )
    assert {point for some in drawn for point in some} == {*points}
    one = parse_points("1@16~0.5,1@16,1@24,1@32~0.5,1@32")
    drawn = [stable_sample(one, Random(seed)) for seed in range(100)]
    assert all(len(some) == 4 and some[0] == one[-1] for some in drawn)
    assert {point for some in drawn for point in some} == {*one}


def test_the_narrowest_width_counts_most():
    points = grid(parse_points("0.25,1"), (16, 32))
    method = Scala(points, MethodSettings(), TASK)
    assert [method.weight(point, points) for point in points] == [1, 3, 1, 1]
    one = Scala(parse_points("1@16,1@24,1@32"), MethodSettings(), TASK)
    assert {one.weight(point, one.points) for point in one.points} == {1}, "there is no narrower width"


@pytest.mark.parametrize("sizes", [(), (16, 32)])
def test_without_stable_sampling_points_come_from_anywhere(sizes):
    points = grid(parse_points("0.25,0.375,0.5,0.625,0.75,0.875,1"), sizes)
    method = Scala(points, MethodSettings(stable_sampling=False), TASK)
    wanted = [uniform_sample(points, Random(seed)) for seed in range(20)]
    assert [method.draw(Random(seed)) for seed in range(20)] == wanted
    stable = Scala(points, MethodSettings(), TASK)
    assert [stable.draw(Random(seed)) for seed in range(20)] != wanted


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
    (command,) = (each for each in app.registered_commands if each.name == "finetune")
    assert get_args(get_type_hints(command.callback)["method"]) == tuple(METHODS)
    assert all(issubclass(method_named(name), Method) for name in METHODS)
    assert all(method_named(name).parts <= set(OFF) for name in METHODS)
    assert recipes().keys() == {*METHODS, *VARIANTS}  # which the help of compare lists


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("usnet", {"teacher": "full"}),
        ("usnet", {"full_every": 4}),
        ("supervit", {"isolation": True}),
        ("sit", {"mask_patches": 1.0}),
        ("separate", {"slim_keep": 0.7}),
    ],
)
def test_a_setting_of_another_method_is_refused(method, setting):
    with pytest.raises(TrainingError, match=f"{next(iter(setting))} has no effect with method {method}"):
        refuse_foreign(MethodSettings(method=method, **setting))
    refuse_foreign(MethodSettings(method=method, teacher="none"))  # off, as it is in any case, or a part


def test_importing_the_names_of_methods_imports_no_torch():
    """Otherwise every `scala -h` would take seconds."""
    code = "import scala_cli.cli.app, sys; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_full_width_is_trained_in_one_of_so_many_steps():
    points = parse_points("0.25,0.5,0.75,1")
    usual, seldom = (
        Scala(points, MethodSettings(full_every=every), task_named("classification")) for every in (1, 4)
    )
    drawn = [seldom.draw(Random(seed)) for seed in range(400)]
    assert all(each == usual.draw(Random(seed))[-len(each) :] for seed, each in enumerate(drawn))
    assert {len(each) for each in drawn} == {3, 4}
    assert 70 < sum(len(each) == 4 for each in drawn) < 130
    alone = Scala(points[-1:], MethodSettings(full_every=4), task_named("classification"))
    assert all(alone.draw(Random(seed)) == [*points[-1:]] for seed in range(20))


def test_a_step_without_the_full_width_and_a_teacher_learns_from_labels(images):
    settings = MethodSettings(noise_calibration=False, teacher="none", full_every=100)
    method = Scala(FOUR, settings, TASK)
    batch, student = Batch(images, TARGETS), slimmable()
    passes = [*method.passes(batch, lambda some, point: student(some, point.ratio), None, FOUR[2::-1])]
    assert len(passes) == 3 and all(each.loss.requires_grad for each in passes)
