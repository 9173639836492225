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
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_medct import check_fit
from .configuration_medct import MedCTConfig, MedCTVisionConfig
from .kernels_medct import add, linear, linear_aligned, nearest, split_rows, times_gelu


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
    """Attention written out, with its weights; arguments as transformers' attention interface has them."""
    scores = query @ key.transpose(-1, -2) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MedCTLinear(nn.Linear):
    """A Linear that is fast on CPUs, too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(hidden_states, self.weight, self.bias)


class MedCTLayerNorm(nn.LayerNorm):
    """A LayerNorm in float32, or better, whatever the precision of its weights.

    The stream that layers add to stays in float32 as well: its rounding to half precision would move tokens to other
    rows of the codebook.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
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
        self.projection = MedCTLinear(config.patch_voxels, config.hidden_size)
        self.norm = MedCTLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 1, z, y, x)` voxels to `(batch, z, y, x, hidden_size)` tokens."""
        if pixel_values.shape[1:] != (1, *self.image_size):
            raise ValueError(
                f"`pixel_values` must be (batch, 1, z, y, x) with (z, y, x) = {self.image_size}, "
                f"not {tuple(pixel_values.shape)}."
            )
        (t, h, w), (pz, py, px) = self.grid_size, self.patch_size
        # (b, 1, t*pz, h*py, w*px) -> (b*t, h, w, pz, py, px)
        blocks = pixel_values.reshape(-1, pz, h, py, w, px).permute(0, 2, 4, 1, 3, 5)
        # Copies of blocks are as large as the volume, so they are made slab by slab.
        tokens = torch.cat(
            [self._embed(slabs) for slabs in split_rows(blocks, h * w * self.patch_norm.weight.numel(), torch.float32)]
        )
        return tokens.unflatten(0, (-1, t))

    def _embed(self, blocks: torch.Tensor) -> torch.Tensor:
        """`(slabs, y, x, *patch_size)` voxels to `(slabs, y, x, hidden_size)` tokens."""
        # Neighbours differ by few HU: half precision would round most of that away before the norm scales it up.
        scaled = self.patch_norm(blocks.flatten(-3))
        return self.norm(self.projection(scaled.to(self.projection.weight.dtype)))


class MedCTPositionBias(nn.Module):
    """A bias on the attention scores of the spatial stage, made by a small network from the offset of two tokens.

    The same for all spatial layers and all volumes. The network runs on the distinct offsets only: (2y-1)(2x-1) of
    them instead of (yx)² pairs, and again only when its weights have changed.
    """

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.grid_size = config.grid_size[1:]
        self.negative_slope = config.position_bias_negative_slope
        self.fc1 = nn.Linear(2, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc3 = nn.Linear(config.hidden_size, config.num_attention_heads)
        self._kept: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def forward(self) -> torch.Tensor:
        """Returns `(1, heads, y * x, y * x)`: the bias of query token i (third axis) on key token j (fourth)."""
        weights = list(self.parameters())
        wants_grad = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if wants_grad or torch.compiler.is_compiling() or self.fc1.weight.is_meta:
            return self._compute()
        # Compared by value, as versions and addresses miss edits through `.data`; 1 MB against the network's 1 GFLOP.
        if self._kept is None or not all(_same(kept, now) for kept, now in zip(self._kept[0], weights, strict=True)):
            # Kept tensors must serve later calls with gradients, or outside of autocast, too.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
                self._kept = [weight.detach().clone() for weight in weights], self._compute()
        return self._kept[1]

    def _compute(self) -> torch.Tensor:
        h, w = self.grid_size
        weight = self.fc1.weight
        rows, columns = (torch.arange(1 - n, n, device=weight.device, dtype=torch.float32) for n in (h, w))
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (2h-1, 2w-1, 2)
        offsets = (offsets.sign() * offsets.abs().log1p()).to(weight.dtype)
        hidden = F.leaky_relu(self.fc1(offsets), self.negative_slope)
        hidden = F.leaky_relu(self.fc2(hidden), self.negative_slope)
        table = self.fc3(hidden).permute(2, 0, 1)  # (heads, 2h-1, 2w-1)
        # Window k of an axis starts at offset k - (n-1); read backwards it holds the offsets of query k to keys 0..n-1.
        bias = table.unfold(1, h, 1).unfold(2, w, 1).flip(-1, -2)  # (heads, h, w, h, w)
        return bias.reshape(1, -1, h * w, h * w)


def _same(kept: torch.Tensor, now: torch.Tensor) -> bool:
    return kept.device == now.device and kept.dtype == now.dtype and torch.equal(kept, now)


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


class MedCTAttention(nn.Module):
    """Multi-head attention on queries and keys of unit length, with learned scales shared by the heads."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.attention_scale
        self.is_causal = False
        self.q_proj = MedCTLinear(config.hidden_size, config.attention_size, bias=False)
        self.k_proj = MedCTLinear(config.hidden_size, config.attention_size, bias=False)
        self.v_proj = MedCTLinear(config.hidden_size, config.attention_size, bias=False)
        self.out_proj = MedCTLinear(config.attention_size, config.hidden_size, bias=False)
        self.q_scale = nn.Parameter(torch.ones(config.head_dim))
        self.k_scale = nn.Parameter(torch.ones(config.head_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, tokens, hidden_size)` each, bias `(1, heads, tokens, tokens)`, to the first's shape, and weights."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        # (b, n, heads*c) -> (b, heads, n, c)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(key_value_states).view(heads).transpose(1, 2)
        value = self.v_proj(key_value_states).view(heads).transpose(1, 2)
        query = (F.normalize(query, dim=-1) * self.q_scale).to(value.dtype)
        key = (F.normalize(key, dim=-1) * self.k_scale).to(value.dtype)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        position_bias = None if position_bias is None else position_bias.to(value.dtype)
        output, weights = attention(
            self, query, key, value, None, scaling=self.scaling, position_bias=position_bias, **kwargs
        )
        return self.out_proj(output.flatten(-2)), weights


