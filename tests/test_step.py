"""A training step: optimizer, schedule, clipping, precision and mixup."""

import math
from copy import deepcopy
from functools import partialmethod
from random import Random

import pytest
import timm
import torch
from conftest import slimmable
from runs import Listener, settings, start
from safetensors.torch import load_file
from timm.models.vision_transformer import Block

from scala_cli.errors import ScalaError
from scala_cli.memory import naming_lack_of_memory
from scala_cli.methods.base import Batch, Pass
from scala_cli.methods.scala import Scala
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.precision import note_emulation, uses_bfloat16
from scala_cli.settings import AugmentSettings, DeviceSettings, OptimizerSettings
from scala_cli.tasks import task_named
from scala_cli.training.finetune import finetune
from scala_cli.training.loop import Trainer
from scala_cli.training.run import Run
from scala_cli.training.step import Step
from scala_cli.watch import Watcher

TASK = task_named("classification")


def trainer(photos, **groups) -> Trainer:
    chosen = settings(photos, **groups)
    return Trainer(start(), TASK, start(), chosen, TASK.open(chosen))


def step(photos, **groups) -> Step:
    return trainer(photos, **groups).step


def test_weight_decay_spares_biases_norms_and_embeddings(photos):
    ready = step(photos)
    names = {id(p): n for n, p in ready.net.vit.named_parameters()}
    groups = ready.optimizer.param_groups
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias"} <= spared


def test_learning_rate_warms_up_and_follows_a_cosine(photos, tmp_path):
    chosen = OptimizerSettings(epochs=4, batch_size=4, lr=1e-2, min_lr=0, warmup_epochs=1)
    ready = trainer(photos, optimizer=chosen)
    rates = []
    ready.step.optimizer.step = lambda: rates.append(ready.step.optimizer.param_groups[0]["lr"])
    ready.train(Run(tmp_path / "run"), Record(), Watcher())
    cosine = [1e-2 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert rates[:3] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3])
    assert rates[3:] == pytest.approx(cosine[3:])


