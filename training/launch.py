"""What a run is launched with: processes and their devices, the base model, its commit."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from huggingface_hub.errors import HfHubHTTPError

from medct.evaluation.scoring import is_classifier
from medct.processing_medct import MedCTProcessor
from medct.publishing.loading import AnyMedCT, load_model
from medct.publishing.push import commit_of
from medct.training.settings import TrainingError, TrainingSettings, complete, refuse_for_classifier


def make_accelerator(settings: TrainingSettings, work: Path) -> Accelerator:
    """Set up the processes, devices and trackers of the run.

    Args:
        settings: The run's settings.
        work: Working folder, for the logs of trackers.

    Raises:
        TrainingError: If processes were started that do not see each other, or in a precision that is not supported.
    """
    tracker = None if settings.report_to == "none" else settings.report_to
    os.environ.setdefault("TRACKIO_DIR", str(work / "logs"))
    try:
        places = ProjectConfiguration(project_dir=str(work), logging_dir=str(work / "logs"))
        accelerator = Accelerator(cpu=settings.cpu, log_with=tracker, project_config=places)
    except (ImportError, ValueError) as error:
        raise TrainingError(f"--report_to {tracker}: {error} Try `pip install {tracker}`.") from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise TrainingError(f"{started} processes were started, but they are not connected. Without GPUs, pass --cpu.")
    if accelerator.mixed_precision == "fp16":
        raise TrainingError("fp16 needs scaled gradients, which this trainer does not support. Launch with bf16 or no.")
    return accelerator


def load_base(settings: TrainingSettings) -> tuple[AnyMedCT, MedCTProcessor]:
    """The base model and its processor.

    Raises:
        MedCTError: If there is no such model, or it cannot be trained with these settings.
    """
    model, processor = load_model(settings.model, revision=settings.revision)
    if is_classifier(model):
        refuse_for_classifier(complete(settings, model.config))
    return model, processor


def commit_of_base(settings: TrainingSettings) -> str | None:
    """What `--revision` stands for, so that an adapter names a commit; as it was given where no Hub answers."""
    try:
        return commit_of(settings.model, settings.revision)
    except (HfHubHTTPError, OSError):
        return settings.revision
