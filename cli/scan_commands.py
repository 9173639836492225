"""What `medct predict` and `medct map` do. Each takes the parsed arguments and returns the exit status."""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import PartialState

from medct.cli.commands import (
    CommandError,
    ends,
    load_for_scans,
    one_study,
    reading_of,
    reading_options,
    row_settings,
    start_processes,
)
from medct.cli.reports import ReportWriter, asked_for, check_reports, report_writer, reported
from medct.common.errors import OK
from medct.common.files import whole_folder, write_json
from medct.common.lock import only_run
from medct.common.output import flush_output, visible
from medct.common.progress import tqdm
from medct.inference.bulk import KEY, Csv, JsonLines, process, process_to_file
from medct.inference.studies import FailedStudy, ReadStudy, find_studies, stacked
from medct.pipeline_medct import CTPipeline
from medct.reporting.findings import shown_probability

# As many as tell any two float32 apart: scores near 0 or 1 would tie otherwise.
_DIGITS = ".9g"
_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json"}


def predict(args: argparse.Namespace) -> int:
    if args.output is None:
        return _predict(args)
    with only_run(args.output):
        return _predict(args)


def _predict(args: argparse.Namespace) -> int:
    format = args.format or ("table" if args.output is None else _SUFFIXES.get(args.output.suffix))
    if args.output is not None and format not in ("csv", "json"):
        raise CommandError(
            f"{args.output}: rows are written as .csv or .jsonl. Use one of these suffixes, or pass --format csv|json."
        )
    studies = find_studies(args.scans)
    check_reports(args, studies)
    state = start_processes(args)
    if args.output is None and state.num_processes > 1:
        raise CommandError("Several processes need a file for their rows. Pass --output FILE.")
    prompts = prompts_of(args)
    pipe = load_for_scans(args, state)
    pipe._sanitize_parameters(**prompts)  # refuses, before any scan is read, what the model cannot be asked
    labels = list(prompts.get("candidate_labels", pipe.asked.label_names))
    has_own_words = args.templates is not None or isinstance(prompts.get("candidate_labels"), dict)
    thresholds, calibration = ({}, {}) if has_own_words else (pipe.thresholds, pipe.calibration)
    has_thresholds = not thresholds.keys().isdisjoint(labels)
    calibrated = [label for label in labels if label in calibration]
    columns = [KEY, *labels, *(f"{label} present" for label in labels if has_thresholds)]
    columns += [*(f"{label} probability" for label in calibrated), "notes", *(["reports"] if asked_for(args) else [])]
    rows_as = Csv(columns) if format == "csv" else JsonLines()
    write_reports = report_writer(args, pipe, prompts, reading_options(args))
    rows_of = functools.partial(prediction_rows, pipe, prompts, flat=format == "csv", write_reports=write_reports)
    if args.output is not None:
        templates = prompts.get("prompt_templates", pipe.asked.prompt_templates)
        settings = {**row_settings(args, pipe), "labels": labels, "templates": templates}
        settings["prompts"] = prompts.get("candidate_labels") if has_own_words else pipe.asked.prompts
        settings |= {"thresholds": thresholds, "calibration": calibration, "reports": asked_for(args) or None}
        failed = process_to_file(studies, reading_of(args, pipe), rows_of, args.output, rows_as, settings, state)
        return ends(failed, len(studies), args.output)
    if format == "csv":
        print(rows_as.header(), end="")

    def show(row: dict[str, Any]) -> None:
        # Not through the progress bar.
        tqdm.write(prediction_table(row) if format == "table" else rows_as.line(row), file=sys.stdout, end="")
        flush_output()

    failed = process(studies, reading_of(args, pipe), rows_of, show, lambda row: None, show_progress=len(studies) > 1)
    return ends(failed, len(studies), None)


