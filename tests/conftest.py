import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forks import Forks
from PIL import Image
from timm.layers import set_fused_attn
from timm.models import VisionTransformer
from typer.testing import CliRunner

from scala_cli.cli.app import app
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import describe
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.rule import Rule

# One of each kind of plain ViT in timm, made small by overrides that a user can give too.
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = {
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "vit": ("vit_tiny_patch16_224", {}),
    "deit3, layer scale": ("deit3_small_patch16_224", {}),
    "class token, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "no class token, registers": ("vit_medium_patch16_reg4_gap_256", {}),
    "average pool, no fc_norm": ("vit_base_patch16_gap_224", {}),
    "average pool, fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "norm before the blocks": ("vit_xsmall_patch16_clip_224", {}),
    "no final norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "odd mlp ratio": ("vit_wee_patch16_reg1_gap_256", {"mlp_ratio": 2.5}),
}


def build(kind: str = "deit", **changes) -> tuple[VisionTransformer, dict]:
    """Returns a tiny timm model and its arguments; every parameter is random, even those that timm fills."""
    torch.manual_seed(0)
    name, special = KINDS[kind]
    args = {**TINY, **special, **changes}
    vit = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit, args


def write_timm_directory(directory: Path, **changes) -> VisionTransformer:
    """Writes a tiny DeiT as timm publishes its models, and returns it."""
    vit, args = build("deit", **changes)
    timm.models.save_for_hf(vit, str(directory), model_args=args, safe_serialization=True)
    return vit


def slimmable(
    kind: str = "deit", ratios: str = "0.25,0.5,0.75,1", depth: int = TINY["depth"], **rule
) -> SlimmableViT:
    vit, args = build(kind, depth=depth)
    spec = describe(vit, args)
    return SlimmableViT(vit, spec, Rule(ratios_of(parse_points(ratios)), spec.num_heads, **rule)).eval()


def interrupt(*_args, **_kwargs):
    """Raises KeyboardInterrupt in place of the patched function."""
    raise KeyboardInterrupt


class Bomb:
    """Makes a directory when unpickled, to show that a pickle was run."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Returns an image folder: 3 classes of flat colours, 12 images to train on and 6 to validate."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 4), ("val", 2)):
        for label, colour in (("blue", (0, 0, 200)), ("green", (0, 200, 0)), ("red", (200, 0, 0))):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
    return root


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Returns a folder of 24 noise images without classes, some of them in a subfolder."""
    drawn = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "pictures" / ("more" if number % 3 == 0 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 255, (18, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    """Returns a copy of `photos` that the test may change."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Keeps tests off the network: no host name resolves."""

    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def as_a_process_begins():
    """Restores the number of threads and fused attention, which change rounding, after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    set_fused_attn(True)


@dataclass
class Answer:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict:
        return json.loads(self.stdout)

    @property
    def told(self) -> str:
        """Returns stderr as one line, without the frame that typer draws around errors."""
        return " ".join(self.stderr.replace("│", " ").split())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Makes an empty directory the working directory, and returns it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scala(elsewhere) -> Callable[..., Answer]:
    """Returns a function that runs a command as a user would, in an empty directory."""

    return command


def command(*words: object) -> Answer:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return Answer(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """If root runs the test, drops its right to read and write everywhere (capset(2))."""
    if os.geteuid() != 0:
        yield
        return
    libc, header, held = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(held[0] & ~0b110, *held[1:])
    assert libc.capset(header, fewer) == 0
    yield
    assert libc.capset(header, held) == 0


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def forks(fork_server, elsewhere) -> Iterator[Forks]:
    """Yields a `Forks` that runs commands in processes of their own, in an empty directory."""
    yield fork_server
    fork_server.end()


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """Returns a directory, shared by all tests, with `tiny` and the timm directory it was converted from."""
    root = tmp_path_factory.mktemp("converted")
    write_timm_directory(root / "tiny-timm", num_classes=3)
    with chdir(root):
        assert command("convert", "tiny-timm", "-o", "tiny").code == 0
    return root


@pytest.fixture
def tiny(converted, elsewhere) -> Path:
    """Returns the test's own converted checkpoint with random weights for the classes of `photos`."""
    shutil.copytree(converted, elsewhere, dirs_exist_ok=True)
    return elsewhere / "tiny"
