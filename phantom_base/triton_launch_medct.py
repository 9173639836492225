"""How kernels of Triton are launched, whichever they are."""

from contextlib import AbstractContextManager, nullcontext

import torch

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
except ImportError:
    raise

TINIEST_NORM = tl.constexpr(1e-12)
"""Rows shorter than that keep their length where others come to unit length, as in `F.normalize`."""


def launch_grid(size: int, block: int) -> tuple[int]:
    """The grid of a kernel in one dimension.

    Args:
        size: Elements or rows in all.
        block: How many of them one program takes.
    """
    return (triton.cdiv(size, block),)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """A context in which kernels are launched where a tensor lies; costs nothing where they are anyway."""
    is_here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return nullcontext() if is_here else torch.cuda.device(tensor.get_device())
