"""The arguments of every `medct` command; imports nothing that takes time."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import medct
from medct.cli.flags import at_least, batch_arguments, label_arguments, model_arguments, share_or_none, split_name
from medct.cli.score_arguments import add_scores

RUNS = {
    "train": ("medct.train", "adapt a model to your scans with LoRA"),
    "reproduce-paper": ("medct.training.reproduce_paper", "repeat the experiment of MedCT-VLM"),
}
"""Commands whose many settings form a dataclass and are parsed from it."""


def _reading_arguments(parser: argparse.ArgumentParser, many: bool = True) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--series",
        type=_number_or_uid,
        metavar="N",
        help="which of several DICOM series: its number in the list that an error shows, or its UID",
    )
    group.add_argument(
        "--resample_irregular",
        action="store_true",
        help="resample tilted, oblique and unevenly spaced scans instead of refusing them",
    )
    for name, unit in (("slope", "HU per stored unit"), ("intercept", "HU of a stored 0")):
        group.add_argument(
            f"--rescale_{name}", type=float, metavar="X", help=f"{unit}, for scans whose header does not say"
        )
    if many:
        batch_arguments(group, "processes that read ahead; each takes 0.9 GB for CT-CLIP (default: 1)")
    else:
        parser.set_defaults(batch_size=1, num_workers=0)


def _prompt_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    group = parser.add_argument_group("findings")
    group.add_argument(
        "--labels",
        nargs="+",
        required=required,
        metavar="LABEL",
        help="findings to ask for, in words, or a table of them with a column `label`"
        + ("" if required else " (default: the adapter's, else the model's own)"),
    )
    group.add_argument(
        "--templates",
        nargs="+",
        metavar="PRESENT|ABSENT",
        help='pairs of sentences that contain {label}, such as "There is {label}.|There is no {label}."; the scores of '
        "several pairs are averaged",
    )


def _number_or_uid(text: str) -> int | str:
    return int(text) if text.isdigit() else text


SCANS_HELP = (
    "files (NIfTI, NRRD, MetaImage, zip), folders to search for these and for DICOM series, or addresses such as hf://"
)


def _add_predict(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "predict",
        "scan_commands.predict",
        "score findings",
        "medct predict scan.nii.gz --model ct-clip\n"
        "  medct predict studies/ --model ct-clip --adapter ORG/NAME --output scores.csv\n"
        '  medct predict scan/ --model ct-clip --labels "Rib fracture" "Pneumothorax" --format json',
        "With --output, a second run resumes where the first stopped; studies that failed are listed in "
        "OUTPUT.failed.csv\nand retried. `accelerate launch -m medct.cli predict ...` spreads studies over processes.",
    )
    parser.add_argument("scans", nargs="+", metavar="SCAN", help=SCANS_HELP)
    _prompt_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--format",
        choices=("table", "json", "csv"),
        help="table for people, one JSON object per line, or csv with one column per finding (default: by the suffix "
        "of --output, else table)",
    )
    group.add_argument("--output", type=Path, metavar="FILE", help="write here (.csv, .jsonl), row by row")
    _report_arguments(parser)
    model_arguments(parser)
    _reading_arguments(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reports, for research only")
    group.add_argument(
        "--dicom_sr",
        type=Path,
        metavar="DIR",
        help="write a DICOM Structured Report for each study; DICOM studies only",
    )
    group.add_argument(
        "--dicom_page",
        type=Path,
        metavar="DIR",
        help="write a page with scores and slices of each study as DICOM Secondary Capture; DICOM studies only",
    )
    group.add_argument(
        "--fhir",
        type=Path,
        metavar="FILE",
        help="write a FHIR R4 bundle of one study, with nothing that says whose study it is",
    )
    group.add_argument(
        "--fhir_identity", action="store_true", help="put patient id, study UID and accession number into the bundle"
    )


def _add_search(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "embed",
        "search_commands.embed",
        "embed scans and reports into a Parquet file",
        "medct embed studies/ --model ct-clip --reports reports.csv --output index.parquet",
        "A second run resumes where the first stopped, and adds new studies.",
    )
    parser.add_argument("scans", nargs="+", metavar="SCAN", help=SCANS_HELP)
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="CSV",
        help="table with a column file_name or VolumeName (the end of a study's path), and report, or CT-RATE's two",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Parquet file to create or add to")
    model_arguments(parser)
    _reading_arguments(parser)

    parser = add(
        "search",
        "search_commands.search_index",
        "find the scans most similar to a text or a scan",
        'medct search "large pleural effusion on the left" --index index.parquet -k 10\n'
        "  medct search scan.nii.gz --index index.parquet",
        "The search is exact, by cosine similarity.",
    )
    parser.add_argument("query", metavar="QUERY", help="a scan if it is an existing path or an address, else a text")
    parser.add_argument("--index", type=Path, required=True, metavar="FILE", help="made by `medct embed`")
    parser.add_argument("-k", type=at_least(1), default=10, help="number of scans to show (default: 10)")
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="table for people, or JSON lines (default: table)"
    )
    model_arguments(parser)
    _reading_arguments(parser, many=False)


def _add_map(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "map",
        "scan_commands.map_scan",
        "where in a scan a score comes from (a debugging aid)",
        'medct map scan.nii.gz --model ct-clip --labels "Pleural effusion" --output maps/',
        "For each finding, writes what each patch adds to the logits margin: a NIfTI file in the scan's geometry and a "
        "PNG\nof the highest axial slices. A debugging aid, not a finding: published CT-CLIP localises poorly (Dice "
        "about 0.004).",
    )
    parser.add_argument("scan", metavar="SCAN", help="one study")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to create")
    _prompt_arguments(parser, required=True)
    model_arguments(parser)
    _reading_arguments(parser, many=False)


def _add_app(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "app",
        "app.run_app",
        "look at the findings of a scan in a browser",
        "medct app                                   # the phantom base, which knows drawings only\n"
        "  medct app --model ct-clip --adapter ORG/NAME",
        "Serves a page on this machine until it is stopped. For research only. Nothing is kept, and no other machine\n"
        "is contacted. Without --model and --adapter the phantom base is used.",
    )
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    group.add_argument(
        "--port", type=at_least(1), metavar="N", help="port to listen on (default: the first free one from 7860)"
    )
    group.add_argument(
        "--max_file_mb", type=at_least(1), default=1024, metavar="N", help="largest file, MiB (default: 1024)"
    )
    model_arguments(parser)


def _source_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the arguments that say where studies come from, for commands that run no model."""
    parser.add_argument(
        "source", metavar="SOURCE", help=f'what to {what}: any address that training takes, or "phantoms"'
    )
    group = parser.add_argument_group("source")
    group.add_argument(
        "--model",
        metavar="ID_OR_DIR",
        help="model whose grid, window, labels and tokenizer to use; `phantom`: this package's (default: CT-CLIP's)",
    )
    group.add_argument("--model_revision", metavar="COMMIT", help="commit of the model on the Hub")
    group.add_argument(
        "--data_revision", "--revision", dest="revision", metavar="COMMIT", help="commit of the source on the Hub"
    )
    group.add_argument("--limit", type=at_least(1), metavar="N", help="only N studies per split, always the same")
    group.add_argument(
        "--reconstructions",
        choices=("one", "all"),
        default="one",
        help="of a scan with several reconstructions: one, or all (default: one)",
    )
    group.add_argument("--version", type=int, choices=(1, 2), default=2, help="version of CT-RATE (default: 2)")
    label_arguments(parser)


