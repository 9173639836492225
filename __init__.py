"""MedCT: CT-CLIP as a Hugging Face model, and LoRA adapters for it."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .adapters_medct import AdapterMismatchError, check_fit
from .checks_medct import CheckpointMismatchError, ProcessorMismatchError, check_processor
from .configuration_medct import (
    CLASSIFIER_TASK,
    CT_CLIP_LABELS,
    ZERO_SHOT_TASK,
    MedCTConfig,
    MedCTVisionConfig,
    RegisteredTasks,
)
from .errors_medct import MedCTError
from .image_processing_medct import MedCTImageProcessor, VolumeGeometry
from .modeling_medct import MedCTForImageClassification, MedCTModel, MedCTVisionModel, zero_shot_probabilities
from .pipeline_medct import CTClassificationPipeline, ZeroShotCTClassificationPipeline
from .processing_medct import MedCTProcessor
from .volume_io_medct import CTVolume, VolumeError, VolumeWarning, read_volume

# Auto classes find these in a process that has imported medct; `save_pretrained` ships the code to those that have not.
AutoConfig.register(MedCTConfig.model_type, MedCTConfig)
AutoConfig.register(MedCTVisionConfig.model_type, MedCTVisionConfig)
AutoModel.register(MedCTConfig, MedCTModel)
AutoModel.register(MedCTVisionConfig, MedCTVisionModel)
AutoModelForImageClassification.register(MedCTConfig, MedCTForImageClassification)
AutoImageProcessor.register(MedCTConfig, MedCTImageProcessor)
AutoProcessor.register(MedCTConfig, MedCTProcessor)
for _shipped, _auto_class in (
    (MedCTConfig, "AutoConfig"),
    (MedCTVisionConfig, "AutoConfig"),
    (MedCTModel, "AutoModel"),
    (MedCTVisionModel, "AutoModel"),
    (MedCTForImageClassification, "AutoModelForImageClassification"),
    (MedCTImageProcessor, "AutoImageProcessor"),
    (MedCTProcessor, "AutoProcessor"),
):
    _shipped.register_for_auto_class(_auto_class)
PIPELINE_REGISTRY.register_pipeline(ZERO_SHOT_TASK, ZeroShotCTClassificationPipeline, AutoModel, type="multimodal")
PIPELINE_REGISTRY.register_pipeline(
    CLASSIFIER_TASK, CTClassificationPipeline, AutoModelForImageClassification, type="image"
)
MedCTConfig._tasks_as = RegisteredTasks

__all__ = [
    "CT_CLIP_LABELS",
    "AdapterMismatchError",
    "CTClassificationPipeline",
    "CTVolume",
    "CheckpointMismatchError",
    "MedCTConfig",
    "MedCTError",
    "MedCTForImageClassification",
    "MedCTImageProcessor",
    "MedCTModel",
    "MedCTProcessor",
    "MedCTVisionConfig",
    "MedCTVisionModel",
    "ProcessorMismatchError",
    "VolumeError",
    "VolumeGeometry",
    "VolumeWarning",
    "ZeroShotCTClassificationPipeline",
    "check_fit",
    "check_processor",
    "read_volume",
    "zero_shot_probabilities",
]
