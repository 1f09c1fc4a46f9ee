"""Files and directories are written whole or not at all, and files of others are kept."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

import scala_cli
from scala_cli.errors import ScalaError
from scala_cli.files import (
    clear,
    new_directory,
    refuse_existing,
    refuse_occupied,
    refuse_unwritable,
    whole_directory,
    whole_file,
    whole_files,
)
from scala_cli.swap import exchanged, restore, swap, target_of, temporary

ROOT = Path(scala_cli.__file__).parent
OURS = {"state.pt", "last/config.json", "teacher/last/config.json"}


def write(target: Path, text: str) -> None:
    with whole_directory(target) as fresh:
        (fresh / "file").write_text(text)


@pytest.fixture(params=["exchange", "no exchange"])
def way(request, monkeypatch, tmp_path) -> str:
    """Swaps directories in one step, if this system can, or by renames."""
    if request.param == "no exchange":
        monkeypatch.setattr("scala_cli.swap.exchanged", lambda *_: False)
        return request.param
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    if not exchanged(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system exchanges nothing")
    for name in ("one", "other"):
        (tmp_path / name).rmdir()
    return request.param


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "net"
    with whole_directory(target) as fresh:
        (fresh / "file").write_text("first")
    with pytest.raises(OSError), whole_directory(target) as fresh:
        (fresh / "file").write_text("second")
        raise OSError(28, "No space left on device")
    assert (target / "file").read_text() == "first"
    with whole_directory(target) as fresh:
        (fresh / "other").write_text("third")
    assert [path.name for path in target.iterdir()] == ["other"]
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "state") as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


# Kills itself just before or after one of the renames; the argument says which.
KILLED = """
import os, signal, sys
from pathlib import Path
from scala_cli import swap
from scala_cli.files import whole_directory

count = 0

def stopping(real, *given):
    def there():
        global count
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    there()
    result = real(*given)
    there()
    return result

rename, exchanged, remove = Path.rename, swap.exchanged, swap.remove
Path.rename = lambda *given: stopping(rename, *given)
can = sys.argv[1] == "exchange"
swap.exchanged = lambda *given: stopping(exchanged if can else lambda *_: False, *given)
with whole_directory(Path("best")) as fresh:
    (fresh / "file").write_text("new")
