"""Says after how much training each run had reached an accuracy at every width.

    python docs/minutes_to.py 70.5,72.2,72.6,72.7 RUN RUN ...

The levels are top-1 in %, one per width, narrowest first. If a run first taught the full width new
classes, both parts count. Time is that of training, without evaluation.
"""

import json
import sys
from pathlib import Path

from scala_cli.models.checkpoint import load_with_record
from scala_cli.training.price import Macs, settings_of, training_macs

levels, *runs = sys.argv[1:]
wanted = [float(level) for level in levels.split(",")]


def epochs_of(run: Path):
    """Yields for each epoch its minutes, images, work and accuracies by width."""
    net, record = load_with_record(run / "last")
    taught = bool(record.provenance.get("teacher"))
    work = training_macs(Macs.of(net), settings_of(run).method, record.task, taught) / 1e12
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        images = row["images_per_sec"] * row["minutes"] * 60
        yield row["minutes"], images, images * work, [point["top1"] for point in row["points"]]


for run in map(Path, runs):
    alone = run / "teacher" / "metrics.jsonl"
    begun = [epoch[:3] for epoch in epochs_of(run / "teacher")] if alone.is_file() else []
    spent = [sum(column) for column in zip((0.0, 0.0, 0.0), *begun, strict=True)]
    found, reached = [], False
    for *more, found in epochs_of(run):
        spent = [one + other for one, other in zip(spent, more, strict=True)]
        reached = all(top1 >= level for top1, level in zip(found, wanted, strict=True))
        if reached:
            break
    minutes, images, work = spent
    told = "reached" if reached else "not reached"
    print(f"{run}: {told} after {images:,.0f} images and {minutes:.1f} minutes: {found}")
    print(f"  {work:.1f}e12 multiply-accumulates")
