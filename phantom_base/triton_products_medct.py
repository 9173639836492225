"""Products that are never written to memory as a whole, as Triton kernels: attention, a gate, nearest codes.

What they compute is `layers_medct`'s; `kernels_medct.fused` says when they are used.
"""

import math

import torch

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_launch_medct import TINIEST_NORM, described, has_large_tiles, num_processors, on_device_of

_LOG2_E = tl.constexpr(math.log2(math.e))

# Tiles: rows, columns, warps, stages.
_LONG = (64, 64, 4, 3)
_SHORT = (32, 32, 1, 2)  # sequences of up to so many tokens
_SHORT_TOKENS = 32
# With large tiles and without: tokens, codes, bytes of channels, warps, stages.
_CODES = {True: (128, 128, 128, 8, 4), False: (128, 64, 128, 8, 3)}
# Rows, columns, channels, group, warps, stages.
_GATED = {True: (128, 128, 64, 8, 8, 4), False: (128, 64, 64, 8, 8, 3)}
_CHOICE_ROWS = 4


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's products are, or in three parts that together are as exact."""
    is_exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if is_exact else "tf32"


@triton.jit
def _attention_kernel(
    query,
    key,
    value,
    query_scale,
    key_scale,
    bias,
    result,
    scaling,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(TOKENS, ROWS)
    program = tl.program_id(0)
    head = program // blocks % HEADS
    sequence = (program // (blocks * HEADS)).to(tl.int64)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    channel = tl.arange(0, WIDTH)
    is_row = row < TOKENS
    rows = sequence * TOKENS * QUERY_ROW + head * WIDTH + row[:, None] * QUERY_ROW + channel[None, :]
    first = sequence * TOKENS * KEY_ROW + head * WIDTH
    queries = tl.load(query + rows, mask=is_row[:, None], other=0.0)
    if HAS_SCALES:
        # Both scales stand with the queries, so that keys are only divided by their length: their scores are.
        wide = queries.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), TINIEST_NORM)
        scale = tl.load(query_scale + channel).to(tl.float32) * tl.load(key_scale + channel).to(tl.float32) * scaling
        queries = (wide / length[:, None] * scale[None, :]).to(queries.dtype)
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, TOKENS, COLUMNS):
        at = start + column
        columns = first + at[:, None] * KEY_ROW + channel[None, :]
        if IS_EVEN:  # noqa: SIM108, as Triton takes constants in statements only
            keys = tl.load(key + columns)
        else:
            keys = tl.load(key + columns, mask=(at < TOKENS)[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if HAS_SCALES:
            wide_keys = keys.to(tl.float32)
            key_length = tl.maximum(tl.sqrt(tl.sum(wide_keys * wide_keys, axis=1)), TINIEST_NORM)
            scores *= (1.0 / key_length)[None, :]
        else:
            scores *= scaling
        if HAS_BIAS:
            places = (head * TOKENS + row[:, None]) * TOKENS + at[None, :]
            if IS_EVEN:
                scores += tl.load(bias + places).to(tl.float32)
            else:
                is_place = is_row[:, None] & (at < TOKENS)[None, :]
                scores += tl.load(bias + places, mask=is_place, other=0.0).to(tl.float32)
        if not IS_EVEN:
            scores = tl.where((at < TOKENS)[None, :], scores, float("-inf"))
        now = tl.maximum(greatest, tl.max(scores, axis=1))
        shrunk = tl.exp2((greatest - now) * _LOG2_E)
        weights = tl.exp2(scores * _LOG2_E - (now * _LOG2_E)[:, None])
        total = total * shrunk + tl.sum(weights, axis=1)
        if IS_EVEN:
            values = tl.load(value + columns)
        else:
            values = tl.load(value + columns, mask=(at < TOKENS)[:, None], other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrunk[:, None], input_precision=PRECISION)
        greatest = now
    mixed = mixed / total[:, None]
    places = (sequence * TOKENS * HEADS + head) * WIDTH + row[:, None] * (HEADS * WIDTH) + channel[None, :]
    tl.store(result + places, mixed.to(result.dtype.element_ty), mask=is_row[:, None])


def can_attend(query: torch.Tensor) -> bool:
    """Whether `attention` takes heads as wide as those of `query`, `(..., width)`: a power of 2 from 16 to 128."""
    width = query.shape[-1]
    return 16 <= width <= 128 and width & (width - 1) == 0


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """Attention of every token on all of its sequence.

    Args:
        query: `(sequences, tokens, heads, width)`; heads lie side by side, rows of tokens may lie apart. The width is a
            power of 2 of at least 16.
        key: Same shape, likewise.
        value: As `key`, with the same strides.
        bias: `(1, heads, tokens, tokens)`, contiguous, added to the scores.
        scaling: Factor of the scores.
        scales: `(width,)` each; with them queries and keys are made of unit length and multiplied by them.
        tile: Rows, columns, warps and stages of a program.

    Returns:
        The shape of `query`, contiguous.
    """
    sequences, tokens, heads, width = query.shape
    result = query.new_empty(query.shape)
    query_scale, key_scale = scales or (query, query)
    rows, columns, warps, stages = tile or (_SHORT if tokens <= _SHORT_TOKENS else _LONG)
    with on_device_of(query):
        _attention_kernel[(triton.cdiv(tokens, rows) * heads * sequences,)](
            query,
            key,
            value,
            query_scale,
            key_scale,
            query if bias is None else bias,
            result,
            scaling,
            TOKENS=tokens,
            HEADS=heads,
            WIDTH=width,
            QUERY_ROW=query.stride(1),
            KEY_ROW=key.stride(1),
            ROWS=rows,
            COLUMNS=columns,
            HAS_SCALES=scales is not None,
            HAS_BIAS=bias is not None,
            IS_EVEN=tokens % rows == 0 and tokens % columns == 0,
            PRECISION=_precision(query.dtype),
            num_warps=warps,
            num_stages=stages,
        )
    return result


@triton.jit
def _gelu(gate):
    # Abramowitz and Stegun 7.1.26: off by 1.5e-7 times the gate at most, and half the instructions of `erf`, of which
    # the product's short sums leave no time for more.
    part = 1.0 / (1.0 + 0.231641888 * tl.abs(gate))
    tail = 0.7107068705 + part * (-0.7265760135 + part * 0.5307027145)
    tail = part * (0.127414796 + part * (-0.142248368 + part * tail))
    tail *= tl.exp2(gate * gate * (-0.5 * _LOG2_E))
    return tl.maximum(gate, 0.0) - tl.abs(gate) * tail


@triton.jit
def _gathered(tensor, places, start, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    channel = (start + tl.arange(0, DEPTH))[None, :]
    at = tensor + places.to(tl.int64)[:, None] * CHANNELS + channel
    if CHANNELS % DEPTH == 0:  # noqa: SIM108, as above
        block = tl.load(at)
    else:
        block = tl.load(at, mask=channel < CHANNELS, other=0.0)
    return block


@triton.jit(do_not_specialize=["number"])
def _gated_product_kernel(
    rows,
    weight,
    result,
    number,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
):
    # One program a multiprocessor makes tile after tile, and fetches the next one's rows while it is at the last one's
    # gelu. Programs that run together share rows and weights: a group of row tiles, for one column tile after another.
    column_tiles: tl.constexpr = (PADDED + COLUMNS - 1) // COLUMNS
    row_tiles = tl.cdiv(number, ROWS)
    each = tl.arange(0, 2 * COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        group = tile // (GROUP * column_tiles)
        in_group = tl.minimum(row_tiles - group * GROUP, GROUP)
        row = (group * GROUP + tile % (GROUP * column_tiles) % in_group) * ROWS
        column = tile % (GROUP * column_tiles) // in_group * COLUMNS
        # One product for both halves, values and then gates: as wide as tensor cores want it.
        product = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for start in range(0, CHANNELS, DEPTH):
            if IS_DESCRIBED:
                left = rows.load([row, start])
                right = tl.reshape(weight.load([0, column, start]), (2 * COLUMNS, DEPTH))
            else:  # beyond the end is the last row once more
                left = _gathered(rows, tl.minimum(row + tl.arange(0, ROWS), number - 1), start, CHANNELS, DEPTH)
                pair = tl.minimum(column + each % COLUMNS, WIDTH - 1) + each // COLUMNS * WIDTH
                right = _gathered(weight, pair, start, CHANNELS, DEPTH)
            product = tl.dot(left, tl.trans(right), product)
        values, gates = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        gated = values * _gelu(gates)
        if IS_DESCRIBED:
            result.store([row, column], gated.to(result.dtype))
        else:
            down, along = row.to(tl.int64) + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
            gated = tl.where(along < WIDTH, gated, 0.0).to(result.dtype.element_ty)
            tl.store(result + down * PADDED + along, gated, mask=(down < number) & (along < PADDED))


def gated_product(rows: torch.Tensor, weight: torch.Tensor, padded: int) -> torch.Tensor:
    """The first half of a product times gelu of the second.

    Args:
        rows: `(rows, d)`, contiguous, in half precision.
        weight: `(2 * width, d)`, likewise.
        padded: Width of the result, a multiple of 8, of which what is beyond `width` is zero.

    Returns:
        `(rows, padded)`.
    """
    (number, channels), width = rows.shape, len(weight) // 2
    assert padded % 8 == 0, "otherwise a copy of the result would be written to"
    result = rows.new_empty((number, padded))
    is_large = has_large_tiles(rows.device)
    tile_rows, columns, depth, group, warps, stages = _GATED[is_large]
    tiles = triton.cdiv(number, tile_rows) * triton.cdiv(padded, columns)
    programs = num_processors(rows.device)
    tensors: tuple = (rows, weight, result)
    if is_large:
        halves = described(weight.unflatten(0, (2, -1)), 2, columns, depth)
        tensors = described(rows, tile_rows, depth), halves, described(result, tile_rows, columns)
    with on_device_of(rows):
        _gated_product_kernel[(min(programs, tiles),)](
            *tensors,
            number,
            CHANNELS=channels,
            WIDTH=width,
            PADDED=padded,
            ROWS=tile_rows,
            COLUMNS=columns,
            DEPTH=depth,
            GROUP=group,
            PROGRAMS=programs,
            IS_DESCRIBED=is_large,
            num_warps=warps,
            num_stages=stages,
        )
    return result


@triton.jit(do_not_specialize=["number"])
def _top_two_kernel(
    tokens,
    codes,
    found,
    number,
    CODES: tl.constexpr,
    TAG: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    row = begin.to(tl.int64) + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    first = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    second = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(CODES, COLUMNS), flatten=True):
        similar = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, CHANNELS, DEPTH):
            if IS_DESCRIBED:
                left, right = tokens.load([begin, start]), codes.load([block * COLUMNS, start])
            else:
                left = _gathered(tokens, tl.minimum(row, number - 1), start, CHANNELS, DEPTH)
                right = _gathered(codes, tl.minimum(block * COLUMNS + column, CODES - 1), start, CHANNELS, DEPTH)
            similar = tl.dot(left, tl.trans(right), similar, input_precision=PRECISION)
        # The lowest bits tell which block it was: they are beyond what the product's rounding lets count.
        # Added zero: ptxas of CUDA 12.8 leaves out products whose only use is of their bits.
        tagged = (((similar + 0.0).to(tl.int32, bitcast=True) & ~TAG) | block).to(tl.float32, bitcast=True)
        if CODES % COLUMNS != 0:
            tagged = tl.where((block * COLUMNS + column < CODES)[None, :], tagged, float("-inf"))
        second = tl.maximum(second, tl.minimum(first, tagged))
        first = tl.maximum(first, tagged)
    best, place = tl.max(first, axis=1, return_indices=True)
    rest = tl.where(column[None, :] == place[:, None], second, first)
    next_best, next_place = tl.max(rest, axis=1, return_indices=True)
    best_code = (best.to(tl.int32, bitcast=True) & TAG) * COLUMNS + place
    next_code = (next_best.to(tl.int32, bitcast=True) & TAG) * COLUMNS + next_place
    tl.store(found + row * 2, tl.minimum(best_code, CODES - 1), mask=row < number)
    tl.store(found + row * 2 + 1, tl.minimum(next_code, CODES - 1), mask=row < number)


@triton.jit(do_not_specialize=["number"])
def _choice_kernel(
    tokens, codes, codebook, found, ids, chosen, number, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)[None, :]
    is_row = row < number
    is_place = is_row[:, None] & (channel < CHANNELS)
    token = tl.load(tokens + row[:, None] * CHANNELS + channel, mask=is_place, other=0.0).to(tl.float32)
    one = tl.load(found + row * 2, mask=is_row, other=0)
    other = tl.load(found + row * 2 + 1, mask=is_row, other=0)
    near = tl.sum(token * tl.load(codes + one[:, None] * CHANNELS + channel, mask=is_place, other=0.0), axis=1)
    far = tl.sum(token * tl.load(codes + other[:, None] * CHANNELS + channel, mask=is_place, other=0.0), axis=1)
    is_other = (far > near) | ((far == near) & (other < one))
    code = tl.where(is_other, other, one).to(tl.int64)
    tl.store(ids + row, code, mask=is_row)
    picked = tl.load(codebook + code[:, None] * CHANNELS + channel, mask=is_place, other=0.0)
    is_finite = tl.abs(tl.sum(token, axis=1)) < float("inf")
    picked = tl.where(is_finite[:, None], picked, float("nan"))
    tl.store(chosen + row[:, None] * CHANNELS + channel, picked, mask=is_place)


def quantize(
    tokens: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of the codebook with the greatest cosine similarity to each token.

    Of all products the two greatest are kept; these are compared again in float32.

    Args:
        tokens: `(tokens, d)`.
        codes: `(codes, d)`, of length 1, float32.
        codebook: `(codes, d)`.
        dtype: Precision of the product of all with all.

    Returns:
        `(tokens, d)`, the rows, and `(tokens,)`, which. The rows of tokens that are not finite are NaN.
    """
    number, channels = tokens.shape
    tokens, codebook = tokens.contiguous(), codebook.contiguous()
    is_large = has_large_tiles(tokens.device)
    rows, columns, depth_bytes, warps, stages = _CODES[is_large]
    depth = depth_bytes // dtype.itemsize
    found = tokens.new_empty((number, 2), dtype=torch.int32)
    ids = tokens.new_empty((number,), dtype=torch.int64)
    chosen = codebook.new_empty((number, channels))
    tensors: tuple = tokens.to(dtype), codes.to(dtype).contiguous()
    if is_large:
        tensors = tuple(described(each, size, depth) for each, size in zip(tensors, (rows, columns), strict=True))
    with on_device_of(tokens):
        _top_two_kernel[(triton.cdiv(number, rows),)](
            *tensors,
            found,
            number,
            CODES=len(codes),
            TAG=triton.next_power_of_2(triton.cdiv(len(codes), columns)) - 1,
            CHANNELS=channels,
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=depth,
            PRECISION=_precision(dtype),
            IS_DESCRIBED=is_large,
            num_warps=warps,
            num_stages=stages,
        )
        _choice_kernel[(triton.cdiv(number, _CHOICE_ROWS),)](
            tokens,
            codes,
            codebook,
            found,
            ids,
            chosen,
            number,
            CHANNELS=channels,
            BLOCK=triton.next_power_of_2(channels),
            ROWS=_CHOICE_ROWS,
            num_warps=4,
        )
    return chosen, ids