def test_layer_decay_slows_the_lower_blocks(photos):
    ready = trainer(photos, optimizer=OptimizerSettings(epochs=1, batch_size=4, layer_decay=0.5))
    ready.scheduler.step_update(0)
    names = {id(p): n for n, p in ready.step.net.vit.named_parameters()}
    rates = {names[id(p)]: g["lr_scale"] for g in ready.step.optimizer.param_groups for p in g["params"]}
    assert rates["head.weight"] > rates["blocks.1.mlp.fc1.weight"] > rates["blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize(("limit", "reached"), [(1e-3, 1e-3), (None, None)])
def test_the_gradient_is_clipped(photos, limit, reached):
    ready = step(photos, optimizer=OptimizerSettings(epochs=1, batch_size=4, clip_grad=limit))
    norms = []

    def note_norm():
        grads = [p.grad for p in ready.net.vit.parameters()]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    ready.optimizer.step = note_norm
    ready(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert norms[0] == pytest.approx(reached, rel=1e-3) if reached else norms[0] > 0.1


def test_bfloat16_training_is_close_to_float32(photos):
    losses = {}
    for amp in (False, True):
        ready = step(photos, device=DeviceSettings(device="cpu", amp=amp))
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        losses[amp] = ready(images, torch.tensor([0, 1, 2, 0]))
        fused = {m.fused_attn for m in ready.net.vit.modules() if hasattr(m, "fused_attn")}
        assert fused == {not amp}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.parametrize(
    ("amp", "cpu", "told"),
    [
        (True, {"architecture": "x86_64", "avx2": True}, 1),
        (True, {"architecture": "x86_64", "amx_bf16": True}, 0),
        (True, {"architecture": "aarch64", "bf16": True}, 0),
        (True, {}, 0),
        (None, {"architecture": "x86_64"}, 0),
    ],
)
def test_bfloat16_that_would_be_emulated_is_told(monkeypatch, amp, cpu, told):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu, raising=False)
    listener = Listener()
    note_emulation(torch.device("cpu"), DeviceSettings(amp=amp), listener)
    assert len(listener.notes) == told


@pytest.mark.parametrize(("capability", "told"), [(False, 1), (True, 0)])
def test_a_gpu_that_emulates_bfloat16_does_not_use_it_by_itself(monkeypatch, capability, told):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    device, listener = torch.device("cuda"), Listener()
    assert uses_bfloat16(device, DeviceSettings()) is capability
    note_emulation(device, DeviceSettings(amp=True), listener)
    assert len(listener.notes) == told


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_a_batch_in_parts_makes_the_same_step(photos, parts):
    """Also if it does not divide: 4 images in 3 parts are 2 and 2, in 9 parts one each."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = []
    for number in (1, parts):
        chosen = OptimizerSettings(epochs=1, batch_size=4, grad_accum_steps=number, clip_grad=None)
        ready = step(photos, optimizer=chosen)
        ready.optimizer.zero_grad = lambda: None
        losses = ready(images, torch.tensor([0, 1, 2, 0]))
        steps.append((losses, [p.grad for p in ready.net.vit.parameters()]))
    (one_losses, one), (other_losses, other) = steps
    assert other_losses == pytest.approx(one_losses, rel=1e-5)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_mixup_of_a_single_image_is_that_image(photos):
    ready = step(photos, augment=AugmentSettings(mixup=0.5))
    one, label = torch.randn(1, 3, 16, 16), torch.tensor([1])
    assert ready.mix(one, label) == (one, label)
    three, soft = ready.mix(torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2]))
    assert len(three) == 2 and soft.shape == (2, 3)


def test_lack_of_memory_names_the_batch_and_keeps_what_was_saved(photos, tmp_path):
    """From step 5 on, each step allocates a petabyte."""
    ready, run = trainer(photos), Run(tmp_path / "run")
    real = ready.step.predict
    ready.step.predict = lambda *args: torch.empty(1 << 50) if ready.step.number == 4 else real(*args)
    with pytest.raises(ScalaError, match="memory for 4 images") as error:
        ready.train(run, Record(), Watcher())
    assert error.value.remedy == "smaller_step" and error.value.resumable
    assert run.read_state()["step"] == 4 and (run.path / "last/model.safetensors").is_file()


def test_other_failures_are_not_called_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"), naming_lack_of_memory(4):
        raise RuntimeError("shape")


def test_gradient_checkpointing_computes_blocks_again_for_the_same_gradients(photos):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients, runs = [], []
    for again in (False, True):
        chosen = OptimizerSettings(epochs=1, batch_size=4, grad_checkpointing=again)
        ready = step(photos, optimizer=chosen)
        ready.optimizer.zero_grad = lambda: None
        models = [ready.net.vit, *(ready.net.at(ratio) for ratio in ready.net.rule.ratios[:-1])]
        count = [0] * len(models)
        for number, model in enumerate(models):

            def counted(*_, count=count, number=number):
                count[number] += 1

            model.blocks[0].register_forward_pre_hook(counted)
        ready(images, torch.tensor([0, 1, 2, 0]))
        gradients.append([p.grad for p in ready.net.vit.parameters()])
        runs.append(count)
    assert runs == [[1] * 4, [2] * 4]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_compiled_widths_are_compiled_once_and_compute_the_same(photos, monkeypatch):
    quick = partialmethod(SlimmableViT.compile, backend="aot_eager")  # torch.compile without kernels
    monkeypatch.setattr(SlimmableViT, "compile", quick)
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    losses, gradients = [], []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        chosen = OptimizerSettings(epochs=1, batch_size=4, torchcompile=compiled)
        start_of_two = start(ratios="0.5,1")
        ready = Step(start_of_two, TASK, None, settings(photos, optimizer=chosen), torch.device("cpu"))
        ready.net.train()
        ready.gather_gradients(images, targets)
        gradients.append([p.grad for p in ready.net.vit.parameters()])
        ready.optimizer.zero_grad()
        losses.append([ready(images, targets) for _ in range(3)])  # each step changes the weights
        assert [*ready.net.vit.state_dict()] == [*start_of_two.vit.state_dict()]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for eager, other in zip(*losses, strict=True):
        assert other == pytest.approx(eager, rel=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_compiler_that_fails_is_named(photos):
    ready = step(photos, optimizer=OptimizerSettings(batch_size=4, torchcompile=True))

    def fail(*_):
        raise RuntimeError("No working C++ compiler\nfound")

    ready.gather_gradients = fail
    with pytest.raises(ScalaError, match="RuntimeError: No working C") as caught:
        ready(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert (caught.value.remedy, caught.value.facts) == ("leave_out", {"setting": "torchcompile"})


def test_lack_of_memory_is_not_the_compilers(photos):
    ready = step(photos, optimizer=OptimizerSettings(batch_size=4, torchcompile=True))

    def fail(*_):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    ready.gather_gradients = fail
    with pytest.raises(ScalaError, match="memory for 4 images"):
        ready(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))


def test_the_narrowest_pulls_with_its_weight(photos):
    """The gradient is the sum of the widths' gradients, the narrowest's counted three times."""
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    chosen = OptimizerSettings(epochs=1, batch_size=4, clip_grad=None)
    ready = step(photos, optimizer=chosen)
    ready.optimizer.zero_grad = ready.optimizer.step = lambda: None
    own = {}
    drawn = ready.method.draw(Random("0 0"))
    for point, loss, _ in ready.method.passes(Batch(images, labels), ready.predict, ready.teach, drawn):
        loss.backward()
        own[point] = [p.grad.clone() for p in ready.net.vit.parameters()]
        ready.net.zero_grad()
    losses = ready(images, labels)
    weights = {point: 3 if point == ready.net.points[0] else 1 for point in own}
    for number, parameter in enumerate(ready.net.vit.parameters()):
        by_hand = sum(weights[point] * gradients[number] for point, gradients in own.items())
        torch.testing.assert_close(parameter.grad, by_hand, rtol=1e-4, atol=1e-6)
    assert list(losses) == [point.label for point in own]


def test_a_gradient_that_is_not_finite_moves_nothing(photos, monkeypatch):
    ready = step(photos)
    given = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    ready(*given)
    before = deepcopy(ready.state())
    monkeypatch.setattr(ready.method, "weight", lambda *_: math.inf)
    with pytest.raises(ScalaError, match=r"norm is (nan|inf) at step 2"):
        ready(*given)
    for part in ("weights", "average"):
        assert all(torch.equal(tensor, ready.state()[part][name]) for name, tensor in before[part].items())
    assert ready.number == 1 and not ready.moving


def test_an_optimizer_of_second_order_is_refused(photos):
    with pytest.raises(ScalaError, match="adahessian needs second derivatives"):
        step(photos, optimizer=OptimizerSettings(epochs=1, batch_size=4, opt="adahessian"))


def test_what_training_starts_from_stays_as_it_was(photos, tmp_path):
    """Teacher and student are copies in their own memory, since tensors of a file may be unaligned."""
    save(start(), Record(), tmp_path / "start")
    begun = load(tmp_path / "start")
    assert any(parameter.data_ptr() % 64 for parameter in begun.vit.parameters())
    weights = {name: tensor.clone() for name, tensor in begun.vit.state_dict().items()}
    ready = Step(begun, TASK, begun, settings(photos), torch.device("cpu"))
    ready(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in begun.vit.state_dict().items())
    assert all(parameter.requires_grad for parameter in begun.vit.parameters())
    assert type(begun.vit.blocks[-1]) is Block
    assert all(parameter.data_ptr() % 64 == 0 for parameter in ready.frozen.parameters())


@pytest.mark.parametrize("averaged", [True, False])
def test_untracked_changes_of_weights_are_cut_anew(photos, monkeypatch, averaged):
    """On a GPU not every kernel that writes weights raises their version counter."""

    def uncounted(values, others, weight):
        for value, other in zip(values, others, strict=True):
            value.data.lerp_(other, weight)

    class SGD(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1.0})

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad)

    monkeypatch.setattr("torch._foreach_lerp_", uncounted)
    chosen = settings(photos, optimizer=OptimizerSettings(batch_size=4, model_ema=averaged))
    ready = Step(
        start(ratios="0.25,0.375,0.5,0.625,0.75,0.875,1"), TASK, start(), chosen, torch.device("cpu")
    )
    ready.optimizer = SGD([*ready.net.vit.parameters()])
    images = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        ready(images, torch.tensor([0, 1, 2, 0]))
        with torch.no_grad():
            for point in ready.net.points:
                expected = ready.evaluated.slice(point)(images)
                torch.testing.assert_close(ready.evaluated.eval()(images, point), expected)


def test_a_model_can_be_copied_after_a_step(photos):
    ready = step(photos)
    ready(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    images = torch.randn(2, 3, 16, 16)
    copied = deepcopy(ready.net)
    with torch.no_grad():
        assert torch.equal(copied(images, 0.5), ready.net(images, 0.5))
        copied.vit.head.bias += 1
        torch.testing.assert_close(copied(images, 0.5), ready.net(images, 0.5) + 1)


class WithDecoder(Scala):
    """A method with a module of its own, applied to the sum of the logits."""

    def modules(self, net):
        return torch.nn.ModuleDict({"decoder": torch.nn.Linear(net.spec.embed_dim, 3)})

    def passes(self, batch, student, teacher, drawn):
        for point, loss, weight in super().passes(batch, student, teacher, drawn):
            yield Pass(point, loss + self.step.modules["decoder"](torch.ones(32)).square().sum(), weight)


def test_what_only_training_needs_is_trained_and_resumed_but_in_no_checkpoint(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("scala_cli.methods.scala.Scala", WithDecoder)
    ready = trainer(photos)
    ready.step.method.step = ready.step
    before = deepcopy(ready.step.modules.state_dict())
    ready.train(run := Run(tmp_path / "run"), Record(), Watcher())
    after = ready.step.modules.state_dict()
    assert not torch.equal(after["decoder.weight"], before["decoder.weight"])
    again = trainer(photos)
    again.restore(run.read_state())
    assert all(torch.equal(again.step.modules.state_dict()[name], tensor) for name, tensor in after.items())
    assert len(again.step.optimizer.state) == len(ready.step.optimizer.state) == len(ready.step.parameters)
    assert not any("decoder" in name for name in load_file(run.path / "last/model.safetensors"))


def test_training_does_not_touch_what_it_starts_from(photos, tmp_path):
    """The caller's model keeps its head, mode and settings, and the caller's process its settings."""
    net = slimmable()
    net.vit.train()
    before = deepcopy(net.vit)
    config, fused = dict(net.vit.pretrained_cfg), timm.layers.use_fused_attn()
    for amp in (False, True):
        chosen = settings(photos, 0.3, device=DeviceSettings(device="cpu", amp=amp))
        finetune(net, Record(), chosen, Run(tmp_path / str(amp)), Listener())
    assert net.vit.training and net.vit.num_classes == 5 and net.spec.num_classes == 5
    assert net.vit.pretrained_cfg == config and timm.layers.use_fused_attn() == fused
    for (name, one), other in zip(net.vit.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad and one.grad is None, name
    for one, other in zip(net.vit.modules(), before.modules(), strict=True):
        assert type(one) is type(other) and getattr(one, "fused_attn", 0) == getattr(other, "fused_attn", 0)


@pytest.mark.parametrize(
    ("task", "fitted", "given", "name", "rate"),
    [
        ("classification", False, {}, "AdamW", 1e-3),
        ("classification", True, {}, "Muon", 2e-3),
        ("classification", True, {"opt": "adamw"}, "AdamW", 1e-3),
        ("features", False, {}, "Muon", 2e-3),
        ("features", False, {"lr": 2e-4}, "Muon", 2e-4),
    ],
)
def test_which_optimizer_and_learning_rate_is_the_default(photos, task, fitted, given, name, rate):
    chosen = settings(photos, optimizer=OptimizerSettings(batch_size=4, **given))
    net = start()
    bias = {"0.5:norm.bias": net.vit.norm.bias.detach()[:16].clone()} if fitted else {}
    ready = Step(net.like(extra=bias), task_named(task), net, chosen, torch.device("cpu"))
    assert ready.rate == rate and type(ready.optimizer).__name__ == name
