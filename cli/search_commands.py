"""What `medct embed` and `medct search` do. Each takes the parsed arguments and returns the exit status."""

import argparse
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState

from medct.byte_sources_medct import is_address
from medct.checks_medct import preprocessing
from medct.cli.commands import (
    CommandError,
    ends,
    load_for_scans,
    load_pipeline,
    one_study,
    reading_of,
    reading_options,
    row_settings,
    start_processes,
)
from medct.cli.flags import REPOSITORY_OF
from medct.common.counting import counted
from medct.common.errors import OK
from medct.common.lock import is_first_process, only_run
from medct.common.output import visible
from medct.common.progress import remark
from medct.data.loader import report_id
from medct.inference import search
from medct.inference.bulk import KEY, JsonLines, process_to_file, read_rows
from medct.inference.studies import FailedStudy, ReadStudy, Study, find_studies, looks_like_path, read_study, stacked
from medct.inference.weights import KEY as WEIGHTS
from medct.inference.weights import NAMES, PREPROCESSING, weights_of
from medct.pipeline_medct import ZeroShotCTClassificationPipeline


def embed(args: argparse.Namespace) -> int:
    if args.output.suffix != ".parquet":
        raise CommandError(f"{args.output}: an index is written as Parquet. Use the suffix .parquet.")
    with only_run(args.output):
        return _embed(args)


def _embed(args: argparse.Namespace) -> int:
    studies = find_studies(args.scans)
    before = search.read_embeddings(args.output) if args.output.exists() else None
    state = start_processes(args)
    reports = _reports_of(args, studies, before) if args.reports else {}
    pipe = load_for_scans(args, state, zero_shot_only=True)
    settings = row_settings(args, pipe)
    rows_path = args.output.with_name(f"{args.output.name}.rows")
    failed = process_to_file(
        studies,
        reading_of(args, pipe),
        functools.partial(embedding_rows, pipe, reports),
        args.output,
        JsonLines(),
        settings,
        state,
        done=before.ids if before else (),
        rows_path=rows_path,
    )
    if state.is_main_process:
        known = set(before.ids if before else ())  # with the new ones, if a run was stopped after it wrote them
        new = (search.compact(row) for row in read_rows(rows_path, JsonLines()) if row[KEY] not in known)
        rows = [*(before.rows() if before else ()), *new]
        # A second run may bring reports for studies that were embedded without.
        search.write_embeddings(args.output, [with_report(pipe, reports, row) for row in rows], settings)
        rows_path.unlink()
    return ends(failed, len(studies), args.output)


def _reports_of(args: argparse.Namespace, studies: Sequence[Study], before: search.Embeddings | None) -> dict[str, str]:
    """The reports that the user named, each of one study at most; says how many studies have none."""
    reports = search.read_reports(args.reports)
    embedded = [] if before is None else before.ids
    reported = set() if before is None else {each for each, has in zip(embedded, before.has_report, strict=True) if has}
    wanting = dict.fromkeys(each for each in (*embedded, *(study.id for study in studies)) if each not in reported)
    search.refuse_shared(reports, list(wanting), args.reports)
    missing = sum(search.report_of(each, reports) is None for each in wanting)
    if missing and is_first_process():
        remark(f"Without a report in {args.reports}: {missing} of {counted(len(wanting), 'study', 'studies')}.")
    return reports


def embedding_rows(
    pipe: ZeroShotCTClassificationPipeline, reports: dict[str, str], reads: list[ReadStudy]
) -> Iterator[dict[str, Any] | FailedStudy]:
    """Embed studies: one row per study, with the embedding of its report if there is one, or why it can have none.

    Args:
        pipe: The model's pipeline.
        reports: Text of each report by study.
        reads: The studies, as one batch.
    """
    for read, image in zip(reads, embed_images(pipe, reads), strict=True):
        if not search.can_name(study := read.study.id):
            yield FailedStudy(read.study, f"{study}: its name is not UTF-8, as names in an index are. Rename it.")
            continue
        row = {KEY: study, "image_embeds": image.tolist(), "text_embeds": None, "report_id": None}
        yield with_report(pipe, reports, row)


def with_report(pipe: ZeroShotCTClassificationPipeline, reports: dict[str, str], row: dict[str, Any]) -> dict[str, Any]:
    """Add the embedding of a study's report to its row, if there is a report and the row has none yet.

    Args:
        pipe: The model's pipeline.
        reports: Text of each report by study.
        row: As `embedding_rows` makes it.
    """
    report = search.report_of(row[KEY], reports) if row["text_embeds"] is None else None
    if report is None:
        return row
    return {**row, "text_embeds": embed_text(pipe, report).tolist(), "report_id": report_id(report)}