class MedCTAlignedLinear(MedCTLinear):
    """A Linear for results of any width; that of the gated feed-forward is odd."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear_aligned(hidden_states, self.weight)


class MedCTMLP(nn.Module):
    """Gated feed-forward: one half of the first product, times gelu of the other."""

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        self.fc1 = MedCTAlignedLinear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = MedCTLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = self.fc1(hidden_states).chunk(2, dim=-1)
        return self.fc2(times_gelu(value, gate))


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

    def forward(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        stream = add(self.position_generator(hidden_states).to(hidden_states.dtype), hidden_states)
        # Gradients need all that a chunk would hand on, and "eager" is there to show the attention as a whole.
        if torch.is_grad_enabled() or self.self_attn.config._attn_implementation == "eager":
            return self._within_sequences(stream, position_bias, **kwargs)
        for chunk in split_rows(stream, stream.shape[1] * self.mlp.fc1.out_features, self.dtype):
            self._within_sequences(chunk, position_bias, **kwargs)
        return stream

    def _within_sequences(self, stream: torch.Tensor, position_bias: torch.Tensor | None, **kwargs) -> torch.Tensor:
        # Only queries are normalised; keys and values come from the stream itself.
        attended, _ = self.self_attn(
            self.layer_norm1(stream).to(self.dtype), stream.to(self.dtype), position_bias=position_bias, **kwargs
        )
        stream = add(stream, attended)
        return add(stream, self.mlp(self.layer_norm2(stream).to(self.dtype)))


class MedCTEncoder(nn.Module):
    """One stage: layers and a LayerNorm."""

    def __init__(self, config: MedCTVisionConfig, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(MedCTLayer(config) for _ in range(num_layers))
        self.norm = MedCTLayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, position_bias: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """`(sequences, tokens, hidden_size)` to the same; attention runs within a sequence."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_bias, **kwargs)
        return self.norm(hidden_states)


