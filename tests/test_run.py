"""A run directory belongs to one process at a time, and --force replaces only what a run wrote."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import slimmable
from runs import Listener, settings, start

from scala_cli.errors import ScalaError, TrainingError
from scala_cli.lock import LOCK
from scala_cli.models.checkpoint import Record
from scala_cli.swap import temporary
from scala_cli.training.compare import claimed
from scala_cli.training.finetune import finetune, resume_run
from scala_cli.training.run import Run
from scala_cli.watch import Stopped

pytestmark = pytest.mark.usefixtures("elsewhere")

HOLDS = """
import sys
from pathlib import Path
from scala_cli.lock import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def trained_elsewhere(run: str):
    """Holds the run's lock in another process."""
    words = [sys.executable, "-c", HOLDS, run]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        yield


def test_two_processes_do_not_train_one_run(photos):
    with pytest.raises(Stopped):
        finetune(start(), Record(), settings(photos), Run(Path("cut")), Listener(stop_at=2, kind=Stopped))
    before = Path("cut/state.pt").read_bytes()
    with trained_elsewhere("cut"):
        for again in (
            lambda: resume_run(Run(Path("cut")), Listener()),
            lambda: finetune(start(), Record(), settings(photos), Run(Path("cut")), Listener(), force=True),
        ):
            with pytest.raises(TrainingError, match="another process is training cut"):
                again()
        assert Path("cut/state.pt").read_bytes() == before
        elsewhere = Run(Path("cut"), writes=False)  # of torchrun's processes only one writes and locks
        resume_run(elsewhere, Listener())
        assert Path("cut/state.pt").read_bytes() == before
    Path("new").mkdir()
    with trained_elsewhere("new"), pytest.raises(TrainingError, match="another process"):
        finetune(start(), Record(), settings(photos), Run(Path("new")), Listener())
    resume_run(Run(Path("cut")), Listener())


def test_two_processes_do_not_train_one_comparison():
    folder, what = Path("side-by-side"), {"model": "tiny"}
    with claimed(folder, what):
        assert json.loads((folder / "compare.json").read_text()) == {"of": what, "arms": []}
    elsewhere, refused = trained_elsewhere(str(folder)), pytest.raises(TrainingError, match="another process")
    with elsewhere, refused, claimed(folder, what):
        pytest.fail("two train one comparison")
    for name in ("compare.json", "compare.csv"):
        (folder / name).rename(temporary(folder / name))  # as far as a killed process got
    with claimed(folder, what):
        assert {path.name for path in folder.iterdir()} == {"compare.json", "compare.csv", LOCK}
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("")
    with pytest.raises(TrainingError, match="do not belong to a comparison"), claimed(Path("mine"), what):
        pytest.fail("it holds other files")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]


def test_both_parts_of_a_run_with_a_new_head_are_held(photos):
    with pytest.raises(Stopped):
        finetune(slimmable(), Record(), settings(photos), Run(Path("cut")), Listener(stop_at=1, kind=Stopped))
    for run in ("cut", "cut/teacher"):
        with trained_elsewhere(run), pytest.raises(TrainingError, match=f"another process is training {run}"):
            resume_run(Run(Path("cut")), Listener())


def test_force_takes_a_run_and_nothing_that_lies_in_it(photos):
    """A link in it is removed, but not its target; a file of somebody else keeps the whole run."""
    chosen = settings(photos, epochs=1)
    finetune(slimmable(), Record(), chosen, Run(Path("mine")), Listener())
    Path("mine/best").rename("far")
    Path("mine/best").symlink_to("../far")
    thesis = Path("mine/teacher/last/thesis.tex")
    thesis.write_text("")
    before = sorted(Path("mine").rglob("*"))
    with pytest.raises(ScalaError, match=r"not ours \(teacher/last/thesis\.tex\)"):
        finetune(start(), Record(), chosen, Run(Path("mine")), Listener(), force=True)
    assert sorted(Path("mine").rglob("*")) == before
    thesis.unlink()
    finetune(start(), Record(), chosen, Run(Path("mine")), Listener(), force=True)
    assert not Path("mine/teacher/best").exists() and not Path("mine/best").is_symlink()
    assert Path("far/model.safetensors").is_file()
