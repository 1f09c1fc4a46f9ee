"""Output at a terminal."""

import io

import pytest
from rich.console import Console

import scala_cli.cli.console as console
from scala_cli.cli.console import Output, shown


@pytest.fixture
def terminal(monkeypatch):
    """Makes both streams one terminal of 120 columns; returns its buffer."""
    written = io.StringIO()

    def make(**options):
        options.pop("stderr", None)
        return Console(file=written, force_terminal=True, width=120, **options)

    monkeypatch.setattr(console, "Console", make)
    return written


ROW = {
    "epoch": 1,
    "images_per_sec": 50.0,
    "points": [{"ratio": 0.5, "top1": 61.25, "top5": 95.0, "images": 6}],
}


def test_a_bar_with_rate_time_left_and_every_loss(terminal):
    with Output().progress() as live:
        live.phase("epoch 1/2", 100)
        live.step(40, {"1": 1.25, "0.5": 2.5})
        live.step(10, {"1": 1.125, "0.5": 2.25})
        live.progress.refresh()
        live.phase("evaluate", 20)
        live.epoch(ROW)
    text = terminal.getvalue()
    assert "epoch 1/2" in text and "50/100" in text and "1: 1.125  0.5: 2.250" in text
    assert "epoch 1, 50 images/s" in text and "61.25" in text


def test_quiet_shows_no_bar(terminal):
    with Output(quiet=True).progress() as live:
        live.phase("epoch 1/2", 100)
        live.step(40, {"1": 1.0})
        live.epoch(ROW)
        live.note("something")
    assert terminal.getvalue() == ""


def test_tables_are_drawn_for_a_terminal(terminal):
    Output().result({"points": []}, [{"ratio": 0.5, "params": 22_050_664, "top1": None}], "widths")
    text = terminal.getvalue()
    assert "widths" in text and "22.05 M" in text and "─────" in text


def test_values_as_a_person_reads_them():
    assert [shown(v) for v in (None, True, 0.36541, 12, 5_717_416)] == ["-", "yes", "0.3654", "12", "5.72 M"]
    assert [shown(width, "ratio") for width in (0.28125, 1 / 3)] == ["0.28125", "1/3"]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    for quiet in (False, True):
        with Output(quiet=quiet).progress() as live:
            live.phase("evaluate", 100)
            for _ in range(4):
                live.step(10)
        lines = [] if quiet else ["evaluate: 20 of 100 images", "evaluate: 40 of 100 images"]
        told = capsys.readouterr().err.splitlines()
        assert [line.partition(",")[0] for line in told] == lines
