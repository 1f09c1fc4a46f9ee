"""The features task: a backbone's widths learn the full model's tokens, without labels."""

import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from threading import Barrier

import pytest
import torch
from conftest import KINDS
from runs import FULL, Listener, backbone, headless, settings
from safetensors.torch import load_file
from torch.nn import functional as F

from scala_cli.data.loader import Loader
from scala_cli.data.transform import transform_for
from scala_cli.errors import DataError, TrainingError
from scala_cli.evaluate import evaluate
from scala_cli.methods import METHODS, method_named
from scala_cli.models.calibrate import calibrate
from scala_cli.models.checkpoint import Record, load_with_record
from scala_cli.models.in_memory import slimmable
from scala_cli.models.order import order_channels
from scala_cli.models.tokens import answer_and_patches
from scala_cli.settings import AugmentSettings, MethodSettings, OptimizerSettings, ReadSettings
from scala_cli.slicing.point import parse_points
from scala_cli.tasks import task_named
from scala_cli.tasks.likeness import Likeness
from scala_cli.tasks.standard import LEAST, Spread, in_units
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.run import Run
from scala_cli.training.step import Step
from scala_cli.watch import Watcher
from scala_cli.world import ALONE, World

TASK = task_named("features")
BACKBONE = Record(task="features")
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("kind", [*KINDS, "attention pool"])
@torch.no_grad()
def test_the_output_is_what_the_model_returns_and_its_patches(kind, images):
    vit = headless(kind)
    told = answer_and_patches(vit, images)
    tokens = vit.fc_norm(vit.forward_features(images))
    patches = tokens[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(told[:, 1:], patches)
    net = slimmable(vit, "0.5,1")
    torch.testing.assert_close(answer_and_patches(net.vit, images), told)
    torch.testing.assert_close(told[:, 0], vit(images))
    ordered = order_channels(net, [images, images.flip(0)])
    assert (answer_and_patches(ordered.vit, images) - told).abs().max() <= 1e-3  # still in the same space
    assert answer_and_patches(ordered.at(Fraction(1, 2)), images).shape == told.shape


@pytest.mark.parametrize("kind", ["distilled", "attention pool"])
@torch.no_grad()
def test_the_pooled_token_is_fitted_with_the_patches(kind):
    images = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    net = order_channels(backbone(kind), [images])
    fitted, fit = calibrate(net, 0.5, [images], every_token=True)
    wanted = answer_and_patches(net.vit, images)
    for part in (slice(0, 1), slice(1, None)):
        before, after = (
            (answer_and_patches(vit, images)[:, part] - wanted[:, part]).square().mean()
            for vit in (net.at(Fraction(1, 2)), fitted)
        )
        assert after < before
    assert fit.output is not None


def test_the_loss_is_the_squared_error_summed_by_hand():
    student, teacher = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    settings = MethodSettings(class_token=2.0, patch_tokens=0.5)
    loss = TASK.loss(student, None, teacher, settings)
    by_hand = 0.0
    for image in range(2):
        for token in range(5):
            for channel in range(3):
                error = (student[image, token, channel] - teacher[image, token, channel]).item() ** 2
                by_hand += 2 * error / (2 * 3) if token == 0 else 0.5 * error / (2 * 4 * 3)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(TrainingError, match="there is none"):
        TASK.loss(student, None, None, settings)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_units_against_their_definition(whiten):
    """Predicting the mean of all vectors has error 1; with `whiten` 1 every direction contributes equally."""
    mixing = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.5])) @ torch.randn(4, 4)
    vectors = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) @ mixing + 5
    spread = Spread()
    for part in vectors.split(300):
        spread.add(part[:, None])
    unit = spread.unit(whiten)
    centred = (vectors - vectors.mean(0)).double()
    moment = centred.T @ centred / len(centred)
    values, directions = torch.linalg.eigh(moment)
    weights = values.clamp_min(LEAST * values.mean()) ** (-whiten / 2)
    by_hand = (centred @ directions * weights).square()
    by_hand = by_hand / by_hand.mean()
    found = in_units(centred.float(), unit).square()
    assert found.mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(found.sum(-1), by_hand.sum(-1).float(), rtol=1e-3, atol=1e-4)
    share = found.mean(0)
    if whiten == 1 and (values > LEAST * values.mean()).all():
        torch.testing.assert_close(share, torch.ones(4), rtol=1e-3, atol=1e-3)


def test_vectors_that_do_not_vary_have_no_unit():
    spread = Spread()
    spread.add(torch.randn(1, 1, 6).expand(40, 1, 6))
    assert spread.unit(0.0) is None and spread.unit(1.0) is None


