"""Whole training runs on real digits and a tiny folder."""

import csv
import json
import math
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import typer
from conftest import slimmable
from runs import FULL, Listener, accuracies, settings, start
from safetensors.torch import load_file

from scala_cli.cli.app import app
from scala_cli.errors import DataError, ScalaError, TrainingError
from scala_cli.models.checkpoint import Record, load, load_with_record
from scala_cli.models.source import Changes, open_model
from scala_cli.settings import (
    AugmentSettings,
    DeviceSettings,
    MethodSettings,
    OptimizerSettings,
    ReadSettings,
    RunSettings,
    Settings,
)
from scala_cli.slicing.point import parse_points
from scala_cli.training.finetune import finetune
from scala_cli.training.run import Run

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_what_a_run_leaves_behind(photos):
    run, listener = Run(Path("runs/one"), newest=True), Listener()
    best = finetune(start(), Record(), settings(photos), run, listener)

    assert [row["epoch"] for row in listener.rows] == [1, 2]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == listener.rows and best in lines
    assert set(lines[0]["loss"]) == {"0.25", "0.5", "0.75", "1"}
    assert [p["ratio"] for p in lines[0]["points"]] == [0.25, 0.5, 0.75, 1.0]
    assert all(p["images"] == 6 for p in lines[0]["points"])
    table = list(csv.DictReader((run.path / "summary.csv").open()))
    assert float(table[1]["top1_0.25"]) == lines[1]["points"][0]["top1"]
    assert float(table[1]["loss_1"]) == lines[1]["loss"]["1"]

    net, record = load_with_record(run.path / "best")
    assert record.method == "scala" and list(record.metrics) == best["points"]
    assert record.order == "importance" and net.spec.label_names == ("blue", "green", "red")
    assert Path("runs/last").resolve() == run.path.resolve()
    assert "method: scala" in (run.path / "args.yaml").read_text()
    assert len(listener.losses) == 2 * 3


def test_training_learns_real_digits():
    """Three epochs from random weights, at widths 0.5 and 1; chance is 10 %."""
    net, record = open_model(
        "test_vit", parse_points("0.5,1"), Changes(num_classes=10, img_size=8, patch_size=4), scratch=True
    )
    chosen = Settings(
        "digits",
        optimizer=OptimizerSettings(epochs=3, batch_size=64, lr=3e-3),
        augment=AugmentSettings(hflip=0, scale=(0.9, 1.0)),
        read=ReadSettings(workers=0),
        device=FULL,
    )
    best = finetune(net, record, chosen, Run(Path("digits")), Listener())
    assert all(point["top1"] > 50 for point in best["points"])


@pytest.mark.parametrize("epochs, steps, rows", [(1.7, 5, 2), (0.5, 2, 1), (0.01, 1, 1)])
def test_part_of_an_epoch(photos, epochs, steps, rows):
    listener = Listener()
    finetune(start(), Record(), settings(photos, epochs=epochs), Run(Path("part")), listener)
    assert (len(listener.losses), len(listener.rows)) == (steps, rows)


def test_other_classes_are_learnt_at_full_width_first_which_then_teaches(photos):
    """The model has five classes without names."""
    listener, run = Listener(), Run(Path("one"))
    finetune(slimmable(), Record(), settings(photos, epochs=2), run, listener)
    assert "knows 5 classes, the data has 3: the head is new" in listener.notes[0]
    assert [set(losses) for losses in listener.losses] == [{"1"}] * 2 + [{"1", "0.75", "0.5", "0.25"}] * 6
    again, record = load_with_record(run.path / "last")
    assert again.spec.num_classes == 3 and record.provenance["teacher"] is True
    assert record.method == "scala" and record.order == "importance"
    taught, images = load_with_record(run.teacher.path / "last")[0], torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(run.read_teacher()(images), taught(images))


def test_a_new_head_without_a_teacher(photos):
    listener, run = Listener(), Run(Path("one"))
    chosen = settings(photos, 1, method=MethodSettings(teacher="none"))
    finetune(slimmable(), Record(), chosen, run, listener)
    assert "there is no teacher" in listener.notes[0] and not run.teacher.path.exists()
    assert load_with_record(run.path / "last")[1].provenance["teacher"] is False


def test_a_full_width_that_cannot_learn_leaves_nothing(photos):
    net = slimmable()
    net.vit.blocks[0].mlp.fc1.bias.data[0] = math.nan
    with pytest.raises(TrainingError, match="nan"):
        finetune(net, Record(), settings(photos), Run(Path("one")), Listener())
    assert not Path("one").exists()


