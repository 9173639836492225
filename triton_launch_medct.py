"""How kernels of Triton are launched, whichever they are."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    raise

LARGE_TILES = (9, 10)
"""Major compute capabilities of cards whose multiprocessors hold 227 KB of tiles; others hold 99 or more."""
_ALIGNED_BYTES = 16
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


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a card; elsewhere those of an H100, for which kernels were measured."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def has_large_tiles(device: torch.device) -> bool:
    """Whether a card is one of `LARGE_TILES`, as those of data centres since Hopper are, or there is none."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in LARGE_TILES


def described(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """A tensor as Hopper's copy engine fetches blocks of it; what lies beyond its end is zero.

    Rows that do not begin at multiples of 16 bytes are copied, and filled up with zeros.

    Args:
        tensor: Contiguous.
        block: Size of a block in each dimension.
    """
    missing = -tensor.shape[-1] % (_ALIGNED_BYTES // tensor.dtype.itemsize)
    tensor = F.pad(tensor, (0, missing)) if missing else tensor
    tensor = tensor.clone() if tensor.data_ptr() % _ALIGNED_BYTES else tensor
    return TensorDescriptor.from_tensor(tensor, list(block))
