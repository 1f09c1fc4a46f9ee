"""Locks: only one process at a time trains a run."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import scala_cli
from scala_cli.errors import TrainingError
from scala_cli.lock import locked

ROOT = Path(scala_cli.__file__).parent


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT.parent)}


HOLDS = """
import os, sys, time
from pathlib import Path
from scala_cli.lock import locked
with locked(Path("run")):
    child = os.fork()  # as torch's workers are
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(code: str):
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        os.kill(child, 9)
        process.stdout.close()


def test_one_process_at_a_time_trains_a_run(elsewhere):
    """A killed process's lock is released at once, even while its workers live on."""
    Path("run").mkdir()
    with another_process(HOLDS) as process:
        with pytest.raises(TrainingError, match="another process is training run"), locked(Path("run")):
            pytest.fail("two train one run")
        process.kill()
        process.wait()
        with locked(Path("run")):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", fail)
    with locked(tmp_path):
        pass