def directly(output: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Returns R² and cosine, computed on all tokens at once."""
    told = {}
    for name, part in (("", slice(1, None)), ("class_", slice(0, 1))):
        given, true = (each[:, part].flatten(0, 1).double() for each in (output, wanted))
        spread = (true - true.mean(0)).square().sum()
        told[f"{name}r2"] = (1 - (given - true).square().sum() / spread).item()
        told[f"{name}cosine"] = F.cosine_similarity(given, true).mean().item()
    return told


def test_the_meter_in_batches_is_the_metric_in_one_go():
    wanted = torch.randn(11, 5, 6) * 3 + 50  # far from zero
    output = wanted + torch.randn(11, 5, 6)
    meter = Likeness()
    for given, true in zip(output.split(4), wanted.split(4), strict=True):
        meter.update(given, true)
    found = meter.result(ALONE)
    assert found.pop("images") == 11 and found == pytest.approx(directly(output, wanted), abs=1e-5)


def test_meters_of_several_processes_are_one():
    """Three processes, as threads; one of them could read no image."""
    wanted, output = torch.randn(9, 5, 6), torch.randn(9, 5, 6)
    meters = [Likeness() for _ in range(3)]
    meters[0].update(output[:6], wanted[:6])
    meters[1].update(output[6:], wanted[6:])
    meeting, told = Barrier(3), {}

    class Meeting(World):
        def total(self, *numbers):
            told[self.rank] = numbers
            meeting.wait()
            sums = [*map(sum, zip(*told.values(), strict=True))]
            meeting.wait()
            return sums

    with ThreadPoolExecutor(3) as threads:
        found = [*threads.map(lambda rank: meters[rank].result(Meeting(rank, 3)), range(3))]
    assert found[0] == found[1] == found[2] and found[0].pop("images") == 9
    assert found[0] == pytest.approx(directly(output, wanted), abs=1e-5)


def test_constant_features_have_no_r2():
    one = torch.randn(1, 5, 6)
    meter = Likeness()
    meter.update(one + 1, one)
    found = meter.result(ALONE)
    assert found["class_r2"] is None and found["r2"] is not None
    same = Likeness()
    same.update(one[:, :1].expand(3, 5, 6), one[:, :1].expand(3, 5, 6))
    with pytest.raises(DataError, match="the same features for all patches of all 3"):
        same.result(ALONE)


@pytest.mark.parametrize("method", [name for name in METHODS if method_named(name).masks_patches])
def test_training_lowers_the_loss_of_every_method(pictures, method):
    how = MethodSettings(method=method, order="none", isolation=False)
    listener = Listener()
    quick = OptimizerSettings(epochs=8, batch_size=10, lr=0.1)
    net = backbone(ratios="0.5" if method == "separate" else "0.5,1")
    how = settings(pictures, method=how, optimizer=quick)
    best = finetune(net, BACKBONE, how, Run(Path("run")), listener)
    first, last = listener.rows[0], listener.rows[-1]
    assert last["loss"]["0.5"] < 0.9 * first["loss"]["0.5"]
    assert best["points"][0]["r2"] > listener.rows[0]["points"][0]["r2"] - 1e-6
    again, record = load_with_record(Path("run/best"))
    assert record.task == "features" and again.spec.features and record.metrics == best["points"]
    assert {*best["points"][0]} == {"ratio", "images", *TASK.columns}


def test_a_step_is_that_of_separate_models(pictures):
    """Compares Scala's step with separate narrow models, on tokens in the teacher's units."""
    net, images = backbone(), torch.randn(4, 3, 16, 16)
    how = settings(pictures, method=MethodSettings(whiten=1.0))
    step = Step(net, TASK, net, how, torch.device("cpu"))
    seen = torch.randn(64, 3, 16, 16)
    step.measure([seen])
    losses = step.gather_gradients(images, torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        stats = TASK.statistics([answer_and_patches(net.vit, seen)], how.method)
        lesson = TASK.standardised(answer_and_patches(net.vit, images), stats)
        half = TASK.standardised(answer_and_patches(net.slice(0.5), images), stats)
    answer, patches = ((half - lesson)[:, part].square().mean() for part in (0, slice(1, None)))
    by_hand = how.method.class_token * answer + how.method.patch_tokens * patches
    assert losses["0.5"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert losses["1"].item() == pytest.approx(0, abs=1e-8)
    assert getattr(step.net.vit.blocks[-1], "read", None) is None  # every token is needed


@pytest.mark.parametrize("whiten", [0.0, 1.0])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(pictures, whiten):
    how = MethodSettings(order="none", isolation=False, whiten=whiten)
    quick = OptimizerSettings(epochs=2, batch_size=4, save_every_steps=1)
    both = settings(pictures, method=how, optimizer=quick, augment=AugmentSettings(mixup=0.5, cutmix=0.5))
    finetune(backbone(), BACKBONE, both, Run(Path("whole")), Watcher())
    with pytest.raises(KeyboardInterrupt):
        finetune(backbone(), BACKBONE, both, Run(Path("cut")), Listener(stop_at=7))
    held = Run(Path("cut")).read_state()
    assert held["statistics"].keys() == {"answer", "patches"}
    resume_run(Run(Path("cut")), Watcher())
    for place in ("last", "best"):
        one, other = (load_file(f"{run}/{place}/model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [Path(run, "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    one, other = ([json.loads(line) for line in each] for each in rows)
    assert [row["points"] for row in one] == [row["points"] for row in other]


@torch.no_grad()
def test_evaluation_compares_with_the_full_width_or_with_another_model(pictures):
    net, other = backbone(), backbone("vit")
    split = TASK.judged(net.spec, str(pictures), None)
    assert len(split) == 24 and split.samples[5][1] == 0

    loader = Loader(split, transform_for(net.spec), 7, ReadSettings(workers=0))
    images = torch.cat([batch for batch, _ in loader])
    half, full = evaluate(net, TASK, loader, net.points, FULL, Watcher())
    told = {name: half[name] for name in TASK.columns}
    output = answer_and_patches(net.slice(0.5), images)
    assert told == pytest.approx(directly(output, answer_and_patches(net.vit, images)), abs=1e-4)
    assert full["r2"] == full["class_r2"] == pytest.approx(1)
    (half,) = evaluate(
        net,
        TASK,
        loader,
        parse_points("0.5"),
        FULL,
        Watcher(),
        reference=lambda images: answer_and_patches(other.vit, images),
    )
    told = {name: half[name] for name in TASK.columns}
    assert told == pytest.approx(directly(output, answer_and_patches(other.vit, images)), abs=1e-4)
