"""The passes over memory between the vision encoder's products, as Triton kernels for NVIDIA cards.

What they compute is `layers_medct`'s, in float32 inside whatever the tensors hold; `kernels_medct.fused` says when
they are used. Each reads and writes a tensor once where the plain formulation does so several times. Weights of norms
and convolutions are constants here: gradients are those of the tensors that flow through.

All of them can be had from this file. It holds the gate, unit length and what is made of weights; the convolution,
norms and products have files of their own.

Masks make every size right. Sizes of the model are constants of a kernel, those of a batch are not, so that
another batch needs no other kernel. Sizes of tiles are those that were fastest on an H100.
"""

import math

import torch
from torch.autograd.function import once_differentiable

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_convolution_medct import mix, mix_prepared
from .triton_launch_medct import TINIEST_NORM, launch_grid, on_device_of
from .triton_norms_medct import add_norm, norm, norm_patches
from .triton_products_medct import attention, can_attend, gated_product, quantize

_GATE_ELEMENTS = 1024
_COPIED = 2048
_UNIT_ROWS = 128
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_GAUSS = tl.constexpr(1 / math.sqrt(2 * math.pi))


# Weights in the form in which kernels and products take them, made anew for each call: no copy can be out of date.


@triton.jit
def _prepare_kernel(
    convolution,
    norm,
    query,
    key,
    value,
    second,
    taps,
    projections,
    padded,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tap_programs = tl.cdiv(27 * CHANNELS, BLOCK)
    head_programs = tl.cdiv(HEADS, ROWS)
    if program < tap_programs:
        place = program * BLOCK + tl.arange(0, BLOCK)
        is_place = place < 27 * CHANNELS
        tap = tl.load(convolution + place % CHANNELS * 27 + place // CHANNELS, mask=is_place, other=0.0)
        tl.store(taps + place, tap.to(tl.float32), mask=is_place)
    elif program < tap_programs + 3 * head_programs:
        kind = (program - tap_programs) // head_programs
        row = (program - tap_programs) % head_programs * ROWS + tl.arange(0, ROWS)[:, None]
        channel = tl.arange(0, ROW)[None, :]
        is_weight = (row < HEADS) & (channel < CHANNELS)
        at = row * CHANNELS + channel
        if kind == 0:
            weight = tl.load(query + at, mask=is_weight, other=0.0).to(tl.float32)
            weight *= tl.load(norm + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
            weight -= tl.sum(weight, axis=1, keep_dims=True) / CHANNELS
            tl.store(projections + at, weight.to(projections.dtype.element_ty), mask=is_weight)
        elif kind == 1:
            tl.store(projections + HEADS * CHANNELS + at, tl.load(key + at, mask=is_weight), mask=is_weight)
        else:
            tl.store(projections + 2 * HEADS * CHANNELS + at, tl.load(value + at, mask=is_weight), mask=is_weight)
    else:
        place = (program - tap_programs - 3 * head_programs) * BLOCK + tl.arange(0, BLOCK)
        is_place = place < CHANNELS * PADDED
        column = place % PADDED
        entry = tl.load(second + place // PADDED * WIDTH + column, mask=is_place & (column < WIDTH), other=0.0)
        tl.store(padded + place, entry, mask=is_place)


def prepare(
    convolution: torch.Tensor,
    norm: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    second: torch.Tensor,
    padded: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring the weights of a layer in the form in which kernels and products take them.

    Queries are made of a LayerNorm and then brought to unit length, which undoes its division; what it weighs and what
    it subtracts can stand in the weight: `query * norm`, less the mean of each row. So all three products are of the
    same rows.

    Args:
        convolution: `(channels, 1, 3, 3, 3)`, of the position generator.
        norm: `(channels,)`, weight of the LayerNorm, which has no bias.
        query: `(heads * width, channels)`, that makes queries of normalised rows.
        key: Same shape, that makes keys.
        value: Same shape, that makes values.
        second: `(channels, width)`, of the feed-forward's second product.
        padded: Width to which that is filled up with zeros.

    Returns:
        `(27, channels)`, float32; `(3 * heads * width, channels)`, which makes queries of any length, keys and values
        of rows that are not normalised; `(channels, padded)`.
    """
    channels, width = second.shape
    taps = torch.empty((27, channels), dtype=torch.float32, device=second.device)
    projections = key.new_empty((3 * len(key), channels))
    filled = second.new_empty((channels, padded))
    row = triton.next_power_of_2(channels)
    rows = max(1, _COPIED // row)
    programs = sum(triton.cdiv(each.numel(), _COPIED) for each in (taps, filled)) + 3 * triton.cdiv(len(key), rows)
    with on_device_of(second):
        _prepare_kernel[(programs,)](
            convolution,
            norm,
            query,
            key,
            value,
            second,
            taps,
            projections,
            filled,
            CHANNELS=channels,
            HEADS=len(key),
            WIDTH=width,
            PADDED=padded,
            BLOCK=_COPIED,
            ROW=row,
            ROWS=rows,
            num_warps=4,
        )
    return taps, projections, filled


# Gate of the feed-forward.


@triton.jit(do_not_specialize=["rows"])
def _gate_kernel(hidden, result, rows, ROW: tl.constexpr, GATE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = place // WIDTH
    column = place % WIDTH
    is_place = row < rows
    value = tl.load(hidden + row * ROW + column, mask=is_place, other=0.0).to(tl.float32)
    gate = tl.load(hidden + row * ROW + GATE + column, mask=is_place, other=0.0).to(tl.float32)
    product = value * gate * (0.5 + 0.5 * tl.erf(gate * _SQRT_HALF))
    tl.store(result + place, product.to(result.dtype.element_ty), mask=is_place)


@triton.jit(do_not_specialize=["rows"])
def _gate_backward_kernel(
    hidden,
    of_result,
    of_hidden,
    rows,
    ROW: tl.constexpr,
    GATE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = place // WIDTH
    column = place % WIDTH
    is_place = row < rows
    value = tl.load(hidden + row * ROW + column, mask=is_place, other=0.0).to(tl.float32)
    gate = tl.load(hidden + row * ROW + GATE + column, mask=is_place, other=0.0).to(tl.float32)
    given = tl.load(of_result + place, mask=is_place, other=0.0).to(tl.float32)
    share = 0.5 + 0.5 * tl.erf(gate * _SQRT_HALF)
    slope = share + gate * _GAUSS * tl.exp(-0.5 * gate * gate)
    dtype = of_hidden.dtype.element_ty
    tl.store(of_hidden + row * 2 * WIDTH + column, (given * gate * share).to(dtype), mask=is_place)
    tl.store(of_hidden + row * 2 * WIDTH + WIDTH + column, (given * value * slope).to(dtype), mask=is_place)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        width = hidden.shape[1] // 2
        result = hidden.new_empty((len(hidden), width))
        _launch_gate(_gate_kernel, hidden, result)
        ctx.save_for_backward(hidden)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, of_result):
        (hidden,) = ctx.saved_tensors
        of_hidden = hidden.new_empty(hidden.shape)
        _launch_gate(_gate_backward_kernel, hidden, of_result.contiguous(), of_hidden)
        return of_hidden


def _launch_gate(kernel, hidden, *more):
    rows, width = len(hidden), hidden.shape[1] // 2
    with on_device_of(hidden):
        kernel[launch_grid(rows * width, _GATE_ELEMENTS)](
            hidden, *more, rows, ROW=hidden.stride(0), GATE=width, WIDTH=width, BLOCK=_GATE_ELEMENTS, num_warps=4
        )


def gate(hidden: torch.Tensor) -> torch.Tensor:
    """The first half of each row times gelu of the second.

    Args:
        hidden: `(..., 2 * width)`.

    Returns:
        `(..., width)`.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _Gate.apply(rows).view(*hidden.shape[:-1], -1)


# Queries and keys of unit length.


@triton.jit(do_not_specialize=["rows"])
def _unit_kernel(
    values,
    scale,
    result,
    rows,
    HEADS: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_place = (row < rows) & (column < WIDTH)
    place = row // HEADS * ROW + row % HEADS * WIDTH + column
    value = tl.load(values + place, mask=is_place, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True)), TINIEST_NORM)
    unit = value / length * tl.load(scale + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(result + place, unit.to(result.dtype.element_ty), mask=is_place)


@triton.jit(do_not_specialize=["rows"])
def _unit_backward_kernel(
    values,
    scale,
    of_result,
    of_values,
    rows,
    HEADS: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_place = (row < rows) & (column < WIDTH)
    value = tl.load(values + row * WIDTH + column, mask=is_place, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True)), TINIEST_NORM)
    unit = value / length
    given = tl.load(of_result + row * WIDTH + column, mask=is_place, other=0.0).to(tl.float32)
    given *= tl.load(scale + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    gradient = (given - unit * tl.sum(given * unit, axis=1, keep_dims=True)) / length
    tl.store(of_values + row * WIDTH + column, gradient.to(of_values.dtype.element_ty), mask=is_place)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, scale):
        ctx.save_for_backward(values, scale)
        return _launch_unit(_unit_kernel, values, scale, torch.empty_like(values))

    @staticmethod
    @once_differentiable
    def backward(ctx, of_result):
        values, scale = ctx.saved_tensors
        return _launch_unit(
            _unit_backward_kernel, values, scale, of_result.contiguous(), torch.empty_like(values)
        ), None


def _launch_unit(kernel, values, scale, *more):
    heads, width = values.shape[-2:]
    rows = values.numel() // width
    with on_device_of(values):
        kernel[launch_grid(rows, _UNIT_ROWS)](
            values,
            scale,
            *more,
            rows,
            HEADS=heads,
            ROW=values.stride(-3),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            ROWS=_UNIT_ROWS,
            num_warps=4,
        )
    return more[-1]


def unit(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, times a scale of each column.

    Args:
        values: `(rows..., heads, width)`.
        scale: `(width,)`.
    """
    return _Unit.apply(values.contiguous(), scale)


__all__ = [
    "add_norm",
    "attention",
    "can_attend",
    "gate",
    "gated_product",
    "mix",
    "mix_prepared",
    "norm",
    "norm_patches",
    "prepare",
    "quantize",
    "unit",
]
