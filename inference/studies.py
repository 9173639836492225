"""From folders of scans to studies, and from studies to the model's input: read ahead, and never stopped by a bad one.

A study is a NIfTI, NRRD, MetaImage or zip file, or all DICOM files of one folder. On a disc, which a table of contents
(DICOMDIR, no study itself) shows, folders that hold parts of the same series are one study. Elsewhere such folders may
as well be copies: each is a study, with a note.
"""

import contextlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from medct.byte_sources_medct import HEAD_BYTES, inflated_head, is_address, of_path, without_secrets
from medct.dicom_io_medct import SUFFIXES as DICOM_SUFFIXES
from medct.dicom_io_medct import is_dicom, series_of
from medct.errors_medct import said_of
from medct.image_processing_medct import MedCTImageProcessor
from medct.inference.places import refuse_missing
from medct.nifti_io_medct import is_nifti
from medct.volume_io_medct import read_volume
from medct.volume_medct import VolumeError
from medct.workers_medct import Lost, Place, load_ahead, overlapped

_VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".zip")
_PAIR_SUFFIXES = (".hdr", ".hdr.gz")
"""Of the header of a NIfTI pair, and of other headers and pictures."""
# One word with a separator that begins as paths do, ends as folders do, or has a suffix; "w/o" is none.
_PATH = re.compile(r"(?:~|\.{1,2})?/\S*|\S*[/\\]|\S*[/\\]\S*\.[A-Za-z]\w*")
_DICOMDIR_CLASS = b"1.2.840.10008.1.3.10"
_DICOMDIR = "dicomdir"


@dataclass(frozen=True)
class Study:
    """One study on disk or at an address.

    Args:
        id: Its path or address, as the user gave it or within a folder that the user gave; see `without_secrets`.
        source: What `read_volume` takes.
        notes: Remarks on where it was found.
    """

    id: str
    source: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadStudy:
    """A study as the model's input.

    Args:
        study: The study.
        pixel_values: `(1, z, y, x)`, on the model's device.
        notes: Remarks from finding and reading it.
    """

    study: Study
    pixel_values: torch.Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FailedStudy:
    """A study that could not be read, and why, in one sentence."""

    study: Study
    reason: str


_Found = tuple[Study, str | None]
"""A study, and the SeriesInstanceUID that it begins with if it is DICOM."""


def find_studies(paths: Iterable[str | os.PathLike]) -> list[Study]:
    """The studies that paths stand for.

    Args:
        paths: Files, taken as they are; folders, searched for studies; addresses, one study each.

    Returns:
        Each study once, in the order of the paths; a folder's studies in the order of their names.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds no study.
    """
    studies: dict[str, _Found] = {}
    paths = list(map(os.fspath, paths))
    refuse_missing(paths)
    for path in paths:
        if is_address(path) or Path(path).is_file():
            found = [(Study(without_secrets(path), path), None)]
        else:
            found = sorted(_studies_below(Path(path)), key=lambda one: one[0].id)
            if not found:
                raise FileNotFoundError(
                    f"{path}: no studies in this folder. A study is a {', '.join(_VOLUME_SUFFIXES)} file, a .hdr "
                    "with its .img, or a folder of DICOM files."
                )
        for study, series in found:
            # Under another spelling or through a link it is still the same study.
            studies.setdefault(path if is_address(path) else os.path.realpath(study.id), (study, series))
    return _with_notes(list(studies.values()))


def looks_like_path(text: str) -> bool:
    """Whether a text is written as the path of a scan, whether or not there is one."""
    if text.lower().endswith((*_VOLUME_SUFFIXES, *_PAIR_SUFFIXES, ".dcm")):
        return True
    return bool(_PATH.fullmatch(text))


def _with_notes(found: list[_Found]) -> list[Study]:
    """Studies, each with a note if another one begins with the same series: pieces of one scan, or copies of it."""
    of_series: dict[str | None, list[str]] = defaultdict(list)
    for study, series in found:
        of_series[series].append(study.id)
    of_series.pop(None, None)
    return [replace(study, notes=_notes_on_pieces(study.id, of_series.get(series, []))) for study, series in found]


def _notes_on_pieces(own: str, of_series: list[str]) -> tuple[str, ...]:
    other = next((each for each in of_series if each != own), None)
    if other is None:
        return ()
    where = other if len(of_series) == 2 else f"{other} (and {len(of_series) - 2} more)"
    return (f"slices of its series lie in {where} too, which is read as another study: a piece of the scan, or a copy",)


