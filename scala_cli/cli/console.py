"""The only place that prints: results to stdout, progress and notes to stderr."""

import errno
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from scala_cli.cli.remedies import advice
from scala_cli.cli.signals import Stop
from scala_cli.cli.track import Tracker
from scala_cli.errors import LostProcess, ScalaError
from scala_cli.report import even
from scala_cli.settings import option
from scala_cli.slicing.point import Point
from scala_cli.watch import Stopped, Watcher, is_first

SECONDS_BETWEEN_LINES = 30.0
"""How often progress is printed where no bar can be shown."""


@dataclass(frozen=True)
class Output:
    """Prints results, notes and errors."""

    json: bool = option(False, "Print the result as one JSON document.", only="on")
    quiet: bool = option(False, "Print only the result.", "-q", only="on")
    debug: bool = option(False, "Show the traceback of an error.", only="on")

    def note(self, text: str) -> None:
        """Prints one line about what is being done, on stderr."""
        if not self.quiet and is_first():
            Console(stderr=True, soft_wrap=True, highlight=False).print(escape(text), style="dim")

    def result(self, document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
        """Prints the result of a command: the whole document with --json, else its rows as a table.

        If stdout is no terminal, columns are separated by two spaces or more.
        """
        if not is_first():
            return
        if self.json:
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            print_table(Console(), rows, title)
            for key, value in document.items():
                if isinstance(value, str | int | float):
                    sys.stdout.write(f"{key}: {shown(value)}\n")
        sys.stdout.flush()  # now, so that a full disk or a closed pipe is still reported as such

    def error(self, message: str, hint: str = "") -> None:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(message)}")
        if hint:
            console.print(escape(hint))

    @contextmanager
    def progress(self) -> Iterator["Live"]:
        """Yields a live bar on stderr; it stays hidden with --quiet, or if stderr is no terminal."""
        console = Console(stderr=True)
        seen = console.is_terminal and not self.quiet and is_first()
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            transient=True,
            disable=not seen,
        )
        stop = Stop(tells=not self.quiet and is_first())
        with (
            stop.heard(),
            bar if seen else nullcontext(),
        ):  # some versions of rich print an empty line after a disabled bar
            yield Live(self, bar, stop)


class Live(Watcher):
    """Shows a live bar with rate, time left and the loss of every pass, and a table after each epoch."""

    def __init__(self, out: Output, progress: Progress, stop: Stop) -> None:
        self.out, self.progress, self.stop = out, progress, stop
        self.task: TaskID | None = None
        self.unit = ""
        self.tracker: Tracker | None = None
        self.told = time.monotonic()
        """When a line of progress was last printed, if there is no bar."""

    def note(self, text: str) -> None:
        self.out.note(text)

    def phase(self, name: str, total: int, unit: str = "images", done: int = 0) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(name, total=total, completed=done, rate="", losses="")
        self.unit = unit
        self.track(lambda tracker: tracker.phase(done))

    def step(self, count: int, losses: Mapping[str, float] | None = None) -> None:
        assert self.task is not None
        self.progress.advance(self.task, count)
        speed = self.progress.tasks[-1].speed
        rate = f"{speed:.0f} {self.unit}/s" if speed else ""
        text = "  ".join(f"{name}: {loss:.3f}" for name, loss in (losses or {}).items())
        self.progress.update(self.task, rate=rate, losses=text)
        if self.progress.disable and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told, task = time.monotonic(), self.progress.tasks[-1]
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
            self.out.note(f"{task.description}: {task.completed:.0f} of {task.total:.0f} {self.unit}{left}")
        if losses:
            self.track(lambda tracker: tracker.step(count, losses))
        if self.stop.asked is not None and is_first():
            raise Stopped(self.stop.asked)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        self.stop.waits = True
        try:
            yield
        except LostProcess:
            # torchrun signals every process; rank 0 saves and ends, which the others see as a lost process
            if self.stop.asked is None:
                raise
            raise Stopped(self.stop.asked) from None
        finally:
            self.stop.waits = False

    @contextmanager
    def tracked(self, tracker: Tracker | None) -> Iterator[None]:
        """Sends figures to a tracker, and closes it at the end, also if sending failed."""
        self.tracker = tracker
        try:
            yield
        finally:
            self.tracker = tracker
            self.track(lambda tracker: tracker.close())

    def track(self, send: Callable[[Tracker], None]) -> None:
        """Sends figures to the tracker, if there is one; if that fails, training goes on without it."""
        if self.tracker is None:
            return
        try:
            send(self.tracker)
        except Exception as error:
            self.tracker = None
            self.note(f"--log-to failed and is off now: {type(error).__name__}: {error}")

    @contextmanager
    def aside(self) -> Iterator[None]:
        tracker, self.tracker = self.tracker, None
        try:
            yield
        finally:
            self.tracker = tracker

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.track(lambda tracker: tracker.epoch(row))
        if not self.out.quiet and is_first():
            points = [
                {name: value for name, value in point.items() if name != "images"} for point in row["points"]
            ]
            title = f"epoch {row['epoch']}, {row['images_per_sec']:.0f} images/s"
            print_table(self.progress.console, points, title)


def print_table(console: Console, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Prints rows as a table; as plain columns if the output is no terminal."""
    if not rows:
        return
    rows = even(rows)
    cells = [[shown(value, column) for column, value in row.items()] for row in rows]
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for column in rows[0]:
            table.add_column(column.replace("_", " "), justify="right")  # a long name wraps at its spaces
        for line in cells:
            table.add_row(*line)
        console.print(table)
        return
    if title:
        console.file.write(f"{title}\n")
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        text = "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        console.file.write(text + "\n")


def shown(value: Any, column: str = "") -> str:
    """Formats a value: four digits, millions as 1.2 M, a dash if it is not known, widths as in --ratio."""
    if value is None:
        return "-"
    if column == "ratio":
        return Point.of(value).label
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value >= 1_000_000:
        return f"{value / 1e6:.2f} M"
    return str(value)


@contextmanager
def reporting_errors(out: Output) -> Iterator[None]:
    """Prints an error as one or two lines and exits.

    The exit code is 2 for an error that the user can fix, 1 for a bug, 130 or 143 if stopped by a signal.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except KeyboardInterrupt as stop:
        code, message, hint = 128 + (stop.args[0] if stop.args else signal.SIGINT), "interrupted.", ""
    except ScalaError as error:
        code, message, hint = 2, error.message, advice(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        place = Path(error.filename or "the disk")
        place = place.parent if place.name.startswith(".") else place  # not the name of our temporary file
        code, message = 2, f"{place}: {error.strerror or error}."
        hint = "Free some space and run the command again." if full else "Check the path and its permissions."
    except MemoryError:
        code, message, hint = 2, "not enough memory.", "Stop other programs, or use a machine with more."
    except Exception as error:
        code, message = 1, f"this is a bug in scala: {type(error).__name__}: {error}"
        hint = "Run it again with --debug and report what it prints, with the output of: scala env"
    else:
        return
    if out.debug:
        traceback.print_exc()
    out.error(message, hint)
    raise typer.Exit(code)
