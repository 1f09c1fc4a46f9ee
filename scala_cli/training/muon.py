"""Lets timm's Muon compute in float32 where the hardware would emulate bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.optim import muon

from scala_cli.precision import multiplies_bfloat16


@contextmanager
def fast_muon(device: torch.device) -> Iterator[None]:
    """Makes timm's Muon orthogonalise its updates in float32 on a device that only emulates bfloat16.

    timm does it in bfloat16 and has no option. On one core of a CPU that emulates it, a matrix of 384 x 1536
    takes 4.6 s, in float32 0.16 s (docs/performance.md).
    """
    timms = muon.zeropower_via_newtonschulz
    if not multiplies_bfloat16(device):
        muon.zeropower_via_newtonschulz = partial(timms, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = timms
