"""Tar files of images: read in any order, with the samples that webdataset gives."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import interrupt, write_timm_directory
from PIL import Image
from runs import QUICK, Listener, settings
from safetensors.torch import load_file

from scala_cli.data.images import as_rgb
from scala_cli.data.shards import numbered, read_shards
from scala_cli.data.split import open_images, open_split, open_validation_images
from scala_cli.errors import DataError
from scala_cli.tasks import task_named
from scala_cli.training.finetune import resume_run
from scala_cli.training.run import Run

pytestmark = pytest.mark.usefixtures("elsewhere")


def png(colour: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(colour).integers(0, 255, (18, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, **{"mode": "w", **options}) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def shard(path: str, first: int, count: int, classes: int = 0) -> Path:
    members = {}
    for number in range(first, first + count):
        members[f"a/{number:06}.png"] = png(number)
        if classes:
            members[f"a/{number:06}.cls"] = str(number % classes).encode()
    return write_tar(Path(path), members)


def pixels(samples) -> list[bytes]:
    return [as_rgb(samples[number][0], True).tobytes() for number in range(len(samples))]


def test_images_are_those_in_the_files_in_any_order():
    wanted = [as_rgb(Image.open(io.BytesIO(png(n))), True).tobytes() for n in range(7)]
    files = [shard("s/0.tar", 0, 3), shard("s/1.tar", 3, 1), shard("s/2.tar", 4, 3)]
    found = read_shards(files)
    assert len(found) == 7 and pixels(found) == wanted
    assert as_rgb(found[5][0], True).tobytes() == wanted[5] and found.name(3) == "s/1.tar/a/000003.png"
    for data in ("s", "s/{0..2}.tar"):
        split = open_images(data)
        assert pixels(split.samples) == wanted and split.classes == () and split.notes == ()
        assert open_validation_images(data) is None


def test_names_of_several_files_are_those_of_a_shell():
    assert [*numbered("a/{008..011}.tar")] == [f"a/{n}.tar" for n in ("008", "009", "010", "011")]
    assert [*numbered("{0..1}/{9..10}.tar")] == ["0/9.tar", "0/10.tar", "1/9.tar", "1/10.tar"]
    assert [*numbered("a.tar")] == ["a.tar"] and [*numbered("{3..1}.tar")] == []


def test_samples_are_those_of_webdataset():
    webdataset = pytest.importorskip("webdataset")
    members = {
        "x/1.png": png(1),
        "x/1.cls": b"3",
        "x/1.json": b"{}",
        "x.y/2.PNG": png(2),
        "x.y/2.cls": b"12\n",
    }
    file = write_tar(Path("s.tar"), {**members, "2.seg.png": png(3)})
    theirs = [
        (sample["png"], int(sample["cls"]))
        for sample in webdataset.WebDataset(str(file), shardshuffle=False)
        if "png" in sample
    ]
    ours = read_shards([file])
    assert pixels(ours) == [as_rgb(Image.open(io.BytesIO(image)), True).tobytes() for image, _ in theirs]
    assert [int(ours.classes[ours[n][1]]) for n in range(len(ours))] == [label for _, label in theirs]
    assert ours.others == {".json": 1, ".seg.png": 1}


def test_parts_with_class_numbers_train_a_classifier(scala, tiny):
    shard("data/train/0.tar", 0, 8, classes=3)
    shard("data/train/1.tar", 8, 4, classes=3)
    shard("data/val/0.tar", 1, 2, classes=3)  # without class 0
    validation = open_split("data", False)
    assert validation.classes == ("0", "1", "2") and [validation.samples[n][1] for n in range(2)] == [1, 2]
    told = scala("finetune", tiny, "--data", "data", *QUICK, "--ratios", "0.5,1", "-o", "run")
    assert told.code == 0, told.told
    evaluated = scala("eval", "run", "--data", "data", "-j", 0, "--json").json["points"]
    assert [point["images"] for point in evaluated] == [2, 2]
    held = scala("finetune", tiny, "--data", "data/train/{0..1}.tar", "--holdout", 0.25, *QUICK, "-o", "held")
    assert held.code == 0, held.told


def test_a_backbone_learns_from_tar_files(scala):
    write_timm_directory(Path("backbone"), num_classes=0)
    for number in range(3):
        shard(f"s/{number:03}.tar", 8 * number, 8)
    words = ("finetune", "backbone", *QUICK, "--save-every-steps", 1, "--ratios", "0.5,1", "--data")
    told = scala(*words, "s/{000..002}.tar", "-o", "run", "-j", 2)
    assert told.code == 0 and "2 of the 24 images validate" in told.told, told.told
    assert "--data '{000..002}.tar'" in Path("run/best/config.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scala_cli.training.loop.evaluate", interrupt)
        assert scala(*words, "s/{000..002}.tar", "-o", "cut").code == 130
    resume_run(Run(Path("cut")), Listener())
    one, other = (load_file(f"{run}/last/model.safetensors") for run in ("run", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert scala("eval", "run", "--data", "s", "-j", 0, "--json").json["points"][0]["images"] == 24


def test_an_archive_beside_images_is_passed_over():
    shard("photos/0.tar", 0, 3)
    Image.new("RGB", (9, 9)).save("photos/a.png")
    split = open_images("photos")
    assert len(split) == 1 and "1 .tar" in split.notes[0]


def test_class_numbers_are_not_used_for_features():
    shard("s/0.tar", 0, 12, classes=3)
    listener = Listener()
    training, _ = task_named("features").open(settings("s/0.tar"), None, listener)
    assert training.classes == () and {training.samples[n][1] for n in range(len(training))} == {0}
    assert "labels are not used: features need none." in listener.notes


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "no images"),
        ({"a.txt": b"1"}, "no images"),
        ({"a.jpg": b"1", "a.png": b"2"}, "two images of the same name, a.jpg and a.png"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, "a.cls holds no class number"),
    ],
)
def test_tar_files_that_hold_something_else(members, message):
    file = write_tar(Path("s.tar"), members)
    with pytest.raises(DataError, match=message):
        open_images(str(file))


def test_files_that_are_no_tar_files():
    whole = shard("s/0.tar", 0, 3).read_bytes()
    for content in (b"", b"not a tar file" * 99, whole[:700], whole[: len(whole) // 2]):
        Path("bad.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.tar"):
            open_images("bad.tar")
    write_tar(Path("packed.tar"), {"a.png": png(0)}, mode="w:gz")
    with pytest.raises(DataError, match=r"packed\.tar cannot be read as a tar file"):
        open_images("packed.tar")


def test_mistakes_with_tar_files(scala, tiny):
    write_timm_directory(Path("backbone"), num_classes=0)
    shard("s/0.tar", 0, 3)
    shard("s/1.tar", 3, 3, classes=2)
    refused = [
        (("finetune", "backbone", "--data", "s/{0..2}.tar"), "there is no tar file s/2.tar"),
        (("finetune", "backbone", "--data", "s/{2..0}.tar"), "names no file"),
        (("finetune", tiny, "--data", "s/1.tar"), "has no validation part. Give a folder"),
        (("finetune", tiny, "--data", "s/{0..1}.tar", "--holdout", 0.2), "not every image has a class"),
        (("finetune", tiny, "--data", "wds/s"), "Give tar files as --data 'DIR/{000..010}.tar'"),
    ]
    for words, message in refused:
        answer = scala(*words, *QUICK, "-o", "run")
        assert answer.code == 2 and message in answer.told, answer.told
        assert not Path("run").exists()


def test_a_broken_image_is_named(scala):
    write_timm_directory(Path("backbone"), num_classes=0)
    write_tar(Path("s.tar"), {**{f"{n}.png": png(n) for n in range(11)}, "bad.png": png(9)[:60]})
    words = ("finetune", "backbone", "--data", "s.tar", *QUICK, "--ratios", "0.5,1", "-o", "run")
    answer = scala(*words)
    assert answer.code == 2 and "s.tar/bad.png cannot be read" in answer.told
    assert scala(*words, "--on-corrupt", "skip").code == 0
