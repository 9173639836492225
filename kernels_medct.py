"""Products and copies in the form that is fastest on the hardware at hand; what they compute is `modeling_medct`'s.

Each has a plain formulation that gives the same up to rounding: `linear` is `F.linear`, `nearest` an argmax. Layers
narrower than `WIDE` take the plain one, so that a small model rounds as the original does.

The model's Linears are torch's own, so that quantisers, PEFT and offloading know them, and nothing but a Linear touches
its weight: `apply_linear` calls it and, if it multiplies plain tensors, only changes how.
"""

import functools
import math
from collections.abc import Callable
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
CODEBOOK_PARTS = 16
# From this width on layers take ways that are faster, and round otherwise. The size of the batch has no part in it, so
# that a model never mixes both.
WIDE = 256
ROW_ELEMENTS = 16
"""Rows of results that begin at multiples of so many elements are written 1.5 times as fast."""
CONVOLVES_ON_CPU = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def add(stream: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Their sum, in the memory of the stream where no gradient needs what it held."""
    return stream + update if torch.is_grad_enabled() else stream.add_(update)


def split_rows(rows: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cut `(rows, ...)` so that results of `width` elements a row stay within the chunk size of the device."""
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
            return self.product(rows.to(weight.dtype), weight, *bias)
        return function(*args, **(kwargs or {}))


_PLAIN = (torch.Tensor, nn.Parameter, type(None))


def apply_linear(module: nn.Module, rows: torch.Tensor, product: Callable[..., torch.Tensor] = linear) -> torch.Tensor:
    """What a Linear, or what adapters or quantisers have made of it, gives for `(..., in_features)`.

    Args:
        module: The Linear.
        rows: `(..., in_features)`.
        product: What multiplies plain tensors, with the arguments of `linear`.
    """
    with _Products(product):
        return module(rows)


def times_gelu(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`value` times gelu of `gate`; both may be halves of wider rows."""
    if gate.shape[-1] >= WIDE:
        gate = gate.contiguous()  # gelu takes three times as long on half of each row
    return value * F.gelu(gate)


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
