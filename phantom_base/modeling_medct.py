"""CT-CLIP as a transformers model: volume encoder, text encoder, common space, loss.

What the volume encoder consists of is in `layers_medct`.

Source: specification of CT-CLIP, sections 2 to 4.
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_MAPPING
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.output_capturing import capture_outputs

from .adapters_medct import tensors_in_use
from .checks_medct import refuse_other_weights, reset_weights
from .configuration_medct import CLASSIFIER_TASK, CODE, CUSTOM_PIPELINES, ZERO_SHOT_TASK, MedCTConfig, MedCTVisionConfig
from .graphs_medct import can_replay, replayed
from .kernels_medct import row_dtype, weights_of
from .layers_medct import (
    MedCTAttention,
    MedCTEncoder,
    MedCTLayer,
    MedCTPatchEmbeddings,
    MedCTPositionBias,
    MedCTQuantizer,
    project,
)
from .peft_medct import MedCTAdapterMixin
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


class MedCTPreTrainedModel(MedCTAdapterMixin, PreTrainedModel):
    """What all models here share: configuration, initialisation, and what of transformers they support."""

    config: MedCTConfig
    # So every part ships the code, also one that was taken out of a model that was loaded as remote code.
    _auto_class = "AutoModel"
    base_model_prefix = "medct"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MedCTLayer", "MedCTPatchEmbeddings", "MedCTPositionBias"]
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
    # Prefixes of weights that are random if a checkpoint lacks them, and of weights that may lie unused in it.
    _may_lack: tuple[str, ...] = ()
    _may_hold: tuple[str, ...] = ()
    # Names of the weights that the checkpoint lacked, or held untrained, and their random initial values.
    _drawn: tuple[set[str], Snapshot] | None = None
    # Options with which the library finds the very files that it was loaded from, besides `name_or_path`.
    _place: Mapping[str, Any] = {}
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
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *args: Any,
        use_safetensors: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self:
        """As in transformers, but only safetensors are read unless one asks for more: no pickles.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            use_safetensors: Whether to read safetensors only.
            output_loading_info: Whether to return what was missing or unexpected as well.

        Raises:
            CheckpointMismatchError: If a checkpoint lacks weights of this class, which would be random, or has others.
                A head to be trained may be missing, and a half that this class does not use may be there.
        """
        options = {"use_safetensors": use_safetensors, "output_loading_info": True}
        name = pretrained_model_name_or_path
        model, loading_info = super().from_pretrained(name, *args, **options, **kwargs)
        refuse_other_weights(name, cls, model.config, loading_info, cls._may_lack, cls._may_hold)
        model._place = _place_of(model.name_or_path, kwargs)
        known = getattr(model.config, "drawn_weights", None) or ()
        drawn = model._weights_called({*loading_info["missing_keys"], *reset_weights(loading_info), *known})
        model._drawn = (set(drawn), Snapshot(drawn)) if drawn else None
        return (model, loading_info) if output_loading_info else model

    @property
    def dtype(self) -> torch.dtype:
        """That of the vision encoder's products, which a saved configuration names and the library loads in.

        The library's own is that of the first parameter, which may be one of those that are kept in float32.
        """
        return getattr(self, "vision_model", self).precision

    @property
    def is_drawn(self) -> bool:
        """Whether weights still have the random initial values that they had when it was loaded, in any precision."""
        return self._drawn is not None and self._drawn[1].equals_rounded(self._weights_called(self._drawn[0]))

    def _weights_called(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, see `tensors_in_use`, on the CPU, but those that are sharded or not here."""
        return {
            name: weight.detach().cpu()
            for name, weight in tensors_in_use(self).items()
            if name in names and not (weight.is_meta or hasattr(weight, "full_tensor"))
        }

    def save_pretrained(self, *args, **kwargs) -> Any:
        """As in transformers, but the folder also names every class of the saved code, and its pipelines.

        So a base can be the start of a classifier, without this package.
        """
        if self.config.model_type == MedCTConfig.model_type:
            others = {name: task for name, task in self.config.custom_pipelines.items() if name not in CUSTOM_PIPELINES}
            self.config.set_custom_pipelines({name: CUSTOM_PIPELINES[name] for name in self._tasks} | others)
            self.config.auto_map = dict(CODE)
            self.config.drawn_weights = sorted(self._drawn[0]) if self.is_drawn else None
        return super().save_pretrained(*args, **kwargs)


def _place_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of loading those that say where files are: a branch as the commit that it is at."""
    place = {key: options[key] for key in ("cache_dir", "revision", "subfolder") if options.get(key) is not None}
    try:
        path = cached_file(name, "config.json", local_files_only=True, **place)
    except (OSError, TypeError):  # no such file, or no such place
        return place
    return place | {"revision": extract_commit_hash(path, None)}


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
        weights = self._weights_of_kernels(tokens) if can_replay(tokens) else None
        if weights is None:
            tokens, codebook_ids = self._encode(tokens)
        else:
            tokens, codebook_ids = replayed(self, self._encode, tokens, weights)
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

    def _weights_of_kernels(self, tokens: torch.Tensor) -> list[torch.Tensor] | None:
        """What `_encode` reads besides, if it runs by kernels as a whole."""
        encoders = self.spatial_encoder, self.temporal_encoder
        weights = weights_of(tokens, self.position_bias, *encoders, self.quantizer)
        is_whole = weights is not None and all(
            layer.leaves_all_to_kernels(tokens) for encoder in encoders for layer in encoder.layers
        )
        return weights if is_whole else None


def _text_encoder(config: MedCTConfig) -> PreTrainedModel:
    """The text encoder that the configuration names, without a pooler, which CT-CLIP does not use.

    Raises:
        ValueError: If its first token, which is read, would not see the text behind it.
    """
    kind = config.text_config.model_type
    if getattr(config.text_config, "is_decoder", False) or kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ValueError(
            f"`text_config` of type {kind!r} is not an encoder whose first token sees the whole text: all texts would "
            'be the same. Choose one that is trained to fill in masks, such as "bert" or "modernbert".'
        )
    parameters = inspect.signature(MODEL_MAPPING[type(config.text_config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    return AutoModel.from_config(config.text_config, **options)


def _embed(projection: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """`(batch, features)` to `(batch, projection_dim)`, of length 1.

    In float32 whatever the model's precision: the two prompts of a label, and the labels among each other, differ by
    less than half precision tells apart.
    """
    projected = project(projection, pooled)
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

    @property
    def dtype(self) -> torch.dtype:
        """As of the other models; if its halves differ, one in which neither is rounded."""
        return torch.promote_types(super().dtype, self.text_model.dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
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
            length = input_ids.shape[-1]
            order = torch.arange(length, device=input_ids.device) + first
            order = torch.where(order < length, order, order - length)  # ONNX takes no remainder of a length it learns
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
        image_embeds = image_embeds.to(torch.promote_types(image_embeds.dtype, torch.float32))
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
        # Whatever the configuration says of this model's own output.
        image_embeds = self.get_image_features(pixel_values, return_dict=True, **kwargs).pooler_output
        text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True, **text_kwargs).pooler_output
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

    _auto_class = "AutoModelForImageClassification"
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

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

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

        Raises:
            ValueError: If the volume is missing or of another size than `config.image_size`, the head has not one
                output for each label of the configuration, or `labels` are invalid, see `label_loss`.
        """
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        precision = self.vision_model.precision
        embeds = _embed(self.visual_projection, outputs.pooler_output.to(precision))
        logits = project(self.classifier, self.dropout(F.relu(embeds)).to(precision))
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
