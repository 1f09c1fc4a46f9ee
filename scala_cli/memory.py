"""Measures the memory a call takes, and names the error if there is too little."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scala_cli.errors import ScalaError


@contextmanager
def naming_lack_of_memory(images: int, remedy: str = "smaller_batch") -> Iterator[None]:
    """Turns torch's out of memory, on any device, into a ScalaError that names the batch size.

    Args:
        images: number of images in the batch that the block computes.
        remedy: name of the remedy for the `ScalaError`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU has none
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ScalaError(f"not enough memory for {images} images at once.", remedy=remedy) from None
        raise


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """Returns how many bytes a call adds at its peak; None if the platform does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    held = begin_peak() if device.type == "cpu" else None
    call()
    return None if held is None else resident("VmHWM") - held


def begin_peak() -> int | None:
    """Resets this process's memory peak; returns the bytes held now, None except on Linux with glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns free memory, which would count as held otherwise
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (OSError, AttributeError):
        return None
    return resident("VmRSS")


def resident(field: str) -> int:
    """Returns the bytes that this process holds now (VmRSS) or held at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
