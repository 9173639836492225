"""The command `medct`: scans to findings, embeddings, search and maps; the repository's scripts are reached through it.

    medct predict scan.nii.gz --model ORG/NAME
    accelerate launch -m medct.cli predict studies/ --model ORG/NAME --output scores.csv

Every command says more with --help. Exit status: 0, all is done; 1, done, but some studies could not be read; 2, it
could not be done, and why is said in one sentence.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from medct import VolumeWarning
from medct.common.host import keep_freed_memory

SCRIPTS = {
    "convert": (
        "medct.publishing.convert_ct_clip_to_hf",
        "make a published CT-CLIP checkpoint a folder that AutoModel loads",
    ),
    "train": ("medct.train", "adapt a model to your scans with LoRA"),
    "prepare": ("medct.data.prepare", "resample scans once, into shards that training streams"),
    "overview": ("medct.data.overview", "look at a data source before training on it"),
    "push": ("medct.publishing.push push", "publish an adapter or a model on the Hub"),
}


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="ID_OR_DIR",
        help="Hub id or folder of a MedCT model; by default $MEDCT_MODEL, else the base that --adapter names",
    )
    group.add_argument("--revision", metavar="COMMIT", help="commit of the model on the Hub")
    group.add_argument("--adapter", metavar="ID_OR_DIR", help="Hub id or folder of a LoRA adapter")
    group.add_argument("--adapter_revision", metavar="COMMIT", help="commit of the adapter on the Hub")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the weights; auto: as they were saved (auto)",
    )
    group.add_argument("--cpu", action="store_true", help="stay on the CPU even if there is a GPU")


def _batch_arguments(group: argparse._ArgumentGroup, workers: str) -> None:
    group.add_argument(
        "--batch_size", type=_at_least(1), default=1, metavar="N", help="studies that go through together (1)"
    )
    group.add_argument("--num_workers", type=_at_least(0), default=1, metavar="N", help=workers)


def _reading_arguments(parser: argparse.ArgumentParser, many: bool = True) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--series", type=int, metavar="N", help="which of several DICOM series: its number in the list of the refusal"
    )
    group.add_argument(
        "--resample_irregular",
        action="store_true",
        help="resample tilted, oblique and unevenly spaced scans instead of refusing them",
    )
    if many:
        _batch_arguments(
            group, "threads that read the next studies meanwhile (1); each holds a volume, 0.2 GB for CT-CLIP"
        )
    else:
        parser.set_defaults(batch_size=1, num_workers=0)


def _prompt_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    group = parser.add_argument_group("findings")
    group.add_argument(
        "--labels",
        nargs="+",
        required=required,
        metavar="LABEL",
        help="findings to ask for, in words" + ("" if required else "; by default the model's own"),
    )
    group.add_argument(
        "--templates",
        nargs="+",
        metavar="PRESENT|ABSENT",
        help='pairs of sentences with {label} in them, such as "There is {label}.|There is no {label}."; the scores of '
        "several are averaged",
    )


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


SCANS_HELP = (
    "files (NIfTI, NRRD, MetaImage, zip), folders to look for them and for DICOM series in, or addresses such as hf://"
)


def _add_predict(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "predict",
        "predict",
        "score findings",
        "medct predict scan.nii.gz --model ct-clip\n"
        "  medct predict studies/ --model ct-clip --adapter ORG/NAME --output scores.csv\n"
        '  medct predict scan/ --model ct-clip --labels "Rib fracture" "Pneumothorax" --format json',
        "With --output a second run goes on where the first stopped; studies that failed are listed in "
        "OUTPUT.failed.csv\nand tried again. `accelerate launch -m medct.cli predict ...` spreads them over processes.",
    )
    parser.add_argument("scans", nargs="+", metavar="SCAN", help=SCANS_HELP)
    _prompt_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=("table", "json", "csv"),
        help="for people, one JSON object a line, or a column a finding; by default what the name of --output says, "
        "else table",
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write here (.csv, .jsonl), row by row")
    _model_arguments(parser)
    _reading_arguments(parser)


def _add_search(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "embed",
        "embed",
        "embed scans and reports into a Parquet file",
        "medct embed studies/ --model ct-clip --reports reports.csv --output index.parquet",
        "A second run goes on where the first stopped, and adds studies that are new.",
    )
    parser.add_argument("scans", nargs="+", metavar="SCAN", help=SCANS_HELP)
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="CSV",
        help="columns file_name or VolumeName (the end of a study's path), and report, or CT-RATE's two",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Parquet file to make or go on with")
    _model_arguments(parser)
    _reading_arguments(parser)

    parser = add(
        "search",
        "search_index",
        "find the scans nearest to a text or a scan",
        'medct search "large pleural effusion on the left" --index index.parquet -k 10\n'
        "  medct search scan.nii.gz --index index.parquet",
        "Needs faiss: pip install medct[search]. The search is exact, by cosine similarity.",
    )
    parser.add_argument("query", help="a scan if there is such a path or it is an address, else a text")
    parser.add_argument("--index", type=Path, required=True, metavar="FILE", help="made by `medct embed`")
    parser.add_argument("-k", type=_at_least(1), default=10, help="how many to show (10)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="for people, or JSON lines")
    _model_arguments(parser)
    _reading_arguments(parser, many=False)

    parser = add(
        "recall",
        "recall",
        "how often a scan's own report is found, and the other way round",
        "medct recall --index index.parquet",
        "Recall at 5, 10, 50 and 100 over the studies of an index that have a report. Needs pip install medct[search].",
    )
    parser.add_argument("--index", type=Path, required=True, metavar="FILE", help="made by `medct embed --reports ...`")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="for people, or JSON")


def _add_evaluate(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "evaluate",
        "evaluate",
        "score a model on labelled studies",
        "medct evaluate --data CT-RATE/ --model ct-clip --adapter ORG/NAME --output scores.json",
        "AUROC of each finding and means, with 95 % intervals over patients; with an adapter that has operating "
        "points,\nalso accuracy and F1 at them. `accelerate launch -m medct.cli evaluate ...` spreads it over "
        "processes.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="ADDRESS",
        help="folder or hf:// address in CT-RATE's layout, with metadata.csv, of prepared shards, or a dataset",
    )
    group.add_argument("--data_revision", metavar="COMMIT", help="commit of the data on the Hub")
    group.add_argument("--split", choices=("train", "tune", "valid"), default="valid", help="which studies (valid)")
    group.add_argument(
        "--reconstructions", choices=("one", "all"), default="one", help="of a scan with several: one, or all (one)"
    )
    group.add_argument("--limit", type=_at_least(1), metavar="N", help="so many studies in a fixed pseudo-random order")
    group.add_argument("--output", type=Path, metavar="FILE", help="JSON file with all figures")
    _model_arguments(parser)
    _batch_arguments(parser.add_argument_group("reading"), "processes that load studies (1)")


def _add_map(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "map",
        "map_scan",
        "where in a scan a score comes from (a debugging aid)",
        'medct map scan.nii.gz --model ct-clip --labels "Pleural effusion" --output maps/',
        "Writes for each finding what every patch adds to the logits margin: a NIfTI file in the scan's geometry and a "
        "PNG\nof the highest axial slices. A debugging aid, no finding: published CT-CLIP localises poorly (Dice about "
        "0.004).",
    )
    parser.add_argument("scan", metavar="SCAN", help="one study")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    _prompt_arguments(parser, required=True)
    _model_arguments(parser)
    _reading_arguments(parser, many=False)


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("medct", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: str, help: str, example: str, more: str) -> argparse.ArgumentParser:
        text = f"{help[0].upper()}{help[1:]}.\n\n  {example}\n\n{more}"
        command = commands.add_parser(name, help=help, description=text, formatter_class=raw)
        command.set_defaults(run=run)
        return command

    for add_commands in (_add_predict, _add_search, _add_evaluate, _add_map):
        add_commands(add)
    for name, (_, help) in SCRIPTS.items():
        commands.add_parser(name, help=help, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SCRIPTS:
        # The scripts read their own arguments and end in their own way.
        module, *words = SCRIPTS[argv[0]][0].split()
        sys.argv = ["medct" if words else f"medct {argv[0]}", *words, *argv[1:]]
        return importlib.import_module(module).main() or 0
    args = make_parser().parse_args(argv)
    commands = importlib.import_module("medct.cli.commands")
    keep_freed_memory()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Notes stand in each row; as warnings they would tear the progress bar.
            warnings.simplefilter("ignore", VolumeWarning)
            # PEFT still reads a name that transformers has given up.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return getattr(commands, args.run)(args)
    except torch.OutOfMemoryError:
        print("error: The accelerator's memory is full. Lower --batch_size, or pass --dtype bfloat16.", file=sys.stderr)
    except (ValueError, OSError) as error:  # ours and the file system's: each says what and where
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; with --output the same command goes on from here.", file=sys.stderr)
        return 128 + 2
    return commands.USAGE
