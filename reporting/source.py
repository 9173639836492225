"""The study that a report belongs to: the headers of the very series that was scored.

All that identifies a patient in a report comes from here, and goes nowhere else: no message quotes a header.
"""

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from medct.dicom_elements_medct import read_meta
from medct.dicom_frames_medct import DEFLATED, inflated_header
from medct.errors_medct import MedCTError
from medct.inference.studies import Study
from medct.reporting.fhir import Identity
from medct.volume_io_medct import dicom_slices, is_dicom_study
from medct.volume_medct import VolumeError

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

INSTALL = "pip install highdicom"
UTF_8 = "ISO_IR 192"
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What pydicom reads in place of bytes that no character has."""
# What the patient and study modules must hold, even if it is empty.
_MAY_BE_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_MUST_BE = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_SAYS_WHOSE = ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber")
Made = TypeVar("Made")
_alone = threading.RLock()
"""Loggers and warnings are the process's: of two threads that silence them, one would end the other's silence."""


class ReportError(MedCTError, ValueError):
    """A report that cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class SourceStudy:
    """Headers of the series that was scored, without pixels.

    Args:
        headers: One a file, in the order of the slices; their texts are Unicode.
        middle: Header of the file that holds the middle slice.
        frame: Frame of the middle slice, from 1; `None` where a file is one slice.
        name: What to call the study in messages.
    """

    headers: "list[Dataset]"
    middle: "Dataset"
    frame: int | None
    name: str

    @property
    def identity(self) -> Identity:
        """Whose study it is."""
        return Identity(*(_text(self.middle[name]) for name in ("PatientID", "StudyInstanceUID", "AccessionNumber")))


def refuse_without_study(studies: list[Study], option: str) -> None:
    """Refuse scans that belong to no DICOM study, before anything is scored.

    Args:
        studies: What is to be reported on.
        option: The option that asks for it.

    Raises:
        ReportError: For the first of them.
    """
    for study in studies:
        try:
            has_study = is_dicom_study(study.source)
        except VolumeError:
            continue  # said when it is read, of this study alone
        if not has_study:
            raise ReportError(
                f"{study.id}: it is not DICOM, so there is no study that a report could belong to. Leave out {option}, "
                "or pass the DICOM files."
            )


def read_source(study: Study, **options: Any) -> SourceStudy:
    """Read the headers of the series that `read_volume` takes of a study.

    Args:
        study: Which one.
        **options: `series`, `resample_irregular`, `rescale_slope` and `rescale_intercept`, see `read_volume`.

    Raises:
        ReportError: If they name no study, or more than one.
        VolumeError: If it is not a usable DICOM study.
    """
    slices = dicom_slices(study.source, **options)
    file_of_slice = [file for file, _ in slices]
    middle, frame = slices[len(slices) // 2]

    def read() -> "dict[int, Dataset]":
        return {id(file): _read_header(file) for file in dict.fromkeys(file_of_slice)}

    headers = quietly(read, f"{study.id}: the headers are damaged. Export the study again.")
    for header in headers.values():
        if not all(header.get(name) for name in _MUST_BE):
            raise ReportError(
                f"{study.id}: its headers lack the UIDs of study, series or image, so nothing can be added to the "
                "study. Export it again."
            )
    if any(len({_text(header[name]) for header in headers.values()}) > 1 for name in _SAYS_WHOSE):
        raise ReportError(
            f"{study.id}: its images name more than one patient or study, so it is not known whose report this would "
            "be. Correct their headers, or export the study again."
        )
    own = headers[id(middle)]
    return SourceStudy(list(headers.values()), own, None if frame is None else frame + 1, study.id)


def _read_header(file: Any) -> "Dataset":
    from pydicom import dcmread

    with file.open() as stream:
        is_deflated = str(read_meta(stream).get("TransferSyntaxUID") or "") == DEFLATED
        if not is_deflated:
            stream.seek(0)
        # Of a deflated data set pydicom would inflate all, which may be gigabytes.
        source = io.BytesIO(inflated_header(stream)) if is_deflated else stream
        header = dcmread(source, stop_before_pixels=True, force=True)
    header.decode()  # before the character set is another
    header.SpecificCharacterSet = UTF_8
    for name in _MAY_BE_EMPTY:
        if name not in header or not _is_known(name, _text(header[name])):
            setattr(header, name, "")
    return header


def _text(element: "DataElement") -> str:
    """A value as the header writes it: some hold several where the standard has one."""
    return "\\".join(map(str, element.value)) if element.VM > 1 else str(element.value or "")


def _is_known(name: str, value: str) -> bool:
    """Whether a date, a time or a sex is one of the standard's; others, as anonymizers write them, say nothing.

    Neither do several names in place of one, nor a text that is not in the character set that its header names.
    """
    from pydicom.valuerep import DA, TM

    if _UNREADABLE in value or (name.endswith("Name") and "\\" in value):
        return False
    if name == "PatientSex":
        return value in ("", "M", "F", "O")
    try:
        if name.endswith("Date"):
            DA(value)  # also takes the points of ACR-NEMA
            return "." not in value
        elif name.endswith("Time"):
            TM(value)
    except ValueError:
        return False
    return True


def quietly(make: Callable[[], Made], refusal: str) -> Made:
    """Call what works on headers; whatever it warns of or fails with is not shown, since it may quote them.

    Args:
        make: What to call.
        refusal: What is said where it fails; the kind of the error is added.

    Raises:
        ReportError: If it fails.
    """
    try:
        with _alone, _silent():
            return make()
    except (MedCTError, OSError):
        raise
    except Exception as error:  # of many kinds; their texts may hold values of the header
        raise ReportError(f"{refusal} ({type(error).__name__})") from None


@contextmanager
def _silent() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
