"""The position generator's depthwise convolution, added to its input, as a Triton kernel.

What they compute is `layers_medct`'s, in float32 inside whatever the tensors hold; `kernels_medct.fused` says when
they are used. Weights are constants here: gradients are those of the tensors that flow through.
"""

import torch
from torch.autograd.function import once_differentiable

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_launch_medct import on_device_of
from .triton_norms_medct import norm, norm_backward

_TILE = (1, 4, 128, 1)
"""Frames, rows and channels that one program makes, for all columns, and its warps."""


@triton.jit
def _mix_kernel(
    grid,
    weights,
    bias,
    stream,
    low,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_FRAMES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
):
    # A program makes a few frames and rows, all columns one after the other: each value is read for three COLUMNS.
    row_tiles: tl.constexpr = (ROWS + TILE_ROWS - 1) // TILE_ROWS
    frame_tiles: tl.constexpr = (FRAMES + TILE_FRAMES - 1) // TILE_FRAMES
    channel_tiles: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0) // channel_tiles
    volume = (program // (row_tiles * frame_tiles)).to(tl.int64)
    tile = tl.arange(0, TILE_FRAMES * TILE_ROWS)[:, None]
    frame = program // row_tiles % frame_tiles * TILE_FRAMES + tile // TILE_ROWS
    row = program % row_tiles * TILE_ROWS + tile % TILE_ROWS
    channel = tl.program_id(0) % channel_tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_channel = channel < CHANNELS
    is_place = (frame < FRAMES) & (row < ROWS) & is_channel
    place = ((volume * FRAMES + frame) * ROWS + row) * COLUMNS * CHANNELS + channel

    shape: tl.constexpr = (TILE_FRAMES * TILE_ROWS, BLOCK)
    before = tl.zeros(shape, tl.float32)
    here = tl.zeros(shape, tl.float32)
    centre = tl.zeros(shape, tl.float32)
    shift = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    for column in range(COLUMNS + 1):
        after = tl.zeros(shape, tl.float32)
        middle = tl.zeros(shape, tl.float32)
        for a in tl.static_range(3):
            for b in tl.static_range(3):
                near_frame = frame + (a + FIRST)
                near_row = row + (b - 1)
                is_near = (near_frame >= 0) & (near_frame < FRAMES) & (near_row >= 0) & (near_row < ROWS)
                offset = ((a + FIRST) * ROWS + (b - 1)) * COLUMNS * CHANNELS + column * CHANNELS
                near_value = tl.load(grid + (place + offset), mask=is_near & is_channel & (column < COLUMNS), other=0.0)
                near_value = near_value.to(tl.float32)
                tap = weights + (a * 9 + b * 3) * CHANNELS + channel
                after += near_value * tl.load(tap, mask=is_channel, other=0.0)
                here += near_value * tl.load(tap + CHANNELS, mask=is_channel, other=0.0)
                before += near_value * tl.load(tap + 2 * CHANNELS, mask=is_channel, other=0.0)
                if a + FIRST == 0 and b == 1:
                    middle = near_value
        total = before + shift + centre
        is_done = is_place & (column > 0)
        done = place + (column - 1) * CHANNELS
        tl.store(stream + done, total, mask=is_done)
        if HAS_LOW:
            # Four a thread, as the sum itself: for wider writes all that is read would change hands in between.
            tl.store(low + tl.max_contiguous(done, (1, 4)), total.to(low.dtype.element_ty), mask=is_done)
        before = here
        here = after
        centre = middle


def _mix(grid, weights, bias, dtype, first=-2):
    """`grid + convolution(grid)` and its copy in another precision, without gradients.

    Args:
        grid: `(volumes, frames, rows, columns, channels)`.
        weights: `(27, channels)`, the taps of the convolution.
        bias: `(channels,)`, or `None`.
        dtype: Precision of the copy.
        first: Offset of the first tap along the frames; -2 is causal.

    Returns:
        The sum and its copy, of the shape of `grid`; the same tensor if their precision is.
    """
    volumes, frames, rows, columns, channels = grid.shape
    stream = torch.empty_like(grid)
    low = stream if dtype == grid.dtype else torch.empty_like(grid, dtype=dtype)
    tile_frames, tile_rows, block, warps = _TILE
    block = triton.next_power_of_2(min(block, channels))
    tiles = triton.cdiv(frames, tile_frames) * triton.cdiv(rows, tile_rows) * triton.cdiv(channels, block)
    with on_device_of(grid):
        _mix_kernel[(volumes * tiles,)](
            grid,
            weights,
            weights if bias is None else bias,
            stream,
            low,
            FRAMES=frames,
            ROWS=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            BLOCK=block,
            TILE_FRAMES=tile_frames,
            TILE_ROWS=tile_rows,
            FIRST=first,
            HAS_BIAS=bias is not None,
            HAS_LOW=low is not stream,
            num_warps=warps,
        )
    return stream, low


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, weight, bias, norm_weight, eps, dtype):
        taps = weight.flatten(1).t().float().contiguous()  # (27, channels)
        stream, low = _mix(grid, taps, bias, dtype)
        normed = norm(stream, norm_weight, None, eps, dtype)
        if low is stream:
            low = stream.view_as(stream)
        ctx.save_for_backward(stream, weight, norm_weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return stream, low, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_stream, of_low, of_normed):
        stream, weight, norm_weight = ctx.saved_tensors
        of_sum, _ = norm_backward(stream, norm_weight, ctx.eps, of_normed, of_stream, of_low)
        taps = weight.flatten(1).flip(1).t().float().contiguous()
        of_grid, _ = _mix(of_sum, taps, None, of_sum.dtype, first=0)
        return of_grid, None, None, None, None, None


def mix(
    grid: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A causal depthwise 3x3x3 convolution added to its input, and the LayerNorm of that.

    Args:
        grid: `(batch, t, h, w, channels)`.
        weight: `(channels, 1, 3, 3, 3)`.
        bias: `(channels,)`.
        norm_weight: `(channels,)`.
        eps: Epsilon of the LayerNorm.
        dtype: Precision of the second and third result.

    Returns:
        The sum in the precision of `grid`, the same in `dtype`, and its LayerNorm; all in the shape of `grid`.
    """
    return _Mix.apply(grid.contiguous(), weight, bias, norm_weight, eps, dtype)


def mix_prepared(
    grid: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal depthwise 3x3x3 convolution added to its input, without gradients.

    Args:
        grid: `(batch, t, h, w, channels)`, contiguous.
        taps: `(27, channels)`, from `prepare`.
        bias: `(channels,)`.
        dtype: Precision of the second result.

    Returns:
        The sum in the precision of `grid`, and the same in `dtype`; both in the shape of `grid`.
    """
    return _mix(grid, taps, bias, dtype)
