"""A model and its processor, loaded by what the checkpoint says it is, and refused if they do not belong together."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoProcessor

from medct.checks_medct import CheckpointMismatchError, check_processor
from medct.configuration_medct import MedCTConfig, UnknownSettingError
from medct.errors_medct import MedCTError, first_line
from medct.modeling_medct import MedCTForImageClassification, MedCTModel
from medct.pipeline_medct import CTClassificationPipeline, CTPipeline, ZeroShotCTClassificationPipeline
from medct.processing_medct import MedCTProcessor
from medct.publishing.cards import is_hub_id

AnyMedCT = MedCTModel | MedCTForImageClassification
"""What scores findings: by comparison with sentences, or by a head of its own."""

HUB_SCHEME = "hf://"
PHANTOM_NAME = "phantom"
PHANTOM_BASE = Path(__file__).parents[1] / "phantom_base"

# The code is always this package's; unless told so, transformers asks whether to run that of a repository.
_NO_FOREIGN_CODE = {"trust_remote_code": False}
_NOT = {"model": "cannot load a model", "adapter": "no adapter"}
_CLASSES = {each.__name__: each for each in (MedCTModel, MedCTForImageClassification)}
_PIPELINES = {MedCTModel: ZeroShotCTClassificationPipeline, MedCTForImageClassification: CTClassificationPipeline}


class ModelError(MedCTError, ValueError):
    """A model that cannot be loaded; the message says why and what to do."""


def resolve_name(name: str, what: str = "model", revision: str | None = None) -> str:
    """What a user's name for a model or an adapter stands for.

    Args:
        name: Folder, Hub id, with or without "hf://", or "phantom": the phantom base, wherever it lies.
        what: "model" or "adapter", for the message.
        revision: Commit on the Hub, if one is asked for.

    Raises:
        ModelError: If it is neither a folder nor a Hub id, or begins as folders here do. Nobody would be asked for a
            slip of the pen, and without a network the Hub's client tries for half a minute. Or if a commit is asked for
            of what lies here: it may have the name of the repository that was meant.
    """
    if Path(name).is_file():
        raise ModelError(f"{name}: {_NOT[what]} (it is a file). Pass the folder that holds it, or a Hub id.")
    if Path(name).exists() or name == PHANTOM_NAME:
        if revision is not None:
            raise ModelError(
                f"{name}: it is here and not on the Hub, so it has no commit {revision!r}. Leave that out."
            )
        return name if Path(name).exists() else str(PHANTOM_BASE)
    hub_id = name.removeprefix(HUB_SCHEME)
    if not is_hub_id(hub_id):
        reason = "there is no such folder, and a Hub id reads ORG/NAME"
    elif name == hub_id and Path(name).parent.is_dir():
        reason = f"{Path(name).parent} is a folder here, but has none of that name; on the Hub it is {HUB_SCHEME}{name}"
    else:
        return hub_id
    raise ModelError(f"{name}: {_NOT[what]} ({reason}). Pass a Hub id or a folder.")


def load_config(name: str, **options: Any) -> MedCTConfig:
    """The configuration of a model.

    Args:
        name: Hub id or folder.
        options: For `from_pretrained`, such as `revision`.

    Raises:
        ModelError: If there is none, or it is that of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(name, **_NO_FOREIGN_CODE, **options)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    except StrictDataclassError as error:
        said = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ModelError(f"{name}: its config.json is not that of a model ({said}). Pass another model.") from error
    if config.model_type != MedCTConfig.model_type:
        raise ModelError(f"{name} is a model of type {config.model_type!r}. Pass a MedCT model.")
    return config


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | None = None,
    zero_shot_only: bool = False,
    **options: Any,
) -> tuple[AnyMedCT, MedCTProcessor]:
    """A model of the class that it was saved as, and its processor.

    Args:
        name: Hub id or folder.
        dtype: Precision of the weights; "auto": as they were saved.
        device: Where the model is to be; the CPU by default. Weights go there from the file, without a second copy.
        zero_shot_only: Refuse a classifier, which compares nothing with texts.
        options: For `from_pretrained`, such as `revision`.

    Raises:
        ModelError: If there is no such model.
        CheckpointMismatchError: If it is of another class, or its weights are not all those of its class.
        ProcessorMismatchError: If its processor makes other voxels than it was trained on.
    """
    config = load_config(name, **options)
    config.return_dict = True  # whoever loads it here reads its outputs by name
    model_class = _class_of(name, config)
    if zero_shot_only and model_class is not MedCTModel:
        raise CheckpointMismatchError(
            f"{name} is a classifier, a {model_class.__name__}: it has no text encoder to compare scans with. Pass a "
            "MedCTModel."
        )
    try:
        # Not the auto classes: they would take the class from the question and not from the checkpoint.
        placed = {} if device is None or device.type == "cpu" else {"device_map": device}
        model, info = model_class.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **placed, **options
        )
        vars(model).pop("hf_device_map", None)  # the mark of a model in parts, which pipelines do not move
        processor = AutoProcessor.from_pretrained(name, **_NO_FOREIGN_CODE, **options)
    except UnknownSettingError as error:
        raise _no_model(name, error) from error
    except MedCTError:
        raise
    except (OSError, ValueError, ImportError) as error:  # a library for quantized weights, say, is not there
        raise _no_model(name, error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointMismatchError(
            f"{name}: its weights have other sizes than its config.json says. Copy or download it again."
        ) from error
    if lacking := sorted(info["missing_keys"]):
        raise CheckpointMismatchError(
            f"{name}: the checkpoint lacks {lacking[0]}, which would be initialised at random. Pass a complete model."
        )
    check_processor(config, processor, name)
    return model, processor


def _no_model(name: str, error: Exception) -> Exception:
    """What to raise; what the system reports, of a home that is read-only, say, is not about the model."""
    if getattr(error, "errno", None):
        return error
    if isinstance(error, UnknownSettingError):
        return ModelError(f"{name}: {error}")
    return ModelError(f"{name}: cannot load a model ({first_line(error)}) Pass a Hub id or a folder.")


def _class_of(name: str, config: MedCTConfig) -> type[AnyMedCT]:
    architectures = config.architectures or [MedCTModel.__name__]
    if len(architectures) != 1 or architectures[0] not in _CLASSES:
        raise CheckpointMismatchError(
            f"{name} was saved as {', '.join(architectures)}. Pass a {' or a '.join(_CLASSES)}."
        )
    return _CLASSES[architectures[0]]


def pipeline_of(model: AnyMedCT, processor: MedCTProcessor, **options: Any) -> CTPipeline:
    """The pipeline for a model.

    Args:
        model: From `load_model`.
        processor: Likewise.
        options: `device`, `adapter`, `adapter_revision`.
    """
    return _PIPELINES[type(model)](model=model, processor=processor, **options)