def _studies_below(folder: Path) -> Iterator[_Found]:
    seen = set()
    scans: dict[Path, _DicomFolder] = {}
    # Discs are often mounted with names in small letters.
    contents = (above / name for above in folder.absolute().parents for name in (_DICOMDIR, _DICOMDIR.upper()))
    discs = {path.parent: number for number, path in enumerate(filter(Path.is_file, contents))}
    barred: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=barred.append, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # A tree may hold millions of files: each has a name here, and few of them a `Path`.
        names = sorted(name for name in names if not name.startswith("."))
        if any(name.lower() == _DICOMDIR for name in names):
            discs.setdefault(Path(parent), len(discs))
        others = [name for name in names if not _is_volume(parent, name)]
        volumes = [str(path) for name in sorted({*names} - {*others}) if not _is_special(path := Path(parent, name))]
        if (first := next((path for name in others if _is_dicom_file(path := Path(parent, name))), None)) is not None:
            scans[Path(parent)] = _dicom_folder(Path(parent), others, first, discs, not volumes and not folders)
        yield from ((Study(path, path), None) for path in volumes)
    # What lies in there is not passed over in silence: reading them says why they cannot be read.
    yield from ((Study(error.filename, error.filename), None) for error in barred)
    yield from _joined(scans)


@dataclass
class _DicomFolder:
    files: list[Path]
    """Not listed where the folder stands for them, as it can be no part of another study."""
    is_whole: bool
    """Whether the folder holds nothing else, so that it can stand for its files."""
    series: set[tuple[Path, str]]
    """On a disc, where folders may be parts of series: the disc and the SeriesInstanceUID of each file."""
    first_series: str | None
    """The SeriesInstanceUID of its first file: asking all of them would read every study twice."""


def _dicom_folder(
    folder: Path, names: list[str], first: Path, discs: dict[Path, int], holds_nothing_else: bool
) -> _DicomFolder:
    """A folder with DICOM files, the first of which is known, by the names of its files and the discs found so far."""
    above = {folder, *folder.parents, *folder.absolute().parents}
    disc = min((each for each in above if each in discs), key=discs.__getitem__, default=None)
    if disc is None and holds_nothing_else:
        return _DicomFolder([], True, set(), series_of(first))
    files = [path for name in names if not _is_special(path := folder / name)]
    series = set() if disc is None else {(disc, series_of(path)) for path in files} - {(disc, None)}
    return _DicomFolder(files, holds_nothing_else, series, series_of(first))


def _joined(folders: dict[Path, _DicomFolder]) -> Iterator[_Found]:
    """A study of each folder, and one of those that share a series."""
    groups: dict[int, list[Path]] = {}
    group_of: dict[tuple[Path, str], list[Path]] = {}
    for path, folder in folders.items():
        same = {id(group_of[one]): group_of[one] for one in folder.series if one in group_of}.values()
        for group in same:
            del groups[id(group)]
        whole = [*(one for group in same for one in group), path]
        groups[id(whole)] = whole
        group_of |= {one: whole for member in whole for one in folders[member].series}
    taken: set[str] = set()
    for paths in groups.values():
        names = (*([os.path.commonpath(paths)] if len(paths) > 1 else []), *map(str, paths))
        name = next(each for each in names if each not in taken)
        taken.add(name)
        is_whole = len(paths) == 1 and folders[paths[0]].is_whole
        source = name if is_whole else [str(file) for path in paths for file in folders[path].files]
        yield Study(name, source), folders[paths[0]].first_series


def _is_volume(folder: str, name: str) -> bool:
    """Whether a file is called as scans are, and a .hdr is the header of one."""
    if not name.lower().endswith(_PAIR_SUFFIXES):
        return name.lower().endswith(_VOLUME_SUFFIXES)
    try:
        (header,) = of_path(Path(folder, name))
        return is_nifti(inflated_head(header, 4))
    except VolumeError:  # it cannot be opened, which reading it tells
        return True


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device, whose reading may never end."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _is_dicom_file(path: Path) -> bool:
    """Whether it is one or stands in the place of one, which reading its folder tells."""
    if path.name.lower() == _DICOMDIR or _is_special(path):
        return False
    has_suffix = path.name.lower().removesuffix(".gz").endswith(DICOM_SUFFIXES)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:  # a broken link, say; files that scanners name have no suffix, or digits for one
        return has_suffix or not path.suffix[1:2].isalpha()
    is_contents = _DICOMDIR_CLASS + b"\0" in head or _DICOMDIR_CLASS + b"\2" in head
    return (has_suffix or is_dicom(head)) and not is_contents


