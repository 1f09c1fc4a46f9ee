"""The `scala` command."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

import scala_cli
from scala_cli.cli.bench import bench
from scala_cli.cli.compare import compare
from scala_cli.cli.convert import convert
from scala_cli.cli.env import env
from scala_cli.cli.evaluate import evaluate
from scala_cli.cli.explain import explain
from scala_cli.cli.export import export
from scala_cli.cli.finetune import finetune
from scala_cli.cli.info import info
from scala_cli.cli.options import add_command
from scala_cli.cli.push import push
from scala_cli.cli.slice import slice

COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert,
    "finetune": finetune,
    "compare": compare,
    "eval": evaluate,
    "slice": slice,
    "bench": bench,
    "export": export,
    "explain": explain,
    "push": push,
    "info": info,
    "env": env,
}

app = typer.Typer(
    name="scala",
    help="Slim pretrained Vision Transformers: train once, cut any width, deploy what fits.",
    epilog="Start: scala finetune deit_s --data DIR, then: scala slice --ratio 0.5",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def show_version(asked: bool) -> None:
    """Prints the version and exits, if asked."""
    if asked:
        typer.echo(f"scala {scala_cli.__version__}")
        raise typer.Exit()


@app.callback()
def root(  # noqa: D103
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass  # its help is the application's


for name, function in COMMANDS.items():
    add_command(app, name, function)


def main() -> None:
    """Runs the command, then exits without unloading torch.

    Everything is written by then, and unloading would cost 1.5 s and 120 MB (docs/performance.md).
    """
    try:
        app()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # reported already
            stream.flush()
    os._exit(code)
