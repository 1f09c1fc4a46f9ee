"""Parameters and multiply-accumulates, compared with formulas written out by hand."""

import sys

import pytest
import timm
import torch
from conftest import build

from scala_cli.cost import cost, gmacs, macs
from scala_cli.memory import peak_memory
from scala_cli.models.vit import describe
from scala_cli.slicing.point import Point


def deit_small(ratio: float) -> tuple[int, float]:
    """Returns parameters and GMACs of DeiT-S at a width, computed from its shapes."""
    depth, heads, classes, patches = 12, 6, 1000, 14 * 14
    dim = int(384 * ratio)
    hidden, tokens, pixels = 4 * dim, patches + 1, 3 * 16 * 16
    params = (
        pixels * dim + dim  # patch embedding
        + dim + tokens * dim  # class token, positions
        + depth * (
            2 * 2 * dim  # two norms
            + dim * 3 * dim + 3 * dim  # qkv
            + dim * dim + dim  # proj
            + dim * hidden + hidden + hidden * dim + dim  # mlp
        )
        + 2 * dim  # last norm
        + dim * classes + classes
    )  # fmt: skip
    attention = heads * 2 * tokens * tokens * (dim // heads)  # q k^T, and the weights times v
    macs = (
        patches * pixels * dim
        + depth * (tokens * (dim * 3 * dim + dim * dim + 2 * dim * hidden) + attention)
        + dim * classes
    )
    return params, macs / 1e9


@pytest.mark.parametrize(
    ("ratio", "gmacs", "millions"),
    [(0.25, 0.37, 1.5), (0.5, 1.25, 5.7), (0.75, 2.66, 12.6), (1.0, 4.60, 22.1)],
)
def test_deit_small(ratio, gmacs, millions):
    with torch.device("meta"):
        spec = describe(timm.create_model("deit_small_patch16_224"))
    counted = cost(spec.at(Point.of(ratio).ratio))
    params, macs = deit_small(ratio)
    assert counted["params"] == params
    assert counted["gmacs"] == pytest.approx(macs, abs=1e-4)
    assert macs == pytest.approx(gmacs, abs=0.01)
    assert params / 1e6 == pytest.approx(millions, abs=0.05)


def test_small_models_cost_something():
    """Multiply-accumulates are counted exactly; only printed values are rounded."""
    vit, args = build("deit", img_size=8, patch_size=4, embed_dim=8, depth=1)
    spec = describe(vit, args)
    (patches, dim), tokens, hidden = (4, 8), 5, 32
    by_hand = patches * 48 * dim + tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens**2 * dim + 5 * dim
    assert macs(spec) == by_hand
    assert cost(spec)["gmacs"] == pytest.approx(by_hand / 1e9, rel=1e-3)
    assert [gmacs(number) for number in (4_599_123_456, 11_738_000, 5_213_987, 0)] == [
        4.5991,
        0.0117,
        0.005214,
        0,
    ]


def test_peak_memory_of_a_call():
    """Counts 100 MB that are freed before the call returns, but not those held before it."""
    held = torch.ones(50_000_000, dtype=torch.uint8)
    peak = peak_memory(torch.device("cpu"), lambda: torch.ones(100_000_000, dtype=torch.uint8).max())
    assert peak is None or 95e6 < peak < 130e6
    assert (peak is None) == (sys.platform != "linux")
    assert len(held)
