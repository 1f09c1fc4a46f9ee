"""How many times the images a second of a step as the paper's code does it.

That is with explicit attention at every width, all tokens of the last block, and eager; in turns, with the
same optimizer, average, teacher and precision.

    python docs/paper_step.py MODEL [--amp] [--torchcompile]
"""

import statistics
from functools import partial

import torch
import typer

from scala_cli.models.source import open_slimmable
from scala_cli.models.vit import choose_attention, random_images
from scala_cli.settings import DeviceSettings, OptimizerSettings, Settings
from scala_cli.tasks import task_named
from scala_cli.timing import take_turns
from scala_cli.training.step import Step
from scala_cli.watch import QUIET

CPU = torch.device("cpu")


def main(model: str, amp: bool = False, torchcompile: bool = False, batch_size: int = 64, runs: int = 15):
    net, _ = open_slimmable(model, None)
    images = random_images(net.spec, batch_size)
    targets = torch.arange(batch_size) % net.spec.num_classes

    def step(compiled: bool = False) -> Step:
        chosen = OptimizerSettings(batch_size=batch_size, torchcompile=compiled)
        ready = Step(
            net,
            task_named("classification"),
            net,
            Settings("", optimizer=chosen, device=DeviceSettings(amp=amp)),
            CPU,
        )
        ready.net.train()
        return ready

    steps = {"the paper's": as_the_paper(step()), "scala": step()}
    if torchcompile:
        steps["scala, compiled"] = step(compiled=True)
    calls = {name: partial(ready, images, targets) for name, ready in steps.items()}
    take_turns(calls, 3, CPU, QUIET)
    times = take_turns(calls, runs, CPU, QUIET)
    for name, series in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["the paper's"], series, strict=True))
        speed = 1000 * batch_size / statistics.median(series)
        print(f"{name:16} {speed:6.1f} images/s  {ratio:.2f} times the paper's")


def as_the_paper(step: Step) -> Step:
    for vit in (step.net.vit, step.frozen):  # the narrow ones do as the full one does
        choose_attention(vit, CPU, bfloat16=True)  # the explicit one
        vit.blocks[-1].read = None
    return step


if __name__ == "__main__":
    typer.run(main)
