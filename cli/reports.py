"""The reports that `medct predict` writes beside its rows: DICOM reports and pages, FHIR."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medct.byte_sources_medct import is_address
from medct.common.files import remove_leftovers, whole_file, write_json
from medct.errors_medct import MedCTError
from medct.inference.studies import ReadStudy, Study
from medct.pipeline_medct import CTPipeline, ZeroShotCTClassificationPipeline
from medct.reporting import fhir
from medct.reporting.codes import own_code
from medct.reporting.findings import Algorithm, Finding, algorithm_of, findings_of
from medct.reporting.source import ReportError, SourceStudy, read_source, refuse_without_study
from medct.volume_io_medct import read_volume
from medct.volume_medct import CTVolume

if TYPE_CHECKING:
    from medct.reporting.page import Picture

OPTIONS = ("dicom_sr", "dicom_page", "fhir")
Encoded = dict[str, torch.Tensor]
"""One scan, from the pipeline's `encode`."""


def asked_for(args: argparse.Namespace) -> dict[str, str]:
    """Where each kind of reports goes that a run is to write."""
    return {name: str(Path(getattr(args, name)).resolve()) for name in OPTIONS if getattr(args, name) is not None}


def check_reports(args: argparse.Namespace, studies: Sequence[Study]) -> None:
    """Refuse reports that cannot be made, before a model is loaded.

    Args:
        args: Parsed, with the options for reports.
        studies: All studies of the run.

    Raises:
        ReportError: If there is no DICOM study that a report could belong to, a library is missing, or a report would
            lie where something else is.
    """
    if args.fhir_identity and args.fhir is None:
        raise ReportError("--fhir_identity says what a bundle holds. Add --fhir FILE.")
    if args.fhir is not None and len(studies) != 1:
        raise ReportError(f"--fhir writes one bundle for one study, and there are {len(studies)}. Pass one of them.")
    if args.fhir is not None:
        _refuse_bundle(args.fhir, args.output)
    for name in ("dicom_sr", "dicom_page"):
        if getattr(args, name) is not None:
            _refuse_folder(getattr(args, name), args.scans, f"--{name}")
    for name in ("dicom_sr", "dicom_page", "fhir_identity"):
        if getattr(args, name):
            refuse_without_study(list(studies), f"--{name}")
    if args.dicom_sr is not None or args.dicom_page is not None:
        from medct.reporting.sr import need_highdicom

        need_highdicom()


def _refuse_bundle(path: Path, rows: Path | None) -> None:
    """Refuse a bundle in place of anything but an older bundle."""
    if path.suffix != ".json":
        raise ReportError(f"--fhir {path}: a bundle is written as JSON. Use the suffix .json.")
    if rows is not None and path.resolve() == rows.resolve():
        raise ReportError(f"--fhir {path}: --output writes its rows there. Name another file.")
    if path.exists() and not fhir.is_bundle(path):
        raise ReportError(f"--fhir {path}: it exists and is not a bundle of MedCT. Name another file.")


def _refuse_folder(folder: Path, scans: Sequence[str], option: str) -> None:
    """Refuse reports in a folder of scans, where the next run would take them for scans."""
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"{option} {folder}: it is a file. Name a folder.")
    read = [Path(scan).resolve() for scan in scans if Path(scan).is_dir()]
    if any(folder.resolve().is_relative_to(each) for each in read):
        raise ReportError(
            f"{option} {folder}: scans are read from there, and the next run would take the reports for scans. Name a "
            "folder outside of the scans'."
        )


