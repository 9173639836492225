"""The layers of the vision encoder: from voxels to tokens, and from these to rows of a codebook.

Unusual, and kept because the published weights were trained so:

- Keys and values are projected from the residual stream itself, only queries from its LayerNorm (`MedCTLayer`).
- The position generator of the temporal stage mixes the grid's axes (`MedCTPositionGenerator`).
- Every token is replaced by a row of a codebook before pooling (`MedCTQuantizer`). Gradients pass straight through and
  the codebook is a buffer that never moves, in training too: otherwise an adapter would either get no gradient or
  belong to a base that drifted while it was trained.

Source: specification of CT-CLIP, section 2.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import maybe_autocast

from .configuration_medct import MedCTVisionConfig
from .kernels_medct import (
    add,
    add_product,
    agree,
    apply_linear,
    feed_forward,
    fused,
    fusible,
    gated,
    gated_product,
    is_autocast,
    is_bare,
    nearest,
    padded_width,
    row_dtype,
    split_rows,
    split_sequences,
    triton_kernels,
    weights_of,
)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with its weights, as transformers' attention interface has it.

    Args:
        module: The attention layer; not used.
        query: `(sequences, heads, tokens, head_dim)`.
        key: As `query`.
        value: As `query`.
        attention_mask: Not used: all tokens of a volume count.
        scaling: Factor of the scores.
        dropout: Not used.
        position_bias: `(1, heads, tokens, tokens)`, added to the scores.
        kwargs: Not used.

    Returns:
        `(sequences, tokens, heads, head_dim)`, and the weights, `(sequences, heads, tokens, tokens)`.
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def project(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A Linear of few rows, which no other form makes faster; rows in another precision than its weights are cast.

    Args:
        module: The Linear, or what adapters or quantizers have made of it.
        rows: `(..., in_features)`.

    Returns:
        `(..., out_features)`.
    """
    return apply_linear(module, rows, F.linear)


