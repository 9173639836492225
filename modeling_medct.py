"""CT-CLIP as a transformers model: volume encoder, text encoder, common space, loss.

Unusual, and kept because the published weights were trained so:

- Keys and values are projected from the residual stream itself, only queries from its LayerNorm (`MedCTLayer`).
- The position generator of the temporal stage mixes the grid's axes (`MedCTPositionGenerator`).
- Every token is replaced by a row of a codebook before pooling (`MedCTQuantizer`). Gradients pass straight through and
  the codebook is a buffer that never moves, in training too: otherwise an adapter would either get no gradient or
  belong to a base that drifted while it was trained.

Source: specification of CT-CLIP, sections 2 to 4.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_medct import (
    AdapterMismatchError,
    adapter_tensors,
    check_fit,
    copy_description,
    loadable_tensors,
    refuse_adapter_without_values,
    refuse_name_of_a_part,
    use_adapters,
    without_load_report,
)
from .checks_medct import refuse_other_weights
from .configuration_medct import CLASSIFIER_TASK, CODE, CUSTOM_PIPELINES, ZERO_SHOT_TASK, MedCTConfig, MedCTVisionConfig
from .graphs_medct import can_replay, replayed
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
)
from .snapshots_medct import Snapshot


@dataclass
class MedCTVisionOutput(BaseModelOutputWithPooling):
    """What the vision encoder makes of a volume.

    Args:
        last_hidden_state: `(batch, z * y * x, hidden_size)`, tokens as rows of the codebook, in the grid's order.
        pooler_output: `(batch, y * x * hidden_size)` from `MedCTVisionModel`: tokens averaged along z, laid end to end.
            `(batch, projection_dim)`, of length 1, from `MedCTModel.get_image_features`.
        codebook_ids: `(batch, z * y * x)`, which rows.
        hidden_states: Inputs and outputs of the layers: `(batch * z, y * x, hidden_size)` in the spatial stage,
            `(batch * y * x, z, hidden_size)` in the temporal one.
        attentions: Attention weights of the layers, with the "eager" implementation only.
    """

    codebook_ids: torch.LongTensor | None = None


@dataclass
class MedCTOutput(ModelOutput):
    """What `MedCTModel` makes of volumes and texts.

    Args:
        loss: `()`, symmetric cross-entropy in which volume i belongs to text i; with `return_loss=True`.
        logits_per_image: `(volumes, texts)`, scaled cosine similarity.
        logits_per_text: `(texts, volumes)`, its transpose.
        image_embeds: `(volumes, projection_dim)`, of length 1.
        text_embeds: `(texts, projection_dim)`, of length 1.

    Embeddings and logits are float32 in half precision, too.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