class MedCTQuantizer(nn.Module):
    """Replaces every token by the codebook row of greatest cosine similarity."""

    codebook: torch.Tensor

    def __init__(self, config: MedCTVisionConfig):
        super().__init__()
        # A buffer and no parameter: no optimizer, and no full fine-tuning either, may move it.
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., hidden_size)` tokens to rows of the codebook, same shape, and their `(...)` indices.

        Args:
            hidden_states: Tokens.
            dtype: Precision of the product of all tokens with all rows; the nearest are compared in float32.
        """
        with torch.no_grad():
            codes = F.normalize(self.codebook.to(torch.promote_types(self.codebook.dtype, torch.float32)), dim=-1)
            coarse_codes = codes.to(dtype)
            # Tokens need no normalising: their length does not change which row is nearest.
            chunks = split_rows(hidden_states.reshape(-1, hidden_states.shape[-1]), len(codes), dtype)
            ids = torch.cat([nearest(chunk, codes, coarse_codes) for chunk in chunks]).view(hidden_states.shape[:-1])
        quantized = F.embedding(ids, self.codebook)
        if hidden_states.requires_grad:
            # The difference is exactly zero: the value is still the row itself, the gradient that of the token.
            quantized = quantized + (hidden_states - hidden_states.detach())
        return quantized, ids


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
    adapter_descriptions: dict[str, dict] = {}
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
    def from_pretrained(cls, *args, use_safetensors: bool = True, **kwargs):
        """transformers' own, but that nothing except safetensors is read unless it is asked for: no pickles."""
        return super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, *args, **kwargs):
        """transformers' own, for an adapter that fits this model; see `check_fit` for the rule.

        What the adapter remembers is kept in `adapter_descriptions`, by its name.

        Raises:
            AdapterMismatchError: If the adapter was trained on another model or another preprocessing.
        """
        description = None
        if peft_model_id is not None:
            load_config, adapter_kwargs = kwargs.get("load_config"), kwargs.get("adapter_kwargs") or {}
            downloads = kwargs if load_config is None else load_config.download_kwargs
            description = check_fit(self, peft_model_id, **{**downloads, **adapter_kwargs})
        loaded = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        self.adapter_descriptions = {**self.adapter_descriptions, adapter_name or "default": description or {}}
        return loaded

    def adapter_strength(self, name: str = "default") -> float:
        """How much of an adapter is in use: 1 as it was loaded, 0 nothing of it; NaN if its layers differ.

        Raises:
            ValueError: If there is no adapter of that name.
        """
        strengths = [
            layer.scaling[name] * layer.r[name] ** (0.5 if layer.use_rslora.get(name) else 1) / layer.lora_alpha[name]
            for layer in self._adapter_layers(name)
        ]
        # Roots and quotients are rounded.
        return strengths[0] if max(strengths) - min(strengths) < 1e-6 else math.nan

    def set_adapter_strength(self, name: str = "default", strength: float = 1.0) -> None:
        """Use so much of an adapter, for all calls that follow. Nothing that is saved changes.

        The adapter's operating points and calibration hold for strength 1; pipelines leave them out at any other.

        Args:
            name: Of the adapter, as in `load_adapter`.
            strength: 1 is the adapter as it was loaded, 0 the base, 0.5 half of what was learned.

        Raises:
            ValueError: If there is no adapter of that name, the strength is negative or no number, or the adapter has
                more than what scales: it is merged, has DoRA's magnitudes, or whole modules.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"`strength` is {strength}. Pass a number, 0 or more; 1 is the adapter as it was loaded.")
        layers = self._adapter_layers(name)
        has_modules = any(name in (getattr(module, "modules_to_save", None) or ()) for module in self.modules())
        if has_modules or any(layer.merged or layer.use_dora.get(name) for layer in layers):
            raise ValueError(
                f"The adapter {name!r} is merged, or has DoRA's magnitudes or whole modules, so its strength cannot be "
                "set. `medct train --strength auto` chooses it when an adapter is made."
            )
        for layer in layers:
            layer.set_scale(name, strength)

    def _adapter_layers(self, name: str) -> list[nn.Module]:
        layers = [module for module in self.modules() if hasattr(module, "scaling") and hasattr(module, "set_scale")]
        found = [layer for layer in layers if name in layer.scaling]
        if not found:
            known = sorted({each for layer in layers for each in layer.scaling})
            raise ValueError(f"There is no adapter {name!r}. Loaded: {', '.join(known) or 'none'}.")
        return found


class MedCTVisionModel(MedCTPreTrainedModel):
    """The vision encoder: voxels to tokens of the codebook, and their pooled row."""

    config: MedCTVisionConfig
    base_model_prefix = "vision_model"
    input_modalities = ("image",)

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

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> MedCTVisionOutput:
        """Encode volumes.

        Args:
            pixel_values: `(batch, 1, z, y, x)`, in [-1, 1], as `MedCTImageProcessor` makes them.

        Raises:
            ValueError: If the volume is missing or of another size than `config.image_size`.
        """
        if pixel_values is None:
            raise ValueError("`pixel_values` are missing: give the vision encoder a volume.")
        tokens = self.embeddings(pixel_values)
        batch, t, h, w, _ = tokens.shape
        # (b, t, h, w, d) -> (b*t, h*w, d)
        tokens = self.spatial_encoder(tokens.flatten(0, 1).flatten(1, 2), self.position_bias(), **kwargs)
        # (b*t, h*w, d) -> (b*h*w, t, d), in memory too: the position generator reads it there
        tokens = tokens.unflatten(0, (batch, t)).transpose(1, 2).flatten(0, 1).contiguous()
        tokens = self.temporal_encoder(tokens, **kwargs)
        # (b*h*w, t, d) -> (b, t, h*w, d)
        tokens = tokens.unflatten(0, (batch, h * w)).transpose(1, 2)
        tokens, codebook_ids = self.quantizer(tokens, self.position_bias.fc1.weight.dtype)
        return MedCTVisionOutput(
            last_hidden_state=tokens.flatten(1, 2),
            pooler_output=tokens.mean(dim=1).flatten(1),
            codebook_ids=codebook_ids.flatten(1),
        )


def _text_encoder(config: MedCTConfig) -> PreTrainedModel:
    """The text encoder that the configuration names, without a pooler, which CT-CLIP does not use."""
    parameters = inspect.signature(MODEL_MAPPING[type(config.text_config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    return AutoModel.from_config(config.text_config, **options)


def _embed(projection: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """`(batch, features)` to `(batch, projection_dim)`, of length 1.

    In float32 whatever the model's precision: the two prompts of a label, and the labels among each other, differ by
    less than half precision tells apart.
    """
    projected = projection(pooled.to(projection.weight.dtype))
    return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


class MedCTModel(MedCTPreTrainedModel):
    """CT-CLIP: volumes and reports in one space."""

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
        outputs.pooler_output = _embed(self.visual_projection, outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode texts into the common space.

        Args:
            input_ids: `(texts, tokens)`.
            attention_mask: `(texts, tokens)`, 0 on padding.

        Returns:
            The encoder's output; its `pooler_output` is the embedding, `(texts, projection_dim)`, of length 1.
        """
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
        """Scaled cosine similarity of `(volumes, projection_dim)` and `(texts, projection_dim)`: `(volumes, texts)`."""
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
            labels: `(batch, labels)`, 0 or 1.

        Returns:
            `logits`, `(batch, labels)`: each label by itself, so take their sigmoid; `loss`, `()`, if labels are given.
        """
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        embeds = _embed(self.visual_projection, outputs.pooler_output).to(self.classifier.weight.dtype)
        logits = self.classifier(self.dropout(F.relu(embeds)))
        return ImageClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = self.config.classifier_pos_weight
        pos_weight = None if weight is None else torch.tensor(weight, device=logits.device, dtype=logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), pos_weight=pos_weight)


__all__ = ["MedCTForImageClassification", "MedCTModel", "MedCTPreTrainedModel", "MedCTVisionModel"]
