"""Whether what is put together belongs together: weights and class, processor and model.

What does not is refused. The libraries would continue: with random weights in place of those that a checkpoint lacks,
and with voxels that mean something else to the model than to the processor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig

from .errors_medct import MedCTError

# What `pixel_values` mean; see `MedCTVisionConfig`.
PREPROCESSING = ("image_size", "hu_min", "hu_max", "hu_per_unit", "target_spacing_mm", "orientation")
_PARTS = {"text_model": "text encoder", "vision_model": "vision encoder", "classifier": "classifier"}


class CheckpointMismatchError(MedCTError, ValueError):
    """Weights that are not those of the class that was asked for; the message says which, and what to do."""


class NotANumberError(MedCTError, ValueError):
    """Results of a model that are NaN or infinite, so that nothing can be said about the scan."""


def refuse_what_is_no_number(results: torch.Tensor) -> None:
    """Refuse results of a model that are NaN or infinite: comparisons would take them for low scores.

    Args:
        results: Of any shape.

    Raises:
        NotANumberError: If any of them is.
    """
    if not torch.isfinite(results).all():
        raise NotANumberError(
            "The model's results are not numbers (NaN or infinite): so is something in the scan, the weights or the "
            "adapter, or the range of float16 is too small. Load them again, or use bfloat16 or float32."
        )


class ProcessorMismatchError(MedCTError, ValueError):
    """A processor that makes other voxels than the model was trained on; the message says what differs."""


def refuse_other_weights(
    name: str,
    model_class: type,
    config: PreTrainedConfig,
    loading_info: dict[str, Any],
    may_lack: tuple[str, ...] = (),
    may_hold: tuple[str, ...] = (),
) -> None:
    """Refuse a checkpoint whose weights are not exactly those of a class.

    Args:
        name: Hub id or folder.
        model_class: What was asked for.
        config: Of the checkpoint.
        loading_info: As `from_pretrained(output_loading_info=True)` gives it.
        may_lack: Prefixes of weights that a checkpoint may lack, which are then initialised at random.
        may_hold: Prefixes of weights that may lie unused in a checkpoint.

    Raises:
        CheckpointMismatchError: If weights are missing, or are there that the class does not have.
    """
    missing = sorted(
        key for key in set(loading_info["missing_keys"]) - reset_weights(loading_info) if not key.startswith(may_lack)
    )
    unexpected = sorted(key for key in loading_info["unexpected_keys"] if not key.startswith(may_hold))
    if not missing and not unexpected:
        return
    said = f"it lacks {_named(missing)}" if missing else f"it has {_named(unexpected)}, which that class does not have"
    holds = ", ".join(config.architectures or ())
    if holds in ("", model_class.__name__):
        remedy = "Its weights have other names or are not whole: save or copy it again, or pass another model."
    else:
        remedy = f"It was saved as {holds}: load it as that, or pass another model."
    raise CheckpointMismatchError(f"{name} is not a {model_class.__name__}: {said}. {remedy}")


def reset_weights(loading_info: dict[str, Any]) -> set[str]:
    """Weights that were set aside because the user asked for other sizes.

    Args:
        loading_info: As `from_pretrained(output_loading_info=True)` gives it.
    """
    return {each[0] if isinstance(each, tuple) else each for each in loading_info.get("mismatched_keys", ())}


def _named(keys: list[str]) -> str:
    parts = [f"the {what}" for part, what in _PARTS.items() if any(part in key.split(".") for key in keys)]
    return f"{parts[0] if parts else 'weights'} ({keys[0]}, {len(keys)} tensors in all)"


def preprocessing(config: PreTrainedConfig) -> dict[str, Any]:
    """What a model expects of `pixel_values`: window and scale in HU, spacing in mm, size and orientation."""
    vision = getattr(config, "vision_config", config)
    return values_of(vision, PREPROCESSING)


def values_of(settings: Any, names: Iterable[str]) -> dict[str, Any]:
    """Attributes by name, with tuples as lists.

    Args:
        settings: A configuration or a processor.
        names: Attributes to collect.

    Returns:
        One entry per name; `None` for attributes that do not exist.
    """
    values = {name: getattr(settings, name, None) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_processor(config: PreTrainedConfig, processor: Any, name: str = "The processor") -> None:
    """Refuse a processor whose voxels mean something else than the model's.

    Args:
        config: Of the model.
        processor: A `MedCTProcessor`, or an image processor alone.
        name: Where it is from.

    Raises:
        ProcessorMismatchError: If window, scale, spacing, size or orientation differ.
    """
    images = getattr(processor, "image_processor", processor)
    theirs = values_of(images, PREPROCESSING)
    for key, ours in preprocessing(config).items():
        if theirs[key] != ours:
            raise ProcessorMismatchError(
                f"{name}: the processor has {key} {theirs[key]}, the model {ours}. Pass the model's own processor, or "
                "`MedCTImageProcessor.from_config(model.config.vision_config)`."
            )


__all__ = ["CheckpointMismatchError", "ProcessorMismatchError", "check_processor"]