@pytest.mark.parametrize(
    ("record", "method", "taught"),
    [
        (Record(), MethodSettings(), True),
        (Record(), MethodSettings(teacher="none"), False),
        (Record(trained=False), MethodSettings(), False),
    ],
)
def test_who_has_a_teacher(photos, record, method, taught):
    finetune(start(), record, settings(photos, 1, method=method), Run(Path("one")), Listener())
    assert load_with_record(Path("one/last"))[1].provenance["teacher"] is taught


@pytest.mark.parametrize(
    ("method", "told", "record", "isolated"),
    [
        ("scala", None, Record(), False),  # the channels are put in order, best first
        ("scala", None, Record(order="none"), True),
        ("usnet", None, Record(order="none"), False),
        ("scala", False, Record(order="none"), False),
        ("usnet", True, Record(), True),
        (
            "scala",
            None,
            Record(method="usnet", metrics=accuracies(0.25, 0.5, 1.0)),
            False,
        ),
    ],
)
def test_who_isolates(photos, method, told, record, isolated):
    chosen = settings(photos, 1, method=MethodSettings(method=method, isolation=told))
    finetune(start(), record, chosen, Run(Path("one")), Listener())
    assert load("one/last").rule.isolated is isolated


@pytest.mark.parametrize(
    ("record", "order", "ordered"),
    [
        (Record(), "importance", True),
        (Record(), "none", False),
        (Record(trained=False), "importance", False),
        (Record(order="none"), "importance", False),
        (
            Record(method="scala", metrics=accuracies(0.5, 1.0)),
            "importance",
            False,
        ),
        (Record(method="separate", metrics=accuracies(1.0)), "importance", True),
    ],
)
def test_pretrained_channels_are_put_in_order_while_that_is_free(photos, record, order, ordered):
    net, chosen = start(), settings(photos, 1, method=MethodSettings(order=order))
    before = net.vit.blocks[0].mlp.fc2.weight.clone()
    listener = Listener()
    finetune(net, record, chosen, Run(Path("one")), listener)
    began, kept = load_with_record(Path("one/start"))
    assert any("order of importance" in note for note in listener.notes) is ordered
    assert torch.equal(began.vit.blocks[0].mlp.fc2.weight, before) is not ordered
    assert kept.order == ("importance" if ordered else record.order)
    assert load_with_record(Path("one/last"))[1].order == kept.order


def test_pretraining_one_width_does_not_decide_isolation(photos):
    """Trains the full width alone, then every width."""
    chosen = settings(photos, 1, method=MethodSettings(method="separate"))
    finetune(start(ratios="1"), Record(order="none"), chosen, Run(Path("one")), Listener())
    net, record = load_with_record(Path("one/last"))
    finetune(
        net.with_points(parse_points("0.25,0.5,1")), record, settings(photos, 1), Run(Path("two")), Listener()
    )
    assert load("two/last").rule.isolated is True


def test_separate_training_leaves_the_other_channels_alone(photos):
    net = start(ratios="0.5")
    chosen = settings(photos, 1, method=MethodSettings(method="separate"))
    finetune(net, Record(), chosen, Run(Path("one")), Listener())
    before, after = load("one/start"), load("one/last")
    assert [p.label for p in after.points] == ["0.5"]
    one, other = before.vit.blocks[0].mlp.fc2.weight, after.vit.blocks[0].mlp.fc2.weight
    assert not torch.equal(one[:16, :64], other[:16, :64])
    decay = 1 - other[16:, 64:] / one[16:, 64:]  # only weight decay and the average change them
    assert decay.abs().max() < 1e-3


def test_the_average_is_what_is_saved(photos):
    chosen = settings(photos, epochs=1)
    run = Run(Path("one"))
    finetune(start(), Record(), chosen, run, Listener())
    state, saved = run.read_state(), load_file("one/last/model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(saved[name], state["average"][f"vit.{name}"])
    assert not torch.equal(saved[name], state["weights"][f"vit.{name}"])

    plain = replace(chosen, optimizer=replace(chosen.optimizer, model_ema=False))
    finetune(start(), Record(), plain, Run(Path("two")), Listener())
    state = Run(Path("two")).read_state()
    assert torch.equal(load_file("two/last/model.safetensors")[name], state["weights"][f"vit.{name}"])


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({"device": DeviceSettings(device="tpu9")}, "tpu9"),
        ({"optimizer": OptimizerSettings(opt="nonsense")}, "nonsense"),
        ({"augment": AugmentSettings(aa="nonsense")}, "AA policy"),
        ({"augment": AugmentSettings(scale=(1.0, 0.5))}, "scale"),
    ],
)
def test_bad_settings_leave_a_finished_run_alone(photos, groups, named):
    finetune(start(), Record(), settings(photos, 1), Run(Path("one")), Listener())
    before = Path("one/state.pt").read_bytes()
    with pytest.raises(ScalaError, match=named):
        finetune(start(), Record(), settings(photos, **groups), Run(Path("one")), Listener(), force=True)
    assert Path("one/state.pt").read_bytes() == before
    with pytest.raises(ScalaError, match=named):
        finetune(start(), Record(), settings(photos, **groups), Run(Path("two")), Listener())
    assert not Path("two").exists()


