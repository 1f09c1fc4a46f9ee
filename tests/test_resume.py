"""Runs that are stopped, or fail, resume with nothing lost."""

import json
import os
import pickle
import shutil
import signal
import time
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Bomb, slimmable, write_timm_directory
from runs import Listener, same_runs, settings, start
from safetensors.torch import load_file

from scala_cli.errors import DataError, TrainingError
from scala_cli.lock import LOCK
from scala_cli.models.checkpoint import Record
from scala_cli.settings import AugmentSettings, MethodSettings
from scala_cli.swap import temporary
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.run import Run
from scala_cli.watch import Stopped

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("epochs", [3, 2.4])
@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stopped])
def test_resuming_gives_the_run_that_was_never_stopped(photos, epochs, every, kind):
    """Ends in step 5 of 9. KeyboardInterrupt leaves the last saved step, 3, 4 or 5; Stopped saves step 5."""
    chosen = settings(photos, epochs=epochs, augment=AugmentSettings(mixup=0.5, cutmix=0.5))
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, save_every_steps=every))
    finetune(start(), Record(), chosen, Run(Path("whole")), Listener())

    with pytest.raises(KeyboardInterrupt):
        finetune(start(), Record(), chosen, Run(Path("cut")), Listener(stop_at=5, kind=kind))
    assert len(Path("cut/metrics.jsonl").read_text().splitlines()) == 1
    again = Listener()
    resume_run(Run(Path("cut")), again)
    done = {None: 3, 1: 5, 2: 4}[every] if kind is KeyboardInterrupt else 5
    assert len(again.losses) == round(3 * epochs) - done
    assert same_runs("whole", "cut")


def test_a_run_goes_on_past_its_planned_end(photos):
    def rows():
        return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]

    finetune(start(), Record(), settings(photos, epochs=1), Run(Path("run")), Listener())
    before = load_file("run/last/model.safetensors")
    again = Listener()
    resume_run(Run(Path("run")), again, {"epochs": 3})
    assert len(again.losses) == 6 and [row["epoch"] for row in rows()] == [1, 2, 3]
    assert rows()[1]["lr"] > rows()[0]["lr"], "the cosine of three epochs"
    assert any(
        not torch.equal(t, before[name]) for name, t in load_file("run/last/model.safetensors").items()
    )
    assert resume_run(Run(Path("run")), Listener())["epoch"] <= 3, "its length is now three epochs"
    with pytest.raises(TrainingError, match="has trained 3 epochs already"):
        resume_run(Run(Path("run")), Listener(), {"epochs": 2})
    assert len(rows()) == 3
    finetune(start(), Record(), settings(photos, epochs=0.7), Run(Path("part")), Listener())
    with pytest.raises(TrainingError, match="epoch 1 ended before all images"):
        resume_run(Run(Path("part")), Listener(), {"epochs": 2})


LONG = ("--epochs", 15, "-b", 4, "--no-amp", "--device", "cpu", "--threads", 1, "--ratios", "0.5,1", "-q")
LONG += ("--save-every-steps", 3)


@pytest.fixture(scope="module")
def never_stopped(fork_server, photos, tmp_path_factory) -> Path:
    """Returns a directory with a model, and in whole/ its run without a stop."""
    root = tmp_path_factory.mktemp("runs")
    write_timm_directory(root / "model", num_classes=3)
    with chdir(root):
        words = ("finetune", "model", "--data", photos, *LONG, "-j", 0, "-o", "whole")
        assert fork_server.run(*words).returncode == 0
    return root


