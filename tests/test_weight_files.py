"""Weights as training scripts save them: nested, with prefixes, with an average, or broken."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build, write_timm_directory
from safetensors.torch import save_file

from scala_cli.errors import CheckpointError
from scala_cli.models import source
from scala_cli.models.foreign import read_pickle
from scala_cli.models.nested import walk
from scala_cli.models.source import open_model
from scala_cli.watch import Watcher

pytestmark = pytest.mark.usefixtures("elsewhere")


class Told(Watcher):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def states():
    """Writes a model to `plain`; returns its weights, and other weights as their average."""
    vit = write_timm_directory(Path("plain"))
    state = vit.state_dict()
    return state, {name: tensor + 1 for name, tensor in state.items()}


def read(content, average=False):
    """Saves `content` as weights and opens it; returns (model, notes)."""
    torch.save(content, "w.pth")
    watch = Told()
    net, _ = open_model("plain", None, weights=Path("w.pth"), average=average, watch=watch)
    return net.vit, watch.notes


def is_of(vit, state) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())


def layouts(state, average):
    other = torch.zeros(2, 2)
    return {
        "plain": state,
        "timm's train.py": {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"x": other}}}},
        "Lightning": {"state_dict": under("model.", state) | {"loss.weight": other}, "callbacks": {}},
        "Lightning, compiled": {"state_dict": under("net._orig_mod.", state)},
        "DistributedDataParallel": {"model": under("module.", state)},
        "both": under("_orig_mod.module.", state),
        "a backbone": {"backbone_state": {"weights": under("backbone.", state)}},
        "MAE": {"model": {**state, "mask_token": other, "decoder_blocks.0.norm1.weight": other}},
        "torch's AveragedModel": {"n_averaged": torch.tensor(3), **under("module.", state)},
        "a tensor beside it": {"best": torch.tensor(3.0), "net": state},
        "in a list": {"models": [state]},
        "a list of it": [state],
        "a tuple of it": ("vit", (state,)),
        "under a number": {0: {"weights": state}, 1: [0.5] * 9},
        "an ordered dictionary": collections.OrderedDict(state_dict=collections.OrderedDict(state)),
    }


@pytest.mark.parametrize("name", layouts({}, {}))
def test_the_model_is_found_wherever_it_lies(name, states):
    vit, _ = read(layouts(*states)[name])
    assert is_of(vit, states[0])


def test_what_holds_itself_or_goes_deep_is_walked_to_its_end(states):
    around: dict = {"model": states[0]}
    around["again"] = [around]
    deep: list = [states[0]]
    for _ in range(3000):
        deep = [deep]
    assert [place for place, _ in walk(around)] == ["model"]
    assert len([*walk(deep)]) == 1
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors; it holds 'x'"):
        around = {}
        around["x"] = around
        read(around)


def averages(state, average):
    return {
        "timm's train.py": {"state_dict": state, "state_dict_ema": average},
        "DeiT": {"model": state, "model_ema": average},
        "beside": {"model": under("module.", state), "ema": under("module.", average)},
        "another order": {"ema_state_dict": average, "state_dict": state},
        "DINO": {
            "student": under("module.backbone.", state) | {"module.head.mlp.weight": torch.zeros(2)},
            "teacher": under("backbone.", average) | {"head.mlp.weight": torch.zeros(2)},
        },
        "in one dictionary": {"state_dict": under("model.", state) | under("ema_model.", average)},
        "MoCo": {
            "state_dict": under("module.base_encoder.", state) | under("module.momentum_encoder.", average)
        },
    }


@pytest.mark.parametrize("name", averages({}, {}))
def test_an_average_is_told_and_taken_where_asked_for(name, states):
    content = averages(*states)[name]
    vit, notes = read(content)
    assert is_of(vit, states[0]) and any("--ema takes it" in note for note in notes)
    vit, _ = read(content, average=True)
    assert is_of(vit, states[1])


def test_what_is_taken_and_left_out_is_told(states):
    _, notes = read({"state_dict": under("model.", states[0]) | {"loss.weight": torch.zeros(2)}})
    assert notes == ["w.pth: left out what is not the model's: 'loss.weight'"]
    vit, notes = read({"model_ema": states[1]})
    assert is_of(vit, states[1]) and "moving average of the weights alone (model_ema)" in notes[0]
    assert read({"model": states[0], "epoch": 3})[1] == []


def test_a_file_of_several_models_is_refused(states):
    with pytest.raises(CheckpointError, match=r"holds several models: model; best, module\."):
        read({"model": states[0], "best": under("module.", states[0])})
    with pytest.raises(CheckpointError, match="several models: model_ema; swa"):
        read({"model": states[0], "model_ema": states[1], "swa": states[1]}, average=True)


def test_names_that_are_not_timms_are_said(states):
    with pytest.raises(
        CheckpointError, match=r"'trunk\.0\.norm1\.weight'.*'blocks\.0\.norm1\.weight'"
    ) as error:
        read({name.replace("blocks", "trunk"): tensor for name, tensor in states[0].items()})
    assert "Rename" in error.value.hint
    with pytest.raises(CheckpointError) as error:
        read({"vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(2, 2)})
    assert "convert its directory" in error.value.hint
    with pytest.raises(CheckpointError, match="size mismatch for head") as error:
        read({**states[0], "head.bias": torch.zeros(3)})
    assert "sizes" in error.value.hint


def test_a_directory_is_no_weight_file():
    write_timm_directory(Path("plain"))
    with pytest.raises(CheckpointError, match="plain is a directory"):
        open_model("deit_ti", None, weights=Path("plain"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value, scala):
    vit = write_timm_directory(Path("plain"))
    vit.blocks[1].mlp.fc1.bias.data[2] = value
    save_file(vit.state_dict(), "plain/model.safetensors")
    answer = scala("convert", "plain", "-o", "out")
    assert answer.code == 2 and "'blocks.1.mlp.fc1.bias' holds" in answer.told and not Path("out").exists()


def test_numpy_numbers_beside_the_weights_are_read(states):
    best = {"acc": np.float64(81.5), "epoch": np.int64(7), "loss": np.float32(0.5), "done": np.bool_(True)}
    vit, _ = read({"model": states[0], **best})
    assert is_of(vit, states[0])
    found = read_pickle(Path("w.pth"))
    assert {name: found[name] for name in best} == {"acc": 81.5, "epoch": 7, "loss": 0.5, "done": True}


def test_other_numpy_objects_are_refused(states):
    read({"model": states[0], "odd": np.array("x")[()]})
    assert read_pickle(Path("w.pth"))["odd"] is None
    with pytest.raises(CheckpointError) as error:
        read({"model": states[0], "odd": np.array([1, 2])})
    assert "torch.save(model.state_dict()" in error.value.hint


def test_weights_in_several_files_stay_in_their_directory():
    vit = write_timm_directory(Path("plain"))
    state = vit.state_dict()
    Path("plain/model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, f"plain/{part}")
    index = Path("plain/model.safetensors.index.json")
    index.write_text(
        json.dumps({"weight_map": {name: part for part, held in parts.items() for name in held}})
    )
    assert is_of(open_model("plain", None)[0].vit, state)
    save_file(state, "secret.safetensors")
    for hostile in (
        {"a": "../secret.safetensors"},
        {"a": str(Path("secret.safetensors").resolve())},
        {},
        "x",
    ):
        index.write_text(json.dumps({"weight_map": hostile}))
        with pytest.raises(CheckpointError, match="does not list files beside it"):
            open_model("plain", None)


def test_names_of_classes_may_begin_with_a_mark_of_their_encoding(scala):
    write_timm_directory(Path("plain"))
    Path("names.txt").write_bytes("ä\nb\nc\nd\ne\n".encode("utf-8-sig"))
    assert scala("convert", "plain", "-o", "out", "--labels", "names.txt").code == 0
    assert json.loads(Path("out/config.json").read_text("utf-8"))["label_names"] == ["ä", "b", "c", "d", "e"]
    Path("names.txt").write_bytes("ä\nb\n".encode("utf-16"))
    assert "not a UTF-8 text file" in scala("convert", "plain", "-o", "again", "--labels", "names.txt").told


def test_a_wrong_conversion_is_refused(scala, monkeypatch):
    """The reported difference is to timm's model with the source's weights, so changed weights show."""
    write_timm_directory(Path("plain"))
    assert scala("convert", "plain", "-o", "right", "--json").json["max_abs_diff"] == 0

    def wrong(net, images):
        changed = build("deit")[0]
        changed.head.bias.data += 0.5
        return type(net)(changed.eval(), net.spec, net.rule)

    monkeypatch.setattr("scala_cli.models.order.order_channels", wrong)
    answer = scala("convert", "plain", "-o", "out", "--order", "importance")
    assert answer.code == 2 and "differ by 0.5" in answer.told and not Path("out").exists()


def test_what_a_config_loses_shows(scala, monkeypatch):
    """The checkpoint would lose an argument, and timm would build another function from it."""
    write_timm_directory(Path("plain"), act_layer="relu")

    def forgetful(vit, args=None):
        return real(vit, args and {name: value for name, value in args.items() if name != "act_layer"})

    real = source.describe
    monkeypatch.setattr(source, "describe", forgetful)
    answer = scala("convert", "plain", "-o", "out")
    assert answer.code == 2 and "would not compute" in answer.told and not Path("out").exists()


def test_the_directory_one_is_in_is_not_replaced(scala, elsewhere, monkeypatch):
    write_timm_directory(elsewhere / "plain")
    for target in (".", "..", elsewhere, elsewhere.parent):
        answer = scala("convert", "plain", "-o", target, "--force")
        assert answer.code == 2 and "Traceback" not in answer.stderr
    (elsewhere / "empty").mkdir()
    monkeypatch.chdir(elsewhere / "empty")
    answer = scala("convert", "../plain", "-o", ".")
    assert answer.code == 2 and "is the working directory" in answer.told
