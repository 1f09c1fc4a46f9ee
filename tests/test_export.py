"""Exported files: each is run in its own runtime, on a batch of another size than it was traced with."""

import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import KINDS, build, slimmable, write_timm_directory

from scala_cli import formats
from scala_cli.deploy.export import Difference, export, export_all, refuse_difference
from scala_cli.errors import CheckpointError, ScalaError
from scala_cli.models.checkpoint import Record, load, save
from scala_cli.models.in_memory import slimmable as from_memory
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import describe
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.rule import Rule

pytestmark = pytest.mark.usefixtures("elsewhere")
SUFFIXES = {name: form.suffix for name, form in formats.FORMATS.items()}


def labels_in(kind: str, file: Path) -> str:
    """Returns the class names as a user of the runtime reads them."""
    if kind.startswith("onnx"):
        return onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map["labels"]
    if kind == "pt2":
        held = {"labels.json": ""}
        torch.export.load(file, extra_files=held)
        return held["labels.json"]
    if kind == "openvino":
        import openvino

        return openvino.Core().read_model(file).get_rt_info("labels").astype(str)
    from executorch.runtime import Runtime

    return Runtime.get().load_program(file).load_method("labels").execute([])[0]


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_format_is_what_torch_computes(kind, images):
    net = slimmable()
    net = type(net)(net.vit, net.spec.naming(["ant", "bee", "cow", "doe", "eel"]), net.rule)
    file = Path(f"half{SUFFIXES[kind]}")
    told = export(net, 0.5, kind, file, images)
    assert told["bytes"] == sum(path.stat().st_size for path in Path().iterdir())
    assert json.loads(labels_in(kind, file)) == ["ant", "bee", "cow", "doe", "eel"]
    again, seven = formats.FORMATS[kind].open(file), torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        difference = (again(seven) - net(seven, 0.5)).abs().max().item()
    if kind == "onnx-int8":
        assert 1e-4 < difference < 0.2
    else:
        assert max(difference, told["max_abs_diff"]) <= 1e-4 and told["same_top1"] == 1


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deit"])
def test_every_kind_of_vit_as_pt2(kind, images):
    assert export(slimmable(kind, depth=1), 0.5, "pt2", Path("half.pt2"), images)["max_abs_diff"] <= 1e-5


