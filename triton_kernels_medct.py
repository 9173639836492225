"""The passes over memory between the vision encoder's products, as Triton kernels for NVIDIA cards.

What they compute is `layers_medct`'s, in float32 inside whatever the tensors hold; `kernels_medct.fused` says when
they are used. Each reads and writes a tensor once where the plain formulation does so several times. Weights of norms
and convolutions are constants here: gradients are those of the tensors that flow through.

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

from .triton_products_medct import attention, can_attend, gated_product, on_device_of, quantize

# Frames, rows and channels that one program of the convolution makes, for all columns, and its warps. With a LayerNorm
# it needs all channels; without, places that lie close together share more of what they read.
_MIX_TILE = (2, 2, 128, 1)
_MIX_NORM_TILE = (1, 4, None, 4)
_NORM_ROWS = 4
_MIX_NORM_ROWS = 8
_GATE_ELEMENTS = 1024
_COPIED = 2048
_UNIT_ROWS = 128
_TINIEST_NORM = tl.constexpr(1e-12)  # as `F.normalize`
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_GAUSS = tl.constexpr(1 / math.sqrt(2 * math.pi))


def _grid(size: int, block: int) -> tuple[int]:
    return (triton.cdiv(size, block),)


# Position generator: depthwise convolution, added to its input, and the LayerNorm of the sum.


@triton.jit
def _mix_kernel(
    grid,
    weights,
    bias,
    norm_weight,
    stream,
    low,
    normed,
    eps,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_FRAMES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_NORM: tl.constexpr,
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
    if HAS_NORM:
        # Of what this program has just written, still in the cache, many rows at a time: their sums take turns.
        tl.debug_barrier()
        scale = tl.load(norm_weight + channel, mask=is_channel, other=0.0).to(tl.float32)
        places: tl.constexpr = TILE_FRAMES * TILE_ROWS * COLUMNS
        for begin in range(0, places, NORM_ROWS):
            near = begin + tl.arange(0, NORM_ROWS)[:, None]
            line = near // COLUMNS
            its_frame = program // row_tiles % frame_tiles * TILE_FRAMES + line // TILE_ROWS
            its_row = program % row_tiles * TILE_ROWS + line % TILE_ROWS
            is_its = (near < places) & (its_frame < FRAMES) & (its_row < ROWS) & is_channel
            its = (((volume * FRAMES + its_frame) * ROWS + its_row) * COLUMNS + near % COLUMNS) * CHANNELS + channel
            value = tl.load(stream + its, mask=is_its, other=0.0)
            mean = tl.sum(value, axis=1, keep_dims=True) / CHANNELS
            centred = tl.where(is_channel, value - mean, 0.0)
            variance = tl.sum(centred * centred, axis=1, keep_dims=True) / CHANNELS
            unit = centred * tl.rsqrt(variance + eps) * scale
            tl.store(normed + its, unit.to(normed.dtype.element_ty), mask=is_its)


def _mix(grid, weights, bias, dtype, norm=None, first=-2):
    """`grid + convolution(grid)`, its copy in another precision and, on request, its LayerNorm, without gradients.

    Args:
        grid: `(volumes, frames, rows, columns, channels)`.
        weights: `(27, channels)`, the taps of the convolution.
        bias: `(channels,)`, or `None`.
        dtype: Precision of the copy and of the LayerNorm.
        norm: Weight and epsilon of the LayerNorm.
        first: Offset of the first tap along the frames; -2 is causal.

    Returns:
        The sum, its copy, its LayerNorm, of the shape of `grid`; without `norm` the copy twice.
    """
    volumes, frames, rows, columns, channels = grid.shape
    stream = torch.empty_like(grid)
    low = stream if dtype == grid.dtype else torch.empty_like(grid, dtype=dtype)
    normed = low if norm is None else torch.empty_like(grid, dtype=dtype)
    tile_frames, tile_rows, block, warps = _MIX_TILE if norm is None else _MIX_NORM_TILE
    block = triton.next_power_of_2(min(block or channels, channels))
    tiles = triton.cdiv(frames, tile_frames) * triton.cdiv(rows, tile_rows) * triton.cdiv(channels, block)
    with on_device_of(grid):
        _mix_kernel[(volumes * tiles,)](
            grid,
            weights,
            weights if bias is None else bias,
            weights if norm is None else norm[0],
            stream,
            low,
            normed,
            0.0 if norm is None else norm[1],
            FRAMES=frames,
            ROWS=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            BLOCK=block,
            TILE_FRAMES=tile_frames,
            TILE_ROWS=tile_rows,
            NORM_ROWS=_MIX_NORM_ROWS,
            FIRST=first,
            HAS_BIAS=bias is not None,
            HAS_LOW=low is not stream,
            HAS_NORM=norm is not None,
            num_warps=warps,
        )
    return stream, low, normed


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, weight, bias, norm_weight, eps, dtype):
        taps = weight.flatten(1).t().float().contiguous()  # (27, channels)
        stream, low, normed = _mix(grid, taps, bias, dtype, (norm_weight, eps))
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
        of_sum, _ = _norm_backward(stream, norm_weight, ctx.eps, of_normed, of_stream, of_low)
        taps = weight.flatten(1).flip(1).t().float().contiguous()
        of_grid, _, _ = _mix(of_sum, taps, None, of_sum.dtype, first=0)
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
    return _mix(grid, taps, bias, dtype)[:2]


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


# LayerNorm, of a sum if there is an update.


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    values,
    update,
    weight,
    bias,
    total,
    normed,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    is_channel = channel < CHANNELS
    is_place = (row < rows) & is_channel
    place = row * CHANNELS + channel
    value = tl.load(values + place, mask=is_place, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        value += tl.load(update + place, mask=is_place, other=0.0).to(tl.float32)
        tl.store(total + place, value.to(total.dtype.element_ty), mask=is_place)
    mean = tl.sum(value, axis=1, keep_dims=True) / CHANNELS
    centred = tl.where(is_channel, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / CHANNELS
    unit = centred * tl.rsqrt(variance + eps)
    unit *= tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_BIAS:
        unit += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    if OUTER * INNER > 1:  # the rows of (batch, OUTER, INNER) are written as (batch, INNER, OUTER)
        row = row - row % (OUTER * INNER) + row % INNER * OUTER + row // INNER % OUTER
        place = row * CHANNELS + channel
    tl.store(normed + place, unit.to(normed.dtype.element_ty), mask=is_place)


def _norm(values, update, total, weight, bias, eps, dtype, turned=False):
    """LayerNorm of `values`, or of their sum with `update`, which is written to `total`."""
    channels = values.shape[-1]
    outer, inner = values.shape[-3:-1] if turned else (1, 1)
    normed = torch.empty_like(values, dtype=dtype)
    rows = values.numel() // channels
    with on_device_of(values):
        _norm_kernel[_grid(rows, _NORM_ROWS)](
            values,
            values if update is None else update,
            weight,
            weight if bias is None else bias,
            values if total is None else total,
            normed,
            rows,
            eps,
            CHANNELS=channels,
            BLOCK=triton.next_power_of_2(channels),
            ROWS=_NORM_ROWS,
            OUTER=outer,
            INNER=inner,
            HAS_UPDATE=update is not None,
            HAS_BIAS=bias is not None,
            num_warps=4,
        )
    return normed.view(*values.shape[:-3], inner, outer, channels).transpose(-3, -2) if turned else normed


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    values,
    weight,
    of_normed,
    of_values,
    of_low,
    result,
    low,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_LOW: tl.constexpr,
    WRITES_LOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    is_channel = channel < CHANNELS
    is_place = (row < rows) & is_channel
    place = row * CHANNELS + channel
    gradient = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_NORMED:
        value = tl.load(values + place, mask=is_place, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=1, keep_dims=True) / CHANNELS
        centred = tl.where(is_channel, value - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / CHANNELS + eps)
        unit = centred * scale
        of_unit = tl.load(of_normed + place, mask=is_place, other=0.0).to(tl.float32)
        of_unit *= tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
        along = tl.sum(of_unit * unit, axis=1, keep_dims=True) / CHANNELS
        gradient = scale * (of_unit - tl.sum(of_unit, axis=1, keep_dims=True) / CHANNELS - unit * along)
    if HAS_VALUES:
        gradient += tl.load(of_values + place, mask=is_place, other=0.0).to(tl.float32)
    if HAS_LOW:
        gradient += tl.load(of_low + place, mask=is_place, other=0.0).to(tl.float32)
    tl.store(result + place, gradient.to(result.dtype.element_ty), mask=is_place)
    if WRITES_LOW:
        tl.store(low + place, gradient.to(low.dtype.element_ty), mask=is_place)


def _norm_backward(values, weight, eps, of_normed, of_values=None, of_low=None, dtype=None):
    """Gradient of what a LayerNorm took, given those of its result and of other uses; a copy in `dtype` with it."""
    channels = values.shape[-1]
    rows = values.numel() // channels
    gradients = [None if each is None else each.contiguous() for each in (of_normed, of_values, of_low)]
    result = torch.empty_like(values)
    low = result if dtype in (None, result.dtype) else torch.empty_like(values, dtype=dtype)
    with on_device_of(values):
        _norm_backward_kernel[_grid(rows, _NORM_ROWS)](
            values,
            weight,
            *(values if each is None else each for each in gradients),
            result,
            low,
            rows,
            eps,
            CHANNELS=channels,
            BLOCK=triton.next_power_of_2(channels),
            ROWS=_NORM_ROWS,
            HAS_NORMED=gradients[0] is not None,
            HAS_VALUES=gradients[1] is not None,
            HAS_LOW=gradients[2] is not None,
            WRITES_LOW=low is not result,
            num_warps=4,
        )
    return result, low


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stream, update, weight, bias, eps, dtype):
        total = torch.empty_like(stream)
        normed = _norm(stream, update, total, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.update_dtype = eps, update.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total, of_normed):
        total, weight = ctx.saved_tensors
        of_stream, of_update = _norm_backward(total, weight, ctx.eps, of_normed, of_total, dtype=ctx.update_dtype)
        return of_stream, of_update, None, None, None, None


def add_norm(
    stream: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two tensors, and its LayerNorm.

    Args:
        stream: `(..., channels)`; overwritten with the sum without gradients.
        update: Same shape.
        weight: `(channels,)`, of the LayerNorm.
        bias: `(channels,)`, likewise.
        eps: Its epsilon.
        dtype: Precision of the second result.
    """
    if torch.is_grad_enabled():
        return _AddNorm.apply(stream.contiguous(), update.contiguous(), weight, bias, eps, dtype)
    return stream, _norm(stream, update.contiguous(), stream, weight, bias, eps, dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weight, bias, eps, dtype):
        ctx.save_for_backward(values, weight)
        ctx.eps = eps
        return _norm(values, None, None, weight, bias, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_normed):
        values, weight = ctx.saved_tensors
        return _norm_backward(values, weight, ctx.eps, of_normed)[0], None, None, None, None


