"""Feature recalibration distillation: a step compared with the loss by hand, runs, resuming, errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, interrupt, slimmable
from safetensors import safe_open
from test_methods import TARGETS, ce, kl
from test_slimmed import slimmed
from torch.nn import functional as F

from scala_cli.deploy.export import export
from scala_cli.errors import CheckpointError, TrainingError
from scala_cli.formats import FORMATS
from scala_cli.methods.base import Batch
from scala_cli.methods.sit import Reverse, SiT
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.features import for_task
from scala_cli.models.slimmed import modules_of
from scala_cli.models.tokens import answer_and_patches, put_back, reductions
from scala_cli.settings import DeviceSettings, MethodSettings, OptimizerSettings, RunSettings, Settings
from scala_cli.slicing.point import parse_points
from scala_cli.tasks import task_named
from scala_cli.training.expert import Expert
from scala_cli.training.step import Step

FULL = parse_points("1")
CPU = torch.device("cpu")


def settings(**changes) -> Settings:
    how = MethodSettings(method="sit", stages="1,1", **changes)
    optimizer = OptimizerSettings(lr=1e-3, model_ema=False)
    return Settings("", how, optimizer, device=DeviceSettings(amp=False), run=RunSettings(seed=3))


def step_of(kind="deit", task="classification", **changes) -> tuple[Step, object]:
    """Returns a step of the method for a tiny model, and the model without modules."""
    chosen, purpose = settings(**changes), task_named(task)
    before = slimmable(kind, "1")
    method = SiT(FULL, chosen.method, purpose)
    start = method.prepared(before, 0)
    return Step(start, purpose, before, chosen, CPU), before


def blocks_of(vit, images):
    """Returns (normed tokens, patch tokens after every block), by running timm's modules one by one."""
    x, seen = vit.patch_drop(vit._pos_embed(vit.patch_embed(images))), []
    for block in vit.blocks:
        x = block(x)
        seen.append(x[:, vit.num_prefix_tokens :])
    return vit.norm(x), seen


def test_a_step_is_the_loss_by_hand(images):
    step, before = step_of()
    step.net.eval()
    (part,) = step.method.passes(Batch(images, TARGETS), step.predict, step.teach, FULL)
    normed, tokens = blocks_of(step.net.vit, images)
    wanted, theirs = blocks_of(before.vit, images)
    reversed_ = {int(n): m for n, m in step.modules.named_children()}
    errors = []
    for number, (mine, goal) in enumerate(zip(tokens, theirs, strict=True)):
        again = reversed_[number](mine) if number in reversed_ else mine
        errors.append((again - goal).square().mean())
    mine, goal = step.net.vit.head(normed[:, 0]), before.vit.head(wanted[:, 0])
    expected = ce(mine, 0.1) + 2 * kl(mine, goal) + 2 * sum(errors) / len(errors)
    torch.testing.assert_close(part.loss, expected)
    part.loss.backward()
    assert all(p.grad is not None for p in step.modules.parameters())
    assert modules_of(step.net.vit)[0].bias.grad.abs().sum() > 0


@pytest.mark.parametrize("off", ["token_weight", "logit_weight"])
def test_each_part_of_the_loss_is_switched_off(off, images):
    whole, _ = step_of()
    part, _ = step_of(**{off: 0.0})
    base, _ = step_of(token_weight=0.0, logit_weight=0.0)
    losses = [
        next(iter(s.method.passes(Batch(images, TARGETS), s.predict, s.teach, FULL))).loss.item()
        for s in (whole, part, base)
    ]
    assert losses[0] > losses[1] > losses[2]
    told = part.method.passes(Batch(images, TARGETS), part.predict, None, FULL)
    assert next(iter(told)).loss.item() == pytest.approx(losses[2])  # without a teacher only the labels count


def test_reverse_modules_learn_five_times_as_fast():
    step, _ = step_of()
    groups = step.optimizer.param_groups
    assert [round(group["lr"], 6) for group in groups] == [0.001] * (len(groups) - 1) + [0.005]
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in step.modules.parameters()}
    again, _ = step_of()
    for one, other in zip(step.modules.parameters(), again.modules.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_reverse_module_has_the_papers_sizes():
    shapes = {name: tuple(p.shape) for name, p in Reverse(8, 3, 12).named_parameters() if p.ndim == 2}
    assert [*shapes.values()] == [(48, 3), (12, 48), (32, 8), (8, 32)]


@pytest.mark.parametrize("kind", ["deit", "no class token, registers"])
def test_features_are_learnt_without_labels(kind, images):
    """Each patch gets the mean of the tokens it went into, to be compared with the teacher's patch."""
    net, _ = for_task(slimmable(kind, "1"), Record(), "features")
    purpose, chosen = task_named("features"), settings()
    start = SiT(FULL, chosen.method, purpose).prepared(net, 0)
    step = Step(start, purpose, net, chosen, CPU)
    step.measure([images])
    told = step.predict(images, FULL[0])
    assert told.answer.shape == step.teach(images).answer.shape == (3, 17, 32)
    before = torch.cat([p.detach().flatten() for p in step.net.parameters()])
    losses = [step(images, TARGETS)["1"] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in step.net.parameters()]))


