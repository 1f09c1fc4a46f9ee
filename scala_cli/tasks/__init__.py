"""The tasks that a family can be trained for, by their names in checkpoints."""

from scala_cli.errors import CheckpointError
from scala_cli.tasks.base import Task
from scala_cli.tasks.classification import Classification
from scala_cli.tasks.features import Features

TASKS: dict[str, Task] = {"classification": Classification(), "features": Features()}


def task_named(name: str) -> Task:
    """Returns the task of this name. Raises CheckpointError if this version has none."""
    if name not in TASKS:
        raise CheckpointError(
            f"the checkpoint is for the task {name!r}, which this version does not have.",
            "Upgrade: pip install -U scala-vit",
        )
    return TASKS[name]
