"""Training runs, whole, on real digits and a tiny folder."""

import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import slimmable, write_timm_directory
from runs import FULL, Listener, accuracies, settings, start
from safetensors.torch import load_file

from scala_cli.errors import DataError, ScalaError, TrainingError
from scala_cli.models.checkpoint import Record, load, load_with_record
from scala_cli.models.source import Changes, open_model
from scala_cli.settings import (
    AugmentSettings,
    DeviceSettings,
    MethodSettings,
    OptimizerSettings,
    ReadSettings,
    Settings,
)
from scala_cli.slicing.point import parse_points
from scala_cli.training.finetune import finetune, go_on
from scala_cli.training.run import FILES, Run
from scala_cli.watch import Stopped


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
    """From random weights, 6 epochs at .5 and 1: chance is 10 %."""
    net, record = open_model(
        "test_vit", parse_points("0.5,1"), Changes(num_classes=10, img_size=8, patch_size=4), scratch=True
    )
    chosen = Settings(
        "digits",
        optimizer=OptimizerSettings(epochs=6, batch_size=64, lr=3e-3),
        augment=AugmentSettings(hflip=0, scale=(0.9, 1.0)),
        read=ReadSettings(workers=0),
        device=FULL,
    )
    best = finetune(net, record, chosen, Run(Path("digits")), Listener())
    assert all(point["top1"] > 60 for point in best["points"])


@pytest.mark.parametrize("epochs, steps, rows", [(1.7, 5, 2), (0.5, 2, 1), (0.01, 1, 1)])
def test_part_of_an_epoch(photos, epochs, steps, rows):
    listener = Listener()
    finetune(start(), Record(), settings(photos, epochs=epochs), Run(Path("part")), listener)
    assert (len(listener.losses), len(listener.rows)) == (steps, rows)


