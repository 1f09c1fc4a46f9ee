"""Learning rates relative to the size of each weight."""

from dataclasses import replace

import pytest
import torch
from test_step import settings, start
from timm.optim import muon
from torch import nn

from scala_cli.errors import TrainingError
from scala_cli.settings import OptimizerSettings
from scala_cli.tasks import task_named
from scala_cli.training.rates import SIZE_OF_ZEROS, SMALLEST, relative_rate
from scala_cli.training.step import Step


def step_with(photos, lr: float, **optimizer) -> Step:
    chosen = settings(photos, optimizer=OptimizerSettings(batch_size=4, lr=lr, model_ema=False, **optimizer))
    net = start()
    with torch.no_grad():  # as if a LayerScale near zero were folded into a weight
        net.vit.blocks[0].mlp.fc2.weight.mul_(1e-2)
        net.vit.blocks[0].mlp.fc2.bias.fill_(1e-2)
    step = Step(net, task_named("features"), net, chosen, torch.device("cpu"))
    for group in step.optimizer.param_groups:  # as timm's schedulers do
        group["lr"] *= group.get("lr_scale", 1)
    return step


def moved(step: Step) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns every parameter before a step, and how far it moved."""
    before = {name: p.detach().clone() for name, p in step.net.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, *step.net.spec.input_size, generator=generator)
    step(images, torch.zeros(4, dtype=torch.long))
    return {name: (before[name], p.detach() - before[name]) for name, p in step.net.named_parameters()}


def test_a_rate_is_the_root_mean_square_of_the_values():
    weight = nn.Parameter(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert relative_rate(weight) == pytest.approx(2.5)
    assert relative_rate(nn.Parameter(torch.zeros(3))) == SIZE_OF_ZEROS
    assert relative_rate(nn.Parameter(torch.full((3,), 1e-9))) == SMALLEST


def test_what_decays_is_as_timm_has_it(photos):
    groups = [step_with(photos, 1e-3, opt=opt).optimizer.param_groups for opt in ("muon", "adamw")]
    decays = [[g["weight_decay"] for g in some for _ in g["params"]] for some in groups]
    assert decays[0] == decays[1] and {*decays[0]} == {0.0, 0.05}


def test_with_muon_every_weight_moves_in_proportion_to_its_size(photos):
    lr = 1e-3
    changes = moved(step_with(photos, lr, weight_decay=0.0))
    checked = 0
    for name, (before, change) in changes.items():
        if before.ndim == 1 and change.any():  # AdamW: the first step moves each value by the rate
            assert change.abs().max().item() == pytest.approx(lr * relative_rate(before), rel=0.02), name
            checked += 1
    assert checked > 10
    small, large = (changes[f"vit.blocks.{number}.mlp.fc2.weight"] for number in (0, 1))
    ratio = [(change.norm() / before.norm()).item() for before, change in (small, large)]
    assert ratio[0] == pytest.approx(ratio[1], rel=0.5)  # the weights differ by a factor of 100


@pytest.mark.parametrize("native", [True, False])
def test_muon_multiplies_in_what_the_hardware_multiplies_in(photos, monkeypatch, native):
    products, timms, multiply = set(), muon.zeropower_via_newtonschulz, torch.addmm

    def observed(added, *factors, **options):
        products.add(added.dtype)
        return multiply(added, *factors, **options)

    monkeypatch.setattr(torch, "addmm", observed)
    monkeypatch.setattr("scala_cli.training.muon.multiplies_bfloat16", lambda device: native)
    step = step_with(photos, 1e-3, weight_decay=0.0)
    changes = moved(step)
    assert products == {torch.bfloat16 if native else torch.float32}
    assert muon.zeropower_via_newtonschulz is timms
    weight, change = changes["vit.blocks.1.mlp.fc2.weight"]
    spectrum = torch.linalg.svdvals(change) / (1e-3 * relative_rate(weight))
    assert spectrum.max() < 2 * spectrum.median(), "every direction moves about equally far"


def test_other_optimizers_move_every_weight_equally_far(photos):
    lr = 1e-3
    changes = moved(step_with(photos, lr, opt="adamw", weight_decay=0.0))
    small, large = (changes[f"vit.blocks.{number}.mlp.fc2.weight"][1].abs().max() for number in (0, 1))
    assert small.item() == pytest.approx(lr, rel=0.02) and large.item() == pytest.approx(lr, rel=0.02)


def test_vectors_of_a_width_s_own_are_trained_in_either_way(photos):
    for opt in ("muon", "adamw"):
        step = step_with(photos, 1e-3, opt=opt)
        trained = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in step.net.parameters()}


def test_layer_decay_scales_relative_rates(photos):
    plain, decayed = (step_with(photos, 1e-3, layer_decay=decay) for decay in (None, 0.5))
    names = {id(p): name for step in (plain, decayed) for name, p in step.net.named_parameters()}
    one, other = (
        {names[id(g["params"][0])]: g["lr_scale"] for g in step.optimizer.param_groups}
        for step in (plain, decayed)
    )
    assert other["vit.head.weight"] == pytest.approx(one["vit.head.weight"])
    assert other["vit.patch_embed.proj.weight"] < 0.5 * one["vit.patch_embed.proj.weight"]


def test_a_rate_for_features_has_to_be_given_where_it_would_destroy_them(photos):
    chosen = settings(photos, optimizer=OptimizerSettings(batch_size=4, lr=None, opt="adamw"))
    with pytest.raises(TrainingError, match="no default learning rate for features"):
        Step(start(), task_named("features"), start(), chosen, torch.device("cpu"))


def test_the_rate_that_is_told_is_the_one_that_was_given(photos, tmp_path):
    from test_step import Listener

    from scala_cli.models.checkpoint import Record
    from scala_cli.training.finetune import finetune
    from scala_cli.training.run import Run

    chosen = settings(photos, 0.3)
    flat = replace(chosen.optimizer, opt="muon", lr=1e-3, min_lr=1e-3, warmup_epochs=0)
    row = finetune(
        start(), Record(), replace(chosen, optimizer=flat), Run(tmp_path / "run"), Listener(), False
    )
    assert row["lr"] == pytest.approx(1e-3)
