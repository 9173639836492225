"""Products that are never written to memory as a whole, as Triton kernels: attention with a bias, nearest codes.

What they compute is `modeling_medct`'s; `kernels_medct.fused` says when they are used.
"""

import math

import torch

try:  # in `try`, so that nobody is asked to install it; who imports this file expects the error
    import triton
    import triton.language as tl
except ImportError:
    raise

_LOG2_E = tl.constexpr(math.log2(math.e))

# Tiles: rows, columns, warps, stages.
_LONG = (128, 64, 4, 3)
_SHORT = (32, 32, 1, 2)  # sequences of up to so many tokens
_SHORT_TOKENS = 32
_CODES = (128, 128, 64, 8, 3)  # tokens, codes, channels, warps, stages
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
    bias,
    result,
    scaling,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    first = (sequence * TOKENS * HEADS + head) * WIDTH
    is_row = row < TOKENS
    rows = first + row[:, None] * (HEADS * WIDTH) + channel[None, :]
    queries = tl.load(query + rows, mask=is_row[:, None], other=0.0)
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, TOKENS, COLUMNS):
        at = start + column
        columns = first + at[:, None] * (HEADS * WIDTH) + channel[None, :]
        if IS_EVEN:
            keys = tl.load(key + columns)
        else:
            keys = tl.load(key + columns, mask=(at < TOKENS)[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scaling * _LOG2_E)
        if HAS_BIAS:
            places = (head * TOKENS + row[:, None]) * TOKENS + at[None, :]
            if IS_EVEN:
                added = tl.load(bias + places)
            else:
                added = tl.load(bias + places, mask=is_row[:, None] & (at < TOKENS)[None, :], other=0.0)
            scores += added.to(tl.float32) * _LOG2_E
        if not IS_EVEN:
            scores = tl.where((at < TOKENS)[None, :], scores, float("-inf"))
        now = tl.maximum(greatest, tl.max(scores, axis=1))
        shrunk = tl.exp2(greatest - now)
        weights = tl.exp2(scores - now[:, None])
        total = total * shrunk + tl.sum(weights, axis=1)
        if IS_EVEN:
            values = tl.load(value + columns)
        else:
            values = tl.load(value + columns, mask=(at < TOKENS)[:, None], other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrunk[:, None], input_precision=PRECISION)
        greatest = now
    mixed = mixed / total[:, None]
    tl.store(result + rows, mixed.to(result.dtype.element_ty), mask=is_row[:, None])


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
    tile: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """Attention of every token on all of its sequence.

    Args:
        query: `(sequences, tokens, heads, width)`; the width is a power of 2 of at least 16.
        key: Same shape.
        value: Same shape.
        bias: `(1, heads, tokens, tokens)`, added to the scores.
        scaling: Factor of the scores.
        tile: Rows, columns, warps and stages of a program.

    Returns:
        The shape of `query`.
    """
    sequences, tokens, heads, width = query.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    result = torch.empty_like(query)
    rows, columns, warps, stages = tile or (_SHORT if tokens <= _SHORT_TOKENS else _LONG)
    with torch.cuda.device_of(query):
        _attention_kernel[(triton.cdiv(tokens, rows) * heads * sequences,)](
            query,
            key,
            value,
            query if bias is None else bias.contiguous(),
            result,
            scaling,
            TOKENS=tokens,
            HEADS=heads,
            WIDTH=width,
            ROWS=rows,
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            IS_EVEN=tokens % rows == 0 and tokens % columns == 0,
            PRECISION=_precision(query.dtype),
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
    FLATTEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_row = (row < number)[:, None]
    first = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    second = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    left = tokens + row[:, None] * CHANNELS + depth[None, :]
    for block in tl.range(0, tl.cdiv(CODES, COLUMNS), flatten=FLATTEN):
        code = block * COLUMNS + column
        is_code = (code < CODES)[:, None]
        right = codes + code[:, None] * CHANNELS + depth[None, :]
        similar = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, CHANNELS, DEPTH):
            is_deep = (start + depth < CHANNELS)[None, :]
            one = tl.load(left + start, mask=is_row & is_deep, other=0.0)
            other = tl.load(right + start, mask=is_code & is_deep, other=0.0)
            similar = tl.dot(one, tl.trans(other), similar, input_precision=PRECISION)
        # The lowest bits tell which block it was: they are beyond what the product's rounding lets count.
        tagged = ((similar.to(tl.int32, bitcast=True) & ~TAG) | block).to(tl.float32, bitcast=True)
        tagged = tl.where((code < CODES)[None, :], tagged, float("-inf"))
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
    tl.store(chosen + row[:, None] * CHANNELS + channel, picked, mask=is_place)


def quantize(
    tokens: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    dtype: torch.dtype,
    tile: tuple[int, int, int, int, int] = _CODES,
    flatten: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of the codebook with the greatest cosine similarity to each token.

    Of all products the two greatest are kept; these are compared again in float32.

    Args:
        tokens: `(tokens, d)`.
        codes: `(codes, d)`, of length 1, float32.
        codebook: `(codes, d)`.
        dtype: Precision of the product of all with all.
        tile: Tokens, codes and channels, warps and stages of a program.
        flatten: Whether the loops are made one.

    Returns:
        `(tokens, d)`, the rows, and `(tokens,)`, which.
    """
    (number, channels), size = tokens.shape, len(codes)
    tokens, codebook = tokens.contiguous(), codebook.contiguous()
    rows, columns, depth, warps, stages = tile
    blocks = triton.cdiv(size, columns)
    found = tokens.new_empty((number, 2), dtype=torch.int32)
    ids = tokens.new_empty((number,), dtype=torch.int64)
    chosen = codebook.new_empty((number, channels))
    with torch.cuda.device_of(tokens):
        _top_two_kernel[(triton.cdiv(number, rows),)](
            tokens.to(dtype),
            codes.to(dtype),
            found,
            number,
            CODES=size,
            TAG=triton.next_power_of_2(blocks) - 1,
            CHANNELS=channels,
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=depth,
            PRECISION=_precision(dtype),
            FLATTEN=flatten,
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
