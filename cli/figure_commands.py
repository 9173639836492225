"""What `medct compare`, `metrics` and `recall` do, without a model: from parsed arguments to the exit status."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from medct.cli.commands import CommandError
from medct.cli.records import all_findings, bootstrap_of, figures_of, only_json, recorded_settings
from medct.common.errors import OK
from medct.common.files import write_json
from medct.configuration_medct import CT_CLIP_LABELS
from medct.data.study_names import matched
from medct.evaluation.figures import Scores
from medct.evaluation.predictions import (
    NAME,
    Predictions,
    held_out,
    join_metadata,
    labelled,
    named_table,
    paired,
    short_names,
)
from medct.evaluation.provenance import list_checksum, provenance
from medct.evaluation.record import read_scores
from medct.evaluation.report import evaluation_report, retrieval_report
from medct.evaluation.retrieval import Pairs, recall_figures, shared_findings
from medct.evaluation.scoring import ScoredStudies
from medct.inference.search import read_embeddings, refuse_shared


def compare_runs(args: argparse.Namespace) -> int:
    with only_json(args.output, args.command):
        runs = [held_out(read_scores(run)) for run in args.runs]
        pairs = _pairs(runs, args)
        sources = []
        for title, (old, new) in pairs.items():
            names = [name for name in old.names if name in new.names]
            if not names:
                raise CommandError(f"{args.runs[0]} and {args.runs[1]} have no label in common on {title}.")
            one, two = old.only(names), new.only(names)
            left = len(one.ids), len(two.ids)
            one, two = paired(one, two, title)
            models = dict(zip(_run_names(args), (Scores(one), Scores(two)), strict=True))
            about = {"source": title, "unpaired": sum(left) - 2 * len(one.ids), "studies": list_checksum(one)}
            about["labels_of_one_run"] = [name for name in (*old.names, *new.names) if name not in names]
            sources.append(about | figures_of(models, title, **bootstrap_of(args)))
        _finish(args, sources)
    return OK


def _run_names(args: argparse.Namespace) -> list[str]:
    names = short_names([str(run) for run in args.runs])
    if args.models is None:
        return names
    return short_names([f"{name}: {model}" for name, model in zip(names, args.models, strict=True)])


def _pairs(runs: Sequence[Predictions], args: argparse.Namespace) -> dict[str, tuple[ScoredStudies, ScoredStudies]]:
    """What the two runs have both scored, by source and split; if each has scored one, that one whatever its name."""
    of_each = []
    for run, path, model in zip(runs, args.runs, args.models or (None, None), strict=True):
        model = list(run.scored)[-1].model if model is None else model
        found = {f"{key.source}, {key.split}": each for key, each in run.scored.items() if key.model == model}
        if not found:
            has = ", ".join(dict.fromkeys(key.model for key in run.scored))
            raise CommandError(f"{path}: it has no scores of {model!r}, but of {has}. Pass one of these to --models.")
        of_each.append(found)
    old, new = of_each
    if len(old) == len(new) == 1 and old.keys() != new.keys():
        return {next(iter(new)): (*old.values(), *new.values())}
    common = [title for title in old if title in new]
    if not common:
        raise CommandError(
            f"{args.runs[0]} was scored on {'; '.join(old)}, and {args.runs[1]} on {'; '.join(new)}. Score both on the "
            "same studies."
        )
    return {title: (old[title], new[title]) for title in common}


def score_tables(args: argparse.Namespace) -> int:
    with only_json(args.output, args.command):
        if args.metadata is None:
            found = held_out(read_scores(args.predictions))
        else:
            found = join_metadata(args.predictions, args.metadata, args.split)
        sources = []
        for key, scored in found.scored.items():
            title = key.source if len({each.model for each in found.scored}) == 1 else f"{key.source}: {key.model}"
            figures = figures_of({key.model: Scores(scored)}, f"{args.predictions}, {title}", **bootstrap_of(args))
            sources.append({"source": f"{title}, {key.split}", "studies": list_checksum(scored), **figures})
        _finish(args, sources)
    return OK


def _finish(args: argparse.Namespace, sources: list[dict[str, Any]]) -> None:
    """Write figures that were computed from tables if asked to, and print them."""
    names = all_findings(sources)
    results = {"label_names": names, "sources": sources, "table": evaluation_report(sources, names)}
    if args.output is not None:
        write_json(args.output, results | {"provenance": _without_model(args, sources)})
    print(results["table"])
    for each in sources:
        if each.get("unpaired"):
            print(f"NOTE: {each['source']}: {each['unpaired']} scores have no partner in the other run; left out.")
        if labels := each.get("labels_of_one_run"):
            print(f"NOTE: {each['source']}: only one run has scored {', '.join(labels)}; left out.")


def _without_model(args: argparse.Namespace, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Provenance of figures that were computed from tables."""
    studies = {each["source"]: each["studies"] for each in sources}
    return provenance(recorded_settings(args), {}, studies, seed=args.seed)


def recall(args: argparse.Namespace) -> int:
    embeddings = read_embeddings(args.index)
    patients, labels = None, None
    if args.metadata is not None:
        patients, labels = _patients_and_labels(args, embeddings.ids)
    paired_rows = np.flatnonzero(embeddings.has_report)
    if not len(paired_rows):
        raise CommandError("No study of this index has a report. Make it with `medct embed ... --reports FILE.csv`.")
    pairs = Pairs(
        embeddings.image_embeds[paired_rows],
        embeddings.text_embeds[paired_rows],
        embeddings.report_ids[paired_rows],
        None if patients is None else patients[paired_rows],
    )
    options = bootstrap_of(args)
    try:
        results = recall_figures(pairs, pool=args.pool, **options)
        if labels is not None:
            results["findings"] = shared_findings(embeddings.image_embeds, labels, patients, **options)
    except ValueError as error:
        raise CommandError(f"{args.index}: {error}") from error
    print(json.dumps(results, indent=2) if args.format == "json" else retrieval_report(results))
    return OK


def _patients_and_labels(args: argparse.Namespace, studies: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Of each study of an index; a study that the table does not name is a patient of its own, without findings."""
    table = named_table(args.metadata)
    columns = args.findings or [name for name in CT_CLIP_LABELS if name in table]
    if missing := [name for name in columns if name not in table]:
        raise CommandError(f"{args.metadata}: has no column {missing[0]!r}. Pass the names of its labels.")
    table = labelled(table, columns, args.metadata).set_index(NAME)
    names = matched(studies, set(table.index))
    if not any(names):
        raise CommandError(f"{args.metadata} names no study of {args.index}. Names must be the ends of their paths.")
    refuse_shared(table.index, studies, args.metadata)
    rows = table.reindex(names)
    patients = [study if pd.isna(who) else who for study, who in zip(studies, rows["patient"], strict=True)]
    return np.array(patients), rows[columns].to_numpy(float) if columns else None
