"""How a process of this package holds the memory of its host."""

import ctypes
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library is glibc; elsewhere nothing changes.

    Each volume and each training step needs blocks of the same sizes. Large ones would go back to the system every
    time and come again page by page, zeroed: a quarter of a training step on CPUs, and of the first volume's time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
