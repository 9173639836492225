"""What `medct prompts` does. It takes the parsed arguments and returns the exit status."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from medct.adapters_medct import (
    DESCRIPTION_FILE,
    adapter_fingerprint,
    fingerprint,
    read_description,
    saved_fingerprint,
)
from medct.cli.commands import CommandError, ends, load_pipeline, start_processes
from medct.cli.records import only_json, recorded_settings
from medct.cli.score_commands import loader_of, remark_on_choice
from medct.common.distributed import of_all, refuse_different, start_launch
from medct.common.errors import OK
from medct.common.files import write_json
from medct.configuration_medct import MedCTConfig, Prompt
from medct.data import open_source
from medct.data.label_space import pairs_of, read_label_flags, told_apart
from medct.errors_medct import first_line
from medct.evaluation.figures import choose_on
from medct.evaluation.operating_points import YOUDEN, Points, remark_on_points, wanted_of
from medct.evaluation.prompts import SYNONYMS, TEMPLATES, Template, spread, wording_scores
from medct.evaluation.provenance import list_checksum, provenance
from medct.evaluation.report import prompts_report
from medct.evaluation.scoring import ScoredStudies, about_model, embed_studies
from medct.pipeline_medct import CTPipeline


def try_prompts(args: argparse.Namespace) -> int:
    if args.store and (args.adapter is None or not (Path(args.adapter) / DESCRIPTION_FILE).is_file()):
        raise CommandError(f"--store writes into an adapter's {DESCRIPTION_FILE}. Pass its folder as --adapter.")
    if args.store and args.split in ("valid", "all"):
        raise CommandError(
            f"--store keeps a choice, and --split {args.split} would make it on the patients that scores are told of. "
            "Leave out --split."
        )
    with only_json(args.output, args.command):
        return _try_prompts(args)


def _try_prompts(args: argparse.Namespace) -> int:
    start_processes(args)
    accelerator = start_launch(Accelerator, cpu=args.cpu)
    pipe = load_pipeline(args, accelerator.device, zero_shot_only=True)
    refuse_different(recorded_settings(args) | _model(args, pipe) | {"mixed precision": accelerator.mixed_precision})
    config, mapping = read_label_flags(pipe.asked, args.labels, mapping=args.mapping)
    if args.store and config.label_names != pipe.asked.label_names:
        raise CommandError("--store keeps the wording of the adapter's own findings. Leave out all others.")
    templates, names = _wordings(args, config)
    options = {"limit": args.limit, "revision": args.data_revision, "mapping": mapping}
    source = told_apart(open_source(args.data, args.split, config, **options))
    loader = loader_of(args, pipe, accelerator, source)
    embeds, studies = embed_studies(pipe.model, loader, accelerator, source.description)
    failed = sum(of_all(loader.num_bad))
    if not accelerator.is_main_process:
        return OK
    scores = wording_scores(pipe.model, pipe.processor, embeds, templates, names, accelerator)
    try:
        found = spread(scores, studies.labels, templates, names, studies.patients, len(config.prompt_templates))
    except ValueError as error:
        raise CommandError(f"{source.description}: {error}") from error
    points = _store_wording(Path(args.adapter), found, scores, studies, templates, names) if args.store else {}
    if args.output is not None:
        write_json(args.output, found | {"provenance": _provenance(args, pipe, accelerator, studies)})
    print(f"{source.description}\n\n{prompts_report(found)}")
    if args.store:
        which = "with operating points and calibration for it" if points else "without operating points for it"
        print(f"\nstored in {Path(args.adapter) / DESCRIPTION_FILE}, {which}")
    remarks = remark_on_points(points.get(YOUDEN, {}), list(names), studies.names) if args.store else []
    for said in (*remarks, remark_on_choice(args.adapter, source, studies)):
        if said:
            print(f"NOTE: {said}")
    return ends(failed, source.num_studies, None)


def _provenance(
    args: argparse.Namespace, pipe: CTPipeline, accelerator: Accelerator, studies: ScoredStudies
) -> dict[str, Any]:
    return provenance(
        recorded_settings(args),
        {"model": _model(args, pipe) | about_model(pipe.model)},
        {f"{args.data}, {args.split}": list_checksum(studies)},
        accelerator,
        seed=0,
    )


def _model(args: argparse.Namespace, pipe: CTPipeline) -> dict[str, Any]:
    model = {"model": args.model, "fingerprint": fingerprint(pipe.model), "adapter": args.adapter}
    if args.adapter is not None:
        model["adapter_fingerprint"] = adapter_fingerprint(args.adapter, revision=args.adapter_revision)
    return model


def _wordings(args: argparse.Namespace, config: MedCTConfig) -> tuple[list[Template], dict[str, list[Prompt]]]:
    """Templates and names to try; first those that the model uses anyway."""
    wanted = pairs_of(args.templates) if args.templates else TEMPLATES
    templates = [tuple(each) for each in config.prompt_templates]
    templates += [each for each in wanted if each not in templates]
    synonyms: Mapping[str, Sequence[str]] = SYNONYMS if args.names is None else _read_names(args.names, config)
    found: dict[str, list[Prompt]] = {}
    for label in config.label_names:
        usual = (config.prompts or {}).get(label, label)
        others = [*synonyms.get(label, ())] if isinstance(usual, str) else [label, *synonyms.get(label, ())]
        found[label] = [usual, *(each for each in dict.fromkeys(others) if each != usual)]
    return templates, found


def _read_names(path: Path, config: MedCTConfig) -> dict[str, list[str]]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: not a readable JSON file ({first_line(error)}).") from error
    is_names = isinstance(names, dict) and all(
        isinstance(each, list) and all(isinstance(name, str) and name.strip() for name in each)
        for each in names.values()
    )
    if not is_names:
        raise CommandError(
            f'{path}: write a list of other names for each finding, such as {{"Emphysema": ["Bullae"]}}.'
        )
    if unknown := sorted(set(names) - set(config.label_names)):
        raise CommandError(f"{path}: the model has no finding {unknown[0]!r}. Name its own: {config.label_names}.")
    return names


def _store_wording(
    folder: Path,
    found: Mapping[str, Any],
    scores: Mapping[str, np.ndarray],
    studies: ScoredStudies,
    templates: Sequence[Template],
    names: Mapping[str, Sequence[Prompt]],
) -> Points:
    """Write the choice into an adapter, with operating points, which it returns, and calibration of its scores."""
    chosen = found["chosen"]
    used = [templates.index(tuple(each)) for each in chosen["prompt_templates"]]
    words = {label: chosen["names"].get(label, each[0]) for label, each in names.items()}
    columns = [each[used, names[label].index(words[label])].mean(axis=0) for label, each in scores.items()]
    described = read_description(folder) or {}
    wanted = wanted_of(described.get("operating_points") or {})
    points, calibration = choose_on(replace(studies, scores=np.stack(columns, axis=-1), names=list(names)), wanted)
    described |= {
        "prompt_templates": chosen["prompt_templates"],
        "prompts": {label: each for label, each in words.items() if each != label} or None,
        "thresholds": points.get(YOUDEN),
        "calibration": calibration or None,
        "operating_points": {name: each for name, each in points.items() if name != YOUDEN} or None,
        "adapter_fingerprint": saved_fingerprint(folder),
    }
    write_json(folder / DESCRIPTION_FILE, described)
    return points
