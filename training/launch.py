"""What a run is launched with: processes and their devices, the base model, its commit."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from huggingface_hub.errors import HfHubHTTPError

from medct.common.distributed import start_launch
from medct.evaluation.scoring import is_classifier
from medct.processing_medct import MedCTProcessor
from medct.publishing.loading import AnyMedCT, load_model
from medct.publishing.push import commit_of
from medct.training.settings import TrainingError, TrainingSettings, complete, refuse_for_classifier


def shards_by_launch() -> bool:
    """Whether accelerate's own flag or configuration asks for a sharded model."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def _refuse_what_is_not_done(settings: TrainingSettings) -> None:
    """Refuse what the flags or the configuration of `accelerate launch` ask for and no run does."""
    flag, asked = parse_flag_from_env, os.environ.get
    steps = asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    is_sharded, instead = shards_by_launch(), "Leave it out; --fsdp2 of train.py shards the model"
    compiles = asked("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO"
    checkpoints = is_sharded and flag("FSDP_ACTIVATION_CHECKPOINTING")
    table = (
        (flag("ACCELERATE_USE_DEEPSPEED"), "DeepSpeed", instead),
        (flag("ACCELERATE_USE_MEGATRON_LM"), "Megatron-LM", instead),
        (flag("ACCELERATE_USE_PARALLELISM_CONFIG"), "parallelism_config", instead),
        (is_sharded and asked("FSDP_VERSION", "1") != "2", "version 1 of FSDP", "Pass --fsdp_version 2"),
        (is_sharded and flag("FSDP_OFFLOAD_PARAMS"), "fsdp_offload_params", "Leave it out"),
        (
            checkpoints and not settings.gradient_checkpointing,
            "fsdp_activation_checkpointing",
            "Pass --gradient_checkpointing to train.py instead",
        ),
        (asked("ACCELERATE_MIXED_PRECISION") == "fp8", "fp8", "Launch with bf16 or no"),
        (compiles and not settings.compile, "a dynamo backend", "Pass --compile to train.py instead"),
        (
            steps not in ("1", str(settings.accumulation_steps)),
            f"gradient_accumulation_steps {steps}",
            f"Pass --accumulation_steps {steps} to train.py instead",
        ),
    )
    for is_asked, what, remedy in table:
        if is_asked:
            raise TrainingError(f"accelerate was told to use {what}, which this trainer does not do. {remedy}.")


def make_accelerator(settings: TrainingSettings, work: Path) -> Accelerator:
    """Set up the processes, devices and trackers of the run.

    Args:
        settings: The run's settings.
        work: Working folder, for the logs of trackers.

    Raises:
        LaunchError: If processes were started that do not see each other.
        TrainingError: If they were started as no run works, or the tracker is not installed.
    """
    _refuse_what_is_not_done(settings)
    tracker = None if settings.report_to == "none" else settings.report_to
    if tracker == "trackio":  # which is told by this alone
        os.environ.setdefault("TRACKIO_DIR", str(work / "logs"))
    places = ProjectConfiguration(project_dir=str(work), logging_dir=str(work / "logs"))
    accelerator = start_launch(Accelerator, cpu=settings.cpu, log_with=tracker, project_config=places)
    if tracker and not accelerator.log_with:
        raise TrainingError(
            f"--report_to {tracker} needs a package that is not installed. Try `pip install {tracker}`."
        )
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
