from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Force, Target, find_checkpoint


def push(
    checkpoint: Annotated[
        str, typer.Argument(metavar="[CKPT]", help="A checkpoint or run. Default: the newest run.")
    ],
    repository: Annotated[
        str | None, typer.Argument(metavar="REPO", help="Where to upload to: org/name. [required]")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option("--ratio", help="Upload one width only, as scala slice cuts it. Default: all."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only write the folder that would be uploaded.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the new repository private.")] = False,
    output: Target = None,
    force: Force = False,
    *,
    out: Output,
) -> None:
    """Upload a family or one of its widths to the Hugging Face Hub, with a model card.

    Example: scala push org/deit-s-slim; and to look at it first: scala push org/deit-s-slim --dry-run
    """
    source, repo = (checkpoint, repository) if repository else (None, checkpoint)
    if (output is not None or force) and not dry_run:
        raise typer.BadParameter("--output and --force go with --dry-run.")
    if private and dry_run:
        raise typer.BadParameter("--dry-run uploads nothing: leave out --private.")
    directory = find_checkpoint(source, out)

    from scala_cli.deploy.push import upload, write_repository

    with out.progress() as live, TemporaryDirectory() as temporary:
        target = (output or Path(repo.rpartition("/")[2])) if dry_run else Path(temporary) / "repository"
        write_repository(directory, repo, ratio, target, force, live)
        if not dry_run:
            out.result({"repository": repo, "url": upload(target, repo, private)}, [])
            return
    out.result({"repository": repo, "path": str(target)}, [])
