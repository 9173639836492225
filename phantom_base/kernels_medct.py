"""Products and copies in the form that is fastest on the hardware at hand; what they compute is `layers_medct`'s.

Each has a plain formulation that gives the same up to rounding: `linear` is `F.linear`, `nearest` an argmax. Layers
narrower than `WIDE` take the plain one, so that a small model rounds as the original does.

On NVIDIA cards the passes between the products are kernels of Triton; `fused` decides, for all of them.

The model's Linears are torch's own, so that quantisers, PEFT and offloading know them, and nothing but a Linear touches
its weight: `apply_linear` calls it and, if it multiplies plain tensors, only changes how.
"""

import functools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Bytes of the widest intermediate results (gated feed-forward, similarity to the codebook) held at a time, whatever
# the size of the volume. On CPUs 16 MiB: they stay in the last cache, and in memory that the allocator hands
# out again; larger blocks are new pages from the system each time, which costs as much as the products themselves.
CPU_CHUNK_BYTES = 2**24
CHUNK_BYTES = 2**28
FUSED_CHUNK_BYTES = 2**29
CODEBOOK_PARTS = 16
# From this width on layers take ways that are faster, and round otherwise. The size of the batch has no part in it, so
# that a model never mixes both.
WIDE = 256
ROW_ELEMENTS = 16
"""Rows of results that begin at multiples of so many elements are written 1.5 times as fast."""
CONVOLVES_ON_CPU = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")

use_triton = os.environ.get("MEDCT_TRITON") != "0"
"""Whether kernels of Triton are used where they can be; the environment variable "0" leaves them out."""
interprets_triton = False
"""Whether they are used on the CPU, too, where Triton only interprets them (`TRITON_INTERPRET=1`): for tests."""
_PLAIN = (torch.Tensor, nn.Parameter, type(None))
_FUSIBLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HALF = (torch.float16, torch.bfloat16)
_OLDEST_CARD = (8, 0)  # compute capability; older ones have no bfloat16
_MOST_OFF = 0.05
"""By how much kernels may differ from torch, as a share of the result's length: rounding stays far below, whatever the
precision, and a kernel that a compiler got wrong far above."""
_agreed: set[tuple] = set()


class _Thread(threading.local):
    is_plain = False
    """Whether this thread is computing what kernels are compared with."""


_thread = _Thread()
# Classes whose forward pass kernels, or a recording, may compute in their place.
_fusible: set[type] = {nn.Linear, nn.Conv3d, nn.ModuleList}


def fusible(module_class: type) -> type:
    """Class decorator: kernels, or a recording, may compute the forward pass of modules of this very class."""
    _fusible.add(module_class)
    return module_class


@functools.cache
def triton_kernels() -> ModuleType | None:
    """`triton_kernels_medct`, imported when it is first needed; `None` where Triton is missing."""
    try:
        from .triton_kernels_medct import mix  # noqa: F401, which loads the module
    except ImportError:
        return None
    return sys.modules[f"{__package__}.triton_kernels_medct"]


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Whether a device is a card that kernels are made for, and Triton is there."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < _OLDEST_CARD:
        return False
    return triton_kernels() is not None


def fused(tensor: torch.Tensor, *parts: nn.Module | torch.Tensor | None) -> bool:
    """Whether kernels of Triton compute what some modules would, past their `forward`.

    Not where anybody but the model has a part in it: modules that have hooks or are not of the very class (adapters,
    quantizers, parametrizations), parameters that are sharded, offloaded or trained. And not while `torch.compile`
    traces, which fuses as well.

    Args:
        tensor: What they are called with.
        parts: The modules, and parameters besides.
    """
    return _takes_kernels(tensor) and all(_is_constant(part, tensor.device) for part in parts)