@torch.no_grad()
def test_tokens_are_put_back_where_they_came_from(images):
    step, _ = step_of()
    vit = step.net.vit.eval()
    read = []
    modules_of(vit)[0].register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with reductions(vit) as reduced:
        tokens = vit.forward_features(images)
    assert [one.block for one in reduced] == [0]
    share = modules_of(vit)[0].shares(read[0][:, 1:])
    assert share.shape == (3, 8, 16) and torch.allclose(share.sum(-1), torch.ones(3, 8))
    whole = put_back(tokens[:, 1:], reduced)
    by_hand = torch.stack(
        [(share[:, :, i, None] * tokens[:, 1:]).sum(1) / share[:, :, i].sum(1)[:, None] for i in range(16)], 1
    )
    torch.testing.assert_close(whole, by_hand)
    assert answer_and_patches(vit, images).shape == (3, 17, 5)
    assert step.net.features(images).tokens.shape == (3, 16, 32)
    assert step.net.features(images, blocks=[0, 1], grid=True)[1].tokens.shape == (3, 32, 4, 4)


WORDS = ("--method", "sit", "--stages", "1,1", "--epochs", "2", "-b", "4", "--workers", "0", "--lr", "1e-3")


def test_a_run_from_start_to_export(scala, tiny, photos):
    done = scala("finetune", "tiny", "--data", photos, *WORDS, "-o", "run", "--json")
    assert done.code == 0, done.stderr
    assert [point["ratio"] for point in done.json["points"]] == [1.0]
    net = load("run")
    assert net.spec.tsm == {0: 8} and [str(p) for p in net.points] == ["1"]
    with (
        safe_open("run/last/extra.st", "pt") as extra,
        safe_open("run/last/model.safetensors", "pt") as plain,
    ):
        assert all(name.startswith("blocks.0.tsm.") for name in extra.keys())  # noqa: SIM118
        assert not any("tsm" in name or "reverse" in name for name in plain.keys())  # noqa: SIM118
    assert load("run/teacher/last").spec.tsm == {}
    told = scala("export", "run", "--ratio", "1", "--format", "pt2", "-o", "full.pt2", "--json")
    assert told.code == 0, told.stderr
    timed = scala("bench", "run", "--runs", "2", "-b", "2", "--threads", "1", "--json")
    assert timed.code == 0, timed.stderr
    params = sum(p.numel() for p in net.vit.parameters())
    assert timed.json["points"][0]["params"] == params
    again = scala("finetune", "run", "--data", photos, *WORDS, "-o", "more")
    assert again.code == 2 and "slimmed already" in again.stderr


@pytest.mark.parametrize("kind", ["onnx", "pt2", "openvino", "executorch"])
def test_every_format_runs_it(kind, images, tmp_path):
    for module in FORMATS[kind].modules:
        pytest.importorskip(module)
    step, _ = step_of()
    file = tmp_path / f"net{FORMATS[kind].suffix}"
    told = export(step.net.eval(), "1", kind, file, images)
    assert told["max_abs_diff"] <= 1e-4


def test_an_interrupted_run_resumes_to_the_same_weights(scala, tiny, photos, monkeypatch):
    assert scala("finetune", "tiny", "--data", photos, *WORDS, "-o", "whole").code == 0
    with monkeypatch.context() as broken:
        done = []
        call = Step.__call__

        def twice(self, *batch):
            done.append(1)
            return interrupt() if len(done) == 5 else call(self, *batch)

        broken.setattr(Step, "__call__", twice)
        words = (*WORDS, "--save-every-steps", "1", "-o", "broken")
        assert scala("finetune", "tiny", "--data", photos, *words).code == 130
    assert scala("finetune", "--resume", "broken").code == 0
    states = [torch.load(f"{run}/state.pt", weights_only=True) for run in ("whole", "broken")]
    for part in ("weights", "modules"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name


def expert(directory: str, classes=3, **more) -> str:
    torch.manual_seed(5)
    cnn = timm.create_model("test_resnet", num_classes=classes)
    timm.models.save_for_hf(cnn, directory, more, safe_serialization=True)
    return f"local-dir:{directory}"


def test_a_second_teacher_teaches_the_distillation_head(scala, photos, elsewhere):
    named = expert("cnn")
    vit = timm.create_model("deit_tiny_distilled_patch16_224", **{**TINY, "num_classes": 3, "img_size": 32})
    args = {**TINY, "num_classes": 3, "img_size": 32}
    timm.models.save_for_hf(vit, "two", model_args=args, safe_serialization=True)
    done = scala("finetune", "two", "--data", photos, *WORDS, "--teacher-model", named, "-o", "run")
    assert done.code == 0, done.stderr
    step, _ = step_of("distilled")
    images = torch.randn(2, 3, 16, 16)
    hints = torch.tensor([1, 4])
    (taught,) = step.method.passes(Batch(images, TARGETS[:2], hints=hints), step.predict, None, FULL)
    (plain,) = step.method.passes(Batch(images, TARGETS[:2]), step.predict, None, FULL)
    with torch.no_grad():
        logits = step.predict(images, FULL[0]).distilled
    assert (taught.loss - plain.loss).item() == pytest.approx(F.cross_entropy(logits, hints).item(), rel=1e-4)


def test_a_second_teacher_gets_images_normalised_as_it_wants(elsewhere):
    named = expert("cnn", pretrained_cfg={"mean": [0.5] * 3, "std": [0.25] * 3})
    spec = slimmable().spec.naming("abc")
    given = Expert(named, spec)
    cfg = given.model.pretrained_cfg
    pixels = torch.rand(2, 3, 16, 16)
    own, theirs = (
        (pixels - torch.tensor(c["mean"])[:, None, None]) / torch.tensor(c["std"])[:, None, None]
        for c in (spec.pretrained_cfg, cfg)
    )
    assert torch.allclose(own * given.scale + given.shift, theirs, atol=1e-5)
    assert not given.train().training


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stages", "1,2"), "stages 1,2 have 3 blocks, the model has 2"),
        (("--stages", "one"), "are no stages"),
        (("--slim-keep", "0.01"), "leaves none of 16 tokens"),
        (("--slim-keep", "0"), "the share of tokens must be above 0"),
        (("--ratios", "0.5,1"), "the full width alone"),
        (("--teacher-model", "resnet18"), "no distillation head"),
    ],
)
def test_what_cannot_be_is_refused(words, said, scala, tiny, photos):
    told = scala("finetune", "tiny", "--data", photos, *WORDS, *words, "-o", "run")
    assert told.code == 2 and said in told.told, told.stderr
    assert not Path("run").exists()


