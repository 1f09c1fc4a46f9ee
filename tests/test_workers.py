"""Worker processes that read images."""

import multiprocessing
import os
import resource
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image
from runs import loader

from scala_cli.data.loader import Loader
from scala_cli.data.split import Split
from scala_cli.data.workers import ignore_stop_signals, naming_a_dead_reader, stop_signals_blocked
from scala_cli.errors import DataError
from scala_cli.evaluate import metrics
from scala_cli.settings import ReadSettings
from scala_cli.tasks import task_named
from scala_cli.watch import Watcher


class Deadly:
    """A data set that kills the process reading it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    def name(self, index):
        return "deadly"


def test_a_reader_that_fails_is_not_called_killed(folder):
    def failing():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
        yield

    reading = loader(folder)
    reading.loader = failing()
    with pytest.raises(RuntimeError, match="Caught"):
        list(reading)


def test_a_reading_process_obeys_its_parent_alone(folder):
    with (
        stop_signals_blocked()
    ):  # as in `Loader.read`, so that threads torch starts in the worker get no signals
        reading = iter(loader(folder, workers=1).loader)
    next(reading)
    (process,) = reading._workers
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    subprocess.run(["kill", "-INT", str(process.pid)], check=True)
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


def test_a_reading_process_that_dies_is_told_in_one_line():
    split = Split(Deadly(), ("one",))
    with pytest.raises(DataError, match="was killed") as error:
        list(Loader(split, None, 2, ReadSettings(workers=1)))
    assert error.value.remedy == "fewer_workers"


def test_a_reading_process_hears_nothing_before_it_knows_what_to_do(folder, monkeypatch):
    """SIGTERM arrives between torch's handlers and ours, where it would end the worker."""
    ready = ignore_stop_signals

    def signalled(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        ready(worker)

    monkeypatch.setattr("scala_cli.data.loader.ignore_stop_signals", signalled)
    assert sum(len(images) for images, _ in loader(folder, workers=2)) == 6


def test_a_reading_process_that_dies_while_the_model_answers(folder):
    """torch raises from whatever the main process is doing."""

    def answer(images):
        for process in multiprocessing.active_children():
            process.kill()
        time.sleep(20)

    images, task = loader(folder, workers=1), task_named("classification")
    with pytest.raises(DataError, match="was killed"):
        metrics({1: answer}, task, images, torch.device("cpu"), Watcher())


class Large:
    """Large images from a worker with a limit on the size of files, as if /dev/shm were full."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return Image.new("RGB", (90, 90)), 0

    def name(self, index):
        return "large"


def test_too_little_shared_memory_is_told_with_its_remedy():
    def transform(image):
        return torch.zeros(3, *image.size)

    with pytest.raises(DataError, match=r"too little shared memory \(/dev/shm: file too large\)") as error:
        list(Loader(Split(Large(), ("one",)), transform, 4, ReadSettings(workers=1)))
    assert error.value.remedy == "shared_memory"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", r"\(/dev/shm\)\."),
        (
            "unable to open shared memory object </torch_7_8> in read-write mode: Too many open files (24)",
            "open",
        ),
        ("unable to mmap 8 bytes from file </torch_7_8>: Cannot allocate memory (12)", "cannot allocate"),
        (
            "Caught RuntimeError ...: unable to write to file </torch_7>: No space left on device (28)",
            "no space",
        ),
    ],
)
def test_all_that_torch_says_of_shared_memory(said, reason):
    with pytest.raises(DataError, match=f"too little shared memory.*{reason}"), naming_a_dead_reader():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError), naming_a_dead_reader():
        raise RuntimeError("out of resource: shared memory")  # a GPU's
