"""scala.slimmable: a timm model in memory, which stays the caller's."""

import pytest
import timm
import torch
from conftest import KINDS, build

from scala_cli.errors import CheckpointError, PointError
from scala_cli.models.memory import slimmable


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_in_memory(kind, images):
    """Of every kind, also where create_model was given more than a name."""
    vit, _ = build(kind)
    net = slimmable(vit.train(), "0.5,1")
    assert net.training and net.vit is vit
    net.eval()
    assert torch.equal(net(images), vit(images))
    assert (net(images, 0.5) - net.slice(0.5)(images)).abs().max() <= 1e-5


def test_a_model_in_memory_that_does_not_show_how_it_was_made():
    vit, _ = build("vit", act_layer="relu")
    with pytest.raises(CheckpointError, match="computes something else") as error:
        slimmable(vit)
    assert "save_for_hf" in error.value.hint
    with pytest.raises(CheckpointError, match="ResNet"):
        slimmable(timm.create_model("resnet18"))
    with pytest.raises(PointError):
        slimmable(build("vit")[0], "0.3,1")