def _add_overview(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "overview",
        "data_commands.show_overview",
        "look at a data source before training on it",
        "medct overview SOURCE --model ct-clip\n"
        "  medct overview SOURCE --split valid --samples 0         # one split, counts only: reads no volume",
        "Counts patients, labels and reports, and draws samples as the model sees them: three middle slices each, "
        "upright,\nwith the patient's right on the left of the picture.",
    )
    _source_arguments(parser, "look at")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--split",
        type=split_name,
        choices=("train", "tune", "valid", "all"),
        default="all",
        help="which studies (default: all)",
    )
    group.add_argument(
        "--samples", type=at_least(0), default=8, metavar="N", help="studies to draw; 0: none (default: 8)"
    )
    group.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed for the choice of samples (default: 0)"
    )
    group.add_argument(
        "--sheet",
        type=Path,
        default=Path("overview.png"),
        metavar="FILE",
        help="PNG or JPEG to write (default: overview.png)",
    )
    group.add_argument("--json", action="store_true", help="print the counts as JSON")


def _add_prepare(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "prepare",
        "data_commands.prepare_shards",
        "resample scans once, into shards that training streams",
        "medct prepare SOURCE shards --model ct-clip\n"
        "  medct prepare SOURCE shards --model ct-clip --push_to_hub ORG/NAME      # to a private Hub dataset\n"
        "  torchrun --nproc_per_node 16 -m medct.cli prepare SOURCE shards ...     # any number of processes",
        "A file appears once it is complete. The same command resumes, and the files are the same however many\n"
        "processes share the work.",
    )
    _source_arguments(parser, "prepare")
    parser.add_argument(
        "output", type=Path, metavar="DIR", help="folder to create, or to resume; all processes share it"
    )
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--splits",
        nargs="+",
        type=split_name,
        default=["train", "tune", "valid"],
        choices=("train", "tune", "valid"),
        help="splits to prepare (default: all three)",
    )
    group.add_argument(
        "--tune_share",
        type=float,
        metavar="SHARE",
        help="share of the training patients that form `tune` (default: a tenth)",
    )
    group.add_argument(
        "--studies_per_shard",
        type=at_least(1),
        default=12,
        metavar="N",
        help="maximum number of studies in a file (default: 12, about 0.7 GB at CT-CLIP's sizes)",
    )
    group.add_argument(
        "--compression",
        choices=("zstd", "lz4"),
        default="zstd",
        help="zstd (default): smaller files; lz4: half as large again, but read up to three times as fast, where "
        "processors are the limit rather than the disk",
    )
    group.add_argument("--retry_skipped", action="store_true", help="rewrite files in which studies were skipped")
    group.add_argument(
        "--max_skipped_share",
        type=share_or_none,
        default=0.05,
        metavar="SHARE",
        help="stop if more than this share of the studies cannot be read (default: 0.05)",
    )
    group.add_argument(
        "--push_to_hub",
        metavar="ORG/NAME",
        help="upload the finished folder to this Hub dataset, created as private",
    )
    _process_arguments(parser)


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--rank",
        type=at_least(0),
        default=int(os.environ.get("RANK", 0)),
        metavar="I",
        help="index of this process, from 0 (default: $RANK, which torchrun and accelerate set)",
    )
    group.add_argument(
        "--world_size",
        type=at_least(1),
        default=int(os.environ.get("WORLD_SIZE", 1)),
        metavar="N",
        help="number of processes on all machines (default: $WORLD_SIZE)",
    )


