"""What commands with a model share: their processes, the model, how scans are read, and how they end."""

import argparse
import functools
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from medct.checks_medct import preprocessing
from medct.cli.wording import in_flags
from medct.common.counting import counted
from medct.common.distributed import be_patient, start_launch
from medct.common.drawings import knows_drawings_only
from medct.common.errors import OK, SOME_FAILED
from medct.errors_medct import MedCTError, first_line
from medct.inference.bulk import Reading
from medct.inference.studies import LoadStudy, Study, find_studies
from medct.inference.weights import KEY as WEIGHTS
from medct.inference.weights import PREPROCESSING, weights_of
from medct.pipeline_medct import CTPipeline
from medct.publishing.loading import load_model, pipeline_of, resolve_name
from medct.reporting.findings import SYNTHETIC

MODEL_VARIABLE = "MEDCT_MODEL"
# Processes of a launch wait for the slowest one at the end of a night.
_PATIENCE = timedelta(days=7)


class CommandError(MedCTError, ValueError):
    """A command that cannot be carried out; the message says why and what to do."""


def start_processes(args: argparse.Namespace) -> PartialState:
    """This process's place in the launch; alone without one.

    Raises:
        LaunchError: If a launch of several processes would have each of them do all of the work.
    """
    # As `Accelerator` does, this follows the launch's own flag, too.
    state = start_launch(PartialState, cpu=args.cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    be_patient(_PATIENCE)
    return state


def model_of(args: argparse.Namespace) -> str:
    """The model that the user named, or that the adapter names, then with the commit that it names; `args` keeps it."""
    if not args.model and (name := os.environ.get(MODEL_VARIABLE)):
        args.model = resolve_name(name, revision=args.revision)
    if args.model:
        return args.model
    if args.adapter is None:
        raise CommandError(f"Which model? Pass --model ID_OR_FOLDER, or set {MODEL_VARIABLE}.")
    from peft import PeftConfig  # takes long to import, like all that is imported late here

    try:
        config = PeftConfig.from_pretrained(args.adapter, revision=args.adapter_revision)
    except Exception as error:  # of any kind, for what PEFT does not expect
        said = first_line(error) if isinstance(error, OSError | ValueError) else f"PEFT: {type(error).__name__}"
        raise CommandError(f"{args.adapter}: no adapter ({said}). Pass a Hub id or a folder.") from error
    args.model, args.revision = config.base_model_name_or_path, args.revision or config.revision
    return args.model


def load_pipeline(args: argparse.Namespace, device: torch.device, zero_shot_only: bool = False) -> CTPipeline:
    """Load the model, its processor and the adapter.

    Args:
        args: Parsed, with the model's options.
        device: Where to run.
        zero_shot_only: Refuse classifiers.

    Raises:
        MedCTError: If one of them cannot be loaded.
    """
    name = model_of(args)
    model, processor = load_model(
        name, dtype=args.dtype, device=device, zero_shot_only=zero_shot_only, revision=args.revision
    )
    try:
        return pipeline_of(
            model.to(device),
            processor,
            device=device,
            adapter=args.adapter,
            adapter_revision=args.adapter_revision,
        )
    except (OSError, ValueError) as error:
        said, which = first_line(error), str(args.adapter or name)
        raise CommandError(said if said.startswith(which) else f"{which}: {said}") from error


def load_for_scans(args: argparse.Namespace, state: PartialState, zero_shot_only: bool = False) -> CTPipeline:
    """As `load_pipeline`, for scans of patients: says so, on standard error, if the model knows drawings only.

    Args:
        args: Parsed, with the model's options.
        state: This process's place in the launch.
        zero_shot_only: Refuse classifiers.
    """
    pipe = load_pipeline(args, state.device, zero_shot_only)
    names = [name for name in (args.adapter, model_of(args)) if name is not None]
    if state.is_main_process and any(map(knows_drawings_only, names)):
        print(f"NOTE: {SYNTHETIC}", file=sys.stderr)
    return pipe


def reading_of(args: argparse.Namespace, pipe: CTPipeline) -> Reading:
    """How scans are read.

    Args:
        args: Parsed, with the options for scans.
        pipe: Holds the image processor.
    """
    load = LoadStudy(pipe.processor.image_processor, pipe.device, reading_options(args))
    return Reading(load, args.batch_size, args.num_workers, functools.partial(in_flags, args=args))


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """How the user wants scans to be read, as `read_volume` takes it."""
    names = ("series", "resample_irregular", "rescale_slope", "rescale_intercept")
    return {name: getattr(args, name) for name in names}


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Which model a run used."""
    names = ("revision", "adapter", "adapter_revision", "dtype")
    return {"model": model_of(args), **{name: getattr(args, name) for name in names}}


def row_settings(args: argparse.Namespace, pipe: CTPipeline) -> dict[str, Any]:
    """What decides about the numbers of a run over scans.

    Args:
        args: Parsed, with the options for the model and for scans.
        pipe: The model's pipeline.
    """
    made_by = {WEIGHTS: weights_of(pipe.model), PREPROCESSING: preprocessing(pipe.model.config)}
    return {**model_settings(args), **reading_options(args), **made_by}


def ends(failed: int, studies: int, output: Path | None) -> int:
    """Report how many studies failed, on standard error.

    Args:
        failed: Studies that could not be read.
        studies: All studies.
        output: The file of results, beside which failures are listed; `None` without one.

    Returns:
        The exit status.
    """
    if failed:
        where = "" if output is None else f"; see {output.name}.failed.csv beside the output"
        print(f"{failed} of {counted(studies, 'study', 'studies')} could not be read{where}.", file=sys.stderr)
    return SOME_FAILED if failed else OK


def one_study(path: str) -> Study:
    """The single study at a path."""
    studies = find_studies([path])
    if len(studies) > 1:
        raise CommandError(f"{path} holds {len(studies)} studies, such as {studies[1].id}. Pass one of them.")
    return studies[0]
