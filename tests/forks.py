"""Runs commands in processes forked from a server that has imported torch and timm already.

A new interpreter needs three seconds or more to import them. Each process imports scala_cli itself;
arguments, environment, directory, streams, signals and exit code are as in a new interpreter.
"""

import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from struct import Struct
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn

NUMBER = Struct("i")
"""How the server sends a process's id, and later its exit code."""


class Fork:
    """A forked process that runs `python -m MODULE WORDS...`, with the part of Popen that torchrun uses."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[str] | int | None = None,
        stderr: IO[str] | int | None = None,
        start_new_session: bool = False,
        cwd: str | None = None,
    ) -> None:
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if not self.pid:
            run_as_new(args, env, (stdout, stderr), start_new_session, cwd or os.curdir)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode


def run_as_new(
    args: Sequence[str],
    env: Mapping[str, str],
    streams: Sequence[IO[str] | int | None],
    new_session: bool,
    cwd: str,
) -> NoReturn:
    """Runs the module as a new interpreter would, and exits with the same code."""
    code = 1
    try:
        if new_session:
            os.setsid()
        for number, stream in enumerate(streams, 1):
            if stream is not None:
                os.dup2(stream if isinstance(stream, int) else stream.fileno(), number)
        os.closerange(3, 1024)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        random.seed()
        module = args.index("-m") + 1
        sys.path[0], sys.argv = cwd, [*args[module:]]
        runpy.run_module(args[module], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Child:
    """A process that the server has forked, with an interface like Popen's; its output goes to files."""

    def __init__(self, server: socket.socket, stdout: IO[str], stderr: IO[str], **asked: Any) -> None:
        self.server, self.streams, self.returncode = server, (stdout, stderr), None
        socket.send_fds(server, [b"+"], [stdout.fileno(), stderr.fileno()])
        server.sendall(json.dumps(asked).encode() + b"\n")
        (self.pid,) = NUMBER.unpack(server.recv(NUMBER.size))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            (self.returncode,) = NUMBER.unpack(self.server.recv(NUMBER.size))
        return self.returncode

    @property
    def stdout(self) -> str:
        return read(self.streams[0])

    @property
    def stderr(self) -> str:
        return read(self.streams[1])

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def unnamed_file() -> IO[str]:
    return TemporaryFile("w+")


def read(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


class Forks:
    """The client of the server; runs one process at a time."""

    def __init__(self) -> None:
        self.channel, other = socket.socketpair()
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a process with threads cannot be forked safely
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            start_new_session=True,  # so that Ctrl-C at a terminal reaches only the tests
        )
        other.close()
        self.child: Child | None = None

    def start(self, *words: object, module: str = "scala_cli", stdout: Any = None, **options: Any) -> Child:
        """Ends the last process and starts `python -m MODULE WORDS...` in this directory and environment."""
        self.end()
        self.child = Child(
            self.channel,
            stdout or unnamed_file(),
            unnamed_file(),
            args=["python", "-m", module, *map(str, words)],
            env={**os.environ},
            cwd=str(Path.cwd()),
            **options,
        )
        return self.child

    def run(self, *words: object, **options: Any) -> Child:
        """Starts a process like `start`, and waits for its end."""
        child = self.start(*words, **options)
        child.wait()
        return child

    def end(self) -> None:
        """Ends the last process if it still runs."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGKILL)
            self.child.wait()

    def close(self) -> None:
        self.end()
        self.channel.close()
        self.server.wait()


def serve(channel: socket.socket) -> None:
    """Forks a process for each request, until the client closes the channel."""
    import sklearn.datasets  # noqa: F401
    import timm.optim  # noqa: F401
    import torch.distributed.run  # noqa: F401
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asking = channel.makefile()
    while streams := socket.recv_fds(channel, 1, 2)[1]:
        child = Fork(**json.loads(asking.readline()), stdout=streams[0], stderr=streams[1])
        for stream in streams:
            os.close(stream)
        channel.sendall(NUMBER.pack(child.pid))
        channel.sendall(NUMBER.pack(child.wait()))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # skips torch's cleanup, which takes a second
