"""What an adapter remembers of the model that it was trained on, and whether it fits another.

Beside its weights an adapter has `medct_adapter.json`: the fingerprint of its base, what `pixel_values` meant there,
the labels, prompts and operating points. `MedCTModel.load_adapter`, and with it `AutoModel.from_pretrained` of an
adapter, asks `check_fit`. PEFT's own loaders know nothing of it; call it before them.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from .checks_medct import preprocessing
from .errors_medct import MedCTError, first_line

try:  # transformers needs both
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file
except ImportError:  # pragma: no cover
    pass

DESCRIPTION_FILE = "medct_adapter.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# Rounding to bfloat16 is the same from float32 and from bfloat16 itself, and from no other type.
_COMPARABLE = (torch.float32, torch.bfloat16)
_CHUNK_ELEMENTS = 2**22
# Initialisations that take out of the base's weights what the adapter holds.
_TAKEN_FROM_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
# Those of them that depend on data, or on chance: loading cannot take the same out again.
_TAKEN_ONCE = ("corda", "lora_ga", "pissa_niter_")
_SMALLEST_SCORE = 1e-7  # float32 tells no smaller ones from 0, or from 1
# What `describe_adapter` writes.
_REMEMBERED = ("base", "preprocessing", "label_names", "prompt_templates", "prompts", "thresholds", "calibration")
_REMEMBERED += ("strength", "operating_points", "adapter_fingerprint")
# What of it holds for exactly those weights, at the strength that they were saved with.
_CHOSEN = ("thresholds", "calibration", "operating_points")
# What an adapter's configuration says of its origin and training, and nothing of what it computes.
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
_ORIGIN += ("init_lora_weights", "lora_dropout")
Config = TypeVar("Config", bound=PreTrainedConfig)
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _peft() -> Any:
    """PEFT, which takes most of a second to import and only adapters need; none if it is not installed."""
    try:
        import peft
    except ImportError:
        return None
    return peft


class AdapterMismatchError(MedCTError, ValueError):
    """An adapter that does not belong to this model; the message says why and what to do."""


OTHER_WORDS = "its scores and thresholds hold for its own, which pipelines ask for while it is in use"


class OtherWordsWarning(UserWarning):
    """An adapter that was trained to be asked in other words than its model."""


def base_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model by their own names, whatever adapters have been put around its layers.

    Offloaded ones are fetched; those that cannot be had are on "meta".
    """
    return dict(_tensors_below(model, "", own_module))