def test_usnet_has_no_teacher(photos):
    chosen = settings(photos, 1, method=MethodSettings(method="usnet"))
    finetune(start(), Record(), chosen, Run(Path("one")), Listener())
    assert load_with_record(Path("one/last"))[1].provenance["teacher"] is False
    assert load_with_record(Path("one/start"))[1].method is None


def test_bad_input_is_found_before_anything_is_written(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    shutil.rmtree(folder / "val")
    with pytest.raises(DataError, match="has no val/"):
        finetune(start(), Record(), settings(folder), Run(Path("one")), Listener())
    assert not Path("one").exists()


def test_an_occupied_run_directory(photos):
    Path("one").mkdir()
    Path("one/notes.txt").write_text("mine")
    for force, reason in ((False, "one is not empty"), (True, r"not ours \(notes.txt\)")):
        with pytest.raises(ScalaError, match=reason):
            finetune(start(), Record(), settings(photos, 1), Run(Path("one")), Listener(), force)
    assert Path("one/notes.txt").read_text() == "mine"
    finetune(start(), Record(), settings(photos, 1), Run(Path("two")), Listener())
    finetune(start(), Record(), settings(photos, 1), Run(Path("two")), Listener(), force=True)
    assert len(Path("two/metrics.jsonl").read_text().splitlines()) == 1


def test_settings_survive_being_saved():
    chosen = Settings("x", MethodSettings(method="usnet"), augment=AugmentSettings(scale=(0.3, 0.9)))
    chosen = replace(chosen, run=RunSettings(seed=4))
    assert Settings.of(asdict(chosen)) == chosen


def test_a_model_tells_the_command_that_trained_it(photos):
    """The command line reads the recorded command as the same settings."""
    chosen = settings(
        photos,
        method=MethodSettings(isolation=False, noise_calibration=False, smoothing=0.2),
        augment=AugmentSettings(scale=(0.3, 0.9), hflip=0.0),
        run=RunSettings(4),
    )
    told = " ".join(["scala finetune model --data photos --ratios 0.5,1", *chosen.words()])
    command = typer.main.get_command(app).commands["finetune"]
    context = command.make_context("finetune", shlex.split(told)[2:])
    heard = context.params
    for group in (chosen.method, chosen.optimizer, chosen.augment, chosen.run):
        assert {name: heard[name] for name in vars(group)} == vars(group)

    finetune(
        start(ratios="0.5,1"),
        Record(provenance={"model": "vit"}),
        chosen,
        Run(Path("one")),
        Listener(),
    )
    origin = load_with_record(Path("one/last"))[1].provenance
    assert shlex.split(origin["command"]) == [
        "scala",
        "finetune",
        "vit",
        "--data",
        photos.name,
        *told.split()[5:],
    ]


def test_corrupt_training_images_are_skipped_and_told(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    (folder / "train/red/9.png").write_text("no image")
    listener = Listener()
    with pytest.raises(DataError, match=r"9\.png cannot be read"):
        finetune(start(), Record(), settings(folder, 1), Run(Path("one")), listener)
    assert not Path("one").exists()  # so that the remedy can be tried in the same place
    read = ReadSettings(workers=0, on_corrupt="skip")
    finetune(start(), Record(), settings(folder, 1, read=read), Run(Path("one")), listener)
    assert any("unreadable and skipped: 1" in note for note in listener.notes)


def test_training_on_nothing_that_can_be_read(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    for file in (folder / "train").rglob("*.png"):
        file.write_text("no image")
    chosen = settings(folder, 1, read=ReadSettings(workers=0, on_corrupt="skip"))
    with pytest.raises(DataError, match=r"none of the images could be read: .*\.png \(no image\)"):
        finetune(start(), Record(order="none"), chosen, Run(Path("one")), Listener())
    assert not Path("one").exists()
