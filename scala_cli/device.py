"""Where tensors are computed, and in which precision."""

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from scala_cli.errors import ScalaError
from scala_cli.settings import DeviceSettings
from scala_cli.watch import Watcher


def choose_device(settings: DeviceSettings) -> torch.device:
    """The device asked for, or the best there is; sets the number of CPU threads on the way.

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
    except (RuntimeError, AssertionError):  # the latter where torch is built without CUDA
        raise ScalaError(
            f"device '{wanted}' cannot be used here.", f"Try --device {accelerator or 'cpu'}"
        ) from None
    return device


def uses_bfloat16(device: torch.device, settings: DeviceSettings) -> bool:
    """Whether to compute in bfloat16: as told, else where the hardware multiplies in it."""
    return multiplies_bfloat16(device) if settings.amp is None else settings.amp


def note_emulation(device: torch.device, settings: DeviceSettings, watch: Watcher) -> None:
    """Tells a user who asks for bfloat16 of what only emulates it: nothing else would."""
    known = device.type == "cuda" or cpu_capabilities().get("architecture") == "x86_64"
    if settings.amp and known and not multiplies_bfloat16(device):
        slow = ", and can take a hundred times as long with --amp" if device.type == "cpu" else ""
        watch.note(f"{device_name(device)} only emulates bfloat16{slow}.")


def multiplies_bfloat16(device: torch.device) -> bool:
    """NVIDIA's GPUs from Ampere on, all others, and CPUs with AMX or AVX512-BF16 (docs/performance.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    capabilities = cpu_capabilities()
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)


def cpu_capabilities() -> dict[str, Any]:
    """What torch tells of this CPU, by its own names; nothing where this torch does not."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def autocast(device: torch.device, settings: DeviceSettings) -> AbstractContextManager[object]:
    on = uses_bfloat16(device, settings)
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


@contextmanager
def naming_lack_of_memory(images: int, remedy: str = "Give a smaller --batch-size (-b).") -> Iterator[None]:
    """Turns torch's out of memory, on any device, into a ScalaError that names the batch size.

    Args:
        images: in the batch that is worked on within.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU has none
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ScalaError(f"not enough memory for {images} images at once.", remedy) from None
        raise


def synchronize(device: torch.device) -> None:
    """Returns once the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """How many bytes more than before are held at the peak of a call; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    held = begin_peak() if device.type == "cpu" else None
    call()
    return None if held is None else resident("VmHWM") - held


def begin_peak() -> int | None:
    """Makes this process's peak of memory begin anew: the bytes held now. None but on Linux with glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, or it would count as held before
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (OSError, AttributeError):
        return None
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of memory that this process holds (VmRSS) or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def device_name(device: torch.device) -> str:
    """The processor's own name: "Intel Xeon ..." or "NVIDIA ..."."""
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
    """All widths share timm's forward; past a limit torch would quietly run further ones uncompiled."""
    import torch._dynamo.config as dynamo

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    for name in ("recompile_limit", "cache_size_limit"):  # by version of torch
        if hasattr(dynamo, name):
            setattr(dynamo, name, 256)
            return