"""


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_at_any_moment_of_a_swap_loses_neither_version(elsewhere, way, moment):
    write(Path("best"), "old")
    done = subprocess.run([sys.executable, "-c", KILLED, way, str(moment)], env=environment())
    assert done.returncode in (0, -9)
    assert done.returncode == (-9 if moment < {"exchange": 2, "no exchange": 8}[way] else 0)
    if way == "exchange":
        assert Path("best").is_dir(), "never missing"
    restore(Path("best"))
    assert Path("best/file").read_text() in ("old", "new")
    write(Path("best"), "newer")
    assert Path("best/file").read_text() == "newer"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT.parent)}


def test_the_next_write_restores_the_former_directory(tmp_path, monkeypatch):
    write(tmp_path / "net", "old")
    (tmp_path / "net").rename(temporary(tmp_path / "net").with_suffix(".former"))
    with pytest.raises(ScalaError, match="not empty"):
        refuse_occupied(tmp_path / "net", False, {"file"})
    assert (tmp_path / "net/file").read_text() == "old"
    (tmp_path / "net").rename(temporary(tmp_path / "net").with_suffix(".former"))
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "net"):
        raise KeyboardInterrupt
    assert (tmp_path / "net/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_reader_always_finds_a_directory(tmp_path):
    target = tmp_path / "net"
    write(target, "first")
    (tmp_path / "other").mkdir()
    if not exchanged(target, tmp_path / "other"):
        pytest.skip("this file system exchanges nothing")
    assert exchanged(target, tmp_path / "other")
    done, missed = Event(), []

    def read():
        while not done.is_set():
            if not target.is_dir():
                missed.append(True)

    reader = Thread(target=read)
    reader.start()
    for number in range(200):
        write(target, str(number))
    done.set()
    reader.join()
    assert not missed and (target / "file").read_text() == "199"


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_swap_leaves_the_former(tmp_path, monkeypatch, failing):
    """Interrupts before or after either rename, without exchange."""
    monkeypatch.setattr("scala_cli.swap.exchanged", lambda *_: False)
    for before in (True, False):
        target = tmp_path / f"{failing}{before}"
        write(target, "old")
        rename, calls = Path.rename, []

        def interrupted(path, to, rename=rename, calls=calls, before=before):
            calls.append(path)
            if len(calls) == failing and before:
                raise KeyboardInterrupt
            rename(path, to)
            if len(calls) == failing:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "rename", interrupted)
            write(target, "new")
        assert (target / "file").read_text() == ("new" if failing == 2 and not before else "old")
        assert not list(tmp_path.glob(".*"))


def test_what_a_link_points_to_is_left_alone(tmp_path, way):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    (tmp_path / "best").symlink_to("mine")
    write(tmp_path / "best", "new")
    assert not (tmp_path / "best").is_symlink() and (tmp_path / "best/file").read_text() == "new"
    (tmp_path / "dangling").symlink_to("nowhere")
    write(tmp_path / "dangling", "new")
    assert (tmp_path / "dangling/file").read_text() == "new"
    assert (tmp_path / "mine/thesis.tex").exists() and not list(tmp_path.glob(".*"))


def test_a_directory_does_not_replace_a_file(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "thesis.tex", "new")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_those_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        with whole_directory(tmp_path / "net") as fresh:
            (fresh / "below").mkdir(mode=0o700)
            for file in (fresh / "file", fresh / "below/file"):
                file.touch(mode=0o600)  # as safetensors makes its files
        with whole_file(tmp_path / "one") as file:
            file.write_text("text")
        with whole_files(tmp_path / "many", force=False) as fresh:
            (fresh / "many").touch(mode=0o600)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_planted_name_is_not_written_through(tmp_path, monkeypatch):
    """Names cannot be guessed, and even a guessed one is not followed."""
    assert temporary(tmp_path / "state.pt") != temporary(tmp_path / "state.pt")
    (tmp_path / "theirs").write_text("theirs")
    for planted in (temporary(tmp_path / "state.pt"), tmp_path / f".state.pt.{os.getpid()}"):
        planted.symlink_to("theirs")
        with monkeypatch.context() as patched:
            patched.setattr("scala_cli.files.temporary", lambda _, planted=planted: planted)
            with pytest.raises(FileExistsError), whole_file(tmp_path / "state.pt") as file:
                file.write_text("ours")
        assert planted.is_symlink(), "it is not ours to remove"
    with whole_file(tmp_path / "state.pt") as file:
        file.write_text("ours")
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_temporary_names_tell_what_they_are_for():
    fresh = temporary(Path("a/.best.x\n1"))
    assert fresh.parent == Path("a") and target_of(fresh.name) == ".best.x\n1"
    assert target_of(fresh.with_suffix(".former").name) == ".best.x\n1"
    assert [*map(target_of, (".best.x7", ".state.pt.4711", "best", ".best.backup.new"))] == [None] * 4


@pytest.mark.parametrize(
    "name",
    ["last/thesis.tex", "teacher/last/thesis.tex", "teacher/notes", "thesis.tex", "last/config.json/x"],
)
def test_force_looks_all_the_way_down(tmp_path, name):
    target = tmp_path / "mine"
    for file in ("state.pt", "teacher/last/config.json"):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_text("")
    refuse_occupied(target, True, OURS)
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text("")
    with pytest.raises(ScalaError) as error:
        refuse_occupied(target, True, OURS)
    assert f"({name.removesuffix('/x')})" in error.value.message
    clear(target, OURS)
    held = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert held == {name}, "nothing but ours goes"


def test_force_on_links_and_on_what_a_killed_process_left(tmp_path):
    target = tmp_path / "run"
    (tmp_path / "far").mkdir()
    (tmp_path / "far/thesis.tex").write_text("")
    target.mkdir()
    (target / "last").symlink_to("../far")
    (target / "state.pt").symlink_to("../far/thesis.tex")
    fresh = temporary(target / "last")
    fresh.mkdir()
    (fresh / ".tmpA1b2C3").write_text("half of the weights")
    temporary(target / "state.pt").write_text("half")
    refuse_occupied(target, True, OURS)
    clear(target, OURS)
    assert not list(target.iterdir()) and (tmp_path / "far/thesis.tex").exists()
    (target / "mine").symlink_to("../far")
    with pytest.raises(ScalaError, match=r"not ours \(mine\)"):
        refuse_occupied(target, True, OURS)
    (target / "mine").unlink()
    temporary(target / "mine").touch()
    with pytest.raises(ScalaError, match="not empty"):
        refuse_occupied(target / "..", False, OURS, in_place=True)
    with pytest.raises(ScalaError, match="not ours"):
        refuse_occupied(target, False, OURS)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (".", "is the working directory, or holds it"),
        ("..", "is the working directory, or holds it"),
        ("here/..", "is the working directory, or holds it"),
        ("/", "is the working directory, or holds it"),
        ("here/below/..", "has no name of its own"),
        ("mounted", "is a mount point"),
        ("x" * 230, "has 230 bytes, more than 200"),
    ],
)
def test_directories_that_cannot_be_replaced(elsewhere, monkeypatch, target, told):
    Path("here/below").mkdir(parents=True)
    Path("mounted").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(ScalaError, match=told):
        refuse_occupied(Path(target), True, {"here", "mounted"})


def test_a_run_may_fill_the_working_directory(elsewhere, monkeypatch):
    refuse_occupied(Path(), False, OURS, in_place=True)
    monkeypatch.setattr("os.path.ismount", lambda _: True)
    refuse_occupied(elsewhere, False, OURS, in_place=True)


def test_an_unwritable_place_is_refused_first(elsewhere, monkeypatch):
    """Checked before anything is downloaded or computed. os.access is patched, as root may write anywhere."""
    asked = []
    monkeypatch.setattr("os.access", lambda place, _: asked.append(place))
    for refuse in (
        lambda: refuse_occupied(Path("a/b/c"), False, OURS),
        lambda: refuse_occupied(elsewhere / "run", False, OURS, in_place=True),
        lambda: refuse_unwritable(Path("a.onnx")),
    ):
        with pytest.raises(PermissionError):
            refuse()
    assert asked == [Path(), elsewhere, Path()]
    Path("file").write_text("")
    with pytest.raises(NotADirectoryError):
        refuse_occupied(Path("file/net"), False, OURS)


def test_force_never_removes_what_is_not_ours(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ScalaError, match="not empty"):
        refuse_occupied(tmp_path, False, {"config.json"})
    temporary(tmp_path / "config.json").write_text("left by a killed process")
    refuse_occupied(tmp_path, True, {"config.json"})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ScalaError, match=r"thesis\.tex"):
        refuse_occupied(tmp_path, True, {"config.json"})
    with pytest.raises(ScalaError, match="not a directory"):
        refuse_occupied(tmp_path / "thesis.tex", True, set())


def test_files_that_go_together_replace_no_directory(tmp_path):
    (tmp_path / "net.bin").mkdir()
    with (
        pytest.raises(ScalaError, match=r"net\.bin is a directory"),
        whole_files(tmp_path / "net", force=True) as fresh,
    ):
        for name in ("net", "net.bin"):
            (fresh / name).write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["net.bin"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ScalaError, match="exists"):
        refuse_existing(tmp_path / "link", False)


def test_two_that_begin_at_once_have_directories_of_their_own(tmp_path):
    wanted = tmp_path / "runs/net-20250101-120000"
    with new_directory(wanted) as one, new_directory(wanted) as other, new_directory(wanted) as third:
        assert [path.name for path in (one, other, third)] == [wanted.name + end for end in ("", "-2", "-3")]
        (other / "file").write_text("")
    assert [*tmp_path.rglob("*")] == [tmp_path / "runs", other, other / "file"]
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "others/net"):
        raise KeyboardInterrupt
    assert not (tmp_path / "others").exists()


def test_swapping_without_exchange(tmp_path, monkeypatch):
    """Without the function in the C library, three renames do the same."""

    class Library:
        """A C library without the function."""

    monkeypatch.setattr("ctypes.CDLL", lambda _: Library())
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    swap(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one/other").exists() and (tmp_path / "other/one").exists()
    assert len([*tmp_path.iterdir()]) == 2
