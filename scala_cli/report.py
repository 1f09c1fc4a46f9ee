"""What outlives a command beside the weights: the model card, tables as CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from scala_cli.models.checkpoint import Record
from scala_cli.models.vit import Spec
from scala_cli.slicing.point import Point

CARD = """---
{metadata}
---

# {name}

{architecture} at {ratio:g} of its width: {params:.1f} M parameters, {gmacs:.2f} GMACs
at {height} x {width} pixels. Cut from a slimmable Vision Transformer{how} with scala-vit.

| ratio | top-1 % | top-5 % |
|---|---|---|
{rows}

```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
```

Weights started from: {origin}.
"""


def model_card(name: str, spec: Spec, record: Record, slice: Mapping[str, Any]) -> str:
    """The README.md of a slice.

    Args:
        spec: the slice's own.
        slice: {"ratio", "params", "gmacs"}
    """
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "scala-vit"],
        license=spec.pretrained_cfg.get("license"),
    )
    rows = [
        f"| {m['ratio']:g} | {m['top1']:.2f} | {m['top5']:.2f} |"
        for m in record.metrics
        if Point.of(m["ratio"]) == Point.of(slice["ratio"])
    ]
    _, height, width = spec.input_size
    card = ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            name=name,
            architecture=spec.architecture,
            ratio=slice["ratio"],
            params=slice["params"] / 1e6,
            gmacs=slice["gmacs"],
            height=height,
            width=width,
            how=f" trained by the {record.method} method" if record.method else "",
            rows="\n".join(rows) or f"| {slice['ratio']:g} | not evaluated | |",
            origin=record.provenance.get("weights", "unknown"),
        )
    )
    return str(card)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV, with every column that any of them has."""
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
