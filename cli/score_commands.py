"""What `medct evaluate` does. It takes the parsed arguments and returns the exit status."""

import argparse
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from medct.cli.commands import CommandError, ends, load_pipeline, start_processes
from medct.cli.flags import REPOSITORY_OF
from medct.cli.records import all_findings, bootstrap_of, figures_of, only_json, recorded_settings
from medct.cli.versions import BASE, Version, versions_of
from medct.common.counting import counted
from medct.common.distributed import of_all, refuse_different, start_launch
from medct.common.errors import OK, SOME_FAILED
from medct.common.run_files import RESULTS
from medct.configuration_medct import MedCTConfig
from medct.data import PhantomCohort, open_source
from medct.data.label_space import LabelTable, read_label_flags, refuse_two_prompts
from medct.data.loader import StudyLoader
from medct.data.sources import Source, digest_of, why_skipped
from medct.evaluation.figures import Scores, choose_on
from medct.evaluation.operating_points import YOUDEN, Points, remark_on_points, wanted_points
from medct.evaluation.predictions import Key, Predictions, learned_from, short_names
from medct.evaluation.provenance import changed_figures, list_checksum, provenance, reasons
from medct.evaluation.record import read_results, results_file, scores_path, write_record
from medct.evaluation.report import evaluation_report
from medct.evaluation.scoring import ScoredStudies, refuse_shares, remark_on_words, score_versions
from medct.pipeline_medct import CTPipeline

BESIDE = "."
"""As an adapter in recorded settings: the one in the folder of the results."""
DEFAULTS: dict[str, Any] = {
    "split": "valid",
    "reconstructions": "one",
    "bootstrap_resamples": 1000,
    "seed": 0,
    "batch_size": 1,
    "dtype": "auto",
}
# Settings that no flag has, of a training run: sizes of a cohort of phantoms, what its models are called, and the
# operating points of each.
_ONLY_RECORDED = ("phantoms", "names", "points")
_POINTS_HOLD_FOR = ("fingerprint", "adapter_fingerprint", "prompt_templates", "prompts")
_MOST_SHOWN = 10
_LEARNED = {"train": "trained on", "tune": "chosen on"}


def evaluate(args: argparse.Namespace) -> int:
    recorded = None if args.repeat is None else read_results(args.repeat)
    settle(args, recorded)
    with only_json(args.output, args.command):
        return _evaluate(args, recorded)


def settle(args: argparse.Namespace, recorded: Mapping[str, Any] | None) -> None:
    """Fill in what no flag says: as in the run that is repeated, else by default.

    Args:
        args: Parsed; changed.
        recorded: Results of the run that is repeated.

    Raises:
        CommandError: If there is nothing to score, or flags contradict each other.
    """
    made = {"settings": {}} if recorded is None else recorded.get("provenance") or {}
    if (known := made.get("settings")) is None:
        why = "is of folds, or of a whole model (--recipe full)" if made else "does not say how it was made"
        raise CommandError(f"{args.repeat} {why}, so it cannot be repeated. Run it again without --repeat.")
    moved = {commit for commit, what in REPOSITORY_OF.items() if getattr(args, what) not in (None, known.get(what))}
    for name in {*known, *vars(args), *_ONLY_RECORDED} - moved:
        if getattr(args, name, None) is None:
            value = known.get(name)
            setattr(args, name, DEFAULTS.get(name) if value is None else value)
    if not args.data:
        raise CommandError("Which studies? Pass --data ADDRESS, or --repeat FILE.")
    for name in ("adapter", "against"):
        if getattr(args, name) == BESIDE and args.repeat is not None:
            setattr(args, name, str(results_file(args.repeat).parent))
    if args.data_revision is not None and len(args.data) > 1:
        raise CommandError("--data_revision is for a single source. With several, write hf://datasets/ORG/NAME@COMMIT.")
    if args.against == BASE and args.adapter is None:
        raise CommandError("--against base compares an adapter with its base. Pass --adapter.")
    if (args.sensitivity or args.specificity) and args.tune_on is None:
        raise CommandError("A wanted sensitivity or specificity needs tuning patients to choose it on. Pass --tune_on.")


