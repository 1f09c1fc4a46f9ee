"""Runs that fail for lack of disk, memory, images or finite numbers lose nothing."""

import math
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import slimmable
from runs import UNORDERED, Listener, same_runs, settings, start

from scala_cli.errors import DataError, ScalaError, TrainingError
from scala_cli.methods.scala import Scala
from scala_cli.models.checkpoint import Record
from scala_cli.settings import ReadSettings
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.run import RUN_FILES, Run
from scala_cli.training.step import Step

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("every", [None, 1])
def test_a_disk_that_fills_up_loses_nothing(photos, every):
    """Limits files to 20 kB after step 5 of 9: writing the state fails, or the epoch's weights."""
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
    assert files_of(Path("cut")) <= RUN_FILES
    resume_run(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut")


def files_of(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_nothing(photos):
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
    resume_run(Run(Path("cut")), again)
    assert len(again.losses) == 4 and same_runs("whole", "cut")


def test_a_loss_that_is_not_finite_names_width_and_step(photos):
    net = start()
    chosen = settings(photos, epochs=3)
    run = Run(Path("one"))
    finetune(net, Record(), replace(chosen, optimizer=replace(chosen.optimizer, epochs=1)), run, Listener())
    before = (run.path / "last/model.safetensors").read_bytes()
    state = run.read_state()
    state["weights"]["vit.blocks.0.mlp.fc1.bias"][0] = math.nan
    state["settings"]["optimizer"]["epochs"] = 3
    run.write_state(state)
    with pytest.raises(TrainingError, match="loss of width 1 is nan at step 4"):
        resume_run(run, Listener())
    assert (run.path / "last/model.safetensors").read_bytes() == before


def test_a_gradient_that_is_not_finite_leaves_weights_and_state_as_they_were(photos, monkeypatch):
    """Every loss is finite; the backward pass of step 5 of 6 fails."""
    chosen = settings(photos)
    chosen = replace(chosen, optimizer=replace(chosen.optimizer, save_every_steps=1))
    finetune(start(), UNORDERED, chosen, Run(Path("whole")), Listener())

    with monkeypatch.context() as patched:

        class Spoiling(Listener):
            def step(self, count, losses=None):
                super().step(count, losses)
                if len(self.losses) == 4:
                    patched.setattr(Scala, "weight", lambda *_: math.inf)

        with pytest.raises(TrainingError, match=r"gradient's norm is (nan|inf) at step 5"):
            finetune(start(), UNORDERED, chosen, Run(Path("cut")), Spoiling())
    assert Run(Path("cut")).read_state()["step"] == 4
    resume_run(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut")


@pytest.mark.parametrize(
    ("owner", "name", "saved"), [(Step, "gather_gradients", 4), (timm.optim.Muon, "step", 3)]
)
def test_lack_of_memory_keeps_the_last_whole_step(photos, monkeypatch, owner, name, saved):
    """Step 5 fails before or while weights move; the run resumes with smaller parts, as the error says."""
    listener, real = Listener(), getattr(owner, name)

    def fail(*given, **named):
        if len(listener.losses) == 4:
            raise torch.OutOfMemoryError("Tried to allocate 20 GiB")
        return real(*given, **named)

    with monkeypatch.context() as patched, pytest.raises(ScalaError, match="memory for 4") as error:
        patched.setattr(owner, name, fail)
        finetune(start(), Record(), settings(photos), Run(Path("cut")), listener)
    assert error.value.resumable
    assert Run(Path("cut")).read_state()["step"] == saved
    resume_run(Run(Path("cut")), Listener(), {"grad_accum_steps": 2})
    assert Run(Path("cut")).read_state()["settings"]["optimizer"]["grad_accum_steps"] == 2


def test_an_image_that_cannot_be_read_keeps_every_step(photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    finetune(start(), UNORDERED, settings(own), Run(Path("whole")), Listener())

    class Spoiling(Listener):
        def step(self, count, losses=None):
            super().step(count, losses)
            if len(self.losses) == 4:
                for file in own.glob("train/*/*.png"):
                    file.write_text("no image")

    with pytest.raises(DataError, match="cannot be read") as error:
        finetune(start(), UNORDERED, settings(own), Run(Path("cut")), Spoiling())
    assert error.value.resumable and Run(Path("cut")).read_state()["step"] == 4
    for file in photos.glob("train/*/*.png"):
        shutil.copy(file, own / file.relative_to(photos))
    resume_run(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut")


def test_unreadable_images_keep_the_epoch_before(photos, tmp_path):
    """In the second of three epochs every image is unreadable and skipped; then the images are restored."""
    own = shutil.copytree(photos, tmp_path / "own")
    chosen = settings(own, epochs=3, read=ReadSettings(workers=0, on_corrupt="skip"))
    finetune(start(), UNORDERED, chosen, Run(Path("whole")), Listener())

    class Removing(Listener):
        def epoch(self, row):
            super().epoch(row)
            for file in own.glob("train/*/*.png"):
                file.write_text("no image")

    with pytest.raises(DataError, match="none of the images") as error:
        finetune(start(), UNORDERED, chosen, Run(Path("cut")), Removing())
    assert error.value.resumable and Run(Path("cut")).read_state()["step"] == 3
    for file in photos.glob("train/*/*.png"):
        shutil.copy(file, own / file.relative_to(photos))
    resume_run(Run(Path("cut")), Listener())
    assert same_runs("whole", "cut")


def test_a_disk_that_fails_once_the_classes_are_learnt(photos, monkeypatch):
    """The disk error is raised as it is, and the run can be resumed afterwards."""
    begin = Run.begin

    def fail(self, *given):
        if self.path.name == "cut":
            raise OSError(28, "No space left on device", "cut")
        begin(self, *given)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(Run, "begin", fail)
        finetune(slimmable(), Record(), settings(photos, epochs=3), Run(Path("cut")), Listener())
    listener = Listener()
    resume_run(Run(Path("cut")), listener)
    assert len(listener.losses) == 9, "the teacher has learnt already"