def tensors_in_use(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """As `base_tensors`, but of a module that an adapter in use has whole, the adapter's own.

    What adapters add to a module's weights does not count.
    """
    return dict(_tensors_below(model, "", _module_in_use))


def own_module(module: nn.Module) -> nn.Module:
    """The model's own module in one of PEFT's, whatever the kind of adapter; any other module itself."""
    while (inner := getattr(module, "original_module", None) or getattr(module, "base_layer", None)) is not None:
        module = inner
    return module


def _module_in_use(module: nn.Module) -> nn.Module:
    """The whole module of the adapter in use in one of PEFT's, else the model's own."""
    whole = getattr(module, "modules_to_save", None)
    if whole is None or module.disable_adapters:
        return own_module(module)
    return next((whole[name] for name in module.active_adapters if name in whole), own_module(module))


def _tensors_below(
    module: nn.Module, prefix: str, choose: Callable[[nn.Module], nn.Module]
) -> Iterator[tuple[str, torch.Tensor]]:
    module = choose(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, _fetched(module, name, tensor)
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors_below(child, f"{prefix}{name}.", choose)


def _fetched(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, from where accelerate keeps it if it is offloaded."""
    if tensor.is_meta:
        hook = getattr(module, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            try:
                return each.weights_map[name]
            except (AttributeError, KeyError, TypeError):  # a hook of another kind, or of other weights
                continue
    return tensor


def changes_base(config: Any) -> bool:
    """Whether loading an adapter changes the base's own weights.

    Args:
        config: Of the adapter.
    """
    begins = str(getattr(config, "init_lora_weights", "")).lower().split("_niter_")[0]
    return begins in _TAKEN_FROM_BASE or getattr(config, "bias", "none") != "none"


def _refuse_what_was_taken_once(config: Any, adapter: str) -> None:
    """Refuse an adapter that belongs to a rest of the base's weights which nobody has any more."""
    begins = str(getattr(config, "init_lora_weights", ""))
    if begins.lower().startswith(_TAKEN_ONCE):
        raise AdapterMismatchError(
            f"{adapter} begins with {begins!r}, which takes out of the base's weights what no loading can take out "
            "again. Ask its author to save it as plain LoRA (`path_initial_model_for_weight_conversion`)."
        )


def refuse_to_share_base(model: PreTrainedModel, config: Any) -> None:
    """Refuse to put an adapter beside others if one of them changes the base, which belongs to all of them.

    Args:
        model: With or without other adapters.
        config: Of the new adapter.

    Raises:
        AdapterMismatchError: If one of them does.
    """
    others = getattr(_without_peft(model), "peft_config", {}).values()
    if others and any(map(changes_base, (config, *others))):
        raise AdapterMismatchError(
            "An adapter that changes weights of its base (PiSSA, OLoRA and the like, or biases) cannot lie beside "
            "another, whose scores would change too. Load each on a model of its own."
        )


def refuse_to_swap(config: Any, adapter: str | Path, **hub: Any) -> None:
    """Refuse an adapter in the place of one with another configuration: transformers puts in the weights alone.

    Args:
        config: Of the adapter whose place it would take.
        adapter: Hub id or folder of the new one.
        hub: As for `check_fit`.

    Raises:
        AdapterMismatchError: If its configuration is another.
    """
    theirs = read_config(_file(adapter, CONFIG_FILE, hub, is_optional=False), adapter).to_dict()
    ours = config.to_dict()
    if other := sorted(key for key in theirs if key not in _ORIGIN and ours.get(key) != theirs[key]):
        raise AdapterMismatchError(
            f"{adapter} has another {other[0]} than the adapter of that name, and only weights can be swapped. Delete "
            "that one first (`delete_adapter`), or load this under another name."
        )


def fingerprint(model: PreTrainedModel) -> str | None:
    """A name for the weights of a model, the same on every machine.

    SHA-256 over names, shapes and values. Values are rounded to bfloat16, so that a float32 model and its bfloat16 copy
    have the same fingerprint; a float16 copy has another. Adapters do not count unless they are merged. Quantized
    weights have the fingerprint of the file that they were made from.

    Args:
        model: MedCT model, or a `PeftModel` around one.

    Returns:
        "sha256-bf16:" and 64 hexadecimal digits; `None` if it cannot be known.
    """
    model = _without_peft(model)
    tensors = base_tensors(model)
    return _digest(tensors) if all(map(_has_values, tensors.values())) else _fingerprint_of_file(model, tensors)


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds the numbers themselves, here."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.is_floating_point() and not tensor.is_meta


@torch.no_grad()
def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    # Converted in pieces through one small buffer, which stays in the processor's cache.
    buffer = torch.empty(_CHUNK_ELEMENTS, dtype=torch.bfloat16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for chunk in tensor.reshape(-1).split(_CHUNK_ELEMENTS):
            piece = buffer[: len(chunk)].copy_(chunk)
            total.update(piece.view(torch.uint8).numpy().data)
    return f"sha256-bf16:{total.hexdigest()}"


def _fingerprint_of_file(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """That of the weights that a model was loaded from; `None` if they are not at hand, or quantized themselves."""
    place = getattr(model, "_place", {})
    try:
        path = cached_file(model.name_or_path, "model.safetensors", local_files_only=True, **place)
        with safe_open(path, framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dictionary
    except (OSError, TypeError):  # no such place, or no such file in it
        return None
    is_whole = saved.keys() <= tensors.keys() and all(map(_has_values, saved.values()))
    return _digest(saved) if is_whole else None


def adapter_fingerprint(adapter: str | Path, **hub: Any) -> str:
    """A name for the weights of an adapter, the same on every machine.

    Args:
        adapter: Hub id or folder.
        hub: `revision` and the like, as for `check_fit`.

    Returns:
        "sha256:" and 64 hexadecimal digits, over names, shapes, types and bytes.
    """
    return _exact_digest(read_tensors(adapter, **hub))


def saved_fingerprint(folder: str | Path) -> str | None:
    """`adapter_fingerprint` of a folder, `None` if no weights are in it yet."""
    return adapter_fingerprint(folder) if Path(folder, WEIGHTS_FILE).is_file() else None


def _exact_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"


def _without_peft(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    operating_points: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Write down what an adapter was trained on, beside its weights.

    Args:
        model: The model that it was trained on, with or without the adapter.
        folder: Where the adapter is saved. If its weights are there already, what is chosen is tied to them.
        base: Hub id or folder of that model.
        revision: Its commit, if it is on the Hub.
        base_fingerprint: Taken before training, where training changes the weights in memory or shards them.
        thresholds: Operating point of each label: the least score that counts as "present".
        calibration: Slope and intercept of each label, see `calibrated`.
        strength: Share of what was learned that is in the saved weights.
        operating_points: Others besides `thresholds`, by name ("sensitivity 0.95") and label.

    Returns:
        What was written.
    """
    description = {
        "base": {"model": base, "revision": revision, "fingerprint": base_fingerprint or fingerprint(model)},
        "preprocessing": preprocessing(model.config),
        "label_names": list(model.config.label_names),
        "prompt_templates": [list(pair) for pair in model.config.prompt_templates],
        "prompts": model.config.prompts,
        "thresholds": thresholds,
        "calibration": calibration,
        "strength": strength,
        "operating_points": operating_points,
        "adapter_fingerprint": saved_fingerprint(folder),
    }
    Path(folder, DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def are_disabled(model: PreTrainedModel) -> bool:
    """Whether a model has disabled adapters; layers of PEFT know, while `active_adapters` names them all the same."""
    return any(getattr(module, "disable_adapters", None) is True for module in model.modules())


def adapters_in_use(model: PreTrainedModel) -> list[str]:
    """Names of the adapters that take part in a model's calls."""
    if are_disabled(model) or not getattr(model, "_hf_peft_config_loaded", False):
        return []
    # The model's own `active_adapters` asks one layer only, which may be one that the adapter in use has no part in.
    active = [getattr(module, "active_adapters", None) for module in model.modules()]
    return list(dict.fromkeys(name for names in active if isinstance(names, list) for name in names))


def description_in_use(model: PreTrainedModel) -> dict[str, Any]:
    """What the adapter in use remembers, see `describe_adapter`; empty if there is none, or several."""
    in_use = adapters_in_use(model)
    return model.adapter_description(in_use[0]) if len(in_use) == 1 else {}


def asked_config(model: PreTrainedModel) -> PreTrainedConfig:
    """What a model is asked: its own configuration, or with an adapter in use the labels and prompts of its training.

    Args:
        model: MedCT model, with or without adapters. A classifier has its own labels whatever adapter is in use.
    """
    return model.config if hasattr(model, "classifier") else as_described(model.config, description_in_use(model))


def as_described(config: Config, description: Mapping[str, Any]) -> Config:
    """A configuration with the labels and prompts that an adapter was trained with.

    Args:
        config: The model's; not changed.
        description: What the adapter remembers, see `describe_adapter`.
    """
    if not description.get("label_names"):
        return config
    config = copy.copy(config)
    config.id2label = dict(enumerate(description["label_names"]))
    config.label2id = {label: index for index, label in config.id2label.items()}
    config.prompt_templates = description["prompt_templates"]
    config.prompts = description.get("prompts")
    return config


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


def without_choices(description: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter remembers, but for operating points and calibration, which hold for its own weights alone."""
    return {key: value for key, value in description.items() if key not in _CHOSEN}


def read_description(adapter: str | Path, **hub: Any) -> dict[str, Any] | None:
    """What an adapter remembers, or `None` if it has no `medct_adapter.json`.

    Args:
        adapter: Hub id or folder.
        hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, as for `from_pretrained`.

    Raises:
        AdapterMismatchError: If the file is not JSON, or holds NaN or infinity, which no score is above or below.
    """
    path = _file(adapter, DESCRIPTION_FILE, hub)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise AdapterMismatchError(
            f"{adapter}: its {DESCRIPTION_FILE} cannot be read ({first_line(error)}). Correct it, or copy it again."
        ) from error


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def check_fit(model: PreTrainedModel, adapter: str | Path, **hub: Any) -> dict[str, Any] | None:
    """Whether an adapter belongs to a model.

    | the adapter | then |
    | --- | --- |
    | has weights in another format than safetensors only | refused |
    | remembers what this version of MedCT does not know | refused |
    | was trained on other weights | refused |
    | was trained with another window, spacing, size or orientation of `pixel_values` | refused |
    | lacks a tensor that its configuration asks for, has another one, or one of another shape | refused |
    | has a number that is NaN or infinite | refused |
    | changes weights of the base (PiSSA, OLoRA and the like, biases), or another one there does | refused |
    | took out of them what loading cannot take out again (LoRA-GA, CorDA, PiSSA in few iterations) | refused |
    | was trained with other labels or prompts | warning |
    | has other weights than its operating points were chosen for | warning: they are left out |
    | has no `medct_adapter.json`, or its base or this model cannot be told | warning: nothing to compare |
    | and the model is float16 or quantized | compared with the file that was loaded, and warning |

    Args:
        model: MedCT model, with or without other adapters.
        adapter: Hub id or folder.
        hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, as for `from_pretrained`.

    Returns:
        What the adapter remembers, as from `read_description`, as far as it holds for its weights.

    Raises:
        AdapterMismatchError: If it is refused.
        OSError: If there is no adapter, or a file of it cannot be fetched.
    """
    try:
        # Every adapter has this file: if even it cannot be had, there is no adapter there, or no way to the Hub.
        config_file = _file(adapter, CONFIG_FILE, hub, is_optional=False)
    except OSError as error:
        raise OSError(f"{adapter}: no adapter ({first_line(error)}) Pass a Hub id or a folder.") from error
    except ValueError as error:  # the Hub's client, of what is not the name of a repository
        raise OSError(f"{adapter}: no adapter (there is no such folder). Pass a Hub id or a folder.") from error
    if _file(adapter, WEIGHTS_FILE, hub) is None:
        raise AdapterMismatchError(
            f"{adapter} has no {WEIGHTS_FILE}. Other formats can hold code and are not read: ask its author to save it "
            "with safetensors."
        )
    description = read_description(adapter, **hub)
    if description is not None:
        _refuse_unknown(adapter, description)
        _check_base(model, adapter, description["base"])
        _check_preprocessing(model, adapter, description["preprocessing"])
    tensors = read_tensors(adapter, **hub)
    config = read_config(config_file, adapter)
    _refuse_what_was_taken_once(config, str(adapter))
    refuse_to_share_base(model, config)
    check_tensors(model, tensors, config, str(adapter))
    if description is None:
        warnings.warn(
            f"{adapter} has no {DESCRIPTION_FILE}: it is not known whether it was trained on this model.", stacklevel=3
        )
        return None
    words = ("label_names", "prompt_templates", "prompts")
    if other := [name for name in words if _plain(description.get(name)) != _plain(getattr(model.config, name))]:
        warnings.warn(
            f"{adapter} was trained with other {' and '.join(other)} than this model's: {OTHER_WORDS}.",
            OtherWordsWarning,
            stacklevel=3,
        )
    return _as_far_as_it_holds(adapter, description, tensors)


def _as_far_as_it_holds(
    adapter: str | Path, description: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """A description without what was chosen for other weights than lie beside it."""
    is_of_others = description.get("adapter_fingerprint") not in (None, _exact_digest(tensors))
    if not is_of_others or not any(description.get(name) for name in _CHOSEN):
        return description
    warnings.warn(
        f"{adapter} has other weights than its operating points and calibration were chosen for: they are left out. "
        "`medct prompts --store` chooses new ones.",
        stacklevel=4,
    )
    return without_choices(description)


def read_config(path: str | Path, adapter: str | Path) -> Any:
    """The configuration of an adapter, as PEFT has it.

    Args:
        path: Of `adapter_config.json`.
        adapter: Hub id or folder, for messages.

    Raises:
        AdapterMismatchError: If PEFT cannot read it, or the adapter mixes others, which would be fetched unchecked.
    """
    try:
        config = _peft().PeftConfig.from_pretrained(str(Path(path).parent))
    except Exception as error:  # of any kind, for what PEFT does not expect
        raise AdapterMismatchError(
            f"{adapter}: PEFT cannot read its {CONFIG_FILE} ({type(error).__name__}). Update PEFT, or ask its author "
            "to save it again."
        ) from error
    if getattr(config, "adapters", None):
        raise AdapterMismatchError(f"{adapter} mixes other adapters ({config.peft_type.value}). Load each by itself.")
    return config


def read_tensors(adapter: str | Path, **hub: Any) -> dict[str, torch.Tensor]:
    """The weights of an adapter, by the names that PEFT writes.

    Args:
        adapter: Hub id or folder.
        hub: As for `check_fit`.

    Raises:
        AdapterMismatchError: If PEFT is not installed, or the file is damaged.
    """
    if _peft() is None:
        raise AdapterMismatchError(f"{adapter} is an adapter, and those need PEFT. Install it: pip install peft.")
    try:
        return load_file(_file(adapter, WEIGHTS_FILE, hub, is_optional=False))
    except SafetensorError as error:
        raise AdapterMismatchError(f"{adapter}: {WEIGHTS_FILE} is damaged. Copy or download it again.") from error


def loadable_tensors(adapter: str | Path, **hub: Any) -> dict[str, torch.Tensor]:
    """`read_tensors` by the names that transformers looks for: it passes over DoRA's as PEFT writes them."""
    return {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: tensor
        for name, tensor in read_tensors(adapter, **hub).items()
    }


def check_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], config: Any, adapter: str) -> None:
    """Refuse tensors that are not exactly those which an adapter of this configuration has on this model.

    Loaders pass over what they do not know and leave what they do not find as it was drawn, with a warning at best.

    Args:
        model: MedCT model, with or without other adapters.
        tensors: By the names that PEFT writes.
        config: Of the adapter.
        adapter: Its name, for messages.

    Raises:
        AdapterMismatchError: If one is missing, is not asked for, has another shape, holds other than floating-point
            numbers, or is NaN or infinite somewhere.
    """
    wanted = _wanted(model, config)
    remedy = "Save it again, or ask its author for all of it."
    if missing := wanted.keys() - tensors.keys():
        raise AdapterMismatchError(
            f"{adapter} lacks {len(missing)} of the {len(wanted)} tensors that its configuration asks for, such as "
            f"{min(missing)}. {remedy}"
        )
    if others := tensors.keys() - wanted.keys():
        raise AdapterMismatchError(
            f"{adapter} has tensors that its configuration does not ask for ({len(others)}, such as {min(others)}). "
            f"{remedy}"
        )
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != wanted[name]:
            raise AdapterMismatchError(
                f"{adapter} has {name} with shape {tuple(tensor.shape)}, not {tuple(wanted[name])}. {remedy}"
            )
        if not tensor.is_floating_point():  # loaders would take integers, without their scales, for the weights
            raise AdapterMismatchError(f"{adapter} has {tensor.dtype} in {name}, no floating-point numbers. {remedy}")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterMismatchError(f"{adapter} has NaN or infinity in {name}. {remedy}")


def _wanted(model: PreTrainedModel, config: Any) -> dict[str, torch.Size]:
    """Shapes of the tensors that PEFT saves of an adapter on a model, by name: of one that is put on an empty copy."""
    model, config = _without_peft(model), copy.deepcopy(config)
    config.base_model_name_or_path = config.task_type = None  # neither says what there is to hold
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other ways look at the weights, and here are none
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    try:
        # Of PEFT's own dealings with transformers. No memory for what a configuration asks for, either.
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):
            # Not `inject_adapter_in_model`, which takes no adapter whose layers share what is kept beside them.
            adapted = _peft().get_peft_model(skeleton, config, adapter_name="wanted")
        found = _peft().get_peft_model_state_dict(adapted, adapter_name="wanted")
    except NotImplementedError as error:  # it looks at the weights, and here are none
        raise AdapterMismatchError(
            f"What an adapter of the kind {config.peft_type.value} has to hold depends on the weights of its base, so "
            "it cannot be checked. Load it with `peft.PeftModel.from_pretrained`, which checks nothing."
        ) from error
    except Exception as error:  # of PEFT: the targets are not in this model, or any kind for what it does not expect
        said = first_line(error) if isinstance(error, ValueError) else type(error).__name__
        raise AdapterMismatchError(
            f"The adapter's configuration fits no module of this model ({said}). Load its base."
        ) from error
    return {name: tensor.shape for name, tensor in found.items()}


def _refuse_unknown(adapter: str | Path, description: Mapping[str, Any]) -> None:
    """Refuse what only a newer version understands: its scores may depend on it."""
    if unknown := sorted(key for key, value in description.items() if key not in _REMEMBERED and value is not None):
        raise AdapterMismatchError(
            f"{adapter}: its {DESCRIPTION_FILE} has {unknown[0]!r}, which this version of MedCT does not know. Update "
            "MedCT."
        )


def _check_base(model: PreTrainedModel, adapter: str | Path, base: dict[str, Any]) -> None:
    theirs = base["fingerprint"]
    model = _without_peft(model)
    tensors = base_tensors(model)
    is_exact = all(map(_has_values, tensors.values()))
    if is_exact and theirs == _digest(tensors):
        return
    types = {tensor.dtype for tensor in tensors.values() if tensor.dtype not in _COMPARABLE}
    if is_exact and theirs is not None and not types:
        ours = "other"
    else:
        ours = None if theirs is None else _fingerprint_of_file(model, tensors)
    if ours not in (None, theirs):
        at = f" at revision {base['revision']}" if base["revision"] else ""
        raise AdapterMismatchError(
            f"{adapter} was trained on other weights than this model's. Load its base, {base['model']}{at}."
        )
    held = f"This model's weights are {', '.join(sorted(map(str, types))) or 'quantized'}"
    if ours is None:
        said = f"It is not known whether {adapter} was trained on this model. {held}, or the adapter names no weights."
    else:
        said = f"{held}: {adapter} was trained on the file that they were made of, so expect other scores than its own."
    warnings.warn(said, stacklevel=4)


def _check_preprocessing(model: PreTrainedModel, adapter: str | Path, described: dict[str, Any]) -> None:
    ours = preprocessing(model.config)
    for name, theirs in described.items():
        if ours.get(name) != theirs:
            raise AdapterMismatchError(
                f"{adapter} was trained with {name} {theirs}, this model has {ours.get(name)}. Load the adapter's base."
            )


def _plain(value: Any) -> Any:
    """As JSON gives it back; nothing and an empty dictionary are one."""
    return json.loads(json.dumps(value or None))


def _file(adapter: str | Path, name: str, hub: dict[str, Any], is_optional: bool = True) -> str | None:
    """Path of a file of an adapter, fetched if need be; `None` if the adapter has none and it `is_optional`.

    Raises:
        OSError: If it cannot be fetched, so that nobody knows whether there is one.
    """
    options = {key: value for key, value in hub.items() if key in _HUB_OPTIONS and value is not None}
    try:
        return cached_file(str(adapter), name, **options)
    except OSError as error:
        # Only what was caused by another error says that the file could not be had; else the Hub, or the folder, has
        # said that there is none.
        is_known_missing = error.__cause__ is None or _is_known_missing(str(adapter), name, options)
        if is_optional and is_known_missing:
            return None
        if is_optional:
            raise OSError(
                f"{adapter}: {name} could not be fetched, so its fit is not known. Load it once with a network."
            ) from error
        raise


def _is_known_missing(adapter: str, name: str, options: dict[str, Any]) -> bool:
    """Whether the cache remembers that the Hub had no such file."""
    within = str(Path(options.get("subfolder", ""), name))
    known = {key: options[key] for key in ("cache_dir", "revision") if key in options}
    return try_to_load_from_cache(adapter, within, **known) is _CACHED_NO_EXIST


__all__ = [
    "AdapterMismatchError",
    "asked_config",
    "calibrated",
    "check_fit",
    "describe_adapter",
    "fingerprint",
    "read_description",
]
