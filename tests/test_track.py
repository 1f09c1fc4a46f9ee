"""Training figures in TensorBoard and Weights & Biases."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import QUICK

from scala_cli.cli import track


def events(directory):
    """Returns {name: [(step, value)]} of TensorBoard's files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(directory))
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_shows_every_step_and_every_epoch(scala, tiny, folder, elsewhere):
    done = scala("finetune", tiny, "--data", folder, *QUICK, "-o", "runs/a", "--log-to", "tensorboard")
    assert done.code == 0, done.stderr
    seen, (row,) = events("runs/tensorboard/a"), metrics(elsewhere / "runs/a")
    for width, mean in row["loss"].items():
        values = [value for _, value in seen[f"loss/{width}"]]
        assert sum(values) / len(values) == pytest.approx(mean, rel=1e-5)
        assert [step for step, _ in seen[f"loss/{width}"]] == [4 * i for i in range(1, len(values) + 1)]
    for point in row["points"]:
        ((_, top1),) = seen[f"top1/{point['ratio']:g}"]
        assert top1 == pytest.approx(point["top1"])
    assert not [name for name in seen if name.startswith(("ratio", "images/"))]


def test_a_resumed_run_goes_on_from_its_state(scala, tiny, folder, elsewhere):
    """What was recorded after the state that it resumes from is hidden; runs/last leads to the same files."""
    words = ("finetune", tiny, "--data", folder, *QUICK, "-o", "runs/a", "--log-to", "tensorboard")
    assert scala(*words).code == 0
    shutil.copytree("runs/a", "killed")
    more = ("finetune", "--resume", "runs/last", "--epochs", 2, "--log-to", "tensorboard")
    assert scala(*more).code == 0
    shutil.rmtree("runs/a")
    shutil.copytree("killed", "runs/a")
    assert scala(*more).code == 0
    assert [path.name for path in Path("runs/tensorboard").iterdir()] == ["a"]
    steps = [step for step, _ in events("runs/tensorboard/a")["loss/1"]]
    assert steps == [4 * i for i in range(1, len(steps) + 1)]
    assert len(events("runs/tensorboard/a")["top1/1"]) == 2


@pytest.mark.parametrize("part", ["begin", "send", "end"])
def test_a_service_that_fails_does_not_stop_the_run(scala, tiny, folder, monkeypatch, part):
    def fail(*_):
        raise ValueError("no login")

    ended = []
    monkeypatch.setattr(track.TensorBoard, "end", lambda tracker: ended.append(tracker.client))
    monkeypatch.setattr(track.TensorBoard, part, fail)
    done = scala("finetune", tiny, "--data", folder, *QUICK, "-o", "runs/a", "--log-to", "tensorboard")
    assert done.code == 0 and done.stderr.count("--log-to failed and is off now: ValueError: no login") == 1
    assert len(ended) == (part == "send")


def test_only_the_widths_are_recorded_where_the_full_width_learns_classes_first(scala, tiny, folder):
    for part in ("train", "val"):
        (folder / part / "blue").rename(folder / part / "azure")
    done = scala("finetune", tiny, "--data", folder, *QUICK, "-o", "runs/a", "--log-to", "tensorboard")
    assert done.code == 0 and Path("runs/a/teacher/last").is_dir(), done.stderr
    seen = events("runs/tensorboard/a")
    assert [step for step, _ in seen["loss/1"]] == [step for step, _ in seen["loss/0.25"]]


def test_wandb_gets_the_same_figures(scala, tiny, folder, elsewhere, monkeypatch):
    sent, began, ended = [], [], []
    run = SimpleNamespace(log=sent.append, finish=lambda: ended.append(True))
    monkeypatch.setattr(track, "find_spec", lambda name: True)
    fake = SimpleNamespace(init=lambda **words: began.append(words) or run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    done = scala("finetune", tiny, "--data", folder, *QUICK, "-o", "runs/a", "--log-to", "wandb")
    assert done.code == 0, done.stderr
    assert began[0]["name"] == "a" and ended == [True]
    (row,) = metrics(elsewhere / "runs/a")
    assert sent[-1]["lr"] == row["lr"] and sent[-1]["images"] == sent[-2]["images"] > sent[0]["images"]


def test_a_missing_package_is_named_before_anything_is_written(scala, tiny, folder, elsewhere, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    done = scala("finetune", tiny, "--data", folder, *QUICK, "-o", "runs/a", "--log-to", "wandb")
    assert done.code == 2 and "pip install wandb" in done.stderr
    assert not (elsewhere / "runs").exists()
