"""Chooses between float32 and bfloat16."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from scala_cli.device import device_name
from scala_cli.settings import DeviceSettings
from scala_cli.watch import Watcher


def uses_bfloat16(device: torch.device, settings: DeviceSettings) -> bool:
    """Returns whether to compute in bfloat16: as the settings say, else if the hardware multiplies in it."""
    return multiplies_bfloat16(device) if settings.amp is None else settings.amp


def note_emulation(device: torch.device, settings: DeviceSettings, watch: Watcher) -> None:
    """Warns a user who asks for bfloat16 on a device that only emulates it."""
    known = device.type == "cuda" or cpu_capabilities().get("architecture") == "x86_64"
    if settings.amp and known and not multiplies_bfloat16(device):
        slow = ", and can take a hundred times as long with --amp" if device.type == "cpu" else ""
        watch.note(f"{device_name(device)} only emulates bfloat16{slow}.")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Returns True for NVIDIA GPUs since Ampere, other GPUs, and CPUs with AMX or AVX512-BF16.

    Measurements are in docs/performance.md.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    capabilities = cpu_capabilities()
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)


def cpu_capabilities() -> dict[str, Any]:
    """Returns torch's own description of this CPU; empty if this version of torch has none."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def autocast(device: torch.device, settings: DeviceSettings) -> AbstractContextManager[object]:
    """Returns bfloat16 autocast if the settings use it on this device, else a context that does nothing."""
    on = uses_bfloat16(device, settings)
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()
