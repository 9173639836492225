"""The machine that a process of this package runs on: its memory, its name, and how verbose its libraries are."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator

import torch
from transformers.utils import logging

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees if the C library is glibc; elsewhere nothing changes.

    Each volume and each training step needs blocks of the same sizes. Large ones would otherwise go back to the system
    every time and come back page by page, zeroed: a quarter of a training step on CPUs, and of the first volume's time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: on its GPU, else on the host; 0 where the system does not report it.

    Of Apple's GPUs it is what the process holds now, of which torch gives back hardly anything before its end.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if resource is None:
        return 0
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def device_name(device: torch.device) -> str:
    """The device's name for readers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} GPU"
    return f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device.type


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let libraries report errors only, within it; a command's own lines say the rest."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
