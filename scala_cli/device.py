"""The device that tensors are computed on."""

import logging
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from scala_cli.errors import ScalaError
from scala_cli.settings import DeviceSettings


def choose_device(settings: DeviceSettings) -> torch.device:
    """Returns the device asked for, or the best available, and sets the number of CPU threads.

    Raises ScalaError for a device this machine does not have.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    wanted = settings.device or accelerator or "cpu"
    try:
        device = torch.device(wanted)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun: a GPU for each process
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):  # AssertionError: torch is built without CUDA
        raise ScalaError(
            f"device '{wanted}' cannot be used here.",
            remedy="try",
            setting="device",
            value=accelerator or "cpu",
        ) from None
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """Returns the processor's name: "Intel Xeon ..." or "NVIDIA ..."."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.processor() or platform.machine()
    return str(device)


def allow_compiling_all() -> None:
    """Raises torch's limit of compilations, beyond which it silently runs more widths uncompiled."""
    import torch._dynamo.config as dynamo

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if there is no GPU
    for name in ("recompile_limit", "cache_size_limit"):  # the name depends on torch's version
        if hasattr(dynamo, name):
            setattr(dynamo, name, 256)
            return
