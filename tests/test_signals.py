"""Ctrl-C and SIGTERM during a command."""

import signal

import pytest
from runs import settings, start

from scala_cli.__main__ import main
from scala_cli.cli.console import Output
from scala_cli.errors import LostProcess
from scala_cli.models.checkpoint import Record
from scala_cli.training.finetune import finetune
from scala_cli.training.run import Run
from scala_cli.training.step import Step
from scala_cli.watch import Stopped


def test_outside_of_training_the_first_stops_at_once():
    with pytest.raises(KeyboardInterrupt) as stopped, Output().progress():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.args == (signal.SIGTERM,) and not isinstance(stopped.value, Stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_training_the_first_waits_for_the_step_and_the_second_does_not(number, capfd):
    with pytest.raises(Stopped) as stopped, Output().progress() as live, live.between_steps():
        live.phase("epoch", 2)
        live.step(1)
        signal.raise_signal(number)
        assert "after this step" in capfd.readouterr().err
        live.step(1)
    assert stopped.value.args == (number,)

    with pytest.raises(KeyboardInterrupt) as stopped, Output().progress() as live, live.between_steps():
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert not isinstance(stopped.value, Stopped)


def test_a_signal_that_interrupts_a_line_being_printed(monkeypatch, capfd):
    """The signal may interrupt a write that holds the stream's lock, so the handler uses no stream."""

    class Busy:
        """A stream that raises on any use."""

        def __getattr__(self, name):
            pytest.fail(f"stderr.{name} is used by the handler")

    with pytest.raises(Stopped), Output().progress() as live, live.between_steps():
        live.phase("epoch", 1)
        with monkeypatch.context() as patched:
            patched.setattr("sys.stderr", Busy())
            signal.raise_signal(signal.SIGINT)
        live.step(1)
    told = capfd.readouterr().err
    assert told.startswith("stopping after this step") and told.endswith("\n") and "\x1b" not in told

    with Output().progress() as live, live.between_steps(), monkeypatch.context() as patched:
        patched.setattr("os.isatty", lambda _: True)
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.startswith("\r\x1b[2Kstopping"), "on a line of its own, for the bar's"

    with Output().progress() as live, live.between_steps(), monkeypatch.context() as patched:
        patched.setattr("os.write", lambda *_: (_ for _ in ()).throw(BrokenPipeError))
        signal.raise_signal(signal.SIGINT)


def test_a_quiet_command_does_not_tell_of_a_signal(capfd):
    with Output(quiet=True).progress() as live, live.between_steps():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_what_is_saved_once_another_process_is_lost_is_saved_whole(photos, tmp_path, monkeypatch):
    """torchrun notices the loss too, and sends SIGTERM to the others meanwhile."""
    run, write, gather, steps = Run(tmp_path / "run"), Run.write_state, Step.gather_gradients, []

    def lose(*given):
        steps.append(given)
        if len(steps) == 3:
            raise LostProcess("another process has ended.", "")
        return gather(*given)

    def write_and_hear(*given):
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        write(*given)

    monkeypatch.setattr(Step, "gather_gradients", lose)
    monkeypatch.setattr(Run, "write_state", write_and_hear)
    with pytest.raises(Stopped), Output(quiet=True).progress() as live:
        finetune(start(), Record(order="none"), settings(photos), run, live)
    assert run.read_state()["step"] == 2


def test_torchrun_repeats_what_the_terminal_has_sent(monkeypatch):
    """Signals within two seconds are one request; a later one is a second request."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt) as stopped, Output().progress() as live, live.between_steps():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        now += 3
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.args == (signal.SIGTERM,)


def test_torchruns_repetition_does_not_cut_an_end_short(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("os._exit", lambda _: pytest.fail("left at once"))
    with pytest.raises(KeyboardInterrupt), Output().progress():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)


def test_one_more_while_the_process_is_ending_leaves_at_once(monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit) as left, Output().progress() as live, live.between_steps():
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
    assert left.value.code == 130


def test_leaving_at_once_uses_no_stream(monkeypatch, capfd):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("os.isatty", lambda _: True)
    with pytest.raises(SystemExit), Output().progress():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            with monkeypatch.context() as patched:
                patched.setattr("sys.stderr", None)
                signal.raise_signal(signal.SIGINT)
    assert "\x1b[?25h" in capfd.readouterr().err


def test_afterwards_signals_are_heard_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with Output().progress():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_before_the_command_has_begun(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("scala_cli.cli.app.main", interrupt)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