@dataclass(frozen=True)
class ReportWriter:
    """Writes the reports of one study after the other; called with a study, it returns the paths that it wrote.

    Args:
        args: Parsed.
        pipe: The model's pipeline.
        prompts: Labels and templates, as the pipeline takes them.
        options: How the scans are read, as `read_volume` takes it.
        algorithm: What findings are made with.
    """

    args: argparse.Namespace
    pipe: CTPipeline
    prompts: dict[str, Any]
    options: dict[str, Any]
    algorithm: Algorithm

    @property
    def labels(self) -> list[str]:
        """The findings that are asked for."""
        return list(self.prompts.get("candidate_labels", self.pipe.asked.label_names))

    def __call__(self, read: ReadStudy, encoded: Encoded, results: list[dict[str, Any]]) -> list[str]:
        args, algorithm = self.args, self.algorithm
        findings = findings_of(results, self.labels, self.pipe.thresholds)
        notes = [note for note in read.notes if note not in read.study.notes]  # these name places on this machine
        if args.dicom_sr is not None or args.dicom_page is not None or args.fhir_identity:
            source = read_source(read.study, **self.options)
        # All are made before the first is saved: a study has every report, or none.
        objects = []
        if args.dicom_sr is not None:
            from medct.reporting.sr import structured_report

            objects.append((structured_report(findings, algorithm, source, notes), args.dicom_sr, "sr"))
        if args.dicom_page is not None:
            from medct.reporting.page import secondary_capture

            drawn = self._drawn(read, encoded, findings, notes)
            objects.append((secondary_capture(drawn, algorithm, source), args.dicom_page, "page"))
        if args.fhir is not None:
            found = fhir.bundle(findings, algorithm, source.identity if args.fhir_identity else None, notes)
        written = [self._save(made, folder, source, findings, kind) for made, folder, kind in objects]
        if args.fhir is not None:
            remove_leftovers(args.fhir)  # of a run that was killed here; they may name the patient
            write_json(args.fhir, found, ensure_ascii=False)
            written.append(str(args.fhir))
        return written

    def _save(self, report: Any, folder: Path, source: SourceStudy, findings: Sequence[Finding], kind: str) -> str:
        """Save a DICOM object under a name that is its own, stays, and says nothing of the patient."""
        # Copies of a series may have the same UIDs, and other values.
        place = source.name if is_address(source.name) else os.path.realpath(source.name)
        said = [place, source.middle.SeriesInstanceUID, source.middle.SOPInstanceUID, str(source.frame)]
        said += [*self.algorithm.parameters, *(finding.label for finding in findings)]
        digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
        path = folder / f"{digest}_{kind}.dcm"
        remove_leftovers(path)  # likewise
        with whole_file(path) as aside:
            report.save_as(aside, enforce_file_format=True)
        return str(path)

    def _drawn(self, read: ReadStudy, encoded: Encoded, findings: list[Finding], notes: Sequence[str]) -> np.ndarray:
        """The page of a study, `(row, column, 3)`."""
        from medct.inference.slices import AxialSlices
        from medct.reporting.page import draw_page

        # Read again: a loader process hands on only what the model sees of a scan.
        orientation = self.pipe.processor.image_processor.orientation
        volume = read_volume(read.study.source, orientation=orientation, **self.options)
        slices = AxialSlices.of(volume)
        return draw_page(findings, self.algorithm, slices, self._pictures(encoded, volume, findings, slices), notes)

    def _pictures(self, encoded: Encoded, volume: CTVolume, findings: list[Finding], slices: Any) -> "list[Picture]":
        """The highest slices of some findings; the middle slice where a model cannot say which those are."""
        from medct.inference.maps import grid_in, map_findings, strongest_slice
        from medct.reporting.page import Picture, worth_a_picture

        if not isinstance(self.pipe, ZeroShotCTClassificationPipeline):
            return [Picture("Middle slice", len(slices) // 2)]
        labels = [finding.label for finding in worth_a_picture(findings)]
        labels, templates = self.prompts.get("candidate_labels", labels), self.prompts.get("prompt_templates")
        maps = map_findings(self.pipe, encoded, labels, templates)
        where = grid_in(self.pipe, volume)
        return [Picture(each.label, strongest_slice(each.patches, *where, slices)) for each in maps]


def report_writer(
    args: argparse.Namespace, pipe: CTPipeline, prompts: dict[str, Any], options: dict[str, Any]
) -> ReportWriter | None:
    """What writes the reports of each study; `None` if none are asked for.

    Args:
        args: Parsed, with the name of the model.
        pipe, prompts, options: See `ReportWriter`.
    """
    if not asked_for(args):
        return None
    algorithm = algorithm_of(pipe, args.model, args.adapter, args.adapter_revision, **prompts)
    writer = ReportWriter(args, pipe, prompts, options, algorithm)
    _refuse_one_code(writer.labels)
    return writer


def _refuse_one_code(labels: Sequence[str]) -> None:
    """Refuse labels that no reader of the reports could tell apart."""
    known: dict[str, str] = {}
    for label in labels:
        other = known.setdefault(own_code(label).value, label)
        if other != label:
            raise ReportError(f"{other!r} and {label!r} are one finding in reports. Rename one of them.")


def reported(
    write: ReportWriter | None, read: ReadStudy, encoded: Encoded, results: list[dict[str, Any]]
) -> dict[str, Any] | str:
    """What a study's row says of its reports: nothing without any, else their paths.

    Args:
        write: From `report_writer`.
        read: The study.
        encoded: The study as the model saw it.
        results: What the pipeline found in it.

    Returns:
        Part of the row; or why the reports could not be made, in one sentence.
    """
    if write is None:
        return {}
    try:
        return {"reports": write(read, encoded, results)}
    except MedCTError as error:
        return str(error)
