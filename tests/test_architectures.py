"""Slices every supported Vision Transformer of timm, two blocks deep and 32 channels wide."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import VisionTransformer

from scala_cli.deploy.slice import slice_model
from scala_cli.errors import ScalaError
from scala_cli.models.architectures import MODULES, obstacle, survey
from scala_cli.models.checkpoint import Record, save
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.source import open_model
from scala_cli.models.vit import describe, skeleton
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.rule import Rule
from scala_cli.watch import QUIET

NAMES = [name for module in MODULES for name in timm.list_models(module=module)]


def small(name: str) -> tuple[VisionTransformer, dict]:
    """Returns a small random model for images of two patches a side, and its arguments."""
    patch = describe(skeleton(name, depth=1)).model_args["patch_size"]
    args = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    args["img_size"] = 2 * patch
    torch.manual_seed(0)
    vit = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit, args


def test_how_many_there_are():
    rows = survey(QUIET)
    assert [row["architecture"] for row in rows] == NAMES
    cut = sum(row["supported"] for row in rows)
    readme = Path(__file__).parents[1] / "README.md"
    ours, theirs = map(int, re.search(r"(\d+) of its (\d+)\s+can be cut", readme.read_text()).groups())
    assert cut == ours if len(rows) == theirs else cut > 0.8 * len(rows)  # other versions of timm have others
    assert all(row["supported"] is not bool(row["why_not"]) for row in rows)


@pytest.mark.no_cover  # covers no new lines, and measuring would take 1.5 times as long
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_architecture(name, tmp_path):
    """The full width gives timm's output, bit for bit; others give their slice's; ordering keeps the output.

    An unsupported architecture is refused with the reason.
    """
    if reason := obstacle(name):
        with pytest.raises(ScalaError, match=re.escape(reason)):
            open_model(name, None, scratch=True)
        return
    vit, args = small(name)
    spec = describe(vit, args)
    net = SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,0.75,1")), spec.num_heads)).eval()
    images = torch.randn(4, *spec.input_size)
    assert torch.equal(net(images), vit(images))
    save(net, Record(), tmp_path / "net")
    for ratio in ("0.5", "0.75"):
        slice_model(tmp_path / "net", ratio, tmp_path / ratio, False, QUIET)
        again = timm.create_model(f"local-dir:{tmp_path / ratio}", pretrained=True).eval()
        assert (again(images) - net(images, ratio)).abs().max() <= 1e-5
    ordered = order_channels(net, [images])
    assert (ordered(images) - net(images)).abs().max() <= 1e-4
