"""Writes the model card: the README.md of a slice or of a repository on the Hub."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scala_cli.models.checkpoint import Record
from scala_cli.models.fit import Fit
from scala_cli.models.vit import Spec
from scala_cli.report import Rows, markdown
from scala_cli.slicing.point import Point
from scala_cli.tasks import task_named
from scala_cli.tasks.base import Task, main_column

CARD = """---
{metadata}
---

# {name}

{what}

{table}
{picture}
```python
{code}
```

Weights started from: {origin}.{command}
"""

FEATURES = "image-feature-extraction"
"""The Hub's name for a model without a classifier."""

PLAIN = """import timm{also}

model = timm.create_model("{place}", pretrained=True).eval()"""

FAMILY = """# every width; needs: pip install scala-vit
import scala_cli

net = scala_cli.load("{source}")
small = net.slice({ratio})"""


def model_card(
    name: str,
    spec: Spec,
    record: Record,
    rows: Rows,
    *,
    family: bool,
    repository: bool = False,
    picture: str = "",
    fit: Fit | None = None,
) -> str:
    """Returns the card of a slice or of a whole family.

    Args:
        name: the directory's name, or the Hub repository's if `repository`.
        spec: the spec of the model that timm loads.
        rows: {"ratio", "params", "gmacs"} of every width in it, widest last.
        picture: the file name of a picture beside the card.
        fit: how well a slice was fitted to the full model.
    """
    found = {Point.of_row(metric): metric for metric in record.metrics}
    task = task_named(record.task)
    place = f"{'hf-hub' if repository else 'local-dir'}:{name}"
    also = ", scala_cli  # needs: pip install scala-vit" if spec.is_of_this_package else ""
    plain = not family or holds_full_width(rows, spec)
    code = [PLAIN.format(place=place, also=also)] if plain else []
    if family:
        source, narrowest = place if repository else name, Point.of_row(rows[0]).label
        code.append(FAMILY.format(source=source, ratio=repr(narrowest)))
    command = record.provenance.get("command")
    card = CARD.format(
        metadata=metadata(name, spec, record, rows).to_yaml(),
        name=name,
        what=description(spec, record, rows, family) + fitted(fit),
        table=markdown([{**line(row), **accuracy(found, Point.of_row(row), task)} for row in rows]),
        picture=f"\n![{task.columns[main_column(task)]} against GMACs]({picture})\n" if picture else "",
        code="\n\n".join(code),
        origin=record.provenance.get("weights", "unknown"),
        command=f" Trained with: `{command}`." if command else "",
    )
    return str(ModelCard(card))


def description(spec: Spec, record: Record, rows: Rows, family: bool) -> str:
    """Returns the first paragraph of a model card."""
    _, height, width = spec.input_size
    method = f", trained by the {record.method} method" if record.method else ""
    points = [Point.of_row(row) for row in rows]
    warning = record.untrained(points)
    warning = f" {warning.capitalize()}." if warning else ""
    if spec.features:
        same = " Every width reproduces the full model's features; R² and cosine tell how closely."
        warning = f" It has no classifier: its outputs are features.{same if record.metrics else ''}{warning}"
    if not family:
        return (
            f"{spec.architecture} at {points[0]} of its width, for images of {height} x {width} "
            f"pixels. Cut from a slimmable Vision Transformer{method}, with scala-vit.{warning}"
        )
    cuts = (
        "timm loads the full width; scala-vit cuts the others."
        if holds_full_width(rows, spec)
        else "scala-vit cuts them."
    )
    return (
        f"{spec.architecture} in {len(rows)} widths that share these weights{method}, for images of "
        f"{height} x {width} pixels. {cuts}{warning}"
    )


def fitted(fit: Fit | None) -> str:
    """Returns a sentence on how well a slice was fitted; empty if it was not, or if that is not known."""
    if fit is None or fit.output is None:
        return ""
    told = f" On {fit.held_out} other images the R² of its output is {fit.output:.4f}"
    return told + ("." if fit.embedding is None else f", that of its embedding {fit.embedding:.4f}.")


def holds_full_width(rows: Rows, spec: Spec) -> bool:
    """Returns whether timm can load the widest width: it is the full one, and no token is slimmed."""
    return Point.of_row(rows[-1]).ratio == 1 and not spec.tsm


def line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the model card's table."""
    return {
        "width": Point.of_row(row).label,
        "parameters, M": row["params"] / 1e6,
        "GMACs": row["gmacs"],
    }


def accuracy(found: Mapping[Point, Mapping[str, float | None]], point: Point, task: Task) -> dict[str, Any]:
    """Returns the accuracy columns of one width; none if no width was measured."""
    if not found:
        return {}
    metric = found.get(point)
    columns = task.columns.items()
    known = {name: value for name, value in (metric or {}).items() if value is not None}
    return {title: f"{known[name]:.{task.digits}f}" if name in known else None for name, title in columns}


def metadata(name: str, spec: Spec, record: Record, rows: Rows) -> ModelCardData:
    """Returns the front matter that the Hub reads, with the accuracy of every width as its model-index."""
    data, base = str(record.provenance.get("data", "")), str(record.provenance.get("model", ""))
    held, task = {Point.of_row(row) for row in rows}, task_named(record.task)
    main, kind = main_column(task), FEATURES if spec.features else task.hub["task_type"]
    results = [
        EvalResult(
            task_type=task.hub["task_type"],
            dataset_type=data,
            dataset_name=data,
            metric_type=task.hub["metric_type"],
            metric_name=f"{task.columns[main].partition(',')[0]} at width {Point.of_row(metric)}",
            metric_value=round(value, task.digits),
        )
        for metric in record.metrics
        if data and (value := metric.get(main)) is not None and Point.of_row(metric) in held
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=kind,
        tags=[kind, "timm", "scala-vit"],
        license=spec.pretrained_cfg.get("license"),
        base_model=base.removeprefix("hf-hub:").partition("@")[0] if base.startswith("hf-hub:") else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
