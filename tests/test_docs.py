"""Documentation that cannot rot."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from scala_cli.cli.app import app

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(app).commands
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_what_the_commands_say():
    made = runpy.run_path(str(ROOT / "docs/make_cli.py"))["reference"]()
    assert (ROOT / "docs/cli.md").read_text() == made, "run: make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_helps_with_every_option(name):
    command = COMMANDS[name]
    assert f"Example: scala {name}" in command.help
    assert all(parameter.help for parameter in command.params if parameter.name != "help")


def written_commands() -> list[str]:
    """Every line `scala ...` in a code block of a page."""
    blocks = [block for page in PAGES for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S)]
    lines = [line.lstrip("$ ") for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("scala ")})


@pytest.mark.parametrize("line", written_commands())
def test_commands_in_the_documentation_exist(line):
    _, name, *words = shlex.split(line, comments=True)
    flags = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)}
    given = {word for word in words if word.startswith("-") and not re.match(r"-\d", word)}
    assert given <= flags | {"-h"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
