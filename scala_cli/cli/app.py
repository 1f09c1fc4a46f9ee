"""The `scala` command."""

from typing import Annotated

import typer

import scala_cli
from scala_cli.cli import bench, convert, env, evaluate, finetune, info, slice

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
    if asked:
        typer.echo(f"scala {scala_cli.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (convert, finetune, evaluate, slice, bench, info, env):
    command.register(app)


def main() -> None:
    app()
