"""Training in several processes, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_timm_directory
from forks import Child
from safetensors.torch import load_file

from scala_cli.data.batches import Batches
from scala_cli.training.run import Run
from scala_cli.world import World

COMMON = ["-j", "0", "--threads", "1", "--no-amp", "--device", "cpu", "--ratios", "0.5,1", "-q"]


@pytest.fixture
def torchrun(forks) -> Callable[..., Child]:
    """Returns a function that starts torchrun in a forked process, which forks its workers."""

    def start(*words: object, processes: int = 2) -> Child:
        several = ("--standalone", f"--nproc-per-node={processes}", "-m", "scala_cli")
        return forks.start(*several, *words, module="torch.distributed.run")

    return start


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_timm_directory(Path("model"), num_classes=3)


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("classes", "more"), [(3, []), (5, ["--order", "none"])])
def test_two_processes_with_half_the_batch_each_are_one_with_all_of_it(
    forks, torchrun, photos, classes, more
):
    """21 steps of 4 images; with other classes the teacher's 7 come first.

    With other classes nothing is ordered: rounding of the teacher would decide the basis of flat colours.

    With AdamW, as Muon magnifies rounding. Biases of keys are not compared: the softmax ignores them, so
    their gradient is rounding that AdamW turns into full steps.
    """
    write_timm_directory(Path("model"), num_classes=classes)
    words = ["finetune", "model", "--data", photos, "--epochs", 7, "--opt", "adamw", *more, *COMMON]
    assert forks.run(*words, "-b", 4, "-o", "one").returncode == 0
    together = torchrun(*words, "-b", 2, "-o", "two", "--json")
    assert together.wait() == 0
    assert json.loads(together.stdout)["run"] == "two"  # the second process prints nothing
    one, two = (load_file(f"{run}/last/model.safetensors") for run in ("one", "two"))
    for name, tensor in one.items():
        if name.endswith("qkv.bias"):
            tensor[32:64] = two[name][32:64] = 0
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    for a, b in zip(rows("one"), rows("two"), strict=True):
        assert a["points"] == b["points"] and all(point["images"] == 6 for point in a["points"])


def test_two_processes_judge_features_as_one_does(forks, torchrun, pictures):
    """Both use rank 0's units; each evaluates its part of the validation images, and the sums are shared."""
    write_timm_directory(Path("model"), num_classes=0)
    words = [
        "finetune",
        "model",
        "--data",
        pictures,
        "--epochs",
        2,
        "--holdout",
        0.3,
        "--order",
        "none",
        *COMMON,
    ]
    assert forks.run(*words, "-b", 4, "-o", "one").returncode == 0
    assert torchrun(*words, "-b", 2, "-o", "two").wait() == 0
    for a, b in zip(rows("one"), rows("two"), strict=True):
        for one, two in zip(a["points"], b["points"], strict=True):
            assert one == pytest.approx(two, abs=1e-3) and one["images"] == 7


def test_torchrun_starts_interpreters_of_its_own(photos):
    words = ["finetune", "model", "--data", str(photos), "--epochs", "1", "-b", "2", "-o", "run", "--json"]
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scala_cli"]
    command = [sys.executable, "-m", *several, *words, *COMMON]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "run" and len(rows("run")) == 1


def test_a_process_that_dies_ends_the_run_which_another_number_resumes(forks, torchrun, photos):
    words = ["finetune", "model", "--data", photos, "--epochs", 25, "-b", 2, "-o", "run", *COMMON]
    run = torchrun(*words)
    while not Path("run/metrics.jsonl").exists():
        time.sleep(0.05)
        assert run.poll() is None
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait() != 0
    done = len(rows("run"))
    assert done < 25
    assert forks.run("finetune", "--resume", "run").returncode == 0
    assert [row["epoch"] for row in rows("run")] == list(range(1, 26))
    odd = torchrun("finetune", "--resume", "run", processes=3)
    assert odd.wait() != 0 and "3 processes cannot share the 4 images" in odd.stderr


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_no_step_is_lost_where_several_processes_are_stopped_or_one_is_killed(torchrun, how):
    """Stops in the first epoch, long before the periodic state is saved."""
    write_timm_directory(Path("model"), num_classes=10)
    words = ["finetune", "model", "--data", "digits", "-b", 2, "--epochs", 1, "-o", "run", "--log-grads"]
    run = torchrun(*words, *COMMON)
    log = Path("run/grads.jsonl")
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        time.sleep(0.05)
        assert run.poll() is None, run.stderr
    if how == "stopped":
        run.send_signal(signal.SIGTERM)
    else:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait() != 0
    told = run.stderr
    assert "bug in scala" not in told
    if how == "stopped":
        assert "another process" not in told
    assert Run(Path("run")).read_state()["step"] >= len(log.read_text().splitlines()) - 1 >= 4


def test_several_processes_name_their_run(scala, photos, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = scala("finetune", "model", "--data", photos)
    assert answer.code == 2 and "--output runs/NAME" in answer.told


@pytest.mark.parametrize("shuffled", [True, False])
def test_together_the_processes_read_each_image_once(shuffled):
    whole = list(Batches(11, 4, shuffled, 0, World()))
    parts = [list(Batches(11, 2, shuffled, 0, World(rank, 2))) for rank in range(2)]
    for batch, one, two in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(one + two)


def test_gradients_count_by_the_images_they_are_of(monkeypatch):
    """One process could read three of its images, another only one."""
    sent = []
    monkeypatch.setattr(World, "sum", lambda _, tensor: sent.append(tensor.clone()) or tensor)

    def average(gradient: float, images: int) -> list[float]:
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.full((2,), gradient)
        World(0, 2).average_gradients([parameter], images)
        return parameter.grad.tolist()

    average(1.0, 3)
    average(5.0, 1)
    monkeypatch.setattr(World, "sum", lambda _, tensor: tensor.copy_(torch.stack(sent).sum(0)))
    assert average(0.0, 1) == [2.0, 2.0]
