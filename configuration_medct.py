"""Configuration of MedCT: what a checkpoint is, and what its voxels and labels mean.

Everything that must travel with the weights stands here and nowhere else: sizes, patching, the HU window, spacing and
orientation of the input, label names and prompt templates. The image processor takes its defaults from this file.

Axes are `(z, y, x)` of the tensor throughout. What they mean in the patient is said once, by
`MedCTVisionConfig.orientation`: the direction in which each index grows. The published weights expect "SLP": z towards
superior, y towards the patient's left, x towards posterior. (So y and x are not image rows and columns.)

Source: specification of CT-CLIP, sections 1, 2 and 4.
"""

import copy
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec, strict

from .errors_medct import MedCTError

CT_CLIP_LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
"""The 18 findings of CT-RATE, in the order of its label csv."""

ZERO_SHOT_TASK = "zero-shot-ct-classification"
CLASSIFIER_TASK = "ct-classification"
CUSTOM_PIPELINES = {
    ZERO_SHOT_TASK: {
        "impl": "pipeline_medct.ZeroShotCTClassificationPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    },
    CLASSIFIER_TASK: {
        "impl": "pipeline_medct.CTClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    },
}
"""What `transformers.pipeline` must know to build our pipelines from a folder or the Hub."""

CODE = {
    "AutoConfig": "configuration_medct.MedCTConfig",
    "AutoModel": "modeling_medct.MedCTModel",
    "AutoModelForImageClassification": "modeling_medct.MedCTForImageClassification",
}
"""What the auto classes must know to load our models from a folder or the Hub, whatever class was saved there."""


class RegisteredTasks(dict):
    """Tasks whose pipelines are registered in this process.

    They are listed, so that `transformers.pipeline` can infer a task; but `in` finds none of them, or the library would
    ask for permission to run remote code instead of using what is registered.
    """

    def __contains__(self, task: object) -> bool:
        return False


# What the library keeps beside a class's own settings.
_OF_THE_LIBRARY = ("auto_map", "image_processor_type", "model_type", "quantization_config", "transformers_weights")


class UnknownSettingError(MedCTError, ValueError):
    """A setting that this version does not know; the library would go on without it."""


def refuse_unknown(names: Iterable[str], what: str) -> None:
    """Refuse settings that mean nothing here: to the version that wrote them, they may decide about scores.

    Args:
        names: Settings that are not the class's own.
        what: Whose settings they are, for the message.

    Raises:
        UnknownSettingError: If one of them is not the library's, either.
    """
    if unknown := sorted(name for name in names if name not in _OF_THE_LIBRARY and not name.startswith("_")):
        raise UnknownSettingError(
            f"{what} has a setting {unknown[0]!r} that this version of MedCT does not know, and without which scores "
            "may be wrong. Correct its name, begin it with `_` if it is a note of your own, or update MedCT."
        )


# Each patient axis by the two letters that may name its direction.
_PATIENT_AXES = ("LR", "AP", "IS")


def is_orientation(code: str) -> bool:
    """Whether three letters name each patient axis once, such as "SLP" or "RAS"."""
    return (
        isinstance(code, str)
        and len(code) == 3
        and all(sum(letter in axis for letter in code) == 1 for axis in _PATIENT_AXES)
    )


def check_voxels(settings: Any) -> None:
    """Refuse impossible sizes, spacings, windows and orientations.

    Args:
        settings: A vision configuration, or an image processor.

    Raises:
        ValueError: If there are any; the message says which.
    """
    _check_three("image_size", settings.image_size, Integral, "whole numbers")
    _check_three("target_spacing_mm", settings.target_spacing_mm)
    for name in ("hu_min", "hu_max", "hu_per_unit"):
        value = getattr(settings, name)
        if not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(f"`{name}` must be a number, not {value!r}.")
    if settings.hu_per_unit <= 0:
        raise ValueError(f"`hu_per_unit` must be positive, not {settings.hu_per_unit}.")
    if settings.hu_min >= settings.hu_max:
        raise ValueError(f"`hu_min` {settings.hu_min} HU must lie below `hu_max` {settings.hu_max} HU.")
    if not is_orientation(settings.orientation):
        raise ValueError(
            f'`orientation` must name each patient axis once, such as "SLP" (z to superior, y to left, x to '
            f'posterior), not "{settings.orientation}".'
        )


def _check_three(name: str, values: Sequence[Any], kind: Any = Real, numbers: str = "numbers") -> None:
    if len(values) != 3 or not all(isinstance(value, kind) and 0 < value < math.inf for value in values):
        raise ValueError(f"`{name}` must be three positive {numbers} (z, y, x), not {tuple(values)}.")


@strict
class MedCTVisionConfig(PreTrainedConfig):
    """Sizes of the vision encoder and the meaning of its voxels. The defaults are those of the published CT-CLIP.

    Args:
        image_size: Voxels of the input, `(z, y, x)`.
        patch_size: Voxels of one patch, `(z, y, x)`; divides `image_size`.
        hidden_size: Width of the token stream.
        num_attention_heads: Heads of each attention.
        head_dim: Width of a head; `num_attention_heads * head_dim` need not equal `hidden_size`.
        num_spatial_layers: Layers that attend within one z position.
        num_temporal_layers: Layers that attend along z ("time" in the video model that CT-CLIP descends from).
        codebook_size: Rows of the codebook.
        attention_scale: Factor on the product of normalised queries and keys, before the softmax.
        layer_norm_eps: Epsilon of every LayerNorm of the vision encoder.
        position_bias_negative_slope: Slope of the LeakyReLUs in the network that makes the position bias.
        initializer_range: Standard deviation of fresh weights.
        hu_min: Lower end of the window, HU.
        hu_max: Upper end of the window, HU.
        hu_per_unit: HU that make 1.0 in `pixel_values`.
        target_spacing_mm: Spacing that volumes are resampled to, `(z, y, x)`, mm.
        orientation: Direction in which the z, y and x index grow, one letter each of R/L, A/P, S/I.

    Raises:
        StrictDataclassError: Of `huggingface_hub`, if a value is impossible or contradicts another; the message holds
            both.
        UnknownSettingError: If there is no such setting.
    """

    _auto_class = "AutoConfig"
    model_type = "medct_vision_model"
    base_config_key = "vision_config"

    image_size: list[int] | tuple[int, ...] = (240, 480, 480)
    patch_size: list[int] | tuple[int, ...] = (10, 20, 20)
    hidden_size: int = 512
    num_attention_heads: int = 8
    head_dim: int = 32
    num_spatial_layers: int = 4
    num_temporal_layers: int = 4
    codebook_size: int = 8192
    attention_scale: float | int = 8.0
    layer_norm_eps: float | int = 1e-5
    position_bias_negative_slope: float | int = 0.1
    initializer_range: float | int = 0.02
    hu_min: float | int = -1000
    hu_max: float | int = 1000
    hu_per_unit: float | int = 1000
    target_spacing_mm: list[float | int] | tuple[float | int, ...] = (1.5, 0.75, 0.75)
    orientation: str = "SLP"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        refuse_unknown(kwargs.keys() & vars(self), "The configuration of the vision encoder")

    @property
    def num_hidden_layers(self) -> int:
        """Of both stages."""
        return self.num_spatial_layers + self.num_temporal_layers

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Tokens along `(z, y, x)`."""
        z, y, x = (size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))
        return z, y, x

    @property
    def patch_voxels(self) -> int:
        """Voxels of one patch."""
        return math.prod(self.patch_size)

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def intermediate_size(self) -> int:
        """Width of the gated feed-forward: floor(4 * 2/3 * hidden_size), so that three matrices cost as much as two."""
        return 8 * self.hidden_size // 3

    @property
    def pooled_size(self) -> int:
        """Width of the pooled volume: one z-averaged token for each place `(y, x)`, laid end to end."""
        return self.grid_size[1] * self.grid_size[2] * self.hidden_size

    def validate_architecture(self) -> None:
        """Refuse impossible values; called by `@strict` after construction."""
        check_voxels(self)
        _check_three("patch_size", self.patch_size)
        for size, patch, axis in zip(self.image_size, self.patch_size, "zyx", strict=True):
            if size % patch:
                raise ValueError(f"`image_size` {size} along {axis} is not a multiple of `patch_size` {patch}.")
        for name in ("hidden_size", "num_attention_heads", "head_dim", "codebook_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, not {getattr(self, name)}.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_pair(value: object) -> bool:
    """Whether it is two sentences."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_text, value))


def _check_templates(templates: Sequence[Sequence[str]]) -> None:
    for template in templates:
        if not _is_pair(template) or not all("{label}" in sentence for sentence in template):
            shown = tuple(template) if isinstance(template, list) else template
            raise ValueError(
                f"Each of `prompt_templates` is a pair of sentences (present, not present) that hold "
                f'"{{label}}", not {shown!r}.'
            )


def _check_names(labels: Sequence[str]) -> None:
    for label in labels:
        if any(unicodedata.category(letter) == "Cc" for letter in label):
            raise ValueError(
                f"The name {label!r} of a label holds a control character, such as a line break. Correct it."
            )


Prompt = str | Sequence[Sequence[str]]
"""What a label is called in prompts, or pairs of sentences of its own, present and not present."""


def _pairs_of(
    label: str, prompt: Prompt, templates: Sequence[Sequence[str]], may_be_sentences: bool
) -> Sequence[Sequence[str]]:
    """The pairs of sentences that ask for a label."""
    if may_be_sentences and not isinstance(prompt, str):
        return prompt
    words = prompt if isinstance(prompt, str) else label
    return [[sentence.replace("{label}", words) for sentence in template] for template in templates]


def _check_prompts(prompts: Mapping[str, Prompt]) -> None:
    for label, prompt in prompts.items():
        are_pairs = isinstance(prompt, list | tuple) and prompt and all(map(_is_pair, prompt))
        if not are_pairs and not _is_text(prompt):
            raise ValueError(
                f"`prompts` of {label!r} are words, or pairs of sentences (present, not present), not {prompt!r}."
            )


@strict
class MedCTConfig(PreTrainedConfig):
    """A vision encoder, a text encoder, their common space, and what the model is asked.

    Args:
        text_config: Configuration of any transformers encoder that is trained to fill in masks (a dict needs its
            `model_type`; BERT by default).
        vision_config: Configuration of the vision encoder.
        projection_dim: Width of the common space.
        logit_scale_init_value: Logarithm of the scale of fresh logits.
        prompt_templates: Pairs of sentences, present and not present, with `{label}` where the label's name goes.
            Several pairs are averaged.
        prompts: For labels whose names say too little, or are in another language than the model's: words that go into
            the templates in place of the name, or pairs of sentences of their own, present and not present, by name.
        classifier_dropout: Dropout before the head of `MedCTForImageClassification`.
        classifier_pos_weight: Weight of the positive cases in that head's loss, one number of 0 or more a label; 1 if
            `None`.
        drawn_weights: Names of the weights that nobody has trained since they were initialised at random, such as those
            of a new head; saving a model writes them down.
        custom_pipelines: Tasks of `transformers.pipeline` and the code shipped for them, see `CUSTOM_PIPELINES`; saving
            a model names its own.
        id2label: Names of the labels by their index; CT-CLIP's 18 findings by default.

    Raises:
        StrictDataclassError, UnknownSettingError: As of `MedCTVisionConfig`.
    """

    _auto_class = "AutoConfig"
    model_type = "medct"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(config_class=MedCTVisionConfig),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 1.0
    prompt_templates: list[list[str]] | list[tuple[str, ...]] | tuple[tuple[str, ...], ...] = (
        ("{label} is present.", "{label} is not present."),
    )
    prompts: dict | None = None
    classifier_dropout: float | int = 0.3
    classifier_pos_weight: list[float | int] | None = None
    drawn_weights: list[str] | None = None
    custom_pipelines: dict | None = None
    _tasks_as = dict  # the installed package puts `RegisteredTasks` here

    def __post_init__(self, **kwargs):
        tasks = {ZERO_SHOT_TASK: CUSTOM_PIPELINES[ZERO_SHOT_TASK]}
        self.set_custom_pipelines(tasks if self.custom_pipelines is None else self.custom_pipelines)
        if self.id2label is None and kwargs.get("num_labels") in (None, len(CT_CLIP_LABELS)):
            self.id2label = dict(enumerate(CT_CLIP_LABELS))
            self.label2id = {label: index for index, label in enumerate(CT_CLIP_LABELS)}
        super().__post_init__(**kwargs)
        refuse_unknown(kwargs.keys() & vars(self), "The model's configuration")

    def set_custom_pipelines(self, tasks: dict) -> None:
        """Name the tasks of a model; see `custom_pipelines`."""
        self.custom_pipelines = self._tasks_as(copy.deepcopy(dict(tasks)))

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved; also the labels where they are the library's own defaults, which are not the ones here."""
        return super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}

    @property
    def label_names(self) -> list[str]:
        """Names of the labels in the order of their index."""
        # Whoever sets `id2label` later may have the indices as text, as JSON has them.
        return [label for _, label in sorted((self.id2label or {}).items(), key=lambda each: int(each[0]))]

    def label_prompts(
        self,
        labels: Sequence[str] | Mapping[str, Prompt] | None = None,
        templates: Sequence[Sequence[str]] | None = None,
    ) -> list[list[str]]:
        """The sentences that ask for each label, one list a template.

        Args:
            labels: Names to ask for, or names with their own `prompts`; the configuration's own by default.
            templates: Pairs of sentences as in `prompt_templates`, for all labels but those that are given here with
                sentences of their own; by default those of the configuration, for all labels without.

        Returns:
            For each template `2 * len(labels)` sentences: present and not present of the first label, of the second ...
            If labels have different numbers of pairs, they are repeated so that all have the same weight.

        Raises:
            ValueError: If a template is not a pair of sentences with "{label}", or a name or a prompt is invalid.
        """
        given = labels if isinstance(labels, Mapping) else {}
        prompts = {**(self.prompts or {}), **given}
        labels = list(self.label_names if labels is None else labels)
        _check_names(labels)
        _check_prompts({label: prompts[label] for label in labels if label in prompts})
        pairs = self.prompt_templates if templates is None else templates
        _check_templates(pairs)
        of_label = [
            _pairs_of(label, prompts.get(label, label), pairs, templates is None or label in given) for label in labels
        ]
        count = math.lcm(*map(len, of_label)) if labels else len(pairs)
        return [[sentence for each in of_label for sentence in each[turn % len(each)]] for turn in range(count)]

    def validate_architecture(self) -> None:
        """Refuse impossible values; called by `@strict` after construction."""
        if self.projection_dim <= 0:
            raise ValueError(f"`projection_dim` must be positive, not {self.projection_dim}.")
        _check_names(self.label_names)
        _check_templates(self.prompt_templates)
        _check_prompts(self.prompts or {})
        weights = self.classifier_pos_weight
        if weights is not None and len(weights) != self.num_labels:
            raise ValueError(f"`classifier_pos_weight` has {len(weights)} numbers for {self.num_labels} labels.")
        if not all(0 <= weight < math.inf for weight in weights or ()):
            raise ValueError(f"`classifier_pos_weight` must be finite numbers of 0 or more, not {weights}.")


__all__ = ["CT_CLIP_LABELS", "MedCTConfig", "MedCTVisionConfig"]
