from typing import Annotated

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Checkpoint, find_checkpoint


def info(
    checkpoint: Checkpoint = None,
    architectures: Annotated[
        bool,
        typer.Option("--architectures", help="List which of timm's Vision Transformers can be sliced."),
    ] = False,
    *,
    out: Output,
) -> None:
    """Print what a checkpoint holds: its widths, their cost and their accuracy.

    Example: scala info runs/last
    """
    if architectures:
        if checkpoint is not None:
            raise typer.BadParameter("--architectures is about timm, not about a checkpoint.")
        return tell_architectures(out)
    directory = find_checkpoint(checkpoint, out)

    from scala_cli.cost import cost
    from scala_cli.models.checkpoint import load_with_record
    from scala_cli.tasks import task_named
    from scala_cli.tasks.base import main_column

    net, record = load_with_record(directory)
    main = main_column(task_named(record.task))
    rows = [
        {**point.columns(), **cost(net.spec_at(point)), main: record.measured(point, main)}
        for point in net.points
    ]
    out.result(
        {
            "path": str(directory),
            "arch": net.spec.architecture,
            "task": record.task,
            "classes": net.spec.num_classes,
            "image": "x".join(map(str, net.spec.input_size)),
            "method": record.method or "none yet",
            "order": record.order or "as it came",
            "isolated": net.rule.isolated,
            "layout": net.rule.layout,
            "attn_scale": net.rule.attn_scale,
            **({"tokens": net.spec.token_counts} if net.spec.tsm else {}),
            "provenance": dict(record.provenance),
            "points": rows,
        },
        rows,
    )


def tell_architectures(out: Output) -> None:
    """Prints which of timm's ViTs can be slimmed, and why others cannot."""

    import timm

    from scala_cli.models.architectures import survey

    with out.progress() as live:
        rows = survey(live)
    supported = sum(row["supported"] for row in rows)
    out.result(
        {
            "timm": timm.__version__,
            "supported": supported,
            "refused": len(rows) - supported,
            "architectures": rows,
        },
        rows,
    )
