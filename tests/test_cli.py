"""Commands, as a user runs them."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from conftest import interrupt, write_timm_directory
from runs import QUICK
from safetensors.torch import save_file

import scala_cli
from scala_cli.deploy.slice import default_target
from scala_cli.slicing.point import Point
from scala_cli.training.run import Run
from scala_cli.training.step import Step


def test_convert_tells_what_it_wrote(scala, tmp_path):
    vit = write_timm_directory(tmp_path / "vit", num_classes=3)
    answer = scala("convert", "vit", "--ratios", "0.5,1", "--json")
    assert answer.code == 0 and answer.stderr == ""
    points = answer.json.pop("points")
    assert answer.json["path"] == "vit-slimmable" and answer.json["max_abs_diff"] == 0
    assert answer.json["arch"] == "deit_tiny_patch16_224"
    assert [p["ratio"] for p in points] == [0.5, 1.0]
    assert set(points[0]) == {"ratio", "embed_dim", "num_heads", "params", "gmacs"}
    assert points[1]["params"] == sum(p.numel() for p in vit.parameters())


@pytest.mark.parametrize("images", [[], ["--data"]])
def test_convert_in_order_of_importance(scala, tmp_path, photos, images):
    vit = write_timm_directory(tmp_path / "vit", num_classes=3)
    words = [*images, photos, "--no-calibrate"] if images else []
    answer = scala("convert", "vit", "-o", "ordered", "--order", "importance", *words, "--json")
    assert 0 < answer.json["max_abs_diff"] <= 1e-4
    again = timm.create_model("local-dir:ordered", pretrained=True)
    assert not torch.equal(again.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    assert scala("info", "ordered", "--json").json["order"] == "importance"


def test_from_pretrained_weights_to_a_slice(scala, tiny, photos):
    """Runs finetune, then the other commands without a path."""
    answer = scala("finetune", tiny, "--data", photos, "-o", "runs/mine", *QUICK, "--json")
    assert answer.code == 0
    assert set(answer.json) == {"run", "best", "points", "images_per_sec"}
    assert answer.json["best"] == "runs/mine/best"
    assert [set(p) for p in answer.json["points"]] == [{"ratio", "top1", "top5"}] * 4

    evaluated = scala("eval", "--data", photos, "-j", 0, "--no-amp", "--json").json
    assert [p["top1"] for p in evaluated["points"]] == [p["top1"] for p in answer.json["points"]]
    assert evaluated["points"][0]["images"] == 6 and evaluated["skipped"] == []

    slicing = scala("slice", "--ratio", "0.5", "--json")
    cut = slicing.json
    assert "newest run: runs/mine/best" in slicing.stderr and "not been trained" not in slicing.stderr
    assert set(cut) == {"path", "ratio", "params", "gmacs", "calibrated", "max_abs_diff"}
    assert cut["path"] == "mine-0.5" and cut["max_abs_diff"] <= 1e-5
    assert timm.create_model("local-dir:mine-0.5", pretrained=True).embed_dim == 16

    timed = scala("bench", "--runs", 3, "-b", 2, "--threads", 1, "--csv", "rows.csv", "--json").json
    assert timed["threads"] == 1 and timed["batch_size"] == 2 and timed["device"]
    row = timed["points"][1]
    assert row["params"] == cut["params"] and row["top1"] == answer.json["points"][1]["top1"]
    assert 0 < row["latency_ms"] <= row["latency_ms_p95"]
    assert row["throughput"] == pytest.approx(2000 / row["latency_ms"], rel=0.01)
    assert Path("rows.csv").read_text().startswith("model,ratio,runtime,params,gmacs,latency_ms")

    known = scala("info", "--json").json
    assert known["method"] == "scala" and known["order"] == "importance" and known["classes"] == 3
    assert known["points"][1]["top1"] == row["top1"]


def test_bench_times_steps_of_training_beside_timms(scala, tiny):
    words = ("bench", tiny, "--ratio", "0.5", "--ratio", "1", "--train", "--runs", 2, "-b", 4)
    told = scala(*words, "--csv", "steps.csv", "--json").json
    assert told["batch_size"] == 4 and told["runs"] == 2 and told["precision"] in ("float32", "bfloat16")
    timm, untaught, taught = told["steps"]
    assert [row["step"] for row in told["steps"]] == ["timm", "scala", "scala, taught"]
    assert timm["efficiency"] == timm["cost_ratio"] == 1
    half, full = (point["gmacs"] for point in scala("info", tiny, "--json").json["points"][1::2])
    assert untaught["cost_ratio"] == pytest.approx((half + full) / full, rel=1e-3)
    assert taught["cost_ratio"] == pytest.approx((half + full + full / 3) / full, rel=1e-3)
    for row in (untaught, taught):
        relative = row["images_per_sec"] * row["cost_ratio"] / timm["images_per_sec"]
        assert row["efficiency"] == pytest.approx(relative, rel=0.01)
    assert Path("steps.csv").read_text().startswith("step,images_per_sec,cost_ratio,efficiency")
    assert scala("bench", tiny, "--train", "--data", "digits").code == 2
    assert scala("bench", tiny, "--grad-checkpointing").code == 2
    assert scala("bench", tiny, "--torchcompile").code == 2


def test_bench_measures_accuracy_where_images_are_given(scala, tiny, photos):
    answer = scala("bench", tiny, "--ratio", "0.5", "--runs", 1, "--data", photos, "-j", 0, "--json")
    (row,) = answer.json["points"]
    assert row["top1"] is not None
    (alone,) = scala("eval", tiny, "--data", photos, "--ratio", "0.5", "-j", 0, "--no-amp", "--json").json[
        "points"
    ]
    assert row["top1"] == alone["top1"]


def test_bench_of_a_model_by_name(scala):
    answer = scala("bench", "test_vit", "--ratio", "0.5", "--runs", 1)
    assert answer.code == 0 and "random weights" in answer.stderr
    assert "latency_ms" in answer.stdout


def test_finetune_converts_a_model_first(scala, photos, tmp_path):
    write_timm_directory(tmp_path / "vit", num_classes=3)
    answer = scala("finetune", "local-dir:vit", "--data", photos, "--ratios", "0.5,1", *QUICK)
    assert answer.code == 0
    (run,) = [path for path in Path("runs").iterdir() if path.name != "last"]
    assert run.name.startswith("vit-20")
    assert "epoch 1" in answer.stderr and "next:" in answer.stderr


def test_interrupted_and_resumed(scala, tiny, photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("scala_cli.training.loop.evaluate", interrupt)
        answer = scala("finetune", tiny, "--data", photos, "-o", "run", *QUICK)
    assert answer.code == 130
    assert "scala finetune --resume run" in answer.stderr and "interrupted" in answer.stderr
    resumed = scala("finetune", "--resume", "run", "--json")
    assert resumed.json["run"] == "run" and "resuming after step" in resumed.stderr


def test_quiet_leaves_the_result_alone(scala, tiny, photos):
    answer = scala("finetune", tiny, "--data", photos, *QUICK, "-q")
    assert answer.stderr == "" and "images_per_sec" in answer.stdout


def test_output_without_a_terminal_is_plain(scala, tiny):
    answer = scala("info", tiny)
    head, *rows = answer.stdout.splitlines()[:5]
    assert head.split() == ["ratio", "embed_dim", "num_heads", "params", "gmacs", "top1"]
    assert [row.split()[0] for row in rows] == ["0.25", "0.5", "0.75", "1"]
    assert "\x1b" not in answer.stdout and "│" not in answer.stdout


def test_which_architectures_can_be_sliced(scala):
    told = scala("info", "--architectures", "--json").json
    rows = {row["architecture"]: row for row in told["architectures"]}
    assert told["supported"] == sum(row["supported"] for row in rows.values()) > 0
    assert told["refused"] == len(rows) - told["supported"]
    assert rows["deit_small_patch16_224"] == {
        "architecture": "deit_small_patch16_224",
        "supported": True,
        "why_not": None,
    }
    assert "HybridEmbed" in rows["vit_base_r50_s16_224"]["why_not"]
    assert scala("info", "tiny", "--architectures").code == 2


def test_env(scala):
    facts = scala("env", "--json").json
    assert facts["torch"] == torch.__version__.partition("+")[0] and facts["threads"] >= 1


def test_classes_that_are_called_otherwise(scala, tiny, photos):
    scala("convert", "tiny-timm", "-o", "german", "--labels", named("blau", "gruen", "rot"))
    call = ("--data", photos, "-j", 0, "--json")
    refused = scala("eval", "german", *call)
    assert refused.code == 2 and "--labels" in refused.stderr
    scala("convert", "tiny-timm", "-o", "english", "--labels", named("blue", "green", "red"))
    assert scala("eval", "english", *call).json["points"][0]["images"] == 6
    assert scala("info", "english", "--json").json["classes"] == 3
    for names, message in (
        (("a", "b"), "names 2 classes, the model has 3"),
        (("a", "b", "a"), "'a' more than once"),
    ):
        answer = scala("convert", "tiny-timm", "-o", "none", "--labels", named(*names))
        assert answer.code == 2 and message in answer.stderr and not Path("none").exists()


def named(*classes: str) -> Path:
    Path("labels.txt").write_text("\n".join(classes) + "\n")
    return Path("labels.txt")


def test_a_width_that_was_not_trained_is_told(scala, tiny, monkeypatch):
    for name in ("export", "export_all"):  # only the messages are tested, so no file is written
        monkeypatch.setattr(f"scala_cli.deploy.export.{name}", lambda *_, **__: {})
    scala("convert", "tiny-timm", "-o", "ordered", "--order", "importance")
    for words in (
        ("slice", "-o", "cut"),
        ("export", "-o", "cut.onnx"),
        ("push", "org/cut", "--dry-run", "-o", "pushed"),
    ):
        for net, told in (
            (tiny, "width 0.5 has not been trained: fit it: scala slice"),
            ("ordered", "width 0.5 has not been trained, only reordered: fit it: scala slice"),
        ):
            answer = scala(words[0], net, *words[1:], "--ratio", "0.5", "--force")
            assert answer.code == 0 and told in answer.stderr
            assert "been trained" not in scala(words[0], net, *words[1:], "--ratio", "1", "--force").stderr
    assert "the narrower widths have not been trained" in scala("push", tiny, "org/all", "--dry-run").stderr
    card = Path("all/README.md").read_text()
    assert "The narrower widths have not been trained." in card and "top-1" not in card
    assert "the narrower widths have not" in scala("export", tiny, "--all", "-o", "graphs").stderr
    scala("convert", "tiny-timm", "--scratch", "-o", "random")
    assert "the weights are random" in scala("slice", "random", "--ratio", "1", "-o", "noise").stderr
    Path("tiny/model.safetensors").unlink()
    answer = scala("slice", tiny, "--ratio", "0.5", "-o", "none")
    assert answer.code == 2 and "not been trained" not in answer.stderr, "a mistake is told alone"


def test_a_head_that_convert_made_is_learnt_first(scala, tiny, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    for part in ("train", "val"):
        shutil.rmtree(folder / part / "blue")
    scala("convert", "tiny-timm", "--num-classes", 2, "-o", "two")
    assert "the head is new" in scala("slice", "two", "--ratio", "1", "-o", "cut").stderr
    answer = scala("finetune", "two", "--data", folder, *QUICK, "-o", "run")
    assert "none of its 2 classes has been learnt" in answer.stderr and Path("run/teacher/last").is_dir()
    assert "the head is new" not in scala("slice", "run", "--ratio", "1", "-o", "again").stderr
    compared = scala("compare", "two", "--data", folder)
    assert compared.code == 2 and "every method would learn them anew" in compared.stderr
    unchanged = ("convert", "tiny-timm", "--num-classes", 3, "-o", "three")
    assert scala(*unchanged).code == 0 and scala("slice", "three", "--ratio", "1").stderr.count("new") == 0


def test_a_large_seed(scala, tiny, photos):
    assert scala("finetune", tiny, "--data", photos, *QUICK, "--seed", 123456789).code == 0


def test_bench_names_the_images_it_skipped(scala, tiny, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "copy")
    (folder / "val/red/0.png").write_text("no image")
    words = ("bench", tiny, "--ratio", ".5", "--ratio", "0.50", "--runs", 1, "--data", folder, "-j", 0)
    answer = scala(*words, "--on-corrupt", "skip")
    assert answer.code == 0 and "unreadable and skipped: 1" in answer.stderr


def test_csv_is_written_through_a_link(scala, tiny, tmp_path):
    (tmp_path / "link.csv").symlink_to("rows.csv")
    assert scala("bench", tiny, "--ratio", "1", "--runs", 1, "--csv", "link.csv").code == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "rows.csv").read_text().startswith(
        "model,ratio"
    )


@pytest.mark.parametrize(
    "words",
    [["--help"], ["finetune", "-h"], ["slice"], ["finetune"], ["slice", "--ratio", "7"], ["--version"]],
)
def test_help_and_argument_errors_do_not_wait_for_torch(words, tmp_path):
    script = (
        "import sys\nfrom scala_cli.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'timm', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, *words], check=True, cwd=tmp_path, capture_output=True)


def test_python_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scala_cli", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("scala 0.")


def test_where_a_slice_goes_by_default():
    assert default_target("/x/runs/mine", Path("/x/runs/mine/best"), "0.5") == Path("mine-0.5")
    assert default_target(None, Path("/x/deit"), Point.of("1/3").file_name) == Path("deit-1_3")
    assert default_target("hf-hub:me/vit@main", Path("/x/snapshots/1a2b"), "0.5") == Path("vit-0.5")


def test_json_is_one_document(scala, tiny):
    answer = scala("info", tiny, "--json")
    assert json.loads(answer.stdout)["path"] == str(tiny)


def test_a_run_that_fails_names_the_way_on_which_may_be_computed_otherwise(scala, tiny, photos, monkeypatch):
    real, steps = Step.gather_gradients, []

    def fail(*given):
        steps.append(given)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("Tried to allocate 20 GiB")
        return real(*given)

    monkeypatch.setattr(Step, "gather_gradients", fail)
    answer = scala("finetune", tiny, "--data", photos, "-o", "run", *QUICK, "--grad-checkpointing")
    assert answer.code == 2 and "Then resume: scala finetune --resume run" in answer.stderr
    words = ("--no-grad-checkpointing", "--grad-accum-steps", 2, "--threads", 1)
    assert scala("finetune", "--resume", "run", *words, "-q", "--json").json["run"] == "run"
    told = Run(Path("run")).read_state()["settings"]
    assert told["optimizer"]["grad_accum_steps"] == 2 and not told["optimizer"]["grad_checkpointing"]
    assert told["device"]["threads"] == 1 and told["device"]["device"] == "cpu"


def test_too_little_memory_to_resume_is_no_damaged_file(scala, tiny, photos, monkeypatch):
    assert scala("finetune", tiny, "--data", photos, "-o", "run", *QUICK).code == 0

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    answer = scala("finetune", "--resume", "run")
    assert answer.code == 2 and "not enough memory" in answer.stderr and "damaged" not in answer.stderr


def test_training_from_a_model_at_another_size_and_other_weights(scala, tmp_path, photos):
    vit = write_timm_directory(tmp_path / "vit", num_classes=3)
    state = {name: tensor + 0.01 for name, tensor in vit.state_dict().items()}
    save_file(state, tmp_path / "other.safetensors")
    words = ("--data", photos, *QUICK, "--ratios", "0.5,1", "--order", "none", "-o", "run", "--json")
    sizes = ("--img-size", 24, "--weights", "other.safetensors")
    done = scala("finetune", "vit", *sizes, *words)
    assert done.code == 0, done.stderr
    start = scala_cli.load(tmp_path / "run/start")
    assert start.spec.input_size == (3, 24, 24)
    assert torch.equal(start.vit.head.bias, state["head.bias"])
    command = json.loads((tmp_path / "run/last/config.json").read_text())["scala"]["provenance"]["command"]
    assert "--img-size 24" in command and "other.safetensors" not in command
    again = scala("finetune", "run", "--img-size", 16, "--data", photos, *QUICK, "-o", "more")
    assert again.code == 2 and "its weights and sizes are what they are" in again.told


@pytest.mark.parametrize("kind", ["directory", "backbone", "slice", "name"])
def test_what_the_widths_of_a_model_would_cost(scala, tiny, elsewhere, kind):
    """The weight files are emptied, so reading one would fail."""
    if kind == "slice":
        scala("slice", tiny, "--ratio", "0.5", "-o", "model")
    elif kind in ("directory", "backbone"):
        write_timm_directory(Path("model"), depth=3, num_classes=0 if kind == "backbone" else 3)
    for file in Path().glob("model/*.safetensors"):
        file.write_bytes(b"")
    name = "test_vit" if kind == "name" else "model"
    told = scala("info", name, "--json").json
    full = timm.create_model(name if kind == "name" else "local-dir:model")
    head = full.embed_dim**2 + full.embed_dim if kind == "backbone" else 0  # the identity
    assert told["points"][-1]["params"] == sum(p.numel() for p in full.parameters()) + head
    assert told["arch"] == full.pretrained_cfg["architecture"] and told["classes"] == full.num_classes
    assert [row["ratio"] for row in told["points"]] == [0.25, 0.5, 0.75, 1]


def test_what_the_widths_of_a_weight_file_would_cost(scala, elsewhere):
    vit = timm.create_model("test_vit", num_classes=7)
    torch.save({"model": vit.state_dict(), "args": Namespace(model="test_vit")}, "mine.pth")
    told = scala("info", "mine.pth", "--json").json
    assert told["classes"] == 7
    assert told["points"][-1]["params"] == sum(p.numel() for p in vit.parameters())


def test_info_of_no_model_at_all(scala):
    assert "there is no model 'nothing'" in scala("info", "nothing").told