@fusible
class MedCTLayerNorm(nn.LayerNorm):
    """A LayerNorm in float32, or better, whatever the precision of its weights.

    The stream that layers add to stays in float32 as well: its rounding to half precision would move tokens to other
    rows of the codebook.
    """

    def forward(self, hidden_states: torch.Tensor, turned: bool = False) -> torch.Tensor:
        """Normalise along the last axis.

        Args:
            hidden_states: `(..., channels)`.
            turned: Whether the two axes before the last had better lie the other way round in memory: kernels can write
                them so. The shape is the same.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        if fused(hidden_states, self.weight, self.bias):
            return triton_kernels().norm(hidden_states, self.weight, self.bias, self.eps, dtype, turned)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(hidden_states.to(dtype), self.normalized_shape, self.weight.to(dtype), bias, self.eps)


class MedCTPatchEmbeddings(nn.Module):
    """Cuts a volume into blocks and makes a token of each."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.image_size = tuple(config.image_size)
        self.grid_size = config.grid_size
        self.patch_size = tuple(config.patch_size)
        self.patch_norm = MedCTLayerNorm(config.patch_voxels, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.patch_voxels, config.hidden_size)
        self.norm = MedCTLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Voxels to tokens.

        Args:
            pixel_values: `(batch, 1, z, y, x)`, in [-1, 1].
            dtype: Precision of the product.

        Returns:
            `(batch, z, y, x, hidden_size)`.
        """
        if pixel_values.shape[1:] != (1, *self.image_size):
            raise ValueError(
                f"`pixel_values` must be (batch, 1, z, y, x) with (z, y, x) = {self.image_size}, "
                f"not {tuple(pixel_values.shape)}."
            )
        if fused(pixel_values, pixel_values, self.patch_norm):
            product_dtype = row_dtype(pixel_values, dtype)
            case = ("patches", *pixel_values.shape[1:], pixel_values.dtype, product_dtype, pixel_values.device)
            one = pixel_values[:1]
            if agree(case, lambda: self._infer(one, product_dtype), lambda: self.forward(one, dtype)):
                return self._infer(pixel_values, product_dtype)
        (t, h, w), (pz, py, px) = self.grid_size, self.patch_size
        # (b, 1, t*pz, h*py, w*px) -> (b*t, h, w, pz, py, px)
        blocks = pixel_values.reshape(-1, pz, h, py, w, px).permute(0, 2, 4, 1, 3, 5)
        # Copies of blocks are as large as the volume, so they are made slab by slab.
        slabs = split_rows(blocks, h * w * pz * py * px, torch.float32)
        tokens = torch.cat([self._embed(slab, dtype) for slab in slabs])
        return tokens.unflatten(1, (h, w)).unflatten(0, (-1, t))

    def _infer(self, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `forward`, by kernels."""
        (t, h, w), (pz, py, px) = self.grid_size, self.patch_size
        # (b, 1, t*pz, h*py, w*px) -> (b*t, pz, h*py, w*px)
        slabs = split_rows(pixel_values.reshape(-1, pz, h * py, w * px), h * w * pz * py * px, dtype)
        tokens = torch.cat([apply_linear(self.projection, self._norm_patches(slab, dtype)) for slab in slabs])
        return self.norm(tokens).unflatten(1, (h, w)).unflatten(0, (-1, t))

    def _norm_patches(self, slab: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`(slabs, z, y, x)` voxels, as they lie, to `(slabs, rows * columns, patch_voxels)`."""
        norm = self.patch_norm
        return triton_kernels().norm_patches(slab, self.patch_size, norm.weight, norm.bias, norm.eps, dtype)

    def _embed(self, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`(slabs, y, x, *patch_size)` voxels to `(slabs, y * x, hidden_size)` tokens."""
        # Neighbours differ by few HU: half precision would round most of that away before the norm scales it up.
        scaled = self.patch_norm(blocks.flatten(-3)).flatten(1, 2)
        return self.norm(apply_linear(self.projection, scaled.to(dtype)))


@fusible
class MedCTPositionBias(nn.Module):
    """A bias on the attention scores of the spatial stage, made by a small network from the offset of two tokens.

    The same for all spatial layers and all volumes. The network runs on the distinct offsets only: (2y-1)(2x-1) of
    them instead of (yx)² pairs, a thousandth of the encoder's work; so its results are not kept.
    """

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.grid_size = config.grid_size[1:]
        self.negative_slope = config.position_bias_negative_slope
        self.fc1 = nn.Linear(2, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc3 = nn.Linear(config.hidden_size, config.num_attention_heads)

    def forward(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Compute the bias of each query token on each key token.

        Args:
            device: Where it is needed.
            dtype: Precision in which it is needed.

        Returns:
            `(1, heads, y * x, y * x)`: that of query token i (third axis) on key token j (fourth).
        """
        with maybe_autocast(device.type, enabled=False):
            return self._compute(device, dtype)

    def _compute(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        h, w = self.grid_size
        rows, columns = (torch.arange(1 - n, n, device=device, dtype=torch.float32) for n in (h, w))
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (2h-1, 2w-1, 2)
        offsets = (offsets.sign() * offsets.abs().log1p()).to(dtype)
        hidden = F.leaky_relu(project(self.fc1, offsets), self.negative_slope)
        hidden = F.leaky_relu(project(self.fc2, hidden), self.negative_slope)
        table = project(self.fc3, hidden).permute(2, 0, 1)  # (heads, 2h-1, 2w-1)
        # Window k of an axis starts at offset k - (n-1); read backwards it holds the offsets of query k to keys 0..n-1.
        bias = table.unfold(1, h, 1).unfold(2, w, 1).flip(-1, -2)  # (heads, h, w, h, w)
        return bias.reshape(1, -1, h * w, h * w)


@fusible
class MedCTPositionGenerator(nn.Module):
    """Depthwise 3x3x3 convolution over the token grid, causal along its first axis."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.conv = nn.Conv3d(
            config.hidden_size, config.hidden_size, kernel_size=3, padding=(2, 1, 1), groups=config.hidden_size
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens in, same shape out; the tensor is *viewed* as `(batch, t, h, w, hidden_size)`.

        In the spatial stage that is what it holds. In the temporal stage memory holds (batch, h, w, t, hidden_size), so
        the same view mixes the axes. The published weights were trained so.
        """
        grid = hidden_states.reshape(-1, *self.grid_size, hidden_states.shape[-1]).permute(0, 4, 1, 2, 3)
        grid = grid.to(self.conv.weight.dtype)
        # The padding behind the last position makes two positions too many; cheaper than a padded copy without it.
        grid = self.conv(grid)[:, :, : self.grid_size[0]]
        return grid.permute(0, 2, 3, 4, 1).reshape(hidden_states.shape)


@fusible
class MedCTAttention(nn.Module):
    """Multi-head attention on queries and keys of unit length, with learned scales shared by the heads."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.attention_scale
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.out_proj = nn.Linear(config.attention_size, config.hidden_size, bias=False)
        self.q_scale = nn.Parameter(torch.ones(config.head_dim))
        self.k_scale = nn.Parameter(torch.ones(config.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within sequences.

        Args:
            hidden_states: `(sequences, tokens, hidden_size)`, which queries are made of.
            key_value_states: The same shape, which keys and values are made of.
            position_bias: `(1, heads, tokens, tokens)`.

        Returns:
            The shape of `hidden_states`, and attention weights where the implementation gives them.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        # (b, n, heads*c) -> (b, n, heads, c)
        query = apply_linear(self.q_proj, hidden_states).view(heads)
        key = apply_linear(self.k_proj, key_value_states).view(heads)
        value = apply_linear(self.v_proj, key_value_states).view(heads)
        query, key = self._unit(query, self.q_scale).to(value.dtype), self._unit(key, self.k_scale).to(value.dtype)
        position_bias = None if position_bias is None else position_bias.to(value.dtype)
        output, weights = self._attend(query, key, value, position_bias)
        return apply_linear(self.out_proj, output.flatten(-2)), weights

    def _unit(self, heads: torch.Tensor, scale: nn.Parameter) -> torch.Tensor:
        """`(..., c)` of length 1, times the scale."""
        return triton_kernels().unit(heads, scale) if fused(heads, scale) else F.normalize(heads, dim=-1) * scale

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(b, n, heads, c)` each to the same, and the weights where the implementation gives them."""
        if self.config._attn_implementation == "sdpa" and fused(query, query, key, value, position_bias):
            kernels = triton_kernels()
            if kernels.can_attend(query):
                bias = None if position_bias is None else position_bias.contiguous()
                return kernels.attention(*(each.contiguous() for each in (query, key, value)), bias, self.scaling), None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # (b, n, heads, c) -> (b, heads, n, c)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return attention(self, query, key, value, None, scaling=self.scaling, position_bias=position_bias)


@fusible
class MedCTMLP(nn.Module):
    """Gated feed-forward: one half of the first product, times gelu of the other."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if fused(hidden_states, self.fc1, self.fc2):
            return feed_forward(hidden_states, self.fc1.weight, self.fc2.weight)
        return apply_linear(self.fc2, gated(apply_linear(self.fc1, hidden_states)))


@fusible
class MedCTLayer(GradientCheckpointingLayer):
    """Position generator, attention and feed-forward, each added to the stream."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.position_generator = MedCTPositionGenerator(config)
        self.layer_norm1 = MedCTLayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.self_attn = MedCTAttention(config)
        self.layer_norm2 = MedCTLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MedCTMLP(config)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products; not that of their weights, which hold integers once they are quantized."""
        return self.self_attn.q_scale.dtype

    def forward(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_states: `(sequences, tokens, hidden_size)`.
            position_bias: `(1, heads, tokens, tokens)`.

        Returns:
            The same shape.
        """
        if self._runs_by_kernels(hidden_states, position_bias) and self._agrees(hidden_states, position_bias):
            return self._infer(hidden_states, position_bias)
        stream, *rows = self._mix(hidden_states)
        # Gradients, and whoever looks at parts, need all that a chunk would hand on; "eager" is there to show the
        # attention as a whole.
        if torch.is_grad_enabled() or self.self_attn.config._attn_implementation == "eager" or self._is_watched():
            return self._within_sequences(stream, *rows, position_bias=position_bias)
        width = 2 * self.self_attn.config.intermediate_size
        chunks = (split_rows(each, stream.shape[1] * width, self.dtype) for each in (stream, *rows))
        for chunk in zip(*chunks, strict=True):
            self._within_sequences(*chunk, position_bias=position_bias)
        return stream

    def _is_watched(self) -> bool:
        """Whether anybody may have kept what parts take or give; of an exported program, which nobody knows."""
        return torch.compiler.is_exporting() or not all(map(is_bare, self.modules()))

    def _runs_by_kernels(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None) -> bool:
        """Whether kernels may run the layer as a whole: no gradients, adapters, hooks or other attention."""
        if not fused(hidden_states, position_bias) or not self.leaves_all_to_kernels(hidden_states):
            return False
        parts = self.position_generator, self.layer_norm1, self.self_attn, self.layer_norm2, self.mlp
        return weights_of(hidden_states, *parts) is not None

    def leaves_all_to_kernels(self, hidden_states: torch.Tensor) -> bool:
        """Whether kernels compute all that a layer like this does, as settings and sizes have it.

        Args:
            hidden_states: What it is called with, where there are kernels.
        """
        attention = self.self_attn
        if torch.is_grad_enabled() or attention.config._attn_implementation != "sdpa" or is_autocast(hidden_states):
            return False
        return triton_kernels().can_attend(attention.q_scale)

    def _agrees(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None) -> bool:
        """Whether kernels make of the first volume what torch does."""
        config, device = self.self_attn.config, hidden_states.device
        sizes = (hidden_states.shape[1], *config.grid_size, config.hidden_size, config.intermediate_size)
        heads = (config.num_attention_heads, config.head_dim)
        case = ("layer", *sizes, *heads, hidden_states.dtype, self.dtype, device)
        one = hidden_states[: math.prod(config.grid_size) // hidden_states.shape[1]]
        # What is added to the stream, beside which it may be small.
        return agree(
            case,
            lambda: self._infer(one, position_bias) - one,
            lambda: self.forward(one, position_bias) - one,
        )

    def _infer(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None) -> torch.Tensor:
        """The layer in as few passes over memory, and as few calls, as can be."""
        kernels, attention, mlp, dtype = triton_kernels(), self.self_attn, self.mlp, self.dtype
        conv, norm1, norm2 = self.position_generator.conv, self.layer_norm1, self.layer_norm2
        projections = (each.weight for each in (attention.q_proj, attention.k_proj, attention.v_proj))
        taps, rows_to_heads, fc2 = kernels.prepare(
            conv.weight, norm1.weight, *projections, mlp.fc2.weight, padded_width(mlp.fc2.weight)
        )
        grid = hidden_states.reshape(-1, *self.position_generator.grid_size, hidden_states.shape[-1])
        mixed = kernels.mix_prepared(grid, taps, conv.bias, dtype)
        bias = None if position_bias is None else position_bias.to(dtype)
        rows_of = [each.view(hidden_states.shape) for each in mixed]
        chunks = zip(*(split_sequences(each, fc2.shape[1], dtype) for each in rows_of), strict=True)
        for stream, low in chunks:
            # (b, n, d) -> 3 x (b, n, heads, c)
            heads = F.linear(low, rows_to_heads).unflatten(-1, (3, -1, attention.head_dim)).unbind(2)
            scales = attention.q_scale, attention.k_scale
            attended = kernels.attention(*heads, bias, attention.scaling, scales)
            add_product(stream, attended.flatten(-2), attention.out_proj.weight)
            rows = kernels.norm(stream, norm2.weight, norm2.bias, norm2.eps, dtype)
            gated = gated_product(rows, mlp.fc1.weight, fc2.shape[1])
            add_product(stream, gated, fc2)
        return rows_of[0]

    def _mix(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stream after the position generator; from kernels also what `_within_sequences` takes with it."""
        generator, norm = self.position_generator, self.layer_norm1
        if not fused(hidden_states, generator, generator.conv, norm):
            return (add(generator(hidden_states).to(hidden_states.dtype), hidden_states, self._is_watched()),)
        grid = hidden_states.reshape(-1, *generator.grid_size, hidden_states.shape[-1])
        weights = (generator.conv.weight, generator.conv.bias, norm.weight)
        mixed = triton_kernels().mix(grid, *weights, norm.eps, row_dtype(grid, self.dtype))
        return tuple(each.view_as(hidden_states) for each in mixed)

    def _within_sequences(
        self,
        stream: torch.Tensor,
        rows: torch.Tensor | None = None,
        normed: torch.Tensor | None = None,
        *,
        position_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention and feed-forward of some sequences; `rows` are the stream in half precision, `normed` its norm."""
        if rows is None:
            rows, normed = stream.to(self.dtype), self.layer_norm1(stream).to(self.dtype)
        # Only queries are normalised; keys and values come from the stream itself.
        attended, _ = self.self_attn(normed, rows, position_bias=position_bias)
        norm, is_watched = self.layer_norm2, self._is_watched()
        if fused(stream, norm):
            dtype = row_dtype(stream, self.dtype)
            stream = stream.clone() if is_watched else stream
            stream, rows = triton_kernels().add_norm(stream, attended, norm.weight, norm.bias, norm.eps, dtype)
        else:
            stream = add(stream, attended, is_watched)
            rows = norm(stream).to(self.dtype)
        return add(stream, self.mlp(rows), is_watched)


@fusible
class MedCTEncoder(nn.Module):
    """One stage: layers and a LayerNorm."""

    def __init__(self, config: MedCTVisionConfig, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(MedCTLayer(config) for _ in range(num_layers))
        self.norm = MedCTLayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None = None) -> torch.Tensor:
        """Run the stage; attention stays within a sequence.

        Args:
            hidden_states: `(batch, sequences, tokens, hidden_size)`.
            position_bias: `(1, heads, tokens, tokens)`.

        Returns:
            The same shape, in memory as the next stage reads it if that costs nothing.
        """
        sequences = hidden_states.shape[1]
        # Also in memory: the position generator reads it there.
        rows = hidden_states.flatten(0, 1).contiguous()
        for layer in self.layers:
            rows = layer(rows, position_bias)
        return self.norm(rows.unflatten(0, (-1, sequences)), turned=True)


@fusible
class MedCTQuantizer(nn.Module):
    """Replaces every token by the codebook row of greatest cosine similarity."""

    codebook: torch.Tensor

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        # A buffer and no parameter: no optimizer, and no full fine-tuning either, may move it.
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., hidden_size)` tokens to rows of the codebook, same shape, and their `(...)` indices.

        Tokens that are not finite become NaN.

        Args:
            hidden_states: Tokens.
            dtype: Precision of the product of all tokens with all rows; the nearest are compared in float32.
        """
        with torch.no_grad():
            codes = F.normalize(self.codebook.to(torch.promote_types(self.codebook.dtype, torch.float32)), dim=-1)
            # Tokens need no normalising: their length does not change which row is nearest.
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            if fused(rows, self.codebook) and self._agrees(rows, codes, dtype):
                quantized, ids = triton_kernels().quantize(rows, codes, self.codebook, dtype)
            else:
                coarse_codes = codes.to(dtype)
                ids = torch.cat([nearest(chunk, codes, coarse_codes) for chunk in split_rows(rows, len(codes), dtype)])
                # Some row is always the nearest: without this, what has overflowed would look like any scan.
                spoiled = (rows.sum(dim=-1, keepdim=True) * 0).to(self.codebook.dtype)
                quantized = F.embedding(ids, self.codebook) + spoiled
        quantized, ids = quantized.view(hidden_states.shape), ids.view(hidden_states.shape[:-1])
        if torch.is_grad_enabled():
            # The difference is exactly zero: the value is still the row itself, the gradient that of the token.
            quantized = quantized + (hidden_states - hidden_states.detach())
        return quantized, ids

    def _agrees(self, rows: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether kernels find rows as similar to some tokens as torch does."""
        some = rows[:1024]

        def similarity(ids: torch.Tensor) -> torch.Tensor:
            return (F.normalize(some.to(codes.dtype), dim=-1) * codes[ids]).sum(dim=-1)

        return agree(
            ("codebook", *codes.shape, len(some), rows.dtype, dtype, rows.device),
            lambda: similarity(triton_kernels().quantize(some, codes, self.codebook, dtype)[1]),
            lambda: similarity(nearest(some, codes, codes.to(dtype))),
        )
