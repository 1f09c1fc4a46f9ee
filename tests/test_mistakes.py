"""Errors: one or two lines, the right exit code, and nothing half done."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from conftest import interrupt, write_timm_directory
from runs import QUICK


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slice", "tiny", "--ratio", "0.46875"], "nearest trained: 0.25, 0.5"),
        (["slice", "tiny", "--ratio", "0"], "ratio 0 is not a width"),
        (["slice", "tiny", "--ratio", "1.5"], "ratio 1.5 is not a width"),
        (["slice", "tiny", "--ratio", "half"], "'half' is not a ratio"),
        (["slice", "nowhere", "--ratio", "0.5"], "nowhere does not exist"),
        (["slice", "--ratio", "0.5"], "no run yet"),
        (["slice", "tiny", "--ratio", "0.5", "-o", "tiny"], "holds what is read"),
        (["slice", "tiny", "--ratio", "0.5", "-o", "tiny", "--force"], "holds what is read"),
        (["convert", "tiny-timm", "-o", "tiny-timm", "--force"], "holds what is read"),
        (
            ["convert", "deit_s", "--weights", "tiny-timm/model.safetensors", "-o", "tiny-timm", "--force"],
            "holds what is read",
        ),
        (["finetune", "tiny", "--data", "digits", "-o", "tiny", "--force"], "holds what is read"),
        (["finetune", "tiny/model.safetensors", "--data", "digits", "-o", "tiny"], "holds what is read"),
        (["convert", "tiny-timm", "--order", "importance", "--data", "torch/cifar10"], "--data-dir"),
        (["slice", "tiny", "--ratio", "0.5", "-o", "tiny-timm"], "not empty"),
        (["convert", "deit_s", "--data", "digits", "--order", "none"], "--data needs --order importance"),
        (["convert", "./missing"], "missing does not exist"),
        (["convert", "local-dir:missing"], "missing does not exist"),
        (["convert", "missing.pth"], "missing.pth does not exist"),
        (["convert", "missing.pth", "--ema"], "missing.pth is no file"),
        (["convert", "."], "no config.json"),
        (["slice", "tiny", "--ratio", "0.5", "--max-gmacs", "1"], "Give either a width"),
        (["finetune", "--resume", "run", "--lr", "3"], "go with --resume"),
        (["eval", "tiny", "--data", "nowhere"], "no such folder"),
        (["eval", "tiny", "--data", "digits"], "3 classes, the data has 10"),
        (["eval", "tiny", "--data", "digits", "--device", "tpu9"], "cannot be used here"),
        (["convert", "deit_s", "--ratios", "0.3"], "not a whole number"),
        (["convert", "deit_s"], "no network"),
        (["convert", "deit_s", "-o", "tiny"], "not empty"),
        (["convert", "deit_s", "-o", "."], "is the working directory, or holds it"),
        (["convert", "deit_s", "-o", "..", "--force"], "is the working directory, or holds it"),
        (["slice", "tiny", "--ratio", "0.5", "-o", "/"], "is the working directory, or holds it"),
        (["push", "tiny", "org/new", "--dry-run", "-o", "."], "is the working directory, or holds it"),
        (["export", "tiny", "--all", "-o", ".", "--force"], "is the working directory, or holds it"),
        (["export", "tiny", "--ratio", "0.5", "-o", "."], ". is a directory"),
        (["convert", "deit_s", "-o", "x" * 230], "has 230 bytes, more than 200"),
        (["convert", "deit_s", "-o", "tiny/config.json/x"], "tiny/config.json: Not a directory"),
        (["finetune", "tiny", "--data", "nowhere"], "no such folder"),
        (["finetune", "deit_s", "--data", "nowhere"], "no such folder"),
        (["finetune", "deit_s", "--data", "torch/cifar10"], "--data-dir"),
        (["compare", "deit_s", "--data", "nowhere"], "no such folder"),
        (["convert", "deit_s", "--order", "importance", "--data", "nowhere"], "no such folder"),
        (["convert", "local-dir:tiny/model.safetensors"], "is a file, not a directory"),
        (["slice", "tiny/model.safetensors", "--ratio", "0.5"], "is a file"),
        (["finetune", "--resume", "nowhere"], "nothing to resume"),
        (["finetune", "tiny"], "--data DIR"),
        (["finetune", "tiny", "--data", "digits", "--method", "separate"], "one width a run"),
        (["finetune", "tiny", "--data", "digits", "--lr", "fast"], "--lr"),
        (["finetune", "tiny", "--data", "digits", "--method", "magic"], "magic"),
        (["bench", "tiny", "--ratio", "0.3"], "not trained"),
        (["bench", "tiny", "--runs", "0"], "--runs"),
        (["convert", "headless", "--task", "classification"], "no classifier. Add one"),
        (["bench", "tiny", "--csv", "nowhere/rows.csv"], "there is no directory nowhere"),
        (["eval", "tiny", "--data", "torch/cifar10"], "--data-dir"),
        (["eval", "tiny", "--data", "digits", "-b", "0"], "--batch-size"),
        (["finetune", "tiny", "--resume", "run"], "go with --resume"),
        (["finetune", "--resume", "run", "--force"], "go with --resume"),
        (["finetune", "tiny", "--data", "digits", "--seed", "-1"], "--seed"),
        (["finetune", "tiny", "--data", "digits", "--opt", "magic", "-j", "0"], "timm refuses"),
        (["info", "--nonsense"], "nonsense"),
    ],
)
def test_mistakes_end_with_a_remedy_and_exit_code_2(scala, tiny, words, message):
    if "headless" in words:
        write_timm_directory(Path("headless"), num_classes=0)
    answer = scala(*words)
    assert answer.code == 2 and answer.stdout == ""
    assert message in answer.told
    assert "Traceback" not in answer.stderr
    if answer.stderr.startswith("error:"):
        assert len(answer.stderr.splitlines()) <= 2
    assert not list(Path().glob(".*")), "half-written output"


def test_one_class_teaches_nothing(scala, tiny, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    for part in ("train", "val"):
        for name in ("blue", "green"):
            shutil.rmtree(folder / part / name)
    answer = scala("finetune", tiny, "--data", folder, *QUICK)
    assert answer.code == 2 and "one class only, 'red'" in answer.stderr and not Path("runs").exists()


def test_two_runs_that_begin_in_one_second(scala, tiny, photos, monkeypatch):
    places = []

    def stop(_net, _record, _settings, run, *_rest):
        places.append(run.path)
        assert run.path.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("time.strftime", lambda *_: "NOW")
    monkeypatch.setattr("scala_cli.training.finetune.finetune", stop)
    Path("runs/tiny-NOW").mkdir(parents=True)
    assert scala("finetune", tiny, "--data", photos, *QUICK).code == 130
    assert places == [Path("runs/tiny-NOW-2")]
    assert [path.name for path in Path("runs").iterdir()] == ["tiny-NOW"], "nothing came of the second"


def test_a_run_without_an_epoch_names_the_way_on(scala, tiny, photos, monkeypatch):
    monkeypatch.setattr("scala_cli.training.loop.evaluate", interrupt)
    scala("finetune", tiny, "--data", photos, "-o", "run", *QUICK)
    answer = scala("info", "run")
    assert answer.code == 2 and "scala finetune --resume run" in answer.stderr


def test_a_full_disk(scala, tiny, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "half/model.safetensors")

    monkeypatch.setattr("scala_cli.models.checkpoint.save_for_hf", full)
    answer = scala("slice", tiny, "--ratio", "0.5", "-o", "half")
    assert answer.code == 2 and "No space left" in answer.stderr and "Free some space" in answer.stderr
    assert not Path("half").exists() and not list(Path().glob(".*"))


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "tiny", "--data", "DATA", "-o", "fixed/run", *QUICK, "--ratios", "0.5,1"),
        ("slice", "tiny", "--ratio", "0.5", "-o", "fixed/half"),
        ("export", "tiny", "--ratio", "0.5", "--format", "pt2", "-o", "fixed/half.pt2"),
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_written_to(scala, as_a_user, tiny, photos, words):
    fixed = Path("fixed")
    fixed.mkdir()
    fixed.chmod(0o555)
    answer = scala(*(photos if word == "DATA" else word for word in words))
    assert answer.code == 2 and "Traceback" not in answer.stderr
    assert "Permission denied" in answer.stderr and "Check the path and its permissions" in answer.stderr
    assert not list(fixed.iterdir())


@pytest.mark.parametrize(
    ("taker", "code", "told"), [("nobody", 0, ""), ("/dev/full", 2, "No space left on device")]
)
def test_stdout_that_is_closed_or_full(forks, tiny, taker, code, told):
    """A closed pipe is no error, a full disk is one; other files are written in both cases."""
    if taker == "nobody":
        reader, writer = os.pipe()
        os.close(reader)
    elif not Path(taker).exists():
        pytest.skip("this system has no disk that is always full")
    else:
        writer = os.open(taker, os.O_WRONLY)
    with os.fdopen(writer, "w") as stdout:
        done = forks.run("bench", "tiny", "--runs", 1, "-q", "--csv", "rows.csv", stdout=stdout)
    assert done.returncode == code and told in done.stderr and "Traceback" not in done.stderr
    assert bool(done.stderr) is bool(told) and Path("rows.csv").is_file()


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("slice", "tiny", "--ratio", "0.5", "-o", "new"), "scala_cli.deploy.slice.write_timm"),
        (("export", "tiny", "--ratio", "0.5", "-o", "new.onnx"), "scala_cli.deploy.export.opened"),
        (("export", "tiny", "--all", "-o", "new"), "scala_cli.deploy.export.opened"),
        (("push", "tiny", "org/new", "--dry-run"), "scala_cli.deploy.push.model_card"),
        (("eval", "tiny", "--data", "digits"), "scala_cli.evaluate.validation_loader"),
        (("bench", "tiny"), "scala_cli.bench.run.warm_up"),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_ctrl_c_leaves_nothing_half_done(scala, tiny, monkeypatch, words, where):
    monkeypatch.setattr(where, interrupt)
    before = sorted(Path().rglob("*"))
    answer = scala(*words)
    assert answer.code == 130 and "interrupted" in answer.stderr and answer.stdout == ""
    assert sorted(Path().rglob("*")) == before


def test_our_own_bugs_exit_with_1(scala, tiny, monkeypatch):
    def bug(*_args, **_kwargs):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("scala_cli.cost.cost", bug)
    answer = scala("info", tiny)
    assert answer.code == 1 and "bug in scala: ZeroDivisionError: oops" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert "Traceback" in scala("info", tiny, "--debug").stderr
