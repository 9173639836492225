"""What an adapter remembers of the model that it was trained on, and whether it fits another.

Beside its weights an adapter has `medct_adapter.json`: the fingerprint of its base, what `pixel_values` meant there,
the labels, prompts and operating points. `MedCTModel.load_adapter`, and with it `AutoModel.from_pretrained` of an
adapter, asks `check_fit`. PEFT's own loaders know nothing of it; call it before them.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from .errors_medct import MedCTError

DESCRIPTION_FILE = "medct_adapter.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# What `pixel_values` mean; see `MedCTVisionConfig`.
_PREPROCESSING = ("image_size", "hu_min", "hu_max", "hu_per_unit", "target_spacing_mm", "orientation")
# Where PEFT puts the module that it wraps, whatever the kind of adapter.
_WRAPPED = re.compile(r"(.+?)\.(?:base_layer|original_module)\.(.+)")
# Rounding to bfloat16 is the same from float32 and from bfloat16 itself, and from no other type.
_COMPARABLE = (torch.float32, torch.bfloat16)
_CHUNK_ELEMENTS = 2**22
_SMALLEST_SCORE = 1e-7  # float32 tells no smaller ones from 0, or from 1
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class AdapterMismatchError(MedCTError, ValueError):
    """An adapter that does not belong to this model; the message says why and what to do."""


def base_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model by their own names, whatever adapters have been put around its layers."""
    tensors = model.state_dict()
    wrappers = {match[1] for name in tensors if (match := _WRAPPED.fullmatch(name))}
    found = {}
    for name, tensor in tensors.items():
        if match := _WRAPPED.fullmatch(name):
            found[f"{match[1]}.{match[2]}"] = tensor
        elif not any(name.startswith(f"{wrapper}.") for wrapper in wrappers):
            found[name] = tensor
    return found


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """A name for the weights of a model, the same on every machine.

    SHA-256 over names, shapes and values. Values count as bfloat16 holds them, so that a float32 model and its bfloat16
    copy are one; of float16 or quantized copies the fingerprint is another. Adapters do not count, merged ones do.

    Args:
        model: MedCT model, or a `PeftModel` around one.

    Returns:
        "sha256-bf16:" and 64 hexadecimal digits.
    """
    total = hashlib.sha256()
    # Converted in pieces through one small buffer, which stays in the processor's cache.
    buffer = torch.empty(_CHUNK_ELEMENTS, dtype=torch.bfloat16)
    for name, tensor in sorted(base_tensors(_without_peft(model)).items()):
        total.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for chunk in tensor.reshape(-1).split(_CHUNK_ELEMENTS):
            piece = buffer[: len(chunk)].copy_(chunk)
            total.update(piece.view(torch.uint8).numpy().data)
    return f"sha256-bf16:{total.hexdigest()}"


