"""From folders of scans to studies, and from studies to the model's input: read ahead, and never stopped by a bad one.

A study is a NIfTI, NRRD, MetaImage or zip file, or all DICOM files of one folder.
"""

import os
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from medct.byte_sources_medct import is_address
from medct.dicom_io_medct import is_dicom
from medct.image_processing_medct import MedCTImageProcessor
from medct.volume_io_medct import VolumeError, read_volume

_VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".zip")
_DICOM_HEAD_BYTES = 600


@dataclass(frozen=True)
class Study:
    """One study on disk or at an address.

    Args:
        id: Its path or address, as the user gave it or within a folder that the user gave.
        source: What `read_volume` takes.
    """

    id: str
    source: Any


@dataclass(frozen=True)
class ReadStudy:
    """A study as the model's input.

    Args:
        study: The study.
        pixel_values: `(1, z, y, x)`.
        notes: Remarks from reading it.
    """

    study: Study
    pixel_values: torch.Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FailedStudy:
    """A study that could not be read, and why, in one sentence."""

    study: Study
    reason: str


def find_studies(paths: Iterable[str | os.PathLike]) -> list[Study]:
    """The studies that paths stand for.

    Args:
        paths: Files, taken as they are; folders, searched for studies; addresses, one study each.

    Returns:
        Each study once, in the order of the paths; a folder's studies in the order of their names.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds no study.
    """
    studies: dict[str, Study] = {}
    for path in map(os.fspath, paths):
        if is_address(path) or Path(path).is_file():
            found = [Study(path, path)]
        elif Path(path).is_dir():
            found = sorted(_studies_below(Path(path)), key=lambda study: study.id)
            if not found:
                raise FileNotFoundError(
                    f"{path}: no studies in this folder. A study is a {', '.join(_VOLUME_SUFFIXES)} file, or a folder "
                    "of DICOM files."
                )
        else:
            raise FileNotFoundError(f"{path}: no such file or folder. Check the path.")
        for study in found:
            # Under another spelling or through a link it is still the same study.
            studies.setdefault(path if is_address(path) else os.path.realpath(study.id), study)
    return list(studies.values())


def _studies_below(folder: Path) -> Iterator[Study]:
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        volumes = [path for path in files if path.name.lower().endswith(_VOLUME_SUFFIXES)]
        others = [path for path in files if path not in set(volumes)]
        if any(map(_is_dicom_file, others)):
            alone = not volumes and not folders
            yield Study(parent, parent if alone else [str(path) for path in others])
        yield from (Study(str(path), str(path)) for path in volumes)


def _is_dicom_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(_DICOM_HEAD_BYTES))
    except OSError:
        return False


def read_study(study: Study, image_processor: MedCTImageProcessor, **options: Any) -> ReadStudy | FailedStudy:
    """Read one study, or say why not.

    Args:
        study: The study to read.
        image_processor: The model's.
        **options: `series` and `resample_irregular`, see `read_volume`.
    """
    try:
        volume = read_volume(study.source, orientation=image_processor.orientation, **options)
        return ReadStudy(study, image_processor.process_volume(volume)[None], volume.notes)
    except VolumeError as error:
        # A list of files has no name of its own; here it is one folder's.
        is_list = isinstance(study.source, list)
        return FailedStudy(study, f"{study.id}: {error.reason}. {error.remedy}." if is_list else str(error))
    except Exception as error:  # one file must not end a night's work; an unknown message may quote a header
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        return FailedStudy(study, f"{study.id}: reading failed ({type(error).__name__} in {where}). Report this.")


def read_ahead(
    studies: Sequence[Study], image_processor: MedCTImageProcessor, num_workers: int, **options: Any
) -> Iterator[ReadStudy | FailedStudy]:
    """Yield studies in order, while threads read the next ones.

    Threads are enough: decompression, resampling and the model itself all release the interpreter's lock.

    Args:
        studies: Studies to read.
        image_processor: The model's.
        num_workers: Number of threads, and so of volumes held besides those yielded; 0 reads on demand.
        **options: See `read_study`.
    """
    if num_workers == 0:
        yield from (read_study(study, image_processor, **options) for study in studies)
        return
    waiting = iter(studies)
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[Future] = deque()

        def submit(count: int) -> None:
            pending.extend(
                pool.submit(read_study, study, image_processor, **options) for study in islice(waiting, count)
            )

        try:
            submit(num_workers)
            while pending:
                result = pending.popleft().result()
                submit(1)
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
