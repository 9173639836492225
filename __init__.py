"""MedCT: CT-CLIP as a Hugging Face model, and LoRA adapters for it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.2.0"


def _is_the_command() -> bool:
    """Whether this is the process of `medct ...`. It reads its arguments before torch and transformers are imported,
    which takes seconds, and then imports what it needs by itself.
    """
    # The interpreter has options of its own: launchers and containers pass -u.
    module = sys.orig_argv[-len(sys.argv)] if sys.argv[0] == "-m" else ""
    return Path(sys.argv[0]).stem == "medct" or module in ("medct", "medct.cli")


_IS_THE_COMMAND = _is_the_command()  # later, Python has changed the arguments

if TYPE_CHECKING or not _IS_THE_COMMAND:
    from .adapters_medct import AdapterMismatchError, check_fit
    from .checks_medct import CheckpointMismatchError, ProcessorMismatchError, check_processor
    from .configuration_medct import CT_CLIP_LABELS, MedCTConfig, MedCTVisionConfig
    from .errors_medct import MedCTError
    from .image_processing_medct import MedCTImageProcessor, VolumeGeometry
    from .modeling_medct import MedCTForImageClassification, MedCTModel, MedCTVisionModel, zero_shot_probabilities
    from .pipeline_medct import CTClassificationPipeline, ZeroShotCTClassificationPipeline
    from .processing_medct import MedCTProcessor
    from .publishing.registration import register
    from .volume_io_medct import CTVolume, VolumeError, VolumeWarning, read_volume

    register()

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
