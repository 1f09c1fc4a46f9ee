"""Hidden patches: which are hidden, and the loss on them, compared with the same by hand."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import write_timm_directory
from runs import QUICK, Listener, backbone, settings
from safetensors.torch import load_file
from timm.utils import random_seed

from scala_cli.methods import METHODS, method_named
from scala_cli.models.checkpoint import Record
from scala_cli.models.tokens import answer_and_patches
from scala_cli.settings import MethodSettings, OptimizerSettings
from scala_cli.tasks import task_named
from scala_cli.tasks.masking import hide_half
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.price import Macs, training_macs
from scala_cli.training.run import Run
from scala_cli.training.step import Step
from scala_cli.watch import Watcher

TASK = task_named("features")
CPU = torch.device("cpu")
MASKED = MethodSettings(order="none", isolation=False, mask_patches=0.5)

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("patch", [4, (2, 8)])
@torch.no_grad()
def test_half_of_the_patches_of_every_image_are_hidden(patch):
    net = backbone(patch_size=patch)
    images = torch.randn(5, 3, 16, 16)
    masked, hidden = hide_half(images, net.spec)
    (tall, wide), columns = net.spec.patch_size, net.spec.grid[1]
    for image in range(5):
        assert hidden[image].sum() == net.spec.patches // 2
        for number in range(net.spec.patches):
            top, left = number // columns * tall, number % columns * wide
            place = (image, slice(None), slice(top, top + tall), slice(left, left + wide))
            seen = torch.zeros(3, tall, wide) if hidden[image, number] else images[place]
            assert torch.equal(masked[place], seen)
    assert len({tuple(each.tolist()) for each in hidden}) == 5  # each image has its own hidden patches
    patches, embedding = net.vit.patch_embed(masked), net.vit.patch_embed.proj
    assert torch.equal(patches[hidden], embedding.bias.expand_as(patches[hidden]))
    assert net.at(Fraction(1, 2))(masked).shape == (5, 32)


@pytest.mark.parametrize("method", [name for name in METHODS if method_named(name).masks_patches])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_that_of_models_run_one_by_one(method, parts):
    """Compares losses and gradients with those of whole models that are not views, patch by patch."""
    net = backbone(ratios="0.5" if method == "separate" else "0.5,1")
    teacher, images = backbone(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        teacher.vit.blocks[0].mlp.fc2.weight.mul_(1.5)  # so that the full width can learn something
    how = replace(MASKED, method=method, favour_narrowest=False, class_token=2.0, patch_tokens=0.5)
    optimizer = OptimizerSettings(grad_accum_steps=parts)
    step = Step(net, TASK, teacher, settings("", method=how, optimizer=optimizer), CPU)
    losses = step.gather_gradients(images, torch.zeros(4, dtype=torch.long))

    random_seed(0)
    masked, hidden = hide_half(images, net.spec)
    lesson = answer_and_patches(teacher.vit, images).detach()
    for ratio in sorted(net.rule.ratios, reverse=True):
        whole, some = (answer_and_patches(net.at(ratio), seen) for seen in (images, masked))
        errors = [
            (some[image, 1 + patch] - lesson[image, 1 + patch]).square().mean()
            for image in range(4)
            for patch in range(16)
            if hidden[image, patch]
        ]
        loss = 2.0 * (whole[:, 0] - lesson[:, 0]).square().mean()
        loss = loss + 0.5 * (whole[:, 1:] - lesson[:, 1:]).square().mean() + 0.5 * sum(errors) / len(errors)
        loss.backward()
        assert losses[str(ratio) if ratio == 1 else "0.5"].item() == pytest.approx(loss.item(), rel=1e-4)
        if method == "usnet" and ratio == 1:
            lesson = whole.detach()
    for (name, ours), by_hand in zip(step.net.vit.named_parameters(), net.vit.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, by_hand.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_only_hidden_patches_count_in_the_second_loss():
    output, lesson = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    TASK.loss(output, None, lesson, MASKED, hidden).backward()
    counted = torch.cat([torch.zeros(2, 1, dtype=torch.bool), hidden], 1)
    assert output.grad[counted].abs().min() > 0 and output.grad[~counted].abs().max() == 0


def test_a_run_that_was_stopped_hides_the_same_patches(pictures):
    quick = OptimizerSettings(epochs=2, batch_size=4, save_every_steps=1)
    how, record = settings(pictures, method=MASKED, optimizer=quick), Record(task="features")
    finetune(backbone(), record, how, Run(Path("whole")), Watcher())
    with pytest.raises(KeyboardInterrupt):
        finetune(backbone(), record, how, Run(Path("cut")), Listener(stop_at=7))
    resume_run(Run(Path("cut")), Watcher())
    one, other = (load_file(f"{run}/last/model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = replace(how, method=replace(MASKED, mask_patches=0.0))
    finetune(backbone(), record, plain, Run(Path("plain")), Watcher())
    other = load_file("plain/last/model.safetensors")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_student_learns_to_tell_what_it_does_not_see():
    net = backbone(ratios="0.5")
    how = settings("", method=replace(MASKED, method="separate", mask_patches=1.0))
    step = Step(net, TASK, backbone(), replace(how, optimizer=OptimizerSettings(opt="adamw", lr=3e-3)), CPU)
    images, generator = torch.randn(8, 3, 16, 16), torch.get_rng_state()

    def error() -> float:
        torch.set_rng_state(generator)
        masked, hidden = hide_half(images, net.spec)
        with torch.no_grad():
            output, lesson = step.predict(masked, net.points[0]), step.teach(images)
        return TASK.loss(output, None, lesson, how.method, hidden).item()

    before = error()
    for _ in range(20):
        step(images, torch.zeros(8, dtype=torch.long))
    assert error() < 0.7 * before


def test_a_second_pass_costs_as_much_as_the_first():
    macs, how = Macs.of(backbone()), MethodSettings()
    once, twice = (training_macs(macs, m, "features", True) for m in (how, replace(how, mask_patches=1.0)))
    assert twice - macs.full == 2 * (once - macs.full)
    assert training_macs(macs, MASKED, "classification", True) < twice


def test_hidden_patches_as_a_user_asks_for_them(scala, pictures):
    write_timm_directory(Path("backbone"), num_classes=0)
    words = ("finetune", "backbone", "--data", pictures, *QUICK, "--ratios", "0.5,1")
    alone = ("--class-token", 0, "--patch-tokens", 0)
    told = scala(*words, *alone, "--mask-patches", 1, "--log-grads", "-o", "run", "--json")
    assert told.code == 0, told.told
    assert "--mask-patches 1.0" in Path("run/best/config.json").read_text()
    assert scala(*words, *alone, "-o", "none").code == 2 and not Path("none").exists()
    answer = scala(*words, "--mask-patches", -1, "-o", "none")
    assert answer.code == 2 and "--mask-patches" in answer.told