@pytest.mark.parametrize(
    ("number", "code", "workers", "send"),
    [
        (signal.SIGKILL, -9, 0, os.kill),
        (signal.SIGKILL, -9, 2, os.kill),
        (signal.SIGTERM, 143, 2, os.kill),
        (signal.SIGTERM, 143, 2, os.killpg),
        (signal.SIGINT, 130, 2, os.killpg),
    ],
)
def test_resuming_a_process_that_was_stopped(forks, photos, never_stopped, number, code, workers, send):
    """Stops after the first epoch; a terminal and a scheduler signal the workers too.

    A killed process says nothing itself, but a worker that was passing it a batch may.
    """
    shutil.copytree(never_stopped, ".", dirs_exist_ok=True)
    words = ("finetune", "model", "--data", photos, *LONG, "-j", workers, "-o", "cut")
    process = forks.start(*words, start_new_session=True)
    while not Path("cut/metrics.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.3)
    send(process.pid, number)
    assert process.wait() == code
    assert code < 0 or ("Traceback" not in process.stderr and "interrupted" in process.stderr)
    assert len(Path("cut/metrics.jsonl").read_text().splitlines()) < 15
    assert forks.run("finetune", "--resume", "cut", "-j", 0, "-q").returncode == 0
    assert same_runs("whole", "cut")


@pytest.mark.parametrize("changes", [{"grad_accum_steps": 4}, {"batch_size": 128, "epochs": 6}])
@pytest.mark.parametrize("stop_at", [3, 5])
def test_resuming_with_other_sizes_of_a_batch(photos, changes, stop_at):
    """One image at a time; and a batch larger than the data set, so that a step is an epoch."""
    chosen = settings(photos)
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, **changes))
    finetune(start(), Record(), chosen, Run(Path("whole")), Listener())
    with pytest.raises(Stopped):
        finetune(start(), Record(), chosen, Run(Path("cut")), Listener(stop_at=stop_at, kind=Stopped))
    resume_run(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut")


@pytest.mark.parametrize("again", ["resume", "force"])
def test_what_a_killed_process_had_begun_to_write_is_removed(photos, again):
    with pytest.raises(Stopped):
        finetune(start(), Record(), settings(photos), Run(Path("cut")), Listener(stop_at=1, kind=Stopped))
    fresh = temporary(Path("cut/last"))
    fresh.mkdir()
    for file in (fresh / "model.safetensors", temporary(Path("cut/state.pt"))):
        file.write_text("half")
    if again == "resume":
        resume_run(Run(Path("cut")), Listener())
    else:
        finetune(start(), Record(), settings(photos), Run(Path("cut")), Listener(), force=True)
    assert [path.name for path in Path("cut").glob(".*")] == [LOCK]


def test_a_kill_between_two_renames_loses_no_checkpoint(photos):
    """On a file system without exchange the old checkpoints have temporary names; they are restored."""
    chosen = settings(photos, epochs=3)
    finetune(start(), Record(), chosen, Run(Path("whole")), Listener())
    with pytest.raises(Stopped):
        finetune(start(), Record(), chosen, Run(Path("cut")), Listener(stop_at=5, kind=Stopped))
    for name in ("start", "last", "best"):
        Path("cut", name).rename(temporary(Path("cut", name)).with_suffix(".former"))
    resume_run(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut") and [path.name for path in Path("cut").glob(".*")] == [LOCK]


def test_resuming_a_run_stopped_in_its_first_epoch(photos):
    with pytest.raises(KeyboardInterrupt):
        finetune(start(), Record(), settings(photos, epochs=1), Run(Path("cut")), Listener(stop_at=1))
    assert resume_run(Run(Path("cut")), Listener())["epoch"] == 1


def test_resuming_what_is_no_run(photos):
    with pytest.raises(TrainingError, match="nothing to resume"):
        resume_run(Run(Path("nowhere")), Listener())
    finetune(start(), Record(), settings(photos, epochs=1), Run(Path("one")), Listener())
    state = Path("one/state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="damaged") as error:
        resume_run(Run(Path("one")), Listener())
    assert error.value.remedy == "from_weights" and error.value.facts == {"weights": Path("one/last")}
    for damage in (b"hello", b"", pickle.dumps(Bomb(), protocol=2)):
        state.write_bytes(damage)
        with pytest.raises(TrainingError, match="damaged"):
            resume_run(Run(Path("one")), Listener())
    assert not Path("exploded").exists()
    for other in ({"rows": []}, []):
        torch.save(other, state)
        with pytest.raises(TrainingError, match="another version"):
            resume_run(Run(Path("one")), Listener())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_run_with_a_new_head_goes_on_with_holds_for_both_parts(photos, workers):
    with pytest.raises(Stopped):
        finetune(slimmable(), Record(), settings(photos), Run(Path("cut")), Listener(stop_at=1, kind=Stopped))
    with pytest.raises(Stopped):
        resume_run(Run(Path("cut")), Listener(stop_at=1, kind=Stopped), {"workers": workers})
    resume_run(Run(Path("cut")), Listener())
    for run in ("cut", "cut/teacher"):
        assert Run(Path(run)).read_state()["settings"]["read"]["workers"] == workers


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: (own / "train/red/0.png").unlink(), "12 training images then, 11 now"),
        (
            lambda own: [(own / part / "red").rename(own / part / "rot") for part in ("train", "val")],
            "classes",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_images(photos, tmp_path, change, told):
    own = shutil.copytree(photos, tmp_path / "own")
    with pytest.raises(Stopped):
        finetune(start(), Record(), settings(own), Run(Path("cut")), Listener(stop_at=2, kind=Stopped))
    change(own)
    with pytest.raises(DataError, match="not those this run began with") as error:
        resume_run(Run(Path("cut")), Listener())
    assert told in error.value.message and error.value.facts == {"weights": Path("cut/start")}


def test_a_run_stopped_before_it_can_be_resumed_does_not_say_that_it_can(photos, monkeypatch):
    begin = Run.begin

    def interrupt(self, *given):
        if self.path.name == "teacher":
            raise KeyboardInterrupt
        begin(self, *given)

    monkeypatch.setattr(Run, "begin", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(slimmable(), Record(), settings(photos), Run(Path("cut")), Listener())
    assert not Run(Path("cut")).holds_state()


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_a_run_with_a_new_head_is_resumed_in_either_part(photos, stop_at):
    chosen = settings(photos, epochs=3)
    finetune(slimmable(), Record(), chosen, Run(Path("whole")), Listener())
    with pytest.raises(KeyboardInterrupt):
        finetune(slimmable(), Record(), chosen, Run(Path("cut")), Listener(stop_at=stop_at))
    resume_run(Run(Path("cut")), Listener())
    one, other = (load_file(f"{run}/last/model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_with_a_new_head_keeps_its_batch_in_another_number_of_processes(photos):
    """Two processes with two images each are stopped while classes are learnt; one process resumes."""
    chosen = settings(photos, method=MethodSettings(order="none"))
    finetune(slimmable(), Record(), chosen, Run(Path("whole")), Listener())
    with pytest.raises(Stopped):
        finetune(slimmable(), Record(), chosen, Run(Path("cut")), Listener(stop_at=1, kind=Stopped))
    for run in (Run(Path("cut")), Run(Path("cut/teacher"))):
        state = run.read_state()
        state["processes"], state["settings"]["optimizer"]["batch_size"] = 2, 2
        run.write_state(state)
    resume_run(Run(Path("cut")), Listener())
    assert Run(Path("cut")).read_state()["images_per_step"] == 4
    assert same_runs("whole", "cut")
