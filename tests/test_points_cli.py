"""Commands with sizes and shares of tokens: untrained, trained by supervit, resumed, exported, timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import build, write_timm_directory
from PIL import Image
from runs import QUICK

from scala_cli.deploy.export import export, export_all
from scala_cli.models.block import MergeBlock
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.in_memory import slimmable as of
from scala_cli.models.points import in_grid, with_untrained
from scala_cli.settings import GridSettings, TokenSettings

SUPER = ("--method", "supervit", "--sizes", "8,16", "--keeps", "0.5,1")
KINDS = ["deit", "class token, registers", "no class token, registers", "qk_norm"]


@pytest.fixture
def images():
    return torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.no_cover
@pytest.mark.parametrize("rule", ["drop", "merge"])
@pytest.mark.parametrize(
    "target", ["half.onnx", "half.pt2", "half.xml", "half.pte"], ids=["onnx", "pt2", "openvino", "executorch"]
)
def test_points_with_fewer_tokens_as_files_of_other_runtimes(target, rule, images):
    kind = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino", ".pte": "executorch"}[Path(target).suffix]
    vit, _ = build("deit", depth=4)
    net, (point,) = with_untrained(of(vit).eval(), Record(), ["0.5~0.7"], TokenSettings(rule))
    told = export(net, point, kind, Path(target), images)
    assert told["keep"] == 0.7 and told["max_abs_diff"] <= 1e-4


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.no_cover
@pytest.mark.parametrize("rule", ["drop", "merge"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_fewer_tokens_as_pt2(kind, rule, images):
    vit, _ = build(kind, depth=4)
    net, (point,) = with_untrained(of(vit).eval(), Record(), ["1@8~0.7"], TokenSettings(rule))
    assert export(net, point, "pt2", Path("half.pt2"), net.fitting(images, point))["max_abs_diff"] <= 1e-5


@pytest.mark.usefixtures("elsewhere")
def test_every_point_over_one_copy_of_the_weights(images):
    vit, _ = build("deit", depth=4)
    net = in_grid(of(vit, "1").eval(), GridSettings("8,16", "0.5,1"))
    save(net, Record(), Path("family"))
    told = export_all(load("family"), Path("family"), Path("graphs"), images)
    assert [row["size"] for row in told["points"]] == [8, 8, 16, 16]
    assert max(row["max_abs_diff"] for row in told["points"]) <= 1e-4


def test_a_pretrained_model_with_fewer_tokens_needs_no_training(scala, photos):
    write_timm_directory(Path("vit"), num_classes=3, depth=4)
    asked = ("--ratio", "1", "--ratio", "1~0.7", "--json")
    done = scala("eval", "vit", "--data", photos, *asked, "-j", 0)
    assert done.code == 0, done.stderr
    assert [row.get("keep") for row in done.json["points"]] == [None, 0.7]
    assert "tokens are merged without training" in done.told
    timed = scala("bench", "vit", *asked, "--runs", 2, "-b", 1)
    assert timed.code == 0, timed.stderr
    whole, fewer = timed.json["points"]
    assert fewer["gmacs"] < whole["gmacs"]
    cut = scala("slice", "vit", "--ratio", "1~0.7", "--tokens", "drop", "-o", "cut")
    assert cut.code == 0 and "import scala_cli" in cut.told, cut.stderr
    again = scala("convert", "cut", "-o", "again")
    assert again.code == 2 and "a slice with fewer tokens" in again.told
    file = scala("export", "vit", "--ratio", "1~0.7", "--format", "pt2", "-o", "file.pt2")
    assert file.code == 0, file.stderr


LOAD = """
import {first}, {second}, json
import torch
model = timm.create_model("local-dir:cut", pretrained=True).eval()
torch.manual_seed(0)
print(json.dumps(model(torch.randn(1, 3, 16, 16))[0].tolist()))
"""


def test_timm_knows_the_slice_whichever_is_imported_first(scala):
    vit = write_timm_directory(Path("vit"), depth=4)
    assert scala("slice", "vit", "--ratio", "1~0.7", "-o", "cut").code == 0
    net, _ = with_untrained(of(vit, "1"), Record(), ["1~0.7"], TokenSettings())
    torch.manual_seed(0)
    with torch.no_grad():
        wanted = net(torch.randn(1, 3, 16, 16), "1~0.7")[0]
    for order in (("timm", "scala_cli"), ("scala_cli", "timm")):
        code = LOAD.format(first=order[0], second=order[1])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), wanted, atol=1e-5, rtol=1e-4)


def test_supervit_trains_judges_cuts_and_goes_on(scala, photos, tmp_path):
    write_timm_directory(Path("vit"), num_classes=3, depth=4, img_size=16)
    whole = scala("finetune", "vit", "--data", photos, *SUPER, *QUICK, "--epochs", 2, "-o", "whole")
    assert whole.code == 0, whole.stderr
    net = load(tmp_path / "whole")
    assert [str(p) for p in net.points] == ["1@8~0.5", "1@8", "1@16~0.5", "1@16"]
    start = load(tmp_path / "whole" / "start")
    assert not torch.equal(net.positions["@8:pos_embed"], start.positions["@8:pos_embed"])
    asked = ("--data", photos, "-j", 0, "--json")
    judged = scala("eval", "whole", *asked)
    assert [(row["size"], row.get("keep")) for row in judged.json["points"]] == [
        (8, 0.5),
        (8, None),
        (16, 0.5),
        (16, None),
    ]
    cascade = scala("eval", "whole", *asked, "--cascade", "1@8~0.5,1@16", "--threshold", 0.5)
    assert cascade.code == 0 and cascade.json["cascade"] == ["1@8~0.5", "1@16"]
    assert scala("eval", "whole", *asked, "--ratio", "1@8~0.6").code == 2
    assert scala("eval", "whole", *asked, "--tokens", "merge").code == 2
    assert scala("slice", "whole", "--ratio", "1@8", "-o", "small").code == 0
    assert timm.create_model("local-dir:small", pretrained=True).patch_embed.img_size == (8, 8)
    timed = scala("bench", "whole", "--json", "--runs", 2, "-b", 1)
    assert len(timed.json["points"]) == 4 and timed.json["points"][0]["size"] == 8


def test_an_interrupted_supervit_ends_with_the_same_weights(scala, photos, tmp_path, monkeypatch):
    from scala_cli.training import loop

    write_timm_directory(Path("vit"), num_classes=3, depth=4)
    words = ("finetune", "vit", "--data", photos, *SUPER, *QUICK, "--save-every-steps", 1)
    assert scala(*words, "-o", "whole").code == 0
    real, calls = loop.Run.write_state, []

    def stop(self, state):
        real(self, state)
        calls.append(state)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "write_state", stop)
    assert scala(*words, "-o", "parts").code == 130
    monkeypatch.setattr(loop.Run, "write_state", real)
    assert scala("finetune", "--resume", "parts").code == 0
    one, two = (load(tmp_path / name / "last").state_dict() for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sizes", "10,16"), "not a multiple of the patch"),
        (("--sizes", "big"), "are no sizes in pixels"),
        (("--keeps", "0,1"), "are no shares of tokens"),
        (("--keeps", "0.5"), "learns from the point of its size"),
        (("--drop-blocks", "1,9"), "the model has blocks 1 to 4"),
        (("--drop-blocks", "x"), "no numbers of blocks"),
        (("--keeps", "1", "--tokens", "merge"), "nothing to merge or drop"),
        (("--ratios", "0.5,1"), "trains one width"),
    ],
)
def test_mistakes(scala, photos, words, message):
    write_timm_directory(Path("vit"), num_classes=3, depth=4)
    done = scala("finetune", "vit", "--data", photos, "--method", "supervit", *words, *QUICK, "-o", "run")
    assert done.code == 2 and message in done.told, done.stderr
    assert not Path("run").exists()


def test_images_that_are_enlarged_are_told(scala):
    write_timm_directory(Path("vit"), num_classes=10, depth=2)
    done = scala("eval", "vit", "--data", "digits", "--ratio", "1@8", "--ratio", "1@16", "-j", 0)
    told = "images looked at are smaller than 16 pixels (the smallest 8): they are enlarged"
    assert done.code == 0 and told in done.told, done.stderr


def test_one_small_image_among_large_ones_is_told(scala):
    write_timm_directory(Path("vit"), num_classes=2, depth=2)
    for number, side in enumerate((32, 32, 8, 32)):
        folder = Path("mixed", "val", str(number % 2))
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (number * 50, 0, 0)).save(folder / f"{number}.png")
    done = scala("eval", "vit", "--data", "mixed", "--ratio", "1@24", "-j", 0)
    assert done.code == 0 and "1 of 4 images looked at are smaller than 24 pixels" in done.told, done.stderr


def test_a_size_is_judged_on_images_decoded_at_it_as_its_slice_is(scala):
    write_timm_directory(Path("vit"), num_classes=10, depth=2)
    points = ("--ratio", "1@8", "--ratio", "1@16", "--data", "digits", "-j", 0, "--json")
    direct = json.loads(scala("eval", "vit", *points).stdout)["points"]
    resized = json.loads(scala("eval", "vit", *points, "--resized").stdout)["points"]
    scala("slice", "vit", "--ratio", "1@8", "-o", "small")
    (alone,) = json.loads(scala("eval", "small", "--data", "digits", "-j", 0, "--json").stdout)["points"]
    assert [direct[0][name] for name in ("top1", "top5")] == [alone[name] for name in ("top1", "top5")]
    assert direct[0] != resized[0] and direct[1] == resized[1]
    timed = json.loads(scala("bench", "vit", *points, "--runs", 1, "-b", 1, "--no-amp").stdout)["points"]
    exact = json.loads(scala("eval", "vit", *points, "--no-amp").stdout)["points"]
    assert [row["top1"] for row in timed] == [row["top1"] for row in exact]


def test_bench_measures_8_bits_of_every_size(scala):
    write_timm_directory(Path("vit"), num_classes=10, depth=2)
    points = ("--ratio", "1@8", "--ratio", "1@16", "--data", "digits", "-j", 0)
    done = scala("bench", "vit", *points, "--int8", "--runs", 1, "-b", 1, "--json")
    assert done.code == 0, done.stderr
    assert all(row["top1"] is not None for row in done.json["points"]) and len(done.json["points"]) == 4


def test_a_family_is_trained_to_merge(scala, photos):
    """--tokens merge is trained, saved, repeated in the command, and kept in slices."""
    write_timm_directory(Path("vit"), num_classes=3, depth=4)
    words = ("--method", "supervit", "--sizes", "16", "--keeps", "0.7,1", "--tokens", "merge")
    done = scala("finetune", "vit", "--data", photos, *words, *QUICK, "-o", "run")
    assert done.code == 0, done.stderr
    net = load("run/last")
    assert net.spec.tokens.kind == "merge" and [str(p) for p in net.points] == ["1~0.7", "1"]
    assert any(isinstance(block, MergeBlock) for block in net.at(net.points[0]).blocks)
    assert (
        "--tokens merge"
        in json.loads(Path("run/last/config.json").read_text())["scala"]["provenance"]["command"]
    )
    cut = scala("slice", "run", "--ratio", "1~0.7", "-o", "cut")
    assert cut.code == 0, cut.stderr
    again = timm.create_model("local-dir:cut", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images), net.eval()(images, "1~0.7"))


def test_every_weight_learns_from_merged_tokens():
    vit, _ = build("deit", depth=4)
    net = in_grid(of(vit, "1"), GridSettings("16", "0.7,1", tokens="merge"))
    net.train()(torch.randn(2, 3, 16, 16), "1~0.7").square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.vit.parameters())
