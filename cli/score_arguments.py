"""The arguments of the commands that score: evaluate, compare, metrics, prompts, recall."""

import argparse
from collections.abc import Callable
from pathlib import Path

from medct.cli.flags import (
    at_least,
    batch_arguments,
    label_arguments,
    model_arguments,
    resamples_argument,
    share,
    split_name,
)

ADDRESS_HELP = "folder or hf:// address: in CT-RATE's layout, with metadata.csv, of prepared shards, or a dataset"


def add_scores(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that score.

    Args:
        add: Adds a command, see `make_parser`.
    """
    _add_evaluate(add)
    _add_compare(add)
    _add_metrics(add)
    _add_prompts(add)
    _add_recall(add)


def _add_evaluate(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "evaluate",
        "score_commands.evaluate",
        "score a model on labelled studies",
        "medct evaluate --data CT-RATE/ --model ct-clip --adapter ORG/NAME --output scores.json\n"
        "  medct evaluate --data site-b site-c --split all --model ct-clip --adapter runs/new --against runs/old\n"
        "  medct evaluate --repeat scores.json                     # again, and which digits differ",
        "AUROC of each finding, and means, with 95 % intervals over patients, sources as columns. With operating "
        "points, an\nadapter's or those of --tune_on, also what they give there. `accelerate launch -m medct.cli "
        "evaluate ...` spreads\nstudies over processes. With --repeat the exit status is 1 if a figure differs.",
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="ADDRESS", help=f"{ADDRESS_HELP}; several become columns")
    group.add_argument("--data_revision", metavar="COMMIT", help="commit of the data on the Hub, for a single source")
    group.add_argument(
        "--split",
        type=split_name,
        choices=("train", "tune", "valid", "all"),
        help="which studies; all: an external test set, which the model has never seen (default: valid)",
    )
    group.add_argument(
        "--reconstructions",
        choices=("one", "all"),
        help="of a scan with several reconstructions: one, or all (default: one)",
    )
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N studies of a fixed pseudo-random order"
    )
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--against",
        metavar="ID_OR_DIR",
        help="compare with this adapter on the same studies, or with `base`, the model without any; differences are "
        "paired",
    )
    group.add_argument("--against_revision", metavar="COMMIT", help="commit of that adapter on the Hub")
    group.add_argument(
        "--tune_on",
        metavar="ADDRESS",
        help="choose operating points and calibration on the tuning patients of this source instead of taking the "
        "adapter's",
    )
    group.add_argument(
        "--sensitivity", type=share, metavar="SHARE", help="with --tune_on: also a point that reaches this"
    )
    group.add_argument(
        "--specificity", type=share, metavar="SHARE", help="with --tune_on: also a point that reaches this"
    )
    resamples_argument(group, default=None)
    group.add_argument("--seed", type=at_least(0), metavar="N", help="seed of the bootstrap (default: 0)")
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file for all figures; the score of each study goes beside it"
    )
    group.add_argument(
        "--repeat",
        type=Path,
        metavar="FILE",
        help="repeat the run that made this results.json, except for flags given here, and compare every digit",
    )
    label_arguments(parser, several=True)
    model_arguments(parser)
    batch_arguments(parser.add_argument_group("reading"), "processes that load studies (default: 1)")
    # What is not given is taken from --repeat, else from `score_commands.DEFAULTS`.
    parser.set_defaults(batch_size=None, dtype=None)


def _add_compare(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "compare",
        "figure_commands.compare_runs",
        "compare the scores of two runs on the same studies",
        "medct compare runs/old runs/new --output difference.json",
        "A run is a folder that `medct train` made, a JSON file of `medct evaluate --output`, or the csv file beside "
        "one.\nStudies that both have scored are paired by their names; no model is loaded.",
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="the older one, then the newer one")
    parser.add_argument(
        "--models",
        nargs=2,
        metavar="NAME",
        help="which model of each run, such as base adapted (default: its last, so a training run's adapted one)",
    )
    _figure_arguments(parser)


def _add_metrics(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "metrics",
        "figure_commands.score_tables",
        "compute figures from a table of scores and a table of labels",
        "medct metrics scores.csv metadata.csv",
        "Takes scores of any origin: what `medct predict --output` wrote, the csv file beside a results.json, or a "
        "table of\nyour own with `file_name` and one column per label. No model is loaded.",
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="csv file with scores, in [0, 1]")
    parser.add_argument(
        "metadata",
        type=Path,
        nargs="?",
        metavar="METADATA",
        help="csv file with labels and, optionally, patient and split (default: the labels beside the scores)",
    )
    parser.add_argument("--split", metavar="NAME", help="only studies of this split of METADATA")
    _figure_arguments(parser)


def _figure_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("figures")
    resamples_argument(group)
    group.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of the bootstrap (default: 0)")
    group.add_argument("--output", type=Path, metavar="FILE", help="JSON file for all figures")


def _add_prompts(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "prompts",
        "prompt_commands.try_prompts",
        "try wordings of the findings on tuning patients",
        "medct prompts --data site-b --model ct-clip\n"
        "  medct prompts --data site-b --model ct-clip --adapter runs/site-b --store",
        "AUROC of each finding under several templates and names: how much zero-shot scores depend on the wording. "
        "--store keeps\nthe choice with an adapter: predict, evaluate and the pipelines then use it.",
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, metavar="ADDRESS", help=ADDRESS_HELP)
    group.add_argument("--data_revision", metavar="COMMIT", help="commit of the data on the Hub")
    group.add_argument(
        "--split",
        type=split_name,
        choices=("train", "tune", "valid", "all"),
        default="tune",
        help="which studies (default: tune)",
    )
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N studies of a fixed pseudo-random order"
    )
    group = parser.add_argument_group("wordings")
    group.add_argument(
        "--templates",
        nargs="+",
        metavar="PRESENT|ABSENT",
        help="pairs of sentences that contain {label} (default: CT-CLIP's and RadFinder's), besides the model's own",
    )
    group.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="JSON file with a list of other names for each finding (default: two or three for each of CT-CLIP's)",
    )
    group.add_argument("--store", action="store_true", help="keep the best wording in the adapter's folder")
    group.add_argument("--output", type=Path, metavar="FILE", help="JSON file for all figures")
    label_arguments(parser, templates=False)
    model_arguments(parser)
    batch_arguments(parser.add_argument_group("reading"), "processes that load studies (default: 1)")


def _add_recall(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "recall",
        "figure_commands.recall",
        "how often a scan finds its own report, and vice versa",
        "medct recall --index index.parquet\n  medct recall --index index.parquet --metadata metadata.csv --pool 1000",
        "Recall at 5, 10, 50 and 100 over the studies in an index that have a report, with 95 % intervals; with "
        "labels, also\nhow well scans find scans that share a finding. CT-CLIP's protocol is shown as well, by name.",
    )
    parser.add_argument("--index", type=Path, required=True, metavar="FILE", help="made by `medct embed --reports ...`")
    parser.add_argument(
        "--metadata",
        type=Path,
        metavar="CSV",
        help="table with file_name or VolumeName (the end of a study's path) and, optionally, patient and labels",
    )
    parser.add_argument(
        "--findings", nargs="+", metavar="LABEL", help="columns of --metadata that are labels (default: CT-CLIP's 18)"
    )
    parser.add_argument("--pool", type=at_least(2), metavar="N", help="also among N studies at a time")
    resamples_argument(parser)
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of bootstrap and pools (default: 0)"
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="table for people, or JSON (default: table)"
    )