def _add_convert(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "convert",
        "hub_commands.convert_checkpoint",
        "convert a published CT-CLIP checkpoint to a folder that AutoModel loads",
        "medct convert CT-CLIP_v2.pt ct-clip --tokenizer microsoft/BiomedVLP-CXR-BERT-specialized",
        "Takes CT-CLIP, VocabFine and ClassFine. Each tensor is mapped, or listed as dropped with the reason.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="FILE", help="CT-CLIP, VocabFine or ClassFine checkpoint (.pt)"
    )
    parser.add_argument(
        "output", type=Path, metavar="DIR", help="folder to create, in the form of a Hub model repository"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="ID_OR_DIR",
        help="Hub id of the text encoder's tokenizer (published: microsoft/BiomedVLP-CXR-BERT-specialized), or a "
        "folder with vocab.txt",
    )
    parser.add_argument(
        "--sizes", type=Path, metavar="FILE", help="JSON file with the model's sizes, if it is not the published one"
    )


def _add_push(add: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add(
        "push",
        "hub_commands.push_folder",
        "publish an adapter or a model on the Hub",
        "medct push runs/site-b ORG/NAME            # an adapter, as training leaves it\n"
        "  medct push ct-clip ORG/NAME --private      # a folder that `medct convert` made",
        "Makes one commit. Pickles, paths of this machine and files that do not belong there are not pushed.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="an adapter or a converted model")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument(
        "--base", metavar="ORG/NAME", help="the base's repository, for an adapter that was trained on a folder"
    )
    parser.add_argument(
        "--base_revision", metavar="COMMIT", help="commit, tag or branch of the base; the adapter names the commit"
    )
    parser.add_argument(
        "--license", metavar="IDENTIFIER", help="licence of the adapter, if the card of its base names none"
    )


ADD_COMMANDS = (
    _add_predict,
    _add_search,
    add_scores,
    _add_map,
    _add_app,
    _add_overview,
    _add_prepare,
    _add_convert,
    _add_push,
)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `medct`; of what it parsed, `run` names the command's function, and `explain` gives its help."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("medct", description=description, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"medct {medct.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: str, help: str, example: str, more: str) -> argparse.ArgumentParser:
        text = f"{help[0].upper()}{help[1:]}.\n\n  {example}\n\n{more}"
        command = commands.add_parser(name, help=help, description=text, formatter_class=raw)
        command.add_argument(
            "--quiet", action="store_true", help="show no progress and no remarks, only results and errors"
        )
        command.set_defaults(run=run, explain=command.format_help)
        return command

    for add_commands in ADD_COMMANDS:
        add_commands(add)
    for name, (_, help) in RUNS.items():
        commands.add_parser(name, help=help, add_help=False)
    return parser