def test_what_another_method_needs_is_refused(scala, tiny, photos):
    told = scala("finetune", "tiny", "--data", photos, "--stages", "1,1", "-o", "run")
    assert told.code == 2 and "stages has no effect with method scala" in told.told


@pytest.mark.parametrize("task", ["classification", "features"])
def test_blocks_that_are_computed_again_give_the_same_step(task, images):
    losses = []
    for again in (False, True):
        chosen, purpose = settings(), task_named(task)
        optimizer = replace(chosen.optimizer, grad_checkpointing=again)
        net, _ = for_task(slimmable("deit", "1"), Record(), task)
        start = SiT(FULL, chosen.method, purpose).prepared(net, 0)
        step = Step(start, purpose, net, replace(chosen, optimizer=optimizer), CPU)
        step.net.train()
        losses.append([step(images, TARGETS)["1"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_second_teacher_of_other_classes_is_refused(elsewhere):
    spec = slimmable().spec.naming("abc")
    with pytest.raises(TrainingError, match="the model knows 4 classes, the student has 3"):
        Expert(expert("four", 4), spec)
    with pytest.raises(TrainingError, match="'b' that the model does not know"):
        Expert(expert("named", 3, label_names=["a", "x", "c"]), spec)
    with pytest.raises(TrainingError, match="another order"):
        Expert(expert("mixed", 3, label_names=["b", "a", "c"]), spec)
    with pytest.raises(CheckpointError, match="there is no model"):
        Expert("resnet17", spec)


def test_every_width_over_one_copy_of_the_weights(scala, elsewhere):
    """`export --all` cuts the modules' tensors too, which are in another file."""
    pytest.importorskip("onnxruntime")
    save(slimmed(), Record(method="sit"), elsewhere / "net")
    told = scala("export", "net", "--all", "-o", "all", "--json")
    assert told.code == 0, told.stderr
    assert all(point["max_abs_diff"] <= 1e-4 for point in told.json["points"])


def test_a_head_for_new_classes_is_learnt_before_tokens_are_slimmed(scala, tiny, photos):
    assert scala("convert", "tiny-timm", "--num-classes", "3", "-o", "new").code == 0
    words = ("finetune", "new", "--data", photos, *WORDS, "--epochs", "1", "-o", "run")
    told = scala(*words)
    assert told.code == 0, told.stderr
    assert load("run/teacher/last").spec.tsm == {} and load("run/last").spec.tsm == {0: 8}


def test_it_is_compared_with_other_methods(scala, tiny, photos):
    words = ("--ratios", "1", "--seeds", "1", "--epochs", "1", "-b", "4", "--workers", "0", "-o", "out")
    told = scala("compare", "tiny", "--data", photos, "--methods", "separate,sit", *words, "--json")
    assert told.code == 0, told.stderr
    plain, slimmed = told.json["arms"]
    assert (plain["arm"], slimmed["arm"]) == ("separate", "sit")
    assert slimmed["gmacs_per_image"] < plain["gmacs_per_image"], "the cost of the slimmed tokens"
    told = scala("compare", "tiny", "--data", photos, "--methods", "sit", "-o", "four", "-j", 0)
    assert told.code == 2 and not Path("four").exists(), "refused before anything is trained"
