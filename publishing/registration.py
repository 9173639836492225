"""Registers MedCT's classes with transformers' Auto classes."""

import sys
import warnings

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from medct.configuration_medct import CLASSIFIER_TASK, ZERO_SHOT_TASK, MedCTConfig, MedCTVisionConfig, RegisteredTasks
from medct.image_processing_medct import MedCTImageProcessor
from medct.modeling_medct import MedCTForImageClassification, MedCTModel, MedCTVisionModel
from medct.pipeline_medct import CTClassificationPipeline, ZeroShotCTClassificationPipeline
from medct.processing_medct import MedCTProcessor


def register() -> None:
    """Let this process's Auto classes and `pipeline` find MedCT's.

    What was loaded with `trust_remote_code=True` before that is of other classes, perhaps of another version; a warning
    says so.
    """
    code = MedCTConfig.__module__.rpartition(".")[2]
    if any(name.startswith("transformers_modules.") and name.endswith(f".{code}") for name in sys.modules):
        warnings.warn(
            "MedCT's code of a repository runs in this process already: models, processors and pipelines loaded before "
            "`import medct` may not work with what comes from `medct`. Load them again, or import medct first.",
            stacklevel=2,
        )
    AutoConfig.register(MedCTConfig.model_type, MedCTConfig, exist_ok=True)
    AutoConfig.register(MedCTVisionConfig.model_type, MedCTVisionConfig, exist_ok=True)
    AutoModel.register(MedCTConfig, MedCTModel, exist_ok=True)
    AutoModel.register(MedCTVisionConfig, MedCTVisionModel, exist_ok=True)
    AutoModelForImageClassification.register(MedCTConfig, MedCTForImageClassification, exist_ok=True)
    AutoImageProcessor.register(MedCTConfig, MedCTImageProcessor, exist_ok=True)
    AutoProcessor.register(MedCTConfig, MedCTProcessor, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(ZERO_SHOT_TASK, ZeroShotCTClassificationPipeline, AutoModel, type="multimodal")
    PIPELINE_REGISTRY.register_pipeline(
        CLASSIFIER_TASK, CTClassificationPipeline, AutoModelForImageClassification, type="image"
    )
    MedCTConfig._tasks_as = RegisteredTasks