def norm(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    turned: bool = False,
) -> torch.Tensor:
    """LayerNorm.

    Args:
        values: `(..., channels)`.
        weight: `(channels,)`.
        bias: `(channels,)`.
        eps: Epsilon.
        dtype: Precision of the result.
        turned: Whether the two axes before the last lie the other way round in memory, without gradients.
    """
    if not torch.is_grad_enabled():
        return _norm(values.contiguous(), None, None, weight, bias, eps, dtype, turned)
    return _Norm.apply(values.contiguous(), weight, bias, eps, dtype)


# Blocks of a volume, each normalised.


@triton.jit
def _patches_kernel(
    pixels,
    weight,
    bias,
    patches,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    Z: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % COLUMNS
    row = program // COLUMNS % ROWS
    frame = (program // (COLUMNS * ROWS)).to(tl.int64)
    size: tl.constexpr = Z * Y * X
    voxel = tl.arange(0, BLOCK)
    is_voxel = voxel < size
    line = (frame * Z + voxel // (Y * X)) * (ROWS * Y) + row * Y + voxel // X % Y
    place = line * (COLUMNS * X) + column * X + voxel % X
    value = tl.load(pixels + place, mask=is_voxel, other=0.0).to(tl.float32)
    centred = tl.where(is_voxel, value - tl.sum(value) / size, 0.0)
    unit = centred * tl.rsqrt(tl.sum(centred * centred) / size + eps)
    unit *= tl.load(weight + voxel, mask=is_voxel, other=0.0).to(tl.float32)
    unit += tl.load(bias + voxel, mask=is_voxel, other=0.0).to(tl.float32)
    tl.store(patches + program.to(tl.int64) * size + voxel, unit.to(patches.dtype.element_ty), mask=is_voxel)


def norm_patches(
    pixels: torch.Tensor,
    patch_size: tuple[int, int, int],
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Cut volumes into blocks, each with its LayerNorm; no gradient reaches the volumes.

    Args:
        pixels: `(frames, z, y, x)`, where z is that of one block.
        patch_size: `(z, y, x)` of a block.
        weight: `(voxels of a block,)`.
        bias: Same shape.
        eps: Epsilon.
        dtype: Precision of the result.

    Returns:
        `(frames, rows * columns, voxels of a block)`.
    """
    rows, columns = pixels.shape[2] // patch_size[1], pixels.shape[3] // patch_size[2]
    size = math.prod(patch_size)
    patches = pixels.new_empty((len(pixels), rows * columns, size), dtype=dtype)
    with on_device_of(pixels):
        _patches_kernel[(len(pixels) * rows * columns,)](
            pixels.contiguous(),
            weight,
            bias,
            patches,
            eps,
            ROWS=rows,
            COLUMNS=columns,
            Z=patch_size[0],
            Y=patch_size[1],
            X=patch_size[2],
            BLOCK=triton.next_power_of_2(size),
            num_warps=8,
        )
    return patches


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
        kernel[_grid(rows * width, _GATE_ELEMENTS)](
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
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True)), _TINIEST_NORM)
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
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True)), _TINIEST_NORM)
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
        kernel[_grid(rows, _UNIT_ROWS)](
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
