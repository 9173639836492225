"""LayerNorms, of a sum if there is an update, and of patches where they lie in the volume, as Triton kernels.

What they compute is `layers_medct`'s, in float32 inside whatever the tensors hold; `kernels_medct.fused` says when
they are used. Weights are constants here: gradients are those of the tensors that flow through.
"""

import math

import torch
from torch.autograd.function import once_differentiable

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_launch_medct import launch_grid, on_device_of

_ROWS = 4


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
        _norm_kernel[launch_grid(rows, _ROWS)](
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
            ROWS=_ROWS,
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


def norm_backward(
    values: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    of_normed: torch.Tensor | None,
    of_values: torch.Tensor | None = None,
    of_low: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of what a LayerNorm took.

    Args:
        values: `(..., channels)`, which it took.
        weight: `(channels,)`.
        eps: As in torch.
        of_normed: Gradient of its result.
        of_values: Gradient of the same values where they are used besides.
        of_low: Gradient of a copy of them in another precision.
        dtype: That of a copy of the gradient.

    Returns:
        The gradient, and the copy of it; without `dtype` it is the same tensor.
    """
    channels = values.shape[-1]
    rows = values.numel() // channels
    gradients = [None if each is None else each.contiguous() for each in (of_normed, of_values, of_low)]
    result = torch.empty_like(values)
    low = result if dtype in (None, result.dtype) else torch.empty_like(values, dtype=dtype)
    with on_device_of(values):
        _norm_backward_kernel[launch_grid(rows, _ROWS)](
            values,
            weight,
            *(values if each is None else each for each in gradients),
            result,
            low,
            rows,
            eps,
            CHANNELS=channels,
            BLOCK=triton.next_power_of_2(channels),
            ROWS=_ROWS,
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
        of_stream, of_update = norm_backward(total, weight, ctx.eps, of_normed, of_total, dtype=ctx.update_dtype)
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
        return norm_backward(values, weight, ctx.eps, of_normed)[0], None, None, None, None


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