@dataclass(frozen=True)
class LoadStudy:
    """Reads studies; picklable, for loader processes.

    Args:
        image_processor: The model's.
        device: Where the model is.
        options: `series` and `resample_irregular`, see `read_volume`.
    """

    image_processor: MedCTImageProcessor
    device: torch.device | str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, study: Study, place: Place) -> ReadStudy | FailedStudy:
        """The study, whose `pixel_values` are still to be finished, or why it cannot be read."""
        place.begin(study.id)
        try:
            volume = read_volume(study.source, orientation=self.image_processor.orientation, **self.options)
            notes = (*study.notes, *volume.notes)
            return ReadStudy(study, self.image_processor.load(volume, place, self.device), notes)
        except VolumeError as error:
            # A list of files has no name of its own; here it is one folder's.
            is_list = isinstance(study.source, list)
            return FailedStudy(study, f"{study.id}: {error.reason}. {error.remedy}." if is_list else str(error))
        except Exception as error:  # one file must not end a night's work
            return FailedStudy(study, f"{study.id}: {said_of(error)}")


def read_study(
    study: Study, image_processor: MedCTImageProcessor, device: torch.device | str = "cpu", **options: Any
) -> ReadStudy | FailedStudy:
    """Read one study, or say why not.

    Args:
        study: The study to read.
        image_processor: The model's.
        device: Where the model is.
        options: `series` and `resample_irregular`, see `read_volume`.
    """
    return next(read_ahead([study], LoadStudy(image_processor, device, options)))


def read_ahead(
    studies: Sequence[Study], load: LoadStudy, num_workers: int = 0, batch_size: int = 1
) -> Generator[ReadStudy | FailedStudy, None, None]:
    """Yield studies in order, while processes read the next ones; on a GPU the next one is made ready there meanwhile.

    Args:
        studies: Studies to read.
        load: How.
        num_workers: Number of processes; 0 reads here, on demand, and so does any number a single study.
        batch_size: Studies that go through the model together.
    """
    device = torch.device(load.device)
    workers = num_workers if len(studies) > 1 else 0
    loaded = load_ahead(studies, load, workers, batch_size, pinned=device.type == "cuda")
    yield from overlapped(_finished(loaded, load), device, _tensors_of)


def _finished(loaded: Generator[Any, None, None], load: LoadStudy) -> Generator[ReadStudy | FailedStudy, None, None]:
    size = load.image_processor.image_size
    with contextlib.closing(loaded):
        for study in loaded:
            if isinstance(study, Lost):
                study = FailedStudy(study.item, f"{study.item.id}: reading failed ({study.reason}). Try it alone.")
            if isinstance(study, ReadStudy):
                is_done = isinstance(study.pixel_values, torch.Tensor)
                out = None if is_done else torch.empty(*size, device=load.device)
                study = replace(study, pixel_values=load.image_processor.finish(study.pixel_values, out)[None])
            yield study
            del study  # its memory can be used again


def _tensors_of(study: ReadStudy | FailedStudy) -> list[torch.Tensor]:
    return [study.pixel_values] if isinstance(study, ReadStudy) else []


def batched_reads(reads: Iterable[ReadStudy | FailedStudy], size: int) -> Iterator[list[ReadStudy] | FailedStudy]:
    """Yield batches of the studies that could be read and, between them, each that could not.

    Args:
        reads: From `read_ahead`.
        size: Studies in a batch; the last one may have fewer.
    """
    batch: list[ReadStudy] = []
    for read in reads:
        if isinstance(read, FailedStudy):
            yield read
            continue
        batch.append(read)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def stacked(reads: Sequence[ReadStudy]) -> torch.Tensor:
    """The input of the model, `(studies, 1, z, y, x)`; of a single study without a copy.

    Args:
        reads: The studies of a batch.
    """
    return reads[0].pixel_values[None] if len(reads) == 1 else torch.stack([read.pixel_values for read in reads])