def prediction_rows(
    pipe: CTPipeline,
    prompts: dict[str, Any],
    reads: list[ReadStudy],
    flat: bool,
    write_reports: ReportWriter | None = None,
) -> Iterator[dict[str, Any] | FailedStudy]:
    """Score studies: one row per study, or why its reports could not be made.

    Args:
        pipe: The model's pipeline.
        prompts: From `prompts_of`.
        reads: The studies, as one batch.
        flat: One column per score instead of a list of findings.
        write_reports: From `report_writer`; a study has a row only once its reports are written.
    """
    encoded = pipe.encode(stacked(reads))
    logits = pipe.forward(encoded, **prompts)["logits"]
    for index, read in enumerate(reads):
        one = slice(index, index + 1)
        findings = pipe.postprocess({"logits": logits[one]}, **prompts)
        reports = reported(write_reports, read, {name: each[one] for name, each in encoded.items()}, findings)
        if isinstance(reports, str):
            yield FailedStudy(read.study, reports)
        elif flat:
            scores = {finding["label"]: f"{finding['score']:{_DIGITS}}" for finding in findings}
            called = [finding for finding in findings if "present" in finding]
            calls = {f"{finding['label']} present": int(finding["present"]) for finding in called}
            calls |= {
                f"{finding['label']} probability": f"{finding['probability']:{_DIGITS}}"
                for finding in findings
                if "probability" in finding
            }
            listed = {name: " | ".join(paths) for name, paths in reports.items()}
            yield {KEY: read.study.id, **scores, **calls, "notes": " | ".join(read.notes), **listed}
        else:
            yield {KEY: read.study.id, "findings": findings, "notes": list(read.notes), **reports}


def prediction_table(row: dict[str, Any]) -> str:
    """A row for people."""
    calls = {True: "  present", False: "  absent", None: ""}
    lines = [row[KEY], *(f"  note: {note}" for note in row["notes"]), "  score  margin  finding"]
    lines += [
        f"  {finding['score']:.3f}  {finding['logits_margin']:+6.2f}  {finding['label']}{calls[finding.get('present')]}"
        + (f"  probability {shown_probability(finding['probability'])}" if "probability" in finding else "")
        for finding in row["findings"]
    ]
    lines += [f"  report: {path}" for path in row.get("reports", ())]
    return "\n".join(map(visible, lines)) + "\n\n"


def map_scan(args: argparse.Namespace) -> int:
    with only_run(args.output):
        return _map_scan(args)


def _map_scan(args: argparse.Namespace) -> int:
    from medct.inference import maps

    study = one_study(args.scan)
    prompts = prompts_of(args)
    pipe = load_for_scans(args, PartialState(cpu=args.cpu), zero_shot_only=True)
    labels, templates = prompts["candidate_labels"], prompts.get("prompt_templates")
    found = maps.map_scan(pipe, study.source, labels, templates, **reading_options(args))
    names = maps.file_names([each.finding.label for each in found])
    index = []
    with whole_folder(args.output) as folder:
        for each, name in zip(found, names, strict=True):
            each.save(folder / f"{name}.nii.gz")
            each.plot().savefig(folder / f"{name}.png", dpi=100)
            values = {key: getattr(each.finding, key) for key in ("label", "score", "logits_margin")}
            index.append(values | {"name": name})
        write_json(folder / "findings.json", index, ensure_ascii=False)
    for each in index:
        numbers = f"{each['score']:.3f}  {each['logits_margin']:+6.2f}"
        print(visible(f"{numbers}  {each['label']}: {args.output / each['name']}.nii.gz, .png"))
    print(f"{maps.CAVEAT}.")
    return OK


def prompts_of(args: argparse.Namespace) -> dict[str, Any]:
    """Labels and templates as the pipeline takes them."""
    prompts: dict[str, Any] = {}
    if args.labels:
        prompts["candidate_labels"] = _labels_of(args.labels)
    if args.templates:
        from medct.data.label_space import pairs_of  # takes long to import

        prompts["prompt_templates"] = pairs_of(args.templates)
    return prompts


def _labels_of(named: Sequence[str]) -> list[str] | dict[str, Any]:
    """Labels in words, or with their prompts from a table.

    Raises:
        CommandError: If there is a table among labels in words, which would be asked for by its file's name.
    """
    names = list(dict.fromkeys(named))
    if not any("." in name for name in names):
        return names
    # Only where there can be a table, because it takes long to import what reads one.
    from medct.data.label_space import read_labels
    from medct.data.table_files import SUFFIXES

    tables = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not tables:
        return names
    if len(names) > 1:
        raise CommandError(f"--labels {tables[0]}: a table stands alone. Write all findings into it, or all in words.")
    table = read_labels(tables[0])
    return {finding: table.prompts.get(finding, finding) for finding in table.findings}