@torch.no_grad()
def embed_images(pipe: ZeroShotCTClassificationPipeline, reads: list[ReadStudy]) -> torch.Tensor:
    """Embed scans.

    Args:
        pipe: The model's pipeline.
        reads: The studies, as one batch.

    Returns:
        `(studies, projection_dim)`, float32, of length 1.
    """
    return pipe.model.get_image_features(stacked(reads)).pooler_output.float().cpu()


@torch.no_grad()
def embed_text(pipe: ZeroShotCTClassificationPipeline, text: str) -> torch.Tensor:
    """Embed a text.

    Args:
        pipe: The model's pipeline.
        text: A report or a query.

    Returns:
        `(projection_dim,)`, float32, of length 1.
    """
    texts = pipe.processor(text=[text], return_tensors="pt").to(pipe.device)
    return pipe.model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output[0].float().cpu()


def search_index(args: argparse.Namespace) -> int:
    is_scan = _is_scan(args.query)
    embeddings = search.read_embeddings(args.index)
    if not embeddings.ids:
        raise CommandError(f"{args.index} holds no study: none could be read. Add some with `medct embed`.")
    if WEIGHTS not in embeddings.settings:
        raise CommandError(
            f"{args.index} does not say which weights made it, as versions before 0.2.0 did not, so nothing in it can "
            "be compared. Make the index again."
        )
    asked = _made_by(args, embeddings.settings)
    pipe = load_pipeline(args, PartialState(cpu=args.cpu).device, zero_shot_only=True)
    _refuse_others(args, asked, embeddings.settings, weights_of(pipe.model))
    _refuse_other_voxels(args, embeddings.settings, preprocessing(pipe.model.config))
    if is_scan:
        read = read_study(one_study(args.query), pipe.processor.image_processor, pipe.device, **reading_options(args))
        if isinstance(read, FailedStudy):
            raise CommandError(read.reason)
        query = embed_images(pipe, [read])[0]
    else:
        query = embed_text(pipe, args.query)
    nearest = zip(*search.nearest(embeddings.image_embeds, query, args.k), strict=True)
    rows = [
        {"rank": rank, "similarity": similarity, KEY: embeddings.ids[index]}
        for rank, (similarity, index) in enumerate(nearest, start=1)
    ]
    if args.format == "json":
        print("".join(map(JsonLines().line, rows)), end="")
    else:
        print("rank  similarity  study")
        print("".join(f"{row['rank']:4d}  {row['similarity']:10.4f}  {visible(row[KEY])}\n" for row in rows), end="")
    return OK


def _made_by(args: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what made an index where no flag says it; returns what flags say."""
    asked = {name: getattr(args, name) for name in NAMES if getattr(args, name) not in (None, "auto")}
    for name in set(NAMES) - asked.keys():
        if REPOSITORY_OF.get(name) not in asked:
            setattr(args, name, settings.get(name))
    return asked


def _refuse_others(
    args: argparse.Namespace, asked: Mapping[str, Any], settings: Mapping[str, Any], weights: str | None
) -> None:
    """Refuse to search an index of other weights, or where they cannot be compared, of another name.

    Raises:
        CommandError: If it is; it names what differs.
    """
    if weights is not None and weights == settings[WEIGHTS]:
        return
    for name, value in asked.items():
        if value != (made_with := settings.get(name)):
            raise CommandError(
                f"{args.index} was made with {name} {made_with!r}, not {value!r}. Leave out --{name}, or make the "
                "index again."
            )
    if weights != settings[WEIGHTS]:
        which = args.adapter or args.model
        raise CommandError(
            f"{args.index} was made with other weights than those that {which} has now, so nothing in it can be "
            "compared. Make the index again."
        )


def _refuse_other_voxels(args: argparse.Namespace, settings: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to search an index whose scans the model of these weights saw in another window, or on another grid.

    Raises:
        CommandError: If it is; it names what differs.
    """
    for name, value in now.items():
        if (made_with := settings.get(PREPROCESSING, {}).get(name)) != value:
            raise CommandError(
                f"{args.index} was made with {name} {made_with!r}, but the model has {value!r} now, so scans in it "
                "cannot be compared with others. Make the index again."
            )


def _is_scan(query: str) -> bool:
    """Whether a query is a scan, and not a text.

    Raises:
        CommandError: If it is neither.
    """
    if not query.strip():
        raise CommandError("The query is empty. Pass a text, or the path of a scan.")
    if is_address(query) or os.path.exists(query):  # noqa: PTH110 - `Path` fails for a text longer than a path may be
        return True
    if looks_like_path(query):
        raise CommandError(f"{query}: no such file or folder. Check the path, or say in words what to look for.")
    return False