def _without_peft(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def preprocessing(model: PreTrainedModel) -> dict[str, Any]:
    """What a model expects of `pixel_values`: window and scale in HU, spacing in mm, size and orientation."""
    vision = getattr(model.config, "vision_config", model.config)
    values = {name: getattr(vision, name) for name in _PREPROCESSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def describe_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    base: str,
    revision: str | None = None,
    base_fingerprint: str | None = None,
    thresholds: dict[str, float] | None = None,
    calibration: dict[str, list[float]] | None = None,
    strength: float | None = None,
) -> dict[str, Any]:
    """Write down what an adapter was trained on, beside its weights.

    Args:
        model: The model that it was trained on, with or without the adapter.
        folder: Where the adapter is saved.
        base: Hub id or folder of that model.
        revision: Its commit, if it is on the Hub.
        base_fingerprint: Taken before training, where training changes the weights in memory or shards them.
        thresholds: Operating point of each label: the least score that counts as "present".
        calibration: Slope and intercept of each label, see `calibrated`.
        strength: Share of what was learned that is in the saved weights.

    Returns:
        What was written.
    """
    description = {
        "base": {"model": base, "revision": revision, "fingerprint": base_fingerprint or fingerprint(model)},
        "preprocessing": preprocessing(model),
        "label_names": list(model.config.label_names),
        "prompt_templates": [list(pair) for pair in model.config.prompt_templates],
        "thresholds": thresholds,
        "calibration": calibration,
        "strength": strength,
    }
    Path(folder, DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return description


def calibrated(scores: Any, slope: Any, intercept: Any) -> np.ndarray:
    """Scores to probabilities: the sigmoid of `slope * logit(score) + intercept`.

    Args:
        scores: Array or number, in [0, 1].
        slope: Likewise; positive, so that the order stays.
        intercept: Likewise.

    Returns:
        float64, in [0, 1].

    Source:
        Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    inside = np.clip(np.asarray(scores, float), _SMALLEST_SCORE, 1 - _SMALLEST_SCORE)
    return 1 / (1 + np.exp(-(slope * np.log(inside / (1 - inside)) + intercept)))


def read_description(adapter: str | Path, **hub: Any) -> dict[str, Any] | None:
    """What an adapter remembers, or `None` if it has no `medct_adapter.json`.

    Args:
        adapter: Hub id or folder.
        hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, as for `from_pretrained`.
    """
    path = _file(adapter, DESCRIPTION_FILE, hub)
    return None if path is None else json.loads(Path(path).read_text())


def check_fit(model: PreTrainedModel, adapter: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Whether an adapter belongs to a model.

    | the adapter | then |
    | --- | --- |
    | has weights in another format than safetensors only | refused |
    | was trained on other weights | refused |
    | was trained with another window, spacing, size or orientation of `pixel_values` | refused |
    | was trained with other labels or prompts | warning |
    | has no `medct_adapter.json`, or the model is neither float32 nor bfloat16 | warning: nothing to compare |

    Args:
        model: MedCT model, with or without other adapters.
        adapter: Hub id or folder.
        hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, as for `from_pretrained`.

    Returns:
        What the adapter remembers, as from `read_description`.

    Raises:
        AdapterMismatchError: If it is refused.
        OSError: If there is no adapter, or the Hub cannot be reached.
    """
    try:
        # Every adapter has this file: if even it cannot be had, there is no adapter there, or no way to the Hub.
        _file(adapter, CONFIG_FILE, hub, is_optional=False)
    except OSError as error:
        raise OSError(f"{adapter}: no adapter ({str(error).splitlines()[0]}) Pass a Hub id or a folder.") from error
    if _file(adapter, WEIGHTS_FILE, hub) is None:
        raise AdapterMismatchError(
            f"{adapter} has no {WEIGHTS_FILE}. Other formats can hold code and are not read: ask its author to save it "
            "with safetensors."
        )
    description = read_description(adapter, **hub)
    if description is None:
        warnings.warn(
            f"{adapter} has no {DESCRIPTION_FILE}: nobody can tell whether it was trained on this model.", stacklevel=3
        )
        return None
    _check_base(model, adapter, description["base"])
    ours = preprocessing(model)
    for name, theirs in description["preprocessing"].items():
        if ours.get(name) != theirs:
            raise AdapterMismatchError(
                f"{adapter} was trained with {name} {theirs}, this model has {ours.get(name)}. Load the adapter's base."
            )
    for name in ("label_names", "prompt_templates"):
        if [*map(_plain, description[name])] != [*map(_plain, getattr(model.config, name))]:
            warnings.warn(
                f"{adapter} was trained with other {name} than this model's: its scores and thresholds hold for its "
                "own.",
                stacklevel=3,
            )
    return description


def _check_base(model: PreTrainedModel, adapter: str | Path, base: dict[str, Any]) -> None:
    if base["fingerprint"] == fingerprint(model):
        return
    dtypes = {tensor.dtype for tensor in base_tensors(_without_peft(model)).values() if tensor.is_floating_point()}
    if not dtypes <= set(_COMPARABLE):
        warnings.warn(
            f"The weights are {', '.join(sorted(map(str, dtypes)))}: whether {adapter} was trained on this model can "
            "be told in float32 and bfloat16 only.",
            stacklevel=4,
        )
        return
    at = f" at revision {base['revision']}" if base["revision"] else ""
    raise AdapterMismatchError(
        f"{adapter} was trained on other weights than this model's. Load its base, {base['model']}{at}."
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _file(adapter: str | Path, name: str, hub: dict[str, Any], is_optional: bool = True) -> str | None:
    """Path of a file of an adapter, fetched if need be; `None` if the adapter has none and it `is_optional`."""
    options = {key: value for key, value in hub.items() if key in _HUB_OPTIONS and value is not None}
    return cached_file(str(adapter), name, _raise_exceptions_for_missing_entries=not is_optional, **options)


__all__ = ["AdapterMismatchError", "calibrated", "check_fit", "describe_adapter", "fingerprint", "read_description"]
