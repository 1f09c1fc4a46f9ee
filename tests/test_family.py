"""A family fitted in closed form: shared weights, and norms and biases of each width."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import slimmable, write_timm_directory
from runs import QUICK, Listener, accuracies, settings, start
from test_calibrate import KINDS, RARE, error, ordered, sample
from torch import Tensor

from scala_cli.deploy.export import export_all
from scala_cli.deploy.slice import slice_model
from scala_cli.errors import CheckpointError, TrainingError
from scala_cli.models.calibrate import calibrate, calibrate_family
from scala_cli.models.checkpoint import Record, load, load_with_record, save
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.settings import MethodSettings, OptimizerSettings
from scala_cli.slicing.own import own_name, own_vectors
from scala_cli.slicing.point import parse_points
from scala_cli.slicing.ridge import Moments, Part, fit_shared
from scala_cli.tasks import task_named
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.gradients import GradientLog
from scala_cli.training.run import Run
from scala_cli.training.start import prepare, with_new_head
from scala_cli.training.step import Step

HALF = slimmable().rule.ratios[1]
TASK = task_named("classification")


def fitted(kind: str = "deit", **how) -> SlimmableViT:
    images = sample(96)
    return calibrate_family(ordered(kind, images), images.split(16), **how)[0]


def part(x: Tensor, t: Tensor, rows: list[int], columns: list[int], weight: float) -> Part:
    seen = Moments()
    for a, b in zip(x.split(30), t.split(30), strict=True):
        seen.add(a, b)
    return Part(seen, Moments(), torch.tensor(rows), torch.tensor(columns), weight)


@pytest.mark.parametrize("bias", [True, False])
def test_a_shared_layer_is_the_least_squares_of_all_its_widths(bias):
    """Each width adds its tokens times the root of its weight, with zeros for channels that it lacks."""
    drawn = torch.Generator().manual_seed(5)
    start = torch.randn(4, 6, generator=drawn, dtype=torch.double)
    places = [([0, 2], [0, 1, 4], 1.0), ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5], 3.0)]
    parts, rows_x, rows_t = [], [], []
    for rows, columns, weight in places:
        x = torch.randn(90, len(columns), generator=drawn, dtype=torch.double) + 2
        t = torch.randn(90, len(rows), generator=drawn, dtype=torch.double) - 1
        parts.append(part(x, t, rows, columns, weight))
        x, t = (x - x.mean(0), t - t.mean(0)) if bias else (x, t)
        wide_x, wide_t = torch.zeros(90, 6, dtype=torch.double), torch.full((90, 4), torch.nan).double()
        wide_x[:, columns], wide_t[:, rows] = x, t
        rows_x.append(wide_x * (weight / 90) ** 0.5)
        rows_t.append(wide_t * (weight / 90) ** 0.5)
    found = fit_shared(parts, start, [0.1], bias)
    for row in range(4):
        x = torch.cat([a for a, t in zip(rows_x, rows_t, strict=True) if t[:, row].isfinite().all()])
        t = torch.cat([t[:, row] for t in rows_t if t[:, row].isfinite().all()])
        pull = (0.1 * x.square().sum(0).mean()).sqrt() * torch.eye(6, dtype=torch.double)
        expected = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([t, pull @ start[row]])).solution
        torch.testing.assert_close(found[row], expected)


def test_rows_and_columns_that_no_width_keeps_stay():
    x, t, start = torch.randn(40, 2), torch.randn(40, 1), torch.randn(3, 4)
    found = fit_shared([part(x, t, [1], [0, 3], 1.0)], start, [0.1], bias=True)
    changed = found != start
    assert changed[1, [0, 3]].all() and changed.sum() == 2


@pytest.mark.parametrize("kind", [*KINDS, *RARE])
@torch.no_grad()
def test_the_widths_are_nearer_to_the_full_model(kind, tmp_path):
    images = sample(128)
    net = ordered(kind, images)
    net = net.with_points([point for point in net.points if point.ratio in (HALF, 1)])
    before = {name: tensor.clone() for name, tensor in net.vit.state_dict().items()}
    family, fits = calibrate_family(net, images.split(16), full_weight=1)
    left, before_it = (error(model.slice(0.5), net, images) for model in (family, net))
    assert left < 0.95 * before_it
    assert [fits[point].images for point in net.points] == [112, 112]
    assert error(family, net, images) < 0.1 * net(images).var()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.vit.state_dict().items())
    save(family, Record(order="importance", calibrated=128), tmp_path / "net")
    again = load(tmp_path / "net")
    for point in net.points:
        assert torch.equal(again(images[:2], point), family(images[:2], point))
        told = slice_model(tmp_path / "net", point, tmp_path / point.label)
        plain = timm.create_model(f"local-dir:{told['path']}", pretrained=True).eval()
        torch.testing.assert_close(plain(images[:2]), family(images[:2], point), atol=1e-5, rtol=1e-4)


def test_the_full_width_counts_as_much_as_it_is_told():
    images = sample(96)
    net = ordered("deit", images)
    left = {}
    for weight in (1, 300):
        family, fits = calibrate_family(net, images.split(16), full_weight=weight)
        left[weight] = error(family, net, images), fits[net.points[0]].output
    assert left[300][0] < 0.2 * left[1][0] and left[300][1] < left[1][1]


def test_a_family_of_one_width_is_the_slice_alone():
    images = sample(64)
    net = ordered("qk_norm", images)
    alone, _ = calibrate(net, 0.5, images.split(16))
    family, _ = calibrate_family(net.with_points([net.points[1]]), images.split(16))
    for one, other in zip(alone.parameters(), family.slice(0.5).parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_norms_and_biases_are_a_widths_own():
    family = fitted("deit3, layer scale")
    own = own_vectors(family.extra, HALF)
    weights = dict(family.slice(0.5).named_parameters())
    expected = {n for n, p in weights.items() if p.ndim == 1 and "patch_embed" not in n and "gamma" not in n}
    assert own.keys() == expected
    assert all(weights[name].shape == tensor.shape for name, tensor in own.items())


def test_other_widths_leave_out_what_is_not_theirs():
    family = fitted()
    fewer = family.with_points([family.points[1], family.points[-1]])
    assert {name.partition(":")[0] for name in fewer.vectors} == {"0.5"}
    assert fewer.extra[own_name(HALF, "norm.weight")] is family.extra[own_name(HALF, "norm.weight")]


@torch.no_grad()
def test_a_change_of_a_widths_own_vectors_is_seen(images):
    family = fitted()
    before = [family(images, point) for point in family.points]
    family.extra[own_name(HALF, "head.bias")].add_(1)
    after = [family(images, point) for point in family.points]
    changes = [(b - a).abs().max().item() for a, b in zip(before, after, strict=True)]
    assert changes == pytest.approx([0, 1, 0, 0], abs=1e-5)


def test_one_onnx_file_of_weights_for_all_widths(tmp_path, images):
    pytest.importorskip("onnxscript")
    family = fitted().with_points(parse_points("0.5,1"))
    save(family, Record(order="importance"), tmp_path / "net")
    told = export_all(family, tmp_path / "net", tmp_path / "out", images)
    assert [row["max_abs_diff"] < 1e-4 for row in told["points"]] == [True] * 2


def test_channels_of_a_fitted_family_stay_in_their_order():
    with pytest.raises(CheckpointError, match="fitted"):
        order_channels(fitted(), [sample()])


def test_training_moves_a_widths_own_vectors(photos):
    """A width's vectors learn from its own loss only, at the shared vectors' rate and without decay."""
    family = with_new_head(fitted(), ["blue", "green", "red"], 0)
    assert not any("head" in name for name in family.extra)
    adamw = OptimizerSettings(epochs=1, batch_size=4, layer_decay=0.5, opt="adamw")
    chosen = settings(photos, optimizer=adamw)
    ready = Step(family, TASK, family, chosen, torch.device("cpu"))
    groups = {id(p): group for group in ready.optimizer.param_groups for p in group["params"]}
    shared = dict(ready.net.vit.named_parameters())
    for name, vector in ready.net.vectors.items():
        assert groups[id(vector)] is groups[id(shared[name.partition(":")[2]])]
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 0])
    ready.gather_gradients(images, targets)
    grads = {name: vector.grad.clone() for name, vector in ready.net.vectors.items()}
    ready.net.zero_grad()
    lesson = ready.teach(images)
    loss = TASK.loss(ready.predict(images, family.points[1]), targets, lesson, chosen.method)
    loss.backward()
    for name, vector in ready.net.vectors.items():
        if name.startswith("0.5:"):
            torch.testing.assert_close(vector.grad, grads[name])
        else:
            assert vector.grad is None
    before = {name: vector.detach().clone() for name, vector in ready.net.vectors.items()}
    ready(images, targets)
    assert all(not torch.equal(vector, before[name]) for name, vector in ready.net.vectors.items())
    averaged = ready.evaluated.vectors
    assert averaged.keys() == before.keys() and averaged[next(iter(before))] is not before[next(iter(before))]


def test_images_that_cannot_be_read_give_the_same_parameters_a_gradient(photos):
    family = with_new_head(fitted().with_points([slimmable().points[1]]), ["blue", "green", "red"], 0)
    chosen = settings(photos, method=MethodSettings(method="separate"))
    given = {}
    for count in (4, 0):
        ready = Step(family, TASK, family, chosen, torch.device("cpu"))
        losses = ready.gather_gradients(torch.randn(count, 3, 16, 16), torch.zeros(count, dtype=torch.long))
        grads = {name: p.grad for name, p in ready.net.named_parameters() if p.grad is not None}
        given[count] = grads.keys()
    assert given[0] == given[4] and len(given[4]) < len([*ready.net.parameters()])
    assert losses == {} and all(not grad.any() for grad in grads.values())


def test_a_fitted_family_is_resumed_exactly(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = with_new_head(fitted(), ["blue", "green", "red"], 0)
    record = Record(order="importance", calibrated=96)
    finetune(family, record, settings(photos), Run(Path("whole")), Listener())
    with pytest.raises(KeyboardInterrupt):
        finetune(family, record, settings(photos), Run(Path("cut")), Listener(stop_at=4))
    resume_run(Run(Path("cut")), Listener())
    whole, again = (load(Path(name) / "last") for name in ("whole", "cut"))
    assert whole.extra.keys() == again.extra.keys() and whole.extra
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole.extra["0.5:norm.bias"], family.extra["0.5:norm.bias"])


FIT = [
    (Record(), {}, True),
    (Record(order="importance"), {}, True),
    (Record(order="none"), {}, False),
    (Record(trained=False), {}, False),
    (Record(method="scala", metrics=accuracies(0.5, 1.0)), {}, False),
    (Record(), {"calibrate": False}, False),
    (Record(), {"order": "none"}, False),
    (Record(), {"isolation": True}, False),
    (Record(), {"method": "usnet"}, False),
]


@pytest.mark.parametrize(("record", "method", "fits"), FIT)
def test_untrained_widths_are_fitted_before_training(photos, record, method, fits):
    chosen = settings(photos, method=MethodSettings(**method))
    ready, after = prepare(start(), record, chosen, TASK.open(chosen)[0], Listener())
    assert bool(ready.vectors) == bool(after.calibrated) == fits
    again, _ = prepare(ready, after, chosen, TASK.open(chosen)[0], Listener())
    assert [*again.extra] == [*ready.extra]
    assert all(torch.equal(again.extra[name], ready.extra[name]) for name in ready.extra)


def test_a_width_that_a_fitted_family_lacks_is_fitted_with_the_others(photos):
    family = with_new_head(fitted(), ["blue", "green", "red"], 0)
    wider = family.with_points(parse_points("0.5,0.625,1"))
    assert {name.partition(":")[0] for name in wider.vectors} == {"0.5"}
    chosen = settings(photos)
    ready, _ = prepare(wider, Record(order="importance"), chosen, TASK.open(chosen)[0], Listener())
    assert {name.partition(":")[0] for name in ready.vectors} == {"0.5", "0.625"}


def test_nothing_of_a_blank_image_is_logged(photos, tmp_path):
    family = with_new_head(fitted(), ["blue", "green", "red"], 0)
    ready = Step(family, TASK, family, settings(photos), torch.device("cpu"))
    ready.gradients = GradientLog(ready.parameters, tmp_path / "grads.jsonl")
    ready.gather_gradients(torch.randn(0, 3, 16, 16), torch.zeros(0, dtype=torch.long))
    assert not ready.gradients.passes


def test_fitted_widths_are_not_isolated(photos):
    family = with_new_head(fitted(), ["blue", "green", "red"], 0)
    chosen = settings(photos, method=MethodSettings(isolation=True))
    with pytest.raises(TrainingError, match="isolated"):
        prepare(family, Record(order="importance"), chosen, TASK.open(chosen)[0], Listener())


def test_convert_fits_a_family(scala, photos, pictures, images):
    vit = write_timm_directory(Path("vit"))
    words = ("--data", pictures, "-j", 0, "--json")
    told = scala("convert", "vit", *words, "-o", "family")
    assert told.code == 0, told.stderr
    assert told.json["calibrated"] == 24 and [row["r2"] <= 1 for row in told.json["points"]] == [True] * 4
    net, record = load_with_record(Path("family"))
    assert record.order == "importance" and record.calibrated == 24 and net.rule.attn_scale == "fixed"
    assert {name.partition(":")[0] for name in net.vectors} == {"0.25", "0.5", "0.75"}
    assert "r2" not in scala("convert", "vit", *words, "--no-calibrate", "-o", "plain").json["points"][0]
    plain = load(Path("plain"))
    assert not plain.vectors
    with torch.no_grad():
        torch.testing.assert_close(plain(images), vit(images), atol=1e-4, rtol=1e-3)
    assert scala("slice", "family", "--ratio", 0.5, "-o", "half").code == 0
    run = scala("finetune", "family", "--data", photos, *QUICK, "-o", "run", "--json")
    assert run.code == 0, run.stderr
    assert {*load(Path("run/best")).extra} >= {"0.5:norm.bias"}
    config = json.loads(Path("run/best/config.json").read_text())["scala"]
    assert config["attn_scale"] == "fixed"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--calibrate",), "--calibrate needs images"),
        (("--data", ".", "--order", "none"), "--data needs --order importance"),
        (("--data", ".", "--scratch"), "pretrained weights"),
        (("--data", ".", "--layout", "fused"), "layout aligned"),
    ],
)
def test_what_convert_refuses(scala, words, told):
    write_timm_directory(Path("vit"))
    failed = scala("convert", "vit", *words)
    assert failed.code == 2 and told in failed.told


def test_layer_scales_are_absorbed():
    family = fitted("deit3, layer scale")
    assert all((p == 1).all() for n, p in family.vit.named_parameters() if n.endswith("gamma"))
    assert family.rule.attn_scale == "fixed"


def test_the_model_from_before_the_fit_teaches_also_when_resumed(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = start()
    finetune(begun, Record(), settings(photos), Run(Path("whole")), Listener())
    with pytest.raises(KeyboardInterrupt):
        finetune(begun, Record(), settings(photos), Run(Path("cut")), Listener(stop_at=4))
    for name in ("whole", "cut"):
        teacher = load(Path(name) / "teacher/last")
        assert not teacher.extra and load(Path(name) / "start").extra
        for one, other in zip(teacher.vit.parameters(), begun.vit.parameters(), strict=True):
            assert torch.equal(one, other)
    resume_run(Run(Path("cut")), Listener())
    whole, again = (load(Path(name) / "last") for name in ("whole", "cut"))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def after_other_classes(family: SlimmableViT, record: Record, photos: Path, run: Path) -> SlimmableViT:
    """Returns what a family starts from once its full width has learnt other classes than it knew."""
    rows = [{**point.columns(), "top1": 50.0} for point in family.points]
    family = family.like(spec=family.spec.naming(["one", "two", "three", "four"]))
    finetune(family, replace(record, metrics=rows), settings(photos), Run(run), Listener())
    return load(run / "start")


def test_a_trained_family_is_fitted_anew_once_its_full_width_has_learnt_other_classes(photos, tmp_path):
    family = fitted()
    record = Record(method="scala", order="importance", calibrated=96)
    begun = after_other_classes(family, record, photos, tmp_path / "run")
    learnt, record = load_with_record(tmp_path / "run/teacher/last")
    again, _ = prepare(
        learnt.with_points(family.points),
        replace(record, metrics=()),
        settings(photos),
        TASK.open(settings(photos))[0],
        Listener(),
    )
    assert begun.vectors and begun.vectors.keys() == again.vectors.keys()
    for name, vector in begun.vectors.items():
        assert torch.equal(vector, again.vectors[name]) and not torch.equal(vector, family.vectors[name])


@pytest.mark.parametrize("isolated, order", [(True, None), (False, "none"), (True, "importance")])
def test_a_family_that_cannot_be_fitted_keeps_its_ends_with_other_classes(photos, tmp_path, isolated, order):
    family = slimmable()
    family = family.like(rule=replace(family.rule, isolated=isolated))
    begun = after_other_classes(family, Record(method="scala", order=order), photos, tmp_path / "run")
    assert begun.rule.isolated is isolated and not begun.vectors
    learnt = load(tmp_path / "run/teacher/last")
    for one, other in zip(begun.vit.parameters(), learnt.vit.parameters(), strict=True):
        assert torch.equal(one, other)
