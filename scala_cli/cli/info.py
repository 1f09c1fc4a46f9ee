from typing import TYPE_CHECKING, Annotated, Any

import typer

from scala_cli.cli.console import Output
from scala_cli.cli.options import Named, find_checkpoint

if TYPE_CHECKING:
    from scala_cli.models.checkpoint import Record
    from scala_cli.models.vit import Spec


def info(
    checkpoint: Named = None,
    architectures: Annotated[
        bool,
        typer.Option("--architectures", help="List which of timm's Vision Transformers can be sliced."),
    ] = False,
    *,
    out: Output,
) -> None:
    """Print what a checkpoint holds: its widths, their cost and their accuracy.

    For a model that is not a checkpoint: what the default widths would cost. Nothing is downloaded but its
    configuration.

    Example: scala info runs/last; or: scala info deit_s
    """
    if architectures:
        if checkpoint is not None:
            raise typer.BadParameter("--architectures takes no checkpoint and no model.")
        return tell_architectures(out)

    from scala_cli.models.source import is_checkpoint

    if checkpoint is not None and not is_checkpoint(checkpoint):
        return tell_model(checkpoint, out)
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
            **described(net.spec, record),
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


def described(spec: "Spec", record: "Record") -> dict[str, Any]:
    """Returns a model's architecture, task, number of classes and image size."""
    return {
        "arch": spec.architecture,
        "task": record.task,
        "classes": spec.num_classes,
        "image": "x".join(map(str, spec.input_size)),
    }


def tell_model(model: str, out: Output) -> None:
    """Prints what the default widths of a MODEL would cost; only a file's weights are read."""
    from scala_cli.cost import cost
    from scala_cli.models.named import weight_file
    from scala_cli.models.source import open_slimmable

    with out.progress() as live:
        net, record = open_slimmable(model, None, scratch=weight_file(model) is None, watch=live)
    rows = [{**point.columns(), **cost(net.spec_at(point))} for point in net.points]
    out.result({"model": model, **described(net.spec, record), "points": rows}, rows)


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
