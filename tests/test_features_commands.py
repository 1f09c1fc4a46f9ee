"""The features task as a user runs it: folders of images, commands and mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import build, write_timm_directory
from huggingface_hub import ModelCard
from PIL import Image
from runs import QUICK, Listener, backbone, settings

from scala_cli.errors import CheckpointError, DataError
from scala_cli.models.checkpoint import Record, load_with_record, save
from scala_cli.models.features import for_task
from scala_cli.models.in_memory import slimmable
from scala_cli.models.source import open_model
from scala_cli.settings import RunSettings
from scala_cli.slicing.point import Point, parse_points
from scala_cli.tasks import task_named

TASK = task_named("features")


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_some_images_judge_where_there_is_no_validation_part(pictures, holdout):
    listener = Listener()
    how = settings(pictures, run=RunSettings(holdout=holdout))
    training, validation = TASK.open(how, ["a", "b"], listener)
    assert len(validation) == (6 if holdout else 2) and len(training) + len(validation) == 24
    names = [{split.samples.name(n) for n in range(len(split))} for split in (training, validation)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 24
    assert training.classes == validation.classes == ()
    assert any(f"{len(validation)} of the 24 images validate" in note for note in listener.notes)
    assert not any("labels" in note for note in listener.notes)


def test_at_most_a_thousand_images_judge(pictures, monkeypatch):
    monkeypatch.setattr("scala_cli.tasks.features.MOST", 1)
    assert len(TASK.open(settings(pictures))[1]) == 1


def test_parts_are_kept_and_labels_are_not_used(photos):
    listener = Listener()
    training, validation = TASK.open(settings(photos), None, listener)
    assert (len(training), len(validation)) == (12, 6) and training.classes == ()
    assert {training.samples[n][1] for n in range(12)} == {0}
    assert listener.notes.count("labels are not used: features need none.") == 1
    assert len(TASK.judged(backbone().spec, str(photos), None)) == 6
    training, validation = TASK.open(settings("digits"))
    assert len(training) + len(validation) == 1797 and training.classes == ()


@pytest.mark.parametrize(("count", "message"), [(0, "holds no images"), (1, "holds one image only")])
def test_a_folder_with_too_few_images(count, message):
    Path("few").mkdir()
    for number in range(count):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(f"few/{number}.png")
    with pytest.raises(DataError, match=message):
        TASK.open(settings("few"))


def test_mistakes_of_a_features_run(scala, pictures, photos, tiny):
    write_timm_directory(Path("backbone"), num_classes=0)
    Path("alike").mkdir()
    for number in range(12):
        Image.new("RGB", (9, 9), (40, 90, 10)).save(f"alike/{number}.png")
    Path("empty").mkdir()
    Path("one").mkdir()
    shutil.copy("alike/0.png", "one")
    refused = {
        ("--data", "empty"): "holds no images",
        ("--data", "one"): "holds one image only",
        ("--data", "alike"): "the images are all the same to the model",
        ("--data", pictures, "--teacher", "none"): "has to teach. Leave out --teacher.",
        ("--data", pictures, "--class-token", 0, "--patch-tokens", 0): "count in the loss",
        ("--data", pictures, "--sizes", "8,16", "--mask-patches", 1): "Leave out --mask-patches.",
        (
            "--data",
            pictures,
            "--mask-patches",
            1,
            "--method",
            "supervit",
            "--sizes",
            16,
        ): "mask_patches has no effect",
        ("--data", pictures, "--mask-patches", 1, "--method", "sit"): "mask_patches has no effect",
    }
    for words, message in refused.items():
        answer = scala("finetune", "backbone", *words, *QUICK, "-o", "run")
        assert answer.code == 2 and message in answer.told, answer.told
        assert not Path("run").exists()
    assert scala("convert", "backbone", "--scratch", "-o", "random").code == 0
    answer = scala("finetune", "random", "--data", pictures, *QUICK, "-o", "run")
    assert answer.code == 2 and "there are no features to learn" in answer.told
    assert scala("convert", "backbone", "-o", "net").code == 0
    answer = scala("eval", "net", "--data", pictures, "-j", 0, "--cascade", "0.5,1")
    assert answer.code == 2 and "a cascade needs classes" in answer.told and "--task" in answer.told
    answer = scala("eval", tiny, "--data", photos, "-j", 0, "--against", "net")
    assert answer.code == 2 and "--against compares features" in answer.told
    answer = scala("slice", "net", "--min-top1", 50)
    assert answer.code == 2 and "it has no top-1. Leave out --min-top1." in answer.told
    write_timm_directory(Path("other"), num_classes=0, embed_dim=64)
    answer = scala("eval", "net", "--data", pictures, "-j", 0, "--against", "other")
    assert answer.code == 2 and "32 for each of 16 patches, the other one 64 for each of 16" in answer.told


def test_a_backbone_and_a_folder_as_a_user_has_them(scala, pictures):
    """Trains, evaluates, slices, times and publishes without any classes."""
    write_timm_directory(Path("backbone"), num_classes=0)
    told = scala("finetune", "backbone", "--data", pictures, *QUICK, "-o", "run", "--json")
    assert told.code == 0, told.told
    points = told.json["points"]
    assert [*points[0]] == ["ratio", *TASK.columns] and points[-1]["r2"] > 0.9
    assert scala("info", "run", "--json").json["points"][0]["r2"] == points[0]["r2"]
    evaluated = scala("eval", "run", "--data", pictures, "-j", 0, "--json").json
    assert len(evaluated["points"]) == 4 and evaluated["points"][0]["images"] == 24
    against = scala("eval", "run", "--data", pictures, "-j", 0, "--against", "backbone", "--json").json
    assert evaluated["points"][-1]["r2"] == 1 > against["points"][-1]["r2"] > 0.9
    assert scala("slice", "run", "--ratio", "0.5", "-o", "half").code == 0
    words = ("--img-size", 24, "--ratios", "0.5,1", "-o", "larger")
    assert scala("convert", "backbone", *words).code == 0  # the reference is opened at the same size
    larger = scala("eval", "larger", "--data", pictures, "-j", 0, "--against", "backbone", "--json").json
    assert larger["points"][-1]["r2"] == 1
    assert scala("slice", "run", "--max-gmacs", 1, "-o", "best", "--json").json["candidates"][0]["r2"]
    timed = scala("bench", "run", "--data", pictures, "-j", 0, "--runs", 1, "-b", 2, "--json").json
    assert timed["points"][0]["r2"] == pytest.approx(evaluated["points"][0]["r2"], abs=1e-2)
    assert scala("push", "run", "org/net", "--dry-run", "-o", "pushed").code == 0
    for place in ("pushed", "half"):
        card = ModelCard.load(f"{place}/README.md")
        assert card.data.pipeline_tag == "image-feature-extraction" and card.data.license == "apache-2.0"
        assert "R² of patches" in card.text and "top-1" not in card.text and "$" not in card.text
    assert f"{points[0]['r2']:.4f}" in Path("pushed/README.md").read_text()
    again, record = open_model("half", parse_points("0.5,1"))
    assert again.spec.features and record.task == "features"


def test_steps_of_features_are_timed(scala):
    write_timm_directory(Path("backbone"), num_classes=0)
    rows = scala("bench", "backbone", "--train", "-b", 2, "--runs", 1, "--json").json["steps"]
    assert [row["step"] for row in rows] == ["timm", "scala, taught"] and rows[1]["cost_ratio"] > 1


def test_methods_side_by_side(scala, pictures):
    write_timm_directory(Path("backbone"), num_classes=0)
    words = ("--methods", "scala,separate", "--seeds", 1, "--ratios", "0.5,1", *QUICK, "--json")
    rows = scala("compare", "backbone", "--data", pictures, *words).json["arms"]
    assert [row["arm"] for row in rows] == ["scala", "separate"]
    assert all(0 < point["r2"] <= 1 for row in rows for point in row["points"])
    refused = scala("compare", "backbone", "--data", pictures, *words, "--without", "teacher", "-o", "two")
    assert refused.code == 2 and "it has to teach" in refused.told


def test_a_classifier_is_left_out_where_features_are_the_task(scala, photos, images):
    vit = write_timm_directory(Path("model"), num_classes=3)
    told = scala("convert", "model", "--task", "features", "--order", "importance", "-o", "net", "--json")
    assert told.code == 0 and told.json["task"] == "features" and told.json["max_abs_diff"] <= 1e-4
    net, record = load_with_record(Path("net"))
    assert net.spec.features and record.task == "features" and net.vit.head.out_features == 32
    vit.reset_classifier(0)
    with torch.no_grad():
        assert (net(images) - vit(images)).abs().max() <= 1e-4
    words = ("--task", "features", "--data", photos, *QUICK)
    assert scala("finetune", "model", *words, "-o", "run").code == 0
    trained, record = load_with_record(Path("run/best"))
    assert trained.spec.features and "--task features" in record.provenance["command"]
    for more in (("--num-classes", 4), ("--labels", "net/config.json")):
        assert scala("convert", "model", "--task", "features", *more, "-o", "no").code == 2


def test_a_family_that_was_slimmed_with_its_classifier_keeps_it():
    vit, _ = build()
    net, record = for_task(slimmable(vit), Record(), "features")
    assert net.spec.features and record.task == "features"
    for slimmed in (Record(order="importance"), Record(method="scala")):
        with pytest.raises(CheckpointError, match="was slimmed with its classifier"):
            for_task(slimmable(vit), slimmed, "features")


def test_a_backbone_saved_before_it_had_a_task_is_one_for_features():
    save(backbone(), Record(), Path("net"))
    _, record = load_with_record(Path("net"))
    assert record.task == "features"


def test_metrics_that_are_not_defined_are_kept():
    points = [{"ratio": 0.5, "r2": 0.5, "cosine": 0.5, "class_r2": None, "class_cosine": 1.0}]
    save(backbone(), Record(task="features", metrics=points), Path("net"))
    assert load_with_record(Path("net"))[1].metrics == points


@pytest.mark.parametrize("tokens", ["merge", "drop"])
def test_features_are_learnt_with_fewer_tokens(scala, pictures, tokens):
    write_timm_directory(Path("backbone"), num_classes=0)
    words = ("--ratios", "0.5,1", "--keeps", "0.7,1", "--tokens", tokens)
    told = scala("finetune", "backbone", "--data", pictures, *words, *QUICK, "-o", "run", "--json").json
    found = {Point.of_row(row).label: row["r2"] for row in told["points"]}
    assert [*found] == ["0.5~0.7", "0.5", "1~0.7", "1"]
    assert found["1~0.7"] < found["1"] and found["1"] > 0.9


def test_features_are_learnt_at_smaller_sizes(scala, pictures):
    """Every point of the grid is judged, from command to slice."""
    write_timm_directory(Path("backbone"), num_classes=0)
    words = ("--sizes", "8,16", "--keeps", "0.5,1", "--tokens", "merge", "--ratios", "0.5,1")
    told = scala("finetune", "backbone", "--data", pictures, *words, *QUICK, "-o", "run", "--json")
    assert told.code == 0, told.told
    rows = json.loads(told.stdout)["points"]
    assert len(rows) == 8 and all(row["r2"] is not None for row in rows)
    again = scala("eval", "run/last", "--data", pictures, "-j", 0, "--no-amp", "--json")
    wanted = pytest.approx([row["r2"] for row in again.json["points"]], rel=1e-3)
    timed = scala("bench", "run/last", "--data", pictures, "--runs", 1, "-b", 1, "--json")
    assert [row["r2"] for row in timed.json["points"]] == wanted
    rounded = scala("eval", "run/last", "--data", pictures, "-j", 0, "--amp", "--json")
    assert rounded.code == 0 and len(rounded.json["points"]) == 8, rounded.told
    assert scala("slice", "run", "--ratio", "0.5@8", "-o", "small").code == 0
    small = timm.create_model("local-dir:small", pretrained=True)
    assert small(torch.zeros(1, 3, 8, 8)).shape == (1, 32)
