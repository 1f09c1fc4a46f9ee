"""Checkpoint directories: what is written is read back, and damage is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import KINDS, slimmable
from safetensors.torch import load_file, save_file

from scala_cli.deploy.slice import slice_model
from scala_cli.errors import CheckpointError
from scala_cli.models.checkpoint import Record, TensorByTensor, load, load_with_record, save, write_timm
from scala_cli.models.locate import resolve
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.slicing.point import Point, parse_points, ratios_of
from scala_cli.slicing.rule import Rule

RECORD = Record(True, "scala", None, [{"ratio": 0.5, "top1": 61.0, "top5": 95.5}], {"weights": "somewhere"})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_round_trip(kind, tmp_path, images):
    net = slimmable(kind, isolated=True, attn_scale="fixed")
    save(net, RECORD, tmp_path / "net")
    again, record = load_with_record(tmp_path / "net")
    assert again.rule == net.rule
    assert (
        record.method == "scala"
        and record.measured(Point.of("1/2"), "top1") == 61.0
        and record.measured(Point.of(1), "top1") is None
    )
    for point in net.points:
        assert torch.equal(again(images, point), net(images, point))
    plain = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    assert torch.equal(plain(images), net(images))


@pytest.mark.parametrize("scale", ["native", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cutting_tensor_by_tensor_is_cutting_the_whole_state(kind, scale, tmp_path):
    net = slimmable(kind, isolated=True, attn_scale=scale)
    save(net, RECORD, tmp_path / "net")
    weights = TensorByTensor(tmp_path / "net/model.safetensors")
    assert len(weights) == len(net.vit.state_dict())
    for point in net.points:
        cut, whole = net.rule.slice_state(weights, point.ratio, copy=True), net.slice(point).state_dict()
        assert cut.keys() == whole.keys()
        assert all(torch.equal(cut[name], whole[name]) and cut[name].is_contiguous() for name in whole)


def test_every_slice_loads_without_us(tmp_path, images):
    """Runs in a process that cannot import scala_cli."""
    net = slimmable("distilled", isolated=True)
    torch.save(images, tmp_path / "images.pt")
    save(net, RECORD, tmp_path / "net")
    for point in net.points:
        result = slice_model(tmp_path / "net", point, tmp_path / point.label)
        assert result["max_abs_diff"] <= 1e-5
    script = """
import sys
sys.modules["scala_cli"] = None
import timm, torch
images = torch.load("images.pt")
out = {}
for name in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
    with torch.no_grad():
        out[name] = model(images)