def same_runs(one: str, other: str) -> bool:
    """Whether two runs came to the same weights and losses, bit for bit."""
    for checkpoint in ("last", "best"):
        a, b = (load_file(f"{run}/{checkpoint}/model.safetensors") for run in (one, other))
        assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (
        [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    )
    return a == b


@pytest.mark.parametrize("epochs", [3, 2.4])
@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stopped])
def test_resuming_gives_the_run_that_was_never_stopped(photos, epochs, every, kind):
    """Killed in step 5 of 9: what is saved then is the last epoch's end, step 4 (or 5), or, asked, step 5."""
    chosen = settings(photos, epochs=epochs, augment=AugmentSettings(mixup=0.5, cutmix=0.5))
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, save_every_steps=every))
    finetune(start(), Record(), chosen, Run(Path("whole")), Listener())

    with pytest.raises(KeyboardInterrupt):
        finetune(start(), Record(), chosen, Run(Path("cut")), Listener(stop_at=5, kind=kind))
    assert len(Path("cut/metrics.jsonl").read_text().splitlines()) == 1
    again = Listener()
    go_on(Run(Path("cut")), again)
    done = {None: 3, 1: 5, 2: 4}[every] if kind is KeyboardInterrupt else 5
    assert len(again.losses) == round(3 * epochs) - done
    assert same_runs("whole", "cut")


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [(signal.SIGKILL, -9, 0), (signal.SIGKILL, -9, 2), (signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 2)],
)
def test_resuming_a_process_that_was_stopped(photos, tmp_path, number, code, workers):
    """Some time after the first epoch; by Ctrl-C, as in a terminal, also the processes that read images."""
    write_timm_directory(tmp_path / "model", num_classes=3)
    words = [
        "finetune",
        "model",
        "--data",
        str(photos),
        "--epochs",
        "15",
        "-b",
        "4",
        "--no-amp",
        "--device",
        "cpu",
    ]
    words += ["--save-every-steps", "3", "--threads", "1", "-j", str(workers), "--ratios", "0.5,1", "-q"]
    scala = [sys.executable, "-m", "scala_cli"]
    subprocess.run([*scala, *words, "-o", "whole"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*scala, *words, "-o", "cut"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not Path("cut/metrics.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.3)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == code
    assert "Traceback" not in told and (code < 0 or "interrupted" in told)
    assert len(Path("cut/metrics.jsonl").read_text().splitlines()) < 15
    subprocess.run([*scala, "finetune", "--resume", "cut", "-q"], check=True, capture_output=True)
    assert same_runs("whole", "cut")


def test_resuming_a_run_stopped_in_its_first_epoch(photos):
    with pytest.raises(KeyboardInterrupt):
        finetune(start(), Record(), settings(photos, epochs=1), Run(Path("cut")), Listener(stop_at=1))
    assert go_on(Run(Path("cut")), Listener())["epoch"] == 1


def test_resuming_what_is_no_run(photos):
    with pytest.raises(TrainingError, match="nothing to resume"):
        go_on(Run(Path("nowhere")), Listener())
    finetune(start(), Record(), settings(photos, epochs=1), Run(Path("one")), Listener())
    state = Path("one/state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="damaged") as error:
        go_on(Run(Path("one")), Listener())
    assert "one/last" in error.value.hint
    torch.save({"rows": []}, state)
    with pytest.raises(TrainingError, match="another version"):
        go_on(Run(Path("one")), Listener())


@pytest.mark.parametrize("every", [None, 1])
def test_a_disk_that_takes_no_more_loses_nothing(photos, every):
    """From step 5 of 9 on no file can grow past 20 kB: what fails is the state, or the epoch's weights."""
    chosen = settings(photos, epochs=3)
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, save_every_steps=every))
    finetune(start(), Record(), chosen, Run(Path("whole")), Listener())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(Listener):
        def step(self, count, losses=None):
            super().step(count, losses)
            if len(self.losses) == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(OSError, match="File too large") as error:
            finetune(start(), Record(), chosen, Run(Path("cut")), Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == ("cut/state.pt" if every else "cut/last")
    assert {path.name for path in Path("cut").iterdir()} <= FILES
    go_on(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut")


def test_a_disk_that_takes_nothing_leaves_nothing(photos):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            finetune(start(), Record(), settings(photos), Run(Path("one")), Listener())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not Path("one").exists()


def test_a_failure_in_the_first_epoch_keeps_the_steps_that_are_saved(photos):
    chosen = settings(photos, epochs=2)
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, save_every_steps=1))
    finetune(start(), Record(), chosen, Run(Path("whole")), Listener())
    failing = Listener(stop_at=2, kind=partial(TrainingError, "not enough memory", ""))
    with pytest.raises(TrainingError, match="memory"):
        finetune(start(), Record(), chosen, Run(Path("cut")), failing)
    again = Listener()
    go_on(Run(Path("cut")), again)
    assert len(again.losses) == 4 and same_runs("whole", "cut")


def test_a_loss_that_is_not_finite_names_width_and_step(photos):
    net = start()
    chosen = settings(photos, epochs=3)
    run = Run(Path("one"))
    finetune(net, Record(), replace(chosen, optimizer=replace(chosen.optimizer, epochs=1)), run, Listener())
    before = (run.path / "last/model.safetensors").read_bytes()
    state = run.read_state()
    state["weights"]["blocks.0.mlp.fc1.bias"][0] = math.nan
    state["settings"]["optimizer"]["epochs"] = 3
    run.write_state(state)
    with pytest.raises(TrainingError, match=r"loss of width 1 is nan at step 4 \(epoch 2/3\)"):
        go_on(run, Listener())
    assert (run.path / "last/model.safetensors").read_bytes() == before


def test_other_classes_are_learnt_at_full_width_first_which_then_teaches(photos):
    """The net has five classes without names."""
    listener, run = Listener(), Run(Path("one"))
    finetune(slimmable(), Record(), settings(photos, epochs=2), run, listener)
    assert "knows 5 classes, the data has 3: the head is new" in listener.notes[0]
    assert [set(losses) for losses in listener.losses] == [{"1"}] * 2 + [{"1", "0.75", "0.5", "0.25"}] * 6
    again, record = load_with_record(run.path / "last")
    assert again.spec.num_classes == 3 and record.provenance["teacher"] is True
    assert record.method == "scala" and record.order == "importance"
    taught, images = load_with_record(run.teacher.path / "best")[0], torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        begun = load_with_record(run.path / "start")[0](images)
        assert (begun - taught(images)).abs().max() < 1e-4


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_a_run_with_a_new_head_is_resumed_in_either_part(photos, stop_at):
    chosen = settings(photos, epochs=3)
    finetune(slimmable(), Record(), chosen, Run(Path("whole")), Listener())
    with pytest.raises(KeyboardInterrupt):
        finetune(slimmable(), Record(), chosen, Run(Path("cut")), Listener(stop_at=stop_at))
    go_on(Run(Path("cut")), Listener())
    one, other = (load_file(f"{run}/last/model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


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
    """The full width alone first, then every width."""
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
    decay = 1 - other[16:, 64:] / one[16:, 64:]  # nothing but weight decay and the average reach them
    assert decay.abs().max() < 1e-3


def test_the_average_is_what_is_saved(photos):
    chosen = settings(photos, epochs=1)
    run = Run(Path("one"))
    finetune(start(), Record(), chosen, run, Listener())
    state, saved = run.read_state(), load_file("one/last/model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(saved[name], state["average"][name])
    assert not torch.equal(saved[name], state["weights"][name])

    plain = replace(chosen, optimizer=replace(chosen.optimizer, model_ema=False))
    finetune(start(), Record(), plain, Run(Path("two")), Listener())
    state = Run(Path("two")).read_state()
    assert torch.equal(load_file("two/last/model.safetensors")[name], state["weights"][name])


@pytest.mark.parametrize(
    "groups",
    [
        {"device": DeviceSettings(device="tpu9")},
        {"optimizer": OptimizerSettings(opt="nonsense")},
        {"augment": AugmentSettings(aa="nonsense")},
        {"augment": AugmentSettings(scale=(1.0, 0.5))},
    ],
)
def test_bad_settings_leave_a_finished_run_alone(photos, groups):
    finetune(start(), Record(), settings(photos, 1), Run(Path("one")), Listener())
    before = Path("one/state.pt").read_bytes()
    with pytest.raises(ScalaError):
        finetune(start(), Record(), settings(photos, **groups), Run(Path("one")), Listener(), force=True)
    assert Path("one/state.pt").read_bytes() == before
    with pytest.raises(ScalaError):
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
    for force in (False, True):
        with pytest.raises(ScalaError):
            finetune(start(), Record(), settings(photos, 1), Run(Path("one")), Listener(), force)
    assert Path("one/notes.txt").read_text() == "mine"
    finetune(start(), Record(), settings(photos, 1), Run(Path("two")), Listener())
    finetune(start(), Record(), settings(photos, 1), Run(Path("two")), Listener(), force=True)
    assert len(Path("two/metrics.jsonl").read_text().splitlines()) == 1


def test_settings_survive_being_saved():
    chosen = Settings("x", MethodSettings(method="usnet"), augment=AugmentSettings(scale=(0.3, 0.9)), seed=4)
    from dataclasses import asdict

    assert Settings.of(asdict(chosen)) == chosen


def test_corrupt_training_images_are_skipped_and_told(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    (folder / "train/red/9.png").write_text("no image")
    listener = Listener()
    with pytest.raises(DataError, match=r"9\.png cannot be read"):
        finetune(start(), Record(), settings(folder, 1), Run(Path("one")), listener)
    assert not Path("one").exists()  # so that the remedy can be tried at once
    read = ReadSettings(workers=0, on_corrupt="skip")
    finetune(start(), Record(), settings(folder, 1, read=read), Run(Path("one")), listener)
    assert any("unreadable and skipped: 1" in note for note in listener.notes)