def contrastive_loss(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over a batch in which volume i belongs to text i.

    Args:
        logits_per_image: `(batch, batch)`.

    Returns:
        `()`, the mean of both directions.

    Raises:
        ValueError: If there are not as many texts as volumes.
    """
    volumes, texts = logits_per_image.shape
    if volumes != texts:
        raise ValueError(
            f"The contrastive loss needs one text a volume; there are {volumes} volumes and {texts} texts."
        )
    target = torch.arange(volumes, device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, target) + F.cross_entropy(logits_per_image.t(), target)) / 2


def zero_shot_probabilities(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Scores of labels from the similarities to their pairs of prompts.

    Args:
        logits_per_image: `(volumes, 2 * labels)`, in the order of `MedCTConfig.label_prompts`.

    Returns:
        `(volumes, labels)`, probability of "present" against "not present", in [0, 1].
    """
    return logits_per_image.unflatten(-1, (-1, 2)).softmax(dim=-1)[..., 0]


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


def _project(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A Linear of few rows, which no other form makes faster; rows in another precision than its weights are cast."""
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
        hidden = F.leaky_relu(_project(self.fc1, offsets), self.negative_slope)
        hidden = F.leaky_relu(_project(self.fc2, hidden), self.negative_slope)
        table = _project(self.fc3, hidden).permute(2, 0, 1)  # (heads, 2h-1, 2w-1)
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
        if self._is_constant(hidden_states, position_bias) and self._agrees(hidden_states, position_bias):
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
        """Whether anybody may have kept what parts take or give."""
        return not all(map(is_bare, self.modules()))

    def _is_constant(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None) -> bool:
        """Whether kernels may run the layer as a whole: no gradients, adapters, hooks or other attention."""
        attention, mlp = self.self_attn, self.mlp
        if torch.is_grad_enabled() or attention.config._attn_implementation != "sdpa" or is_autocast(hidden_states):
            return False
        products = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2)
        generator = self.position_generator
        others = (attention, mlp, generator, generator.conv, self.layer_norm1, self.layer_norm2, position_bias)
        return fused(hidden_states, *others, *products) and triton_kernels().can_attend(attention.q_scale)

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


class MedCTLogitScale(nn.Module):
    """The learned scale of the logits, kept as its logarithm.

    A module of its own, with one element instead of none: so PEFT can save it with an adapter, and FSDP2 can shard it.
    """

    def __init__(self, config: MedCTConfig):
        super().__init__()
        self.init_value = float(config.logit_scale_init_value)
        self.weight = nn.Parameter(torch.full((1,), self.init_value))

    def forward(self, similarity: torch.Tensor) -> torch.Tensor:
        return similarity * self.weight.to(similarity.dtype).exp()


# Roots and quotients of scales are rounded.
_STRENGTH_ROUNDING = 1e-6


class MedCTPreTrainedModel(PreTrainedModel):
    """What all models here share: configuration, initialisation, and what of transformers they support."""

    config: MedCTConfig
    base_model_prefix = "medct"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MedCTLayer", "MedCTPatchEmbeddings", "MedCTPositionBias", "MedCTQuantizer"]
    # Small, and used in float32 anyway. Codebooks hold rows so close to each other that half precision makes them one.
    _keep_in_fp32_modules_strict = [
        "patch_norm",
        "position_generator",
        "layer_norm1",
        "layer_norm2",
        "spatial_encoder.norm",
        "temporal_encoder.norm",
        "quantizer",
    ]
    _supports_sdpa = True
    # The position bias reaches sdpa once for all volumes; flash attention takes no bias at all, and flex attention
    # would need a copy for each volume.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    # Its network is tiny, has inputs of two numbers, and decides about every attention.
    _keep_in_fp32_modules = ["position_bias", "vision_model.position_bias"]
    # Losses are means over a batch; without this the library's `Trainer` takes them for sums over tokens.
    accepts_loss_kwargs = False
    # Tasks of `transformers.pipeline` that a saved folder offers.
    _tasks: tuple[str, ...] = ()
    # How the names of weights begin that are drawn at random where a checkpoint has none, or that may lie unused in it.
    _may_lack: tuple[str, ...] = ()
    _may_hold: tuple[str, ...] = ()
    _described: dict[str, tuple[Snapshot, dict]] = {}
    _can_record_outputs = {"hidden_states": MedCTLayer, "attentions": MedCTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MedCTAttention):
            init.ones_(module.q_scale)
            init.ones_(module.k_scale)
        elif isinstance(module, MedCTQuantizer):
            init.normal_(module.codebook)
        elif isinstance(module, MedCTLogitScale):
            init.constant_(module.weight, module.init_value)

    @classmethod
    def from_pretrained(
        cls, name=None, *args, use_safetensors: bool = True, output_loading_info: bool = False, **kwargs
    ):
        """transformers' own, but that nothing except safetensors is read unless it is asked for: no pickles.

        Args:
            name: Hub id or folder.
            use_safetensors: Whether to read safetensors only.
            output_loading_info: Whether to return what was missing or unexpected as well.

        Raises:
            CheckpointMismatchError: If the checkpoint lacks weights of this class, which would be drawn at random, or
                has others. A head to be trained may be missing, and a half that this class does not use may be there.
        """
        options = {"use_safetensors": use_safetensors, "output_loading_info": True}
        model, loading_info = super().from_pretrained(name, *args, **options, **kwargs)
        refuse_other_weights(name, cls, model.config, loading_info, cls._may_lack, cls._may_hold)
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        """transformers' own; every class of the saved code can be loaded from the folder, and its pipelines are named.

        So a base serves as the beginning of a classifier, without this package.
        """
        if self.config.model_type == MedCTConfig.model_type:
            others = {name: task for name, task in self.config.custom_pipelines.items() if name not in CUSTOM_PIPELINES}
            self.config.set_custom_pipelines({name: CUSTOM_PIPELINES[name] for name in self._tasks} | others)
            self.config.auto_map = dict(CODE)
        saved = super().save_pretrained(*args, **kwargs)
        folder = args[0] if args else kwargs["save_directory"]
        if getattr(self, "_hf_peft_config_loaded", False):  # then an adapter was saved, and nothing else
            copy_description(self, folder)
        return saved

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """transformers' own, for an adapter that fits this model; see `check_fit` for the rule.

        What the adapter remembers is kept, see `adapter_description`.

        Args:
            peft_model_id: Hub id or folder of the adapter.
            adapter_name: Name to load it under; "default" by default.
            args: As for transformers' method.
            kwargs: Likewise.

        Raises:
            AdapterMismatchError: If the adapter was trained on another model or another preprocessing, or is not whole.
        """
        description, name = None, adapter_name or "default"
        refuse_name_of_a_part(self, name)
        if peft_model_id is not None:
            load_config, adapter_kwargs = kwargs.get("load_config"), kwargs.get("adapter_kwargs") or {}
            downloads = kwargs if load_config is None else load_config.download_kwargs
            hub = {**downloads, **adapter_kwargs}
            description = check_fit(self, peft_model_id, **hub)
            # The second argument is `adapter_state_dict`; beside offloaded layers transformers reads files only.
            if len(args) < 2 and not any(weight.is_meta for weight in self.parameters()):
                kwargs.setdefault("adapter_state_dict", loadable_tensors(peft_model_id, **hub))
        with without_load_report():
            loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        refuse_adapter_without_values(self, name)
        # transformers counts the base's tensors as missing where the adapter's name stands in theirs.
        missing = {key for key in loaded.missing_keys if name in key.split(".")}
        if astray := missing | loaded.unexpected_keys:
            kind = self.peft_config[name].peft_type.value
            self.delete_adapter(name)
            raise AdapterMismatchError(
                f"{len(astray)} tensors of the adapter were not loaded, such as {min(astray)}; transformers loads no "
                f"{kind} adapter whole. Use `peft.PeftModel.from_pretrained`, after `check_fit`."
            )
        self._described = {**self._described, name: (Snapshot(adapter_tensors(self, name)), description or {})}
        return loaded

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """transformers' own, also where one adapter has whole modules and another has none.

        Args:
            adapter_name: Name of the adapter to use from now on, or several.

        Raises:
            ValueError: If it is not loaded.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not getattr(self, "_hf_peft_config_loaded", False) or not set(names) <= set(self.peft_config):
            return super().set_adapter(adapter_name)  # says what is wrong
        return use_adapters(self, adapter_name)

    def adapter_description(self, name: str) -> dict:
        """What the adapter of a name remembers of its training; see `describe_adapter`.

        Empty if nothing is known, or the adapter has become another since it was loaded: replaced, swapped, trained.
        At another strength than the stored one it is the same adapter, but operating points and calibration do not hold
        there and are left out.
        """
        snapshot, description = self._described.get(name, (None, {}))
        if snapshot is None or not snapshot.equals(adapter_tensors(self, name)):
            return {}
        strengths = [_strength_of(layer, name) for layer in self._lora_layers(name)]
        if all(math.isclose(strength, 1, rel_tol=_STRENGTH_ROUNDING) for strength in strengths):
            return description
        return {
            key: value
            for key, value in description.items()
            if key not in ("thresholds", "calibration", "operating_points")
        }

    def adapter_strength(self, name: str = "default") -> float:
        """How much of a LoRA adapter is in use: 1 as it was loaded, 0 nothing of it; NaN if its layers differ.

        Raises:
            ValueError: If there is no LoRA adapter of that name.
        """
        strengths = [_strength_of(layer, name) for layer in self._known_lora_layers(name)]
        is_one = math.isclose(min(strengths), max(strengths), rel_tol=_STRENGTH_ROUNDING)
        return strengths[0] if is_one else math.nan

    def set_adapter_strength(self, name: str = "default", strength: float = 1.0) -> None:
        """Use this much of a LoRA adapter in all calls that follow. Nothing that is saved changes.

        The adapter's operating points and calibration hold for strength 1 and are left out at any other; see
        `adapter_description`.

        Args:
            name: Name of the adapter, as in `load_adapter`.
            strength: 1 is the adapter as it was loaded, 0 the base, 0.5 half of what was learned.

        Raises:
            ValueError: If there is no LoRA adapter of that name, the strength is negative or not finite, or the adapter
                has parts that do not scale: it is merged, or has DoRA's magnitudes or whole modules.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"`strength` is {strength}. Pass a number, 0 or more; 1 is the adapter as it was loaded.")
        layers = self._known_lora_layers(name)
        has_modules = any(name in (getattr(module, "modules_to_save", None) or ()) for module in self.modules())
        if has_modules or any(layer.merged or layer.use_dora.get(name) for layer in layers):
            raise ValueError(
                f"The adapter {name!r} is merged, or has DoRA's magnitudes or whole modules, so its strength cannot be "
                "set. `medct train --strength auto` chooses it when an adapter is made."
            )
        for layer in layers:
            layer.set_scale(name, strength)

    def _lora_layers(self, name: str) -> list[nn.Module]:
        return [module for module in self.modules() if name in getattr(module, "lora_alpha", ())]

    def _known_lora_layers(self, name: str) -> list[nn.Module]:
        layers = self._lora_layers(name)
        if not layers:
            known = sorted({each for module in self.modules() for each in getattr(module, "lora_alpha", ())})
            raise ValueError(f"There is no LoRA adapter {name!r}. Loaded: {', '.join(known) or 'none'}.")
        return layers


def _strength_of(layer: nn.Module, name: str) -> float:
    """Scale of an adapter in a layer of PEFT, as a share of the configured one."""
    root = 0.5 if layer.use_rslora.get(name) else 1
    return layer.scaling[name] * layer.r[name] ** root / layer.lora_alpha[name]


class MedCTVisionModel(MedCTPreTrainedModel):
    """The vision encoder: voxels to tokens of the codebook, and their pooled row."""

    config: MedCTVisionConfig
    base_model_prefix = "vision_model"
    input_modalities = ("image",)
    # Not `_keys_to_ignore_on_load_unexpected`: the whole model would take over what its part ignores.
    _may_hold = ("text_model.", "text_projection.", "visual_projection.", "logit_scale.", "classifier.")

    def __init__(self, config: MedCTVisionConfig):
        super().__init__(config)
        self.embeddings = MedCTPatchEmbeddings(config)
        self.position_bias = MedCTPositionBias(config)
        self.spatial_encoder = MedCTEncoder(config, config.num_spatial_layers)
        self.temporal_encoder = MedCTEncoder(config, config.num_temporal_layers)
        self.quantizer = MedCTQuantizer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @property
    def precision(self) -> torch.dtype:
        """That of the products, taken from a scale of activations; weights of Linears may be quantized."""
        layers = (*self.spatial_encoder.layers, *self.temporal_encoder.layers)
        return layers[0].dtype if layers else torch.float32

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> MedCTVisionOutput:
        """Encode volumes.

        Args:
            pixel_values: `(batch, 1, z, y, x)`, in [-1, 1], as `MedCTImageProcessor` makes them.
            kwargs: `output_hidden_states`, `output_attentions` and `return_dict`. Whatever else the whole processor,
                PEFT or the library's `Trainer` hand on is of texts, and ignored.

        Raises:
            ValueError: If the volume is missing or of another size than `config.image_size`.
        """
        if pixel_values is None:
            raise ValueError("`pixel_values` are missing: give the vision encoder a volume.")
        tokens = self.embeddings(pixel_values, self.precision).flatten(2, 3)  # (b, t, h*w, d)
        if can_replay(tokens) and self._is_constant(tokens):
            tokens, codebook_ids = replayed(self, self._encode, tokens, (*self.parameters(), *self.buffers()))
        else:
            tokens, codebook_ids = self._encode(tokens)
        return MedCTVisionOutput(
            last_hidden_state=tokens.flatten(1, 2),
            pooler_output=tokens.mean(dim=1).flatten(1),
            codebook_ids=codebook_ids.flatten(1),
        )

    def _encode(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(b, t, h*w, d)` tokens to rows of the codebook, same shape, and their `(b, t, h*w)` indices."""
        dtype = self.precision
        position_bias = self.position_bias(tokens.device, dtype)
        tokens = self.spatial_encoder(tokens, position_bias).transpose(1, 2)  # (b, h*w, t, d)
        tokens = self.temporal_encoder(tokens).transpose(1, 2)
        return self.quantizer(tokens, row_dtype(tokens, dtype))

    def _is_constant(self, tokens: torch.Tensor) -> bool:
        """Whether `_encode` runs by kernels as a whole."""
        encoders, bias = (self.spatial_encoder, self.temporal_encoder), self.position_bias
        layers = [layer for encoder in encoders for layer in encoder.layers]
        parts = (*encoders, *(encoder.norm for encoder in encoders), bias, bias.fc1, bias.fc2, bias.fc3, self.quantizer)
        return fused(tokens, *parts, *layers) and all(layer._is_constant(tokens, None) for layer in layers)


def _text_encoder(config: MedCTConfig) -> PreTrainedModel:
    """The text encoder that the configuration names, without a pooler, which CT-CLIP does not use.

    Raises:
        ValueError: If its first token, which is read, would not see the text behind it.
    """
    kind = config.text_config.model_type
    if getattr(config.text_config, "is_decoder", False) or kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ValueError(
            f"`text_config` of type {kind!r} is no encoder whose first token sees the whole text: all texts would be "
            'the same. Choose one that is trained to fill in masks, such as "bert" or "modernbert".'
        )
    parameters = inspect.signature(MODEL_MAPPING[type(config.text_config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    return AutoModel.from_config(config.text_config, **options)


def _embed(projection: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """`(batch, features)` to `(batch, projection_dim)`, of length 1.

    In float32 whatever the model's precision: the two prompts of a label, and the labels among each other, differ by
    less than half precision tells apart.
    """
    projected = _project(projection, pooled)
    return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class MedCTModel(MedCTPreTrainedModel):
    """CT-CLIP: volumes and reports in one space."""

    _tasks = (ZERO_SHOT_TASK,)

    def __init__(self, config: MedCTConfig):
        super().__init__(config)
        self.text_model = _text_encoder(config)
        self.vision_model = MedCTVisionModel._from_config(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.pooled_size, config.projection_dim, bias=False)
        self.logit_scale = MedCTLogitScale(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> MedCTVisionOutput:
        """Encode volumes into the common space.

        Args:
            pixel_values: `(batch, 1, z, y, x)`, in [-1, 1], as `MedCTImageProcessor` makes them.

        Returns:
            The encoder's output; its `pooler_output` is the embedding, `(batch, projection_dim)`, of length 1.
        """
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = outputs.pooler_output.to(self.vision_model.precision)
        outputs.pooler_output = _embed(self.visual_projection, pooled)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode texts into the common space.

        Args:
            input_ids: `(texts, tokens)`; padding on the left is moved behind the text.
            attention_mask: `(texts, tokens)`, 0 on padding.

        Returns:
            The encoder's output; its `pooler_output` is the embedding, `(texts, projection_dim)`, of length 1.
        """
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            # The first token is read, and positions are counted from there.
            first = attention_mask.ne(0).int().argmax(dim=-1, keepdim=True)
            order = (torch.arange(input_ids.shape[-1], device=input_ids.device) + first) % input_ids.shape[-1]
            input_ids, attention_mask = input_ids.gather(-1, order), attention_mask.gather(-1, order)
            for name in ("token_type_ids", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name].expand_as(order).gather(-1, order)
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        # CT-CLIP reads the first token itself, not BERT's pooler.
        embeds = _embed(self.text_projection, outputs.last_hidden_state[:, 0])
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_logits(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Compute the scaled cosine similarity of volumes and texts.

        Args:
            image_embeds: `(volumes, projection_dim)`, of length 1.
            text_embeds: `(texts, projection_dim)`, of length 1.

        Returns:
            `(volumes, texts)`, float32 or better.
        """
        with maybe_autocast(image_embeds.device.type, enabled=False):
            return self.logit_scale(image_embeds @ text_embeds.to(image_embeds).t())

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> MedCTOutput:
        """Compare volumes with texts; each volume and each text is encoded once, whatever their numbers.

        Args:
            input_ids: `(texts, tokens)`.
            pixel_values: `(volumes, 1, z, y, x)`, in [-1, 1].
            attention_mask: `(texts, tokens)`, 0 on padding.
            token_type_ids: `(texts, tokens)`, for text encoders that take them.
            return_loss: Whether volume i belongs to text i and the contrastive loss is wanted.

        Raises:
            ValueError: If volumes or texts are missing, or the loss is wanted of unequal numbers.
        """
        if pixel_values is None:
            raise ValueError("`pixel_values` are missing; to encode texts alone call `get_text_features`.")
        if input_ids is None:
            raise ValueError("`input_ids` are missing; to encode volumes alone call `get_image_features`.")
        # Not every text encoder takes token types.
        text_kwargs = kwargs if token_type_ids is None else {"token_type_ids": token_type_ids, **kwargs}
        image_embeds = self.get_image_features(pixel_values, **kwargs).pooler_output
        text_embeds = self.get_text_features(input_ids, attention_mask, **text_kwargs).pooler_output
        logits_per_image = self.get_logits(image_embeds, text_embeds)
        return MedCTOutput(
            loss=contrastive_loss(logits_per_image) if return_loss else None,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )


class MedCTForImageClassification(MedCTPreTrainedModel):
    """The vision half with a linear head, one output a label ("ClassFine" of CT-CLIP)."""

    input_modalities = ("image",)
    _tasks = (CLASSIFIER_TASK,)
    _may_lack = ("classifier.",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale\."]

    def __init__(self, config: MedCTConfig):
        super().__init__(config)
        self.vision_model = MedCTVisionModel._from_config(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.pooled_size, config.projection_dim, bias=False)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classify volumes.

        Args:
            pixel_values: `(batch, 1, z, y, x)`, in [-1, 1].
            labels: `(batch, labels)`: 0, 1, or NaN where unknown, which adds nothing to the loss.
            kwargs: See `MedCTVisionModel.forward`.

        Returns:
            `logits`, `(batch, labels)`: each label by itself, so take their sigmoid; `loss`, `()`, if labels are given:
            the mean over those that are known.
        """
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        precision = self.vision_model.precision
        embeds = _embed(self.visual_projection, outputs.pooler_output.to(precision))
        logits = _project(self.classifier, self.dropout(F.relu(embeds)).to(precision))
        if logits.shape[-1] != self.config.num_labels:
            raise ValueError(
                f"The head has {logits.shape[-1]} outputs for {self.config.num_labels} labels. "
                "Load the model with `id2label=` of yours and `ignore_mismatched_sizes=True` instead of replacing it."
            )
        return ImageClassifierOutput(
            loss=None if labels is None else self.label_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def label_loss(self, logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Binary cross-entropy of the labels that are known, with the weights of the configuration.

        Args:
            logits: `(batch, labels)`.
            labels: `(batch, labels)`: 0, 1, or NaN where unknown.
            reduction: "mean" over them, or "sum".

        Raises:
            ValueError: If there is not one label for each logit, or a label is none.
        """
        _check_labels(labels, logits)
        weight = self.config.classifier_pos_weight
        if weight is not None and len(weight) != logits.shape[-1]:
            raise ValueError(f"`classifier_pos_weight` has {len(weight)} numbers for {logits.shape[-1]} labels.")
        pos_weight = None if weight is None else torch.tensor(weight, device=logits.device, dtype=logits.dtype)
        known = ~labels.isnan()
        total = F.binary_cross_entropy_with_logits(
            logits, labels.nan_to_num().to(logits), weight=known.to(logits), pos_weight=pos_weight, reduction="sum"
        )
        return total / known.sum().clamp(min=1) if reduction == "mean" else total


def _check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse what binary cross-entropy would take for a label, such as -1 for "uncertain" or -100 for "ignored"."""
    if labels.shape != logits.shape:
        raise ValueError(
            f"`labels` must be (batch, labels) = {tuple(logits.shape)}, 0 or 1 each, not {tuple(labels.shape)}: this "
            "classifier has labels that do not exclude each other."
        )
    if not torch.compiler.is_compiling() and not ((labels >= 0) & (labels <= 1) | labels.isnan()).all():
        raise ValueError("`labels` hold numbers outside of [0, 1]. Pass NaN where a label is unknown.")


__all__ = ["MedCTForImageClassification", "MedCTModel", "MedCTPreTrainedModel", "MedCTVisionModel"]
