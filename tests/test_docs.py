"""Documentation: its commands, examples, links and reference stay correct."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import build, slimmable
from PIL import Image

import scala_cli
from scala_cli.cli.app import app
from scala_cli.data.transform import transform_for
from scala_cli.deploy.export import FromPixels, export
from scala_cli.formats import FORMATS
from scala_cli.models.checkpoint import Record, save
from scala_cli.models.in_memory import slimmable as from_memory
from scala_cli.models.order import order_channels
from scala_cli.models.slimmable import SlimmableViT
from scala_cli.models.vit import describe, random_images
from scala_cli.slicing.point import parse_points, ratios_of
from scala_cli.slicing.rule import Rule

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(app).commands
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_what_the_commands_say():
    made = runpy.run_path(str(ROOT / "docs/make_cli.py"))["reference"]()
    assert (ROOT / "docs/cli.md").read_text() == made, "run: make docs"


def test_the_script_beside_the_papers_step(tiny, capsys):
    runpy.run_path(str(ROOT / "docs/paper_step.py"))["main"](str(tiny), batch_size=4, runs=1)
    assert re.findall(r"\S+ times the paper's", capsys.readouterr().out)[0].startswith("1.00")


class Decoder(torch.nn.Module):
    """A dense head: one number per patch, drawn as a square of two by two."""

    def forward(self, features):
        return torch.nn.functional.interpolate(features.sum(1, keepdim=True), scale_factor=2.0)


@pytest.fixture
def dense(elsewhere, images):
    """Writes what docs/dense.md uses: a family, a head for it and a photograph."""
    net = from_memory(build("deit", num_classes=0)[0])
    save(order_channels(net, [images]), Record(order="importance"), Path("family"))
    names = {"input_names": ["features"], "output_names": ["map"], "dynamo": True, "verbose": False}
    torch.onnx.export(Decoder().eval(), (torch.randn(1, 32, 4, 4),), "decoder.onnx", **names)
    Image.new("RGB", (20, 30), "red").save("photo.jpg")


def test_what_docs_say_of_dense_features_runs(dense):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/dense.md").read_text(), re.S)
    names = {}
    exec(example, names)
    assert names["picture"].shape == (1, 1, 8, 8)
    wanted = Decoder()(names["tokens"]).numpy()
    np.testing.assert_allclose(names["picture"], wanted, atol=1e-4)


def test_the_script_that_draws_maps(dense, capsys):
    runpy.run_path(str(ROOT / "docs/draw_maps.py"))["main"]("family", "decoder.onnx", "photo.jpg", "maps.png")
    assert capsys.readouterr().out == "maps.png\n"
    width, height = Image.open("maps.png").size
    assert width > 3 * height


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_helps_with_every_option(name):
    command = COMMANDS[name]
    assert f"Example: scala {name}" in command.help
    assert all(parameter.help for parameter in command.params if parameter.name != "help")


def written_commands() -> list[str]:
    """Returns every line `scala ...` in a code block of a page."""
    blocks = [block for page in PAGES for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S)]
    lines = [line.lstrip("$ ") for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("scala ")})


@pytest.mark.parametrize("line", written_commands())
def test_commands_in_the_documentation_exist(line):
    _, name, *words = shlex.split(line, comments=True)
    flags = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)}
    given = {word for word in words if word.startswith("-") and not re.match(r"-\d", word)}
    assert given <= flags | {"-h"}


DEPLOYING = {
    re.search(r"half\.\w+", example)[0]: example
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.S)
}
"""The examples of docs/deploy.md by the files that they run."""


def test_docs_say_how_each_format_is_run():
    assert {Path(file).suffix for file in DEPLOYING} == {form.suffix for form in FORMATS.values()}


@pytest.mark.no_cover
@pytest.mark.parametrize("file", DEPLOYING)
def test_what_docs_say_of_deploying_runs_without_us(file, tmp_path):
    """Runs every example of docs/deploy.md on the file that its command writes."""
    vit, args = build("deit", img_size=224, patch_size=32)
    spec = describe(vit, args).naming(["ant", "bee", "cow", "doe", "eel"])
    net = SlimmableViT(vit, spec, Rule(ratios_of(parse_points("0.5,1")), spec.num_heads)).eval()
    model = FromPixels(net.slice(0.5), spec)
    noise = np.random.default_rng(45).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((400, 300)).save(tmp_path / "cat.jpg", quality=100)
    image = Image.open(tmp_path / "cat.jpg")
    pixels = model.pixels_of(transform_for(spec)(image)[None])
    squashed = torch.tensor(np.array(image.resize((224, 224)))).permute(2, 0, 1)[None]
    misread = pixels.permute(0, 2, 3, 1).reshape(pixels.shape)
    with torch.no_grad():
        told, *wrong = (spec.label_names[model(each).argmax()] for each in (pixels, squashed, misread))
    assert told not in wrong, "the image must tell whether an example reads and cuts it right"
    kind = next(name for name, form in FORMATS.items() if form.suffix == Path(file).suffix)
    export(net, 0.5, kind, tmp_path / file, random_images(spec, 2), pixels=True)
    script = f"{DEPLOYING[file]}\nimport sys\nassert not {{'scala_cli', 'timm'}} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == told, (done.stdout, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", page.read_text()):
        if target.startswith("https://"):
            continue
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Returns the headings of a page as GitHub's anchors."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_what_the_readme_says_of_python_runs(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    save(slimmable(), Record(), Path("runs/last"))
    scala_cli.slice_model("runs/last", 0.5, "half")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {"images": images}
    for example in examples:
        exec(example, names)
    assert len(examples) == 2 and names["logits"].shape == names["cheap"](images).shape == (3, 5)
    with torch.no_grad():
        torch.testing.assert_close(names["small"](images), names["model"](images))
    assert all(getattr(scala_cli, name) for name in scala_cli.__all__)