def weights_of(tensor: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor] | None:
    """Parameters and buffers of modules and all their parts, if kernels may compute what they would; else `None`.

    As `fused` of every part, and as fast as Python can ask: single volumes wait for it.

    Args:
        tensor: What they are called with.
        modules: The modules, each with its parts.
    """
    if not _takes_kernels(tensor):
        return None
    found: list[torch.Tensor | None] = []
    left = list(modules)
    while left:
        part = left.pop()
        if type(part) not in _fusible or not is_bare(part):
            return None
        found += part._parameters.values()
        found += part._buffers.values()
        left += part._modules.values()  # type: ignore[arg-type]
    weights = [each for each in found if each is not None]
    return weights if all(_is_constant(each, tensor.device) for each in weights) else None


def _takes_kernels(tensor: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.dtype not in _FUSIBLE_DTYPES or type(tensor) is not torch.Tensor:
        return False
    if not use_triton or _thread.is_plain:
        return False
    return interprets_triton if tensor.device.type == "cpu" else runs_kernels(tensor.device)


def agree(case: tuple, by_kernels: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> bool:
    """Whether kernels give what torch does, on the card at hand: tried once a process for each case.

    Compilers of kernels have left out what only looked superfluous, and nobody would notice wrong scores. If they
    differ, a warning says so, and this process computes without any of them.

    Args:
        case: All that decides which kernels run: names, sizes, precisions, the device.
        by_kernels: Computes something with kernels.
        plain: Computes the same; for it, no kernels are used.
    """
    global use_triton
    if case in _agreed:
        return True
    with torch.no_grad():
        found = by_kernels().float()
        _thread.is_plain = True
        try:
            expected = plain().float()
        except torch.OutOfMemoryError:  # it needs more than kernels do; another time there may be room
            return True
        finally:
            _thread.is_plain = False
        off, length = (found - expected).norm().item(), expected.norm().item()
    if not math.isfinite(length):  # nothing can be said of this volume; perhaps of the next
        return True
    if not off <= _MOST_OFF * length:
        use_triton = False
        warnings.warn(
            f"Triton's kernels are off by {off / max(length, 1e-9):.0%} on this card ({case[0]}), so torch computes in "
            "their place. Please report this with the versions of torch, Triton and the driver.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    _agreed.add(case)
    return True


def _is_constant(part: nn.Module | torch.Tensor | None, device: torch.device) -> bool:
    if isinstance(part, nn.Module):
        is_known = type(part) in _fusible and is_bare(part)
        return is_known and all(_is_constant(parameter, device) for parameter in part._parameters.values())
    is_trained = part is not None and part.requires_grad and torch.is_grad_enabled()
    return part is None or (type(part) in _PLAIN and part.device == device and not is_trained)


def is_bare(module: nn.Module) -> bool:
    """Whether nothing but its class has a part in what a module computes."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module)


def split_sequences(rows: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Split sequences so that what kernels make of them stays within the chunk size of a card.

    Args:
        rows: `(sequences, tokens, d)`.
        width: Elements per token of the widest intermediate result.
        dtype: Precision of that result.
    """
    return rows.split(max(1, FUSED_CHUNK_BYTES // (rows.shape[1] * width * dtype.itemsize)))


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether torch's autocast is on where the tensor lies."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def row_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The precision in which rows are handed to products: autocast's if it is on.

    Args:
        tensor: Lies where the products are made.
        dtype: Precision of the products' weights.
    """
    return torch.get_autocast_dtype(tensor.device.type) if is_autocast(tensor) else dtype


def add(stream: torch.Tensor, update: torch.Tensor, is_kept: bool = False) -> torch.Tensor:
    """The sum of two tensors, in the memory of the first unless gradients are enabled.

    Args:
        stream: Any shape; overwritten without gradients.
        update: Same shape.
        is_kept: Whether somebody else may hold the first.
    """
    return stream + update if is_kept or torch.is_grad_enabled() else stream.add_(update)


def split_rows(rows: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Split rows so that intermediate results stay within the chunk size of the device.

    Args:
        rows: `(rows, ...)`.
        width: Elements per row of the widest intermediate result.
        dtype: Precision of that result.

    Returns:
        Views `(fewer rows, ...)` in order.
    """
    if torch.compiler.is_exporting():  # a number of chunks is that of one batch size
        return (rows,)
    chunk_bytes = CPU_CHUNK_BYTES if rows.device.type == "cpu" else CHUNK_BYTES
    return rows.split(max(1, chunk_bytes // (width * dtype.itemsize)))


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`; on x86 as a convolution of size 1, where that is faster, and with rows of results that lie aligned.

    oneDNN makes the same product up to 1.3 times as fast in float32 as the library behind `F.linear` does on processors
    of AMD, and 1.1 times in bfloat16 if the results are wider than the rows.

    Args:
        rows: `(..., in_features)`.
        weight: `(out_features, in_features)`.
        bias: `(out_features,)`.

    Returns:
        `(..., out_features)`.
    """
    width = len(weight)
    if min(weight.shape) >= WIDE and width % ROW_ELEMENTS:
        missing = -width % ROW_ELEMENTS  # that of the gated feed-forward is odd
        bias = None if bias is None else F.pad(bias, (0, missing))
        return linear(rows, F.pad(weight, (0, 0, 0, missing)), bias)[..., :width]
    if min(weight.shape) >= WIDE and rows.is_cuda and rows.shape[-1] % ROW_ELEMENTS:
        missing = -rows.shape[-1] % ROW_ELEMENTS
        rows, weight = F.pad(rows, (0, missing)), F.pad(weight, (0, missing))
    is_faster = rows.dtype == torch.float32 or (rows.dtype == torch.bfloat16 and width > weight.shape[1])
    is_faster = is_faster and min(weight.shape) >= WIDE
    if not (CONVOLVES_ON_CPU and is_faster and rows.dtype == weight.dtype and rows.device.type == "cpu"):
        return F.linear(rows, weight, bias)
    # (..., d) -> (1, d, n, 1) with channels last: the same memory
    columns = rows.reshape(1, -1, 1, rows.shape[-1]).permute(0, 3, 1, 2)
    product = F.conv2d(columns, weight[..., None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(*rows.shape[:-1], -1)


class _Products(TorchFunctionMode):
    """While it lasts, `F.linear` of plain tensors is another product, of rows in the precision of the weight.

    Weights of other types (quantized, sharded) know themselves how they are multiplied.
    """

    def __init__(self, product: Callable[..., torch.Tensor]):
        super().__init__()
        self.product = product

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear and not kwargs and all(type(each) in _PLAIN for each in args):
            rows, weight, *bias = args
            return self.product(rows if is_autocast(rows) else rows.to(weight.dtype), weight, *bias)
        return function(*args, **(kwargs or {}))


def apply_linear(module: nn.Module, rows: torch.Tensor, product: Callable[..., torch.Tensor] = linear) -> torch.Tensor:
    """Call a Linear, or what adapters or quantizers have made of it.

    Args:
        module: The Linear.
        rows: `(..., in_features)`.
        product: What to use in place of `F.linear` for plain tensors.

    Returns:
        `(..., out_features)`.
    """
    if type(module) is nn.Linear and is_bare(module) and type(module.weight) in _PLAIN:
        # As below; a call of the module costs as much of a processor's time as the product itself.
        rows = rows if is_autocast(rows) else rows.to(module.weight.dtype)
        return product(rows, module.weight, *([] if module.bias is None else [module.bias]))
    with _Products(product):
        return module(rows)


def gated(hidden: torch.Tensor) -> torch.Tensor:
    """The first half of each row times gelu of the second.

    Args:
        hidden: `(..., 2 * width)`.

    Returns:
        `(..., width)`.
    """
    if fused(hidden):
        return triton_kernels().gate(hidden)
    value, gate = hidden.chunk(2, dim=-1)
    if gate.shape[-1] >= WIDE:
        gate = gate.contiguous()  # gelu takes three times as long on half of each row
    return value * F.gelu(gate)


def padded_width(weight: torch.Tensor) -> int:
    """The width that cards multiply well, next to that of the rows that `weight`, `(out, width)`, takes."""
    return weight.shape[1] + -weight.shape[1] % ROW_ELEMENTS


def gated_product(rows: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    """The first half of a product times gelu of the second, by kernels.

    Args:
        rows: `(..., d)`.
        weight: `(2 * narrow, d)`.
        width: That of the result, of which what is beyond `narrow` is zero.

    Returns:
        `(..., width)`.
    """
    if rows.dtype in _HALF and weight.dtype == rows.dtype:
        product = triton_kernels().gated_product(rows.reshape(-1, rows.shape[-1]), weight, width)
        return product.view(*rows.shape[:-1], width)
    halves = F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, width - len(weight) // 2)).flatten(0, 1)
    return triton_kernels().gate(F.linear(rows, halves))


def add_product(stream: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> None:
    """Add a product to the stream, in its memory; never rounded in between where the stream is the more precise one.

    Args:
        stream: `(..., d)`, on a card.
        rows: `(..., width)`.
        weight: `(d, width)`.
    """
    stream, rows = stream.view(-1, stream.shape[-1]), rows.reshape(-1, rows.shape[-1])
    if stream.dtype == rows.dtype:
        torch.addmm(stream, rows, weight.t(), out=stream)
    elif stream.device.type != "cpu":
        torch.addmm(stream, rows, weight.t(), out_dtype=stream.dtype, out=stream)
    else:
        stream.add_(F.linear(rows, weight))


def feed_forward(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A gated feed-forward whose halves are made as wide as cards multiply well; what is added is zero.

    Args:
        rows: `(..., d)`.
        first: `(2 * width, d)`, weight of the first product.
        second: `(d, width)`, of the second.

    Returns:
        `(..., d)`.
    """
    missing = padded_width(second) - second.shape[1]
    halves = F.pad(first.unflatten(0, (2, -1)), (0, 0, 0, missing)).flatten(0, 1)
    rows = rows if is_autocast(rows) else rows.to(first.dtype)
    return F.linear(gated(F.linear(rows, halves)), F.pad(second, (0, missing)))


def nearest(tokens: torch.Tensor, codes: torch.Tensor, coarse_codes: torch.Tensor) -> torch.Tensor:
    """The row of `codes` with the greatest product with each token.

    Args:
        tokens: `(tokens, d)`.
        codes: `(codes, d)`, in float32 or better.
        coarse_codes: The same in the precision of the large product, which finds the candidates.

    Returns:
        `(tokens,)`, int64.
    """
    if torch.finfo(coarse_codes.dtype).bits > 16:
        return _most_similar(tokens.to(coarse_codes.dtype), coarse_codes, 1).squeeze(-1)
    # Half precision often holds the best two as equal, so they are compared again.
    first_two = _most_similar(tokens.to(coarse_codes.dtype), coarse_codes, min(2, len(codes)))
    exact = (codes[first_two] * tokens[:, None]).sum(dim=-1)
    return first_two.gather(-1, exact.argmax(dim=-1, keepdim=True)).squeeze(-1)


def _most_similar(tokens: torch.Tensor, codes: torch.Tensor, k: int) -> torch.Tensor:
    """`(tokens, k)`, the rows of `codes` with the greatest products with each token, the greatest first.

    Of the products with some parts of the codes the greatest are found place by place, at the speed of memory. The `k`
    best lie in the `k` best of these places, so the search for where they stand, which is slow, is short.
    """
    parts = codes.chunk(math.gcd(len(codes), CODEBOOK_PARTS))
    similarities = [linear(tokens, part) for part in parts]
    places = functools.reduce(torch.maximum, similarities).topk(min(k, len(parts[0]))).indices
    candidates = torch.stack([similarity.gather(-1, places) for similarity in similarities], dim=-1)
    best = candidates.flatten(-2).topk(k).indices  # place * parts + part
    return best % len(parts) * len(parts[0]) + places.gather(-1, best // len(parts))