torch.save(out, "logits.pt")
"""
    labels = [point.label for point in net.points]
    subprocess.run([sys.executable, "-c", script, *labels], cwd=tmp_path, check=True)
    with torch.no_grad():
        for label, logits in torch.load(tmp_path / "logits.pt").items():
            assert (net(images, label) - logits).abs().max() <= 1e-5


def test_config_is_timms_with_one_key_of_ours(tmp_path):
    save(slimmable(), RECORD, tmp_path / "net")
    config = json.loads((tmp_path / "net/config.json").read_text())
    assert config["architecture"] == "deit_tiny_patch16_224"
    assert config["scala"]["ratios"] == ["0.25", "0.5", "0.75", "1"]
    assert config["scala"]["dims"]["0.5"] == {"embed_dim": 16, "num_heads": 2, "hidden_dim": 64}
    assert "scala" not in config["pretrained_cfg"]
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]


def test_a_slice_that_reads_back_wrong_is_not_left_behind(tmp_path, monkeypatch):
    save(slimmable(), RECORD, tmp_path / "net")

    def write_badly(state, *rest):
        write_timm({**state, "head.bias": state["head.bias"] + 1e-3}, *rest)

    monkeypatch.setattr("scala_cli.deploy.slice.write_timm", write_badly)
    with pytest.raises(CheckpointError, match=r"differs by 0\.001"):
        slice_model(tmp_path / "net", 0.5, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_slice_is_no_slimmable_checkpoint(tmp_path):
    save(slimmable(), RECORD, tmp_path / "net")
    slice_model(tmp_path / "net", 0.5, tmp_path / "half")
    assert re.search(r"\| 0\.5 \|.*\| 61\.00 \| 95\.50 \|", (tmp_path / "half/README.md").read_text())
    with pytest.raises(CheckpointError, match="one width only"):
        load(tmp_path / "half")


NO_FIELD: list[dict] = [
    {"provenance": None},
    {"provenance": [1]},
    {"task": ["x"]},
    {"method": 5},
    {"order": ["importance"]},
    {"trained": "yes"},
    {"new_head": None},
    {"calibrated": "many"},
    {"metrics": "none"},
    {"isolated": "no"},
]
"""Fields of a "scala" object with values of the wrong type."""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 400), "truncated"),
        (lambda d: truncate(d / "model.safetensors"), "truncated"),
        (lambda d: (d / "model.safetensors").unlink(), "does not exist"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "does not hold an object"),
        (lambda d: edit(d, lambda c: c.pop("scala")), "not yet a slimmable one"),
        (lambda d: edit(d, lambda c: c["scala"].pop("ratios")), "lacks 'ratios'"),
        (lambda d: edit(d, lambda c: c.pop("architecture")), "lacks 'architecture'"),
        (lambda d: edit(d, lambda c: c["scala"].update(format=99)), "format 99"),
        (lambda d: edit(d, lambda c: c.update(scala="x")), "not yet a slimmable one"),
        (lambda d: edit(d, lambda c: c["scala"].update(layout="later")), "layout 'later'"),
        (lambda d: edit(d, lambda c: c["scala"].update(ratios=[0.5])), "damaged"),
        (lambda d: edit(d, lambda c: c["scala"].update(metrics=[{"top1": 1.0}])), "lacks 'ratio'"),
        *[
            (
                lambda d, told=told: edit(d, lambda c: c["scala"].update(told)),
                f"is damaged: .*{next(iter(told))}",
            )
            for told in NO_FIELD
        ],
        (
            lambda d: edit(d, lambda c: c["scala"].update(ratios=["a", "1"])),
            "config.json is damaged: 'a' is not",
        ),
        (
            lambda d: edit(d, lambda c: c["scala"].update(bounds=["a", "1"])),
            "config.json is damaged: 'a' is not",
        ),
        (lambda d: edit(d, lambda c: c["model_args"].update(num_heads=5)), "damaged"),
        (lambda d: edit(d, lambda c: c["model_args"].update(num_heads=0)), "damaged"),
        (lambda d: edit(d, lambda c: c.update(pretrained_cfg=None)), "damaged"),
        (lambda d: edit(d, lambda c: c.update(architecture=None)), "damaged"),
        (lambda d: edit(d, lambda c: c["model_args"].update(colour="red")), "damaged"),
        (lambda d: edit(d, lambda c: c.update(architecture="vit_of_tomorrow")), "no architecture"),
        (lambda d: edit(d, lambda c: c["model_args"].update(depth=3)), "has no 'blocks.2.norm1.weight'"),
        (lambda d: edit(d, lambda c: c["model_args"].update(depth=1)), "holds 'blocks.1"),
        (lambda d: edit(d, lambda c: c["model_args"].update(num_classes=9)), "'head.weight' has shape"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, spoil, message):
    save(slimmable(), RECORD, tmp_path / "net")
    spoil(tmp_path / "net")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "net")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def edit(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_names_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run yet"):
        resolve(None)
    save(slimmable(), RECORD, tmp_path / "runs/one/best")
    (tmp_path / "runs/last").symlink_to("one")
    best = (tmp_path / "runs/one/best").resolve()
    for name in (None, "runs/one", "runs/last", "runs/one/best", "local-dir:runs/one/best"):
        assert resolve(name).resolve() == best
    for name, message in (("nowhere", "does not exist"), ("runs", "has no config.json")):
        with pytest.raises(CheckpointError, match=message):
            resolve(name)


def test_a_cut_that_disagrees_with_the_family_is_not_left_behind(tmp_path, monkeypatch):
    """The slice is compared with the family's own forward, so a wrong cut is found, not only a wrong file."""
    save(slimmable(), RECORD, tmp_path / "net")
    right = Rule.slice_state

    def from_the_wrong_end(rule, state, ratio, copy=False, own=None):
        isolated = replace(rule, isolated=True, ratios=ratios_of(parse_points("0.25,0.5,1")))
        return right(isolated if copy else rule, state, ratio, copy, own or {})

    monkeypatch.setattr(Rule, "slice_state", from_the_wrong_end)
    with pytest.raises(CheckpointError, match="differs by"):
        slice_model(tmp_path / "net", 0.5, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_checkpoint_may_hold_more_than_this_version_knows(tmp_path, images):
    """Fields of a later version are ignored; fields that an earlier version lacks get defaults."""
    net = slimmable()
    save(net, RECORD, tmp_path / "net")
    file = tmp_path / "net/config.json"
    config = json.loads(file.read_text())
    assert "task" not in config["scala"]  # the default is not written
    config["scala"] |= {"sizes": [128, 224], "later": {"deep": 1}}
    for name in ("isolated", "bounds", "layout", "attn_scale", "new_head", "order", "metrics", "trained"):
        del config["scala"][name]
    file.write_text(json.dumps(config))
    again, record = load_with_record(tmp_path / "net")
    assert record == Record(method="scala", provenance=record.provenance)
    with torch.no_grad():
        assert torch.equal(again(images, 0.5), net(images, 0.5))


def test_tensors_that_timm_has_no_place_for_lie_beside_its_weights(tmp_path, images):
    plain = slimmable()
    extra = {"0.5:norm.bias": torch.ones(1).expand(16), "stream.basis": torch.eye(32)}
    later = {"pos_embed.128": torch.randn(1, 65, 32)}
    save(SlimmableViT(plain.vit, plain.spec, plain.rule, extra), RECORD, tmp_path / "net")
    file = tmp_path / "net/extra.st"
    save_file({**load_file(file), **later}, file)
    again = load(tmp_path / "net").with_points(parse_points("0.5,1")).copied()
    assert again.extra.keys() == extra.keys()
    assert all(torch.equal(again.extra[name], tensor) for name, tensor in extra.items())
    timms = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(timms(images), plain(images))
    known = (".safetensors", ".pth", ".pth.tar", ".bin")  # timm before 1.0.29 fails if it finds two
    assert [f.name for f in file.parent.iterdir() if f.name.endswith(known)] == ["model.safetensors"]
    save(plain, RECORD, tmp_path / "net")  # overwrites the directory: nothing of the old one is left
    assert not load(tmp_path / "net").extra


def test_a_task_of_a_later_version_is_refused(scala, tmp_path):
    save(slimmable(), Record(task="later"), tmp_path / "net")
    answer = scala("info", tmp_path / "net")
    assert answer.code == 2 and "for the task 'later'" in answer.told and "Upgrade" in answer.told


def test_ratios_without_an_end_in_decimals(tmp_path):
    net = slimmable("deit", ratios="5/16,1")
    metrics = [{"ratio": float(Point.of("5/16").ratio), "top1": 50.0, "top5": 90.0}]
    save(net, Record(True, "scala", metrics=metrics), tmp_path / "net")
    assert load_with_record(tmp_path / "net")[1].measured(Point.of("5/16"), "top1") == 50.0
    assert Record(metrics=[{"ratio": 1 / 3, "top1": 1.0}]).measured(Point.of("1/3"), "top1") == 1.0


def test_public_names(tmp_path):
    import scala_cli

    save(slimmable(), RECORD, tmp_path / "net")
    net = scala_cli.load(tmp_path / "net")
    assert isinstance(net, scala_cli.SlimmableViT) and net.points[1] == scala_cli.Point.of("0.5")
    with pytest.raises(AttributeError):
        _ = scala_cli.nothing