def test_pixels_are_normalised_in_the_file(images):
    net = slimmable(depth=1)
    export(net, 0.5, "onnx", Path("half.onnx"), images, pixels=True)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    cfg = net.spec.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        wanted = net((pixels / 255 - mean) / std, 0.5)
    session = onnxruntime.InferenceSession("half.onnx")
    assert session.get_inputs()[0].type == "tensor(uint8)"
    found = session.run(None, {"images": pixels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        ({"mean": (0.5,) * 3, "std": (0.25,) * 3}, ((0.5,), (0.25,))),
        ({"mean": (0.4,), "std": (0.2,)}, ((0.4,), (0.2,))),
    ],
)
def test_pixels_of_one_channel_are_normalised(cfg, wanted):
    vit, args = build("deit", in_chans=1, depth=1)
    spec = describe(vit, args)
    spec = replace(spec, pretrained_cfg={**spec.pretrained_cfg, **cfg})
    net = SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,1")), spec.num_heads)).eval()
    export(net, 0.5, "onnx", Path("half.onnx"), torch.randn(3, 1, 16, 16), pixels=True)
    pixels = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    (mean,), (std,) = wanted
    with torch.no_grad():
        expected = net((pixels / 255 - mean) / std, 0.5)
    found = onnxruntime.InferenceSession("half.onnx").run(None, {"images": pixels.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_pixels_of_one_channel_with_the_means_of_three_are_refused():
    vit, args = build("deit", in_chans=1)
    spec = describe(vit, args)
    net = SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,1")), spec.num_heads)).eval()
    with pytest.raises(CheckpointError, match="takes 1 channels, but its mean has 3 values") as error:
        export(net, 0.5, "onnx", Path("half.onnx"), torch.randn(3, 1, 16, 16), pixels=True)
    assert error.value.remedy == "normalise_yourself" and not list(Path().iterdir())


@pytest.mark.no_cover
@pytest.mark.parametrize("opset", [formats.OPSETS[0], 18, formats.OPSETS[-1]])
@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_the_opset_asked_for_is_that_of_the_file(kind, opset, images):
    """Also checked by ONNX, for a model with reductions, which opset 17 writes in another way."""
    net = slimmable("average pool, fc_norm", depth=1)
    told = export(net, 0.5, kind, Path("half.onnx"), images, opset=opset)
    written = onnx.load("half.onnx")
    assert told["opset"] == opset == {each.domain: each.version for each in written.opset_import}[""]
    onnx.checker.check_model(written)
    about = onnxruntime.InferenceSession("half.onnx").get_modelmeta().custom_metadata_map
    assert about["opset"] == str(opset)


@pytest.mark.no_cover
def test_every_width_in_an_opset_over_one_copy_of_the_weights(images):
    net = slimmable("average pool, fc_norm", ratios="0.5,1", depth=1)
    save(net, Record(), Path("net"))
    told = export_all(net, Path("net"), Path("all"), images, opset=17)
    assert told["opset"] == 17
    for row in told["points"]:
        written = onnx.load(f"all/{row['file']}")
        assert written.opset_import[0].version == 17 and row["max_abs_diff"] <= 1e-5
        onnx.checker.check_model(written)


def test_an_opset_that_the_exporter_does_not_reach_is_refused(images, monkeypatch):
    whole = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda *args, **options: whole(*args, **{**options, "opset_version": 18})
    )
    with pytest.raises(ScalaError, match="cannot be written in opset 21") as error:
        export(slimmable(), 0.5, "onnx", Path("half.onnx"), images, opset=21)
    assert "opset 18" in error.value.hint and not list(Path().iterdir())


def test_exporting_leaves_the_familys_modes_alone(images):
    net = slimmable(ratios="0.5,1")
    save(net, Record(), Path("net"))
    net.train()
    net.vit.blocks[0].eval()
    before = [module.training for module in net.modules()]
    export_all(net, Path("net"), Path("all"), images)
    export(net, 0.5, "pt2", Path("half.pt2"), images)
    assert [module.training for module in net.modules()] == before


def test_a_file_that_answers_something_else_is_not_left_behind(images, monkeypatch):
    Path("half.pt2").write_text("an earlier one")
    wrong = formats.Format(
        ".pt2", (), formats.write_pt2, lambda file: lambda images: torch.zeros(len(images), 5)
    )
    monkeypatch.setitem(formats.FORMATS, "pt2", wrong)
    with pytest.raises(CheckpointError, match="read back by its runtime differs by"):
        export(slimmable(), 0.5, "pt2", Path("half.pt2"), images, force=True)
    assert [path.name for path in Path().iterdir()] == ["half.pt2"]
    assert Path("half.pt2").read_text() == "an earlier one"


def test_eight_bits_that_change_the_class_of_photographs_are_refused(images, monkeypatch):
    opposite = lambda file: lambda images: -slimmable()(images, 0.5)  # noqa: E731
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    kind = formats.Format(".onnx", (), lambda *given, **_: onnx.save(empty, given[2]), opposite)
    monkeypatch.setitem(formats.FORMATS, "onnx-int8", kind)
    assert export(slimmable(), 0.5, "onnx-int8", Path("noise.onnx"), images)["same_top1"] < 0.9
    with pytest.raises(CheckpointError, match="another class to 100% of the images"):
        export(slimmable(), 0.5, "onnx-int8", Path("half.onnx"), images, real=True)


@pytest.mark.parametrize(("factor", "r2"), [(0.9, 0.99), (0.5, 0.75)])
def test_eight_bits_are_judged_by_the_features_they_keep(images, monkeypatch, factor, r2):
    net = from_memory(build(num_classes=0)[0], "0.5,1")
    with torch.no_grad():
        middle = net(images, 0.5).mean(0)
    closer = lambda file: lambda images: middle + factor * (net(images, 0.5) - middle)  # noqa: E731
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    kind = formats.Format(".onnx", (), lambda *given, **_: onnx.save(empty, given[2]), closer)
    monkeypatch.setitem(formats.FORMATS, "onnx-int8", kind)
    told = export(net, 0.5, "onnx-int8", Path("noise.onnx"), images)
    assert told["r2"] == pytest.approx(r2, abs=1e-4) and "same_top1" not in told
    if r2 < 0.9:
        with pytest.raises(CheckpointError, match=r"gives features whose R² is 0\.75, below 0\.9"):
            export(net, 0.5, "onnx-int8", Path("half.onnx"), images, real=True)
    else:
        export(net, 0.5, "onnx-int8", Path("half.onnx"), images, real=True)


def test_a_backbone_is_compared_on_any_folder_of_images(scala, pictures):
    save(from_memory(build(num_classes=0)[0], "0.5,1"), Record(task="features"), Path("net"))
    words = ("export", "net", "--ratio", "0.5", "--data", pictures, "-j", 0, "--json")
    told = scala(*words, "-o", "half.onnx").json
    assert told["images"] == 24 and told["r2"] == 1


def test_what_a_format_cannot_express_is_named(images, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("no rule for aten::magic")

    kind = formats.Format(".xml", (), fail, formats.open_openvino)
    monkeypatch.setitem(formats.FORMATS, "openvino", kind)
    with pytest.raises(ScalaError, match="openvino cannot express this VisionTransformer"):
        export(slimmable(), 0.5, "openvino", Path("half.xml"), images)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_full_disk(kind, images):
    """Limits files to 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(slimmable(), 0.5, kind, Path(f"half{SUFFIXES[kind]}"), images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(Path().iterdir())


def test_a_missing_package_is_named_with_what_installs_it(images, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ScalaError, match="onnx-int8 needs onnxruntime") as error:
        formats.format_named("onnx-int8")
    assert error.value.hint == "pip install 'scala-vit[onnx]'"
    assert formats.format_named("pt2")


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "rule", [{}, {"layout": "fused", "attn_scale": "fixed", "isolated": True}], ids=["aligned", "fused"]
)
def test_all_widths_over_one_copy_of_the_weights(rule, images):
    net = slimmable(ratios="0.25,0.5,1", **rule)
    save(net, Record(), Path("net"))
    told = export_all(net, Path("net"), Path("all"), images)
    weights = Path("net/model.safetensors")
    assert Path("all/model.safetensors").read_bytes() == weights.read_bytes()
    assert told["bytes"] == sum(path.stat().st_size for path in Path("all").iterdir())
    for row in told["points"]:
        graph = onnx.load(f"all/{row['file']}", load_external_data=False)
        held = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
        assert held == 0 and not re.search(rb"/\w+/\w+\.py", graph.SerializeToString())
        session = onnxruntime.InferenceSession(f"all/{row['file']}")
        found = session.run(None, {"images": images.numpy()})[0]
        with torch.no_grad():
            difference = (torch.from_numpy(found) - net(images, row["ratio"])).abs().max()
        assert difference <= 1e-5 and row["max_abs_diff"] <= 1e-4
    # a graph grows with the blocks, not with their width: it is small next to a real model's weights
    graphs = sum(path.stat().st_size for path in Path("all").glob("*.onnx"))
    deit_s = 22_050_664 * 4
    assert (deit_s + graphs * 12 / len(net.vit.blocks)) / deit_s < 1.1
    with torch.no_grad():
        assert torch.equal(load("all")(images, 0.5), net(images, 0.5))
        assert torch.equal(timm.create_model("local-dir:all", pretrained=True).eval()(images), net(images))


def test_export_as_a_user_runs_it(scala, tiny, photos):
    assert scala("convert", "tiny-timm", "--ratios", "0.5,1", "-o", "two").code == 0
    told = scala("export", tiny, "--ratio", "0.5", "--data", photos, "-j", 0, "--json").json
    assert told["path"] == "tiny-0.5.onnx" and told["images"] == 6 and told["max_abs_diff"] <= 1e-4
    again = scala("export", tiny, "--ratio", "0.5")
    assert again.code == 2 and "exists" in again.stderr and "--force" in again.stderr
    whole = scala("export", "two", "--all", "--json").json
    assert whole["path"] == "two-onnx" and len(whole["points"]) == 2


def test_a_width_of_one_third_has_a_file_name(scala, monkeypatch):
    vit, args = build("deit", embed_dim=48)
    spec = describe(vit, args)
    save(SlimmableViT(vit, spec, Rule(ratios_of(parse_points("1/3")), spec.num_heads)), Record(), Path("odd"))
    for name, place in (("export_all", 2), ("export", 3)):  # only names are tested, so no file is written
        monkeypatch.setattr(
            f"scala_cli.deploy.export.{name}", lambda *given, place=place, **_: {"path": str(given[place])}
        )
    for words, name in ((["--all"], "odd-onnx"), (["--ratio", "1/3"], "odd-1_3.onnx")):
        assert scala("export", "odd", *words, "--json").json["path"] == name


@pytest.mark.parametrize("kind", formats.FORMATS)
@pytest.mark.parametrize("classes", [0, 5])
def test_the_features_of_the_patches_as_a_second_output(kind, classes, images):
    net = from_memory(build("class token, registers", num_classes=classes, depth=1)[0])
    net = order_channels(net, [images, images.flip(0)])
    file, names = Path(f"half{SUFFIXES[kind]}"), ["logits" if classes else "features", "tokens"]
    told = export(net, 0.5, kind, file, images, outputs=",".join(names))
    answers, seven = formats.FORMATS[kind].open(file), torch.randn(7, 3, 16, 16)
    output, tokens = answers(seven)
    with torch.no_grad():
        wanted = net.features(seven, 0.5).tokens
        differences = (output - net(seven, 0.5)).abs().max().item(), (tokens - wanted).abs().max().item()
    assert tokens.shape == (7, 16, 32) and output.shape == (7, classes or 32)
    assert max(differences) < 0.5 if kind == "onnx-int8" else max(*differences, told["max_abs_diff"]) <= 1e-4
    if kind.startswith("onnx"):
        assert [each.name for each in onnxruntime.InferenceSession(str(file)).get_outputs()] == names
    if kind == "openvino":
        import openvino

        assert [output.any_name for output in openvino.Core().read_model(file).outputs] == names


def test_large_outputs_may_differ_by_more_and_no_answer_is_none():
    images = torch.arange(1.0, 9.0).view(2, 4)
    answers = {"near": images + 4e-4, "far": images + 9e-3, "none": images * torch.nan}
    found = {n: Difference.between(lambda x: 4 * x, lambda x, a=a: 4 * a, images) for n, a in answers.items()}
    refuse_difference(found["near"], "onnx", real=True)
    assert found["near"].largest == pytest.approx(1.6e-3, rel=1e-2)
    for name in ("far", "none"):
        with pytest.raises(CheckpointError, match="differs by"):
            refuse_difference(found[name], "onnx", real=True)


def test_a_second_output_that_answers_something_else_is_noticed(images, monkeypatch):
    def opposite(file):
        return lambda images: (net(images, 0.5), -net.features(images, 0.5).tokens)

    net = from_memory(build("deit", num_classes=0)[0])
    monkeypatch.setitem(formats.FORMATS, "pt2", formats.Format(".pt2", (), formats.write_pt2, opposite))
    with pytest.raises(CheckpointError, match="read back by its runtime differs by"):
        export(net, 0.5, "pt2", Path("half.pt2"), images, outputs="features,tokens")
    assert not list(Path().iterdir())


def test_tokens_from_pixels_as_a_user_asks_for_them(scala):
    write_timm_directory(Path("backbone"), num_classes=0)
    assert scala("convert", "backbone", "-o", "net").code == 0
    words = ("--ratio", "0.5", "--outputs", "features,tokens", "--with-preprocess", "-o", "half.onnx")
    told = scala("export", "net", *words, "--json")
    assert told.code == 0 and told.json["max_abs_diff"] <= 1e-4
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    features, tokens = onnxruntime.InferenceSession("half.onnx").run(None, {"images": pixels.numpy()})
    assert features.shape == (5, 32) and tokens.shape == (5, 16, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--ratio", "0.5", "--outputs", "tokens"],
            "no outputs 'tokens'; it has logits,tokens. Try --outputs",
        ),
        (["--ratio", "0.5", "--outputs", "features,tokens"], "no outputs 'features,tokens'"),
        (["--all", "--outputs", "logits,tokens"], "--all writes plain ONNX"),
        ([], "Give one width with --ratio, of 0.25, 0.5, 0.75, 1; or --all."),
        (["--ratio", "0.5", "--all"], "Give one width with --ratio, or --all."),
        (["--ratio", "0.5", "--int8", "--format", "pt2"], "--int8 goes with --format onnx"),
        (["--all", "--format", "pt2"], "--all writes plain ONNX"),
        (["--ratio", "0.5", "--opset", "18", "--format", "pt2"], "--opset goes with --format onnx"),
        (["--ratio", "0.5", "--opset", "16"], "cannot be written in opset 16. Give one from 17 to 25"),
        (["--all", "--opset", "26"], "cannot be written in opset 26. Give one from 17 to 25"),
        (["--ratio", "0.3"], "not trained"),
        (["--ratio", "0.5", "-o", "half.pt"], "does not end in .onnx"),
        (["--ratio", "0.5", "-o", "folder.onnx"], "is a directory"),
        (["--ratio", "0.5", "-o", "nowhere/half.onnx"], "there is no directory nowhere"),
        (["--all", "-o", "tiny"], "holds what is read"),
        (["--ratio", "0.5", "--data", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_in_exporting(scala, tiny, words, message):
    Path("folder.onnx").mkdir()
    before = sorted(Path().rglob("*"))
    answer = scala("export", tiny, *words)
    assert answer.code == 2 and answer.stdout == ""
    assert message in answer.told
    assert sorted(Path().rglob("*")) == before


def test_a_slice_has_one_width_to_export(scala, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "scala_cli.deploy.export.export", lambda _net, point, *_, **__: asked.append(point) or {}
    )
    assert scala("slice", tiny, "--ratio", "0.5", "-o", "half").code == 0
    answer = scala("export", "half", "-o", "half.onnx")
    assert answer.code == 0 and [str(point) for point in asked] == ["1"], answer.told
    answer = scala("export", "tiny-timm", "--all")
    assert answer.code == 2 and "make one first: scala convert tiny-timm" in answer.told