def _evaluate(args: argparse.Namespace, recorded: Mapping[str, Any] | None) -> int:
    start_processes(args)
    accelerator = start_launch(Accelerator, cpu=args.cpu)
    pipe = load_pipeline(args, accelerator.device)
    config, mappings = _asked(args, pipe)
    if remark := remark_on_words(pipe.model, pipe.processor, config):
        warnings.warn(remark, stacklevel=1)
    versions = versions_of(args, pipe, config, mappings)
    scored_with = {name: version.about for name, version in versions.items()}
    refuse_different(recorded_settings(args) | scored_with | {"mixed precision": accelerator.mixed_precision})
    args.points = _still_hold(args.points, recorded, versions)
    score = functools.partial(_score, args, pipe, versions, accelerator)
    opened = functools.partial(_open, args, config, mappings)
    _refuse_the_same(args)
    tuning = None if args.tune_on is None else opened(args.tune_on, "tune")
    tuned = None if tuning is None else score(tuning)[0]
    chosen_on = None if tuned is None else next(iter(tuned.values()))
    scored, sources, lists, failed = {}, [], {}, 0
    if chosen_on is not None:
        lists[f"{short_names([args.tune_on])[0]}, tune"] = list_checksum(chosen_on)
    for name, address in zip(short_names(args.data), args.data, strict=True):
        source = opened(address, args.split)
        scored[name], unreadable = score(source)
        if chosen_on is not None:
            _refuse_overlap(chosen_on, next(iter(scored[name].values())), name)
        failed += unreadable
        learned = _learned(versions, source, next(iter(scored[name].values())))
        sources.append(_about(name, source, args.split, unreadable) | {"learned": learned})
    if not accelerator.is_main_process:
        return OK
    brought = {name: _brought(args, name, version, tuned and tuned[name]) for name, version in versions.items()}
    for about in sources:
        by_model = scored[about["source"]]
        models = {name: Scores(each, *brought[name]) for name, each in by_model.items()}
        about |= figures_of(models, about["description"], **bootstrap_of(args))
        about["studies"] = lists[f"{about['source']}, {args.split}"] = list_checksum(next(iter(by_model.values())))
    points, _ = next(iter(brought.values()))
    names = all_findings(sources)
    on_points = [] if chosen_on is None else remark_on_points(points.get(YOUDEN, {}), names, chosen_on.names)
    if tuning is not None and chosen_on is not None:
        adapters = [version.about.get("adapter") for version in versions.values()]
        on_points += filter(None, (remark_on_choice(adapter, tuning, chosen_on) for adapter in adapters))
    results = _results(args, versions, sources, lists, on_points, accelerator)
    keys = {Key(model, name, args.split): each for name, by_model in scored.items() for model, each in by_model.items()}
    if args.output is not None:
        write_record(args.output, results, Predictions(results["label_names"], keys))
    _show(results)
    status = ends(failed, sum(about["num_studies"] for about in sources), None)
    return max(status, OK if recorded is None else _tell_changes(recorded, results))


def _results(
    args: argparse.Namespace,
    versions: Mapping[str, Version],
    sources: list[dict[str, Any]],
    lists: dict[str, dict[str, Any]],
    on_points: list[str],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What the JSON file holds; `lists` are of studies."""
    names = all_findings(sources)
    return {
        "measured_on": "; ".join(about["description"] for about in sources),
        "synthetic": any(about["synthetic"] for about in sources),
        "label_names": names,
        "prompts": {name: version.asks for name, version in versions.items()},
        "sources": sources,
        "table": evaluation_report(sources, names),
        "remarks": [*on_points, *(remark for about in sources for remark in _remarks(about))],
        "provenance": provenance(
            recorded_settings(args),
            {name: version.about for name, version in versions.items()},
            lists,
            accelerator,
            seed=args.seed,
        ),
    }


def _refuse_the_same(args: argparse.Namespace) -> None:
    """Refuse, before anything is scored, thresholds from the very studies that they would be tried on.

    Raises:
        CommandError: If the tuning studies are asked for once more, whatever their address is called.
    """
    tuning = None if args.tune_on is None else os.path.realpath(args.tune_on)
    if args.split in ("tune", "all") and tuning in map(os.path.realpath, args.data):
        raise CommandError(
            f"--split {args.split} scores the studies of {args.tune_on} that --tune_on chooses thresholds on. Pass "
            "--split valid, or tune on another source."
        )


def _refuse_overlap(tuned: ScoredStudies, scored: ScoredStudies, name: str) -> None:
    """Refuse studies that were tuned on, known by their names and scores, since copies have other addresses.

    Raises:
        CommandError: If there are any.
    """
    ours, theirs = (set(zip(each.ids, map(tuple, each.scores.tolist()), strict=True)) for each in (scored, tuned))
    if both := len(ours & theirs):
        raise CommandError(
            f"{name}: thresholds would be tried on {both} studies that they were chosen on. Leave these out, or tune "
            "on others."
        )


def _asked(args: argparse.Namespace, pipe: CTPipeline) -> tuple[MedCTConfig, dict[str, LabelTable | None]]:
    """What the model is asked, and what each source calls it; of all others under ""."""
    config, own = read_label_flags(pipe.asked, args.labels, args.templates)
    mappings = {"": own}
    addresses = [*args.data, *([] if args.tune_on is None else [args.tune_on])]
    known = dict(zip(short_names(args.data), args.data, strict=True)) | {each: each for each in addresses}
    for named in [args.mapping] if isinstance(args.mapping, str) else args.mapping or []:
        source, _, file = named.rpartition("=")
        if source and source not in known:
            raise CommandError(f"--mapping {named}: there is no source {source!r}. Pass one of {', '.join(known)}.")
        config, mappings[known.get(source, "")] = read_label_flags(config, mapping=file)
    refuse_two_prompts(table for table in mappings.values() if table is not None and table is not own)
    return config, mappings


def _open(
    args: argparse.Namespace,
    config: MedCTConfig,
    mappings: Mapping[str, LabelTable | None],
    address: str,
    split: str,
) -> Source:
    options = {} if args.phantoms is None else {"phantoms": PhantomCohort(**args.phantoms)}
    source = open_source(
        address,
        split,
        config,
        mapping=mappings.get(address, mappings[""]),
        reconstructions=args.reconstructions,
        limit=args.limit,
        revision=args.data_revision if address in args.data else None,
        **options,
    )
    refuse_shares(source)
    return source


def _score(
    args: argparse.Namespace,
    pipe: CTPipeline,
    versions: Mapping[str, Version],
    accelerator: Accelerator,
    source: Source,
) -> tuple[dict[str, ScoredStudies], int]:
    """What each version says of a source's studies, and how many of them could not be read."""
    loader = loader_of(args, pipe, accelerator, source)
    become = [version.become for version in versions.values()]
    prompts = [version.prompts for version in versions.values()]
    scored = score_versions(pipe.model, become, loader, prompts, accelerator, source.description)
    return dict(zip(versions, scored, strict=True)), sum(of_all(loader.num_bad))


def loader_of(args: argparse.Namespace, pipe: CTPipeline, accelerator: Accelerator, source: Source) -> StudyLoader:
    """This process's loader of a source.

    Args:
        args: Parsed, with `batch_size` and `num_workers`.
        pipe: Holds model and processor.
        accelerator: Its processes share the work.
        source: What to load.

    Raises:
        LaunchError: If other processes would load other studies.
    """
    refuse_different({"studies": f"{source.description}, {digest_of(source)}"})
    return StudyLoader(
        source,
        pipe.processor,
        source.label_names,
        batch_size=args.batch_size,
        with_text=False,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=args.num_workers,
        device=accelerator.device,
    )


def _about(name: str, source: Source, split: str, unreadable: int) -> dict[str, Any]:
    """What is known of a source besides its figures."""
    return {
        "source": name,
        "description": source.description,
        "split": split,
        "synthetic": source.is_synthetic,
        "num_studies": source.num_studies,
        "skipped": len(source.skipped),
        "why": why_skipped(source.skipped),
        "unreadable": unreadable,
        "left_out": dict(source.elsewhere),
        "mapping": source.mapping,
    }


def _learned(versions: Mapping[str, Version], source: Source, scored: ScoredStudies) -> dict[str, dict[str, int]]:
    """By adapter, how many of these studies bear the names of those that it was trained on, and chosen on."""
    counts = {name: _learned_by(version.about.get("adapter"), source, scored) for name, version in versions.items()}
    return {name: each for name, each in counts.items() if each}


def _learned_by(adapter: str | None, source: Source, scored: ScoredStudies) -> dict[str, int]:
    if adapter is None or source.is_synthetic:  # drawings have numbers, the same in every split
        return {}
    learned = learned_from(scores_path(Path(adapter) / RESULTS))
    # Of several reconstructions, the scan is named.
    counts = {
        split: max(len(names.intersection(each)) for each in (source.names, scored.ids))
        for split, names in learned.items()
    }
    return {split: count for split, count in counts.items() if count}


def remark_on_choice(adapter: str | None, source: Source, scored: ScoredStudies) -> str | None:
    """What to say of a choice on studies with the names of those that an adapter was trained on, as of other folds.

    Args:
        adapter: Its folder; `None` without one.
        source: What the choice was made on.
        scored: Its studies.
    """
    count = _learned_by(adapter, source, scored).get("train")
    if not count:
        return None
    studies = counted(len(scored.ids), "study", "studies")
    return (
        f"{Path(str(adapter)).name} has trained on {count:,} of the {studies} that the choice was made on, by their "
        "names. If they are the same studies, it does not hold for others."
    )


def _brought(
    args: argparse.Namespace, name: str, version: Version, tuned: ScoredStudies | None
) -> tuple[Points, dict[str, list[float]]]:
    """Operating points and calibration of a version: from tuning patients where they are asked for, else its own."""
    if tuned is None:
        return (args.points or {}).get(name, version.points), version.calibration
    return choose_on(tuned, wanted_points(args.sensitivity, args.specificity))


def _still_hold(
    points: Mapping[str, Points] | None, recorded: Mapping[str, Any] | None, versions: Mapping[str, Version]
) -> dict[str, Points] | None:
    """Of the operating points of a run that is repeated, those of models with the same weights that are asked the same;
    others bring their own."""
    before = {} if recorded is None else recorded["provenance"].get("models", {})
    held = {
        name: each
        for name, each in (points or {}).items()
        if name in versions
        and all(before.get(name, {}).get(what) == versions[name].about.get(what) for what in _POINTS_HOLD_FOR)
    }
    return held or None


def _remarks(about: Mapping[str, Any]) -> Iterator[str]:
    if about["left_out"]:
        others = ", ".join(f"{count:,} of {split}" for split, count in about["left_out"].items())
        scored = counted(about["num_studies"], "study", "studies")
        yield (
            f"{about['source']}: only {scored} of the split {about['split']} were scored; left out: {others}. For a "
            "test set that the model has never seen, pass --split all."
        )
    for adapter, counts in about["learned"].items():
        said = " and ".join(f"{_LEARNED[split]} {count:,}" for split, count in counts.items())
        yield (
            f"{about['source']}: of the {counted(about['num_studies'], 'study', 'studies')}, {adapter} has {said}, by "
            "their names. If they are the same studies, its figures are too optimistic."
        )
    if about["skipped"]:
        yield f"{about['source']}: left out before they were read: {about['why']}."
    if about["synthetic"]:
        yield f"{about['source']}: SYNTHETIC drawings: no patients, and no clinical meaning."


def _show(results: Mapping[str, Any]) -> None:
    print(f"{results['measured_on']}\n\n{results['table']}")
    for remark in results["remarks"]:
        print(f"NOTE: {remark}")


def _tell_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """Say which digits differ from the run that was repeated, and what else does; returns the exit status."""
    same, changed = changed_figures(before, now)
    print(f"\nrepeated: {same} figures are the same to the last digit, {len(changed)} are not")
    for each in sorted(changed, key=lambda each: each["digits"])[:_MOST_SHOWN]:
        agree = counted(each["digits"], "digit agrees", "digits agree")
        print(f"  {each['figure']}: {each['before']}, now {each['now']} ({agree})")
    if len(changed) > _MOST_SHOWN:
        print(f"  and {len(changed) - _MOST_SHOWN} more, of which no fewer digits agree")
    differing = reasons(before["provenance"], now["provenance"])
    for reason in differing:
        print(f"  differs: {reason}")
    if changed and not differing:
        print("  nothing that is recorded differs, so the computation itself is not repeatable here")
    return SOME_FAILED if changed else OK
