"""DICOM: one CT series out of files in any order, or one Enhanced multi-frame file.

Unusual:
- A damaged file is never left out, since that would turn it into a missing slice. What is left out (other kinds of
  image, localizers, files that are no DICOM) is counted in the notes.
- Slices are ordered and spaced by their positions along their common normal; instance numbers, slice thickness and file
  names are not asked. Positions must be even and lie on a line, or the series is refused with the figures.
- Rescale slope and intercept must both be there, slice by slice (or be given by the caller), because a default of 1 and
  0 would make air of 0 HU.
- No message holds text from a header but terms of the standard's own lists: other fields, and pydicom's own messages,
  may hold names, dates and identifiers.

Source: DICOM PS3.3 (C.7.6.2, C.7.6.16, C.8.2, C.11.1), PS3.5.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import ByteSource, too_inflated
from .dicom_geometry_medct import check_alike, order, to_grid
from .dicom_pixels_medct import AGAIN, DEFLATED, PixelLayout, Slice, decode, layout_of, name_of, quiet_pydicom
from .volume_medct import CTVolume, VolumeError, refuse_second_rescale

try:
    import pydicom
except ImportError:
    pydicom = None

_CT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image
)
_DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
_DICOMDIR = "table of contents of a disc (DICOMDIR)"
_RESCALE_TYPES = ("HU", "HU_MOD", "US", "OD", "MGML", "PCT", "Z_EFF", "ED", "EDW")
_MODALITIES = ("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "SC", "OT", "SEG", "RTSTRUCT", "RTDOSE", "SR")
_ALL_FILES = "Pass all files of the series together: a folder, or a list of them (in a list, for a processor)"


_CTFile = tuple[ByteSource, Any, int | None]
"""A file of CT slices, its header, and where its pixels begin."""


def is_dicom(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def read_dicom(
    files: Sequence[ByteSource],
    source: str,
    series: int | str | None = None,
    rescale: tuple[float | None, float | None] = (None, None),
    resample_irregular: bool = False,
) -> CTVolume:
    """One CT series.

    Args:
        files: In any order; other files may lie among them.
        source: What to call them together.
        series: Which of several: its number in the list that the refusal shows, or its SeriesInstanceUID.
        rescale: Slope and intercept where the headers hold none.
        resample_irregular: Interpolate uneven slice steps, keep one of identical slices, and keep a tilted stack (its
            affine is then sheared, for the caller to straighten) instead of refusing.

    Returns:
        The volume, int16 where slopes are 1 and all values fit.
    """
    if pydicom is None:
        raise VolumeError(source, "DICOM needs pydicom and decoders", "Install them: pip install medct[dicom]")
    with quiet_pydicom():
        found, left_out = _collect(files, source)
        slices = [one for file in _choose_series(found, source, series) for one in _slices_of(*file, rescale)]
        check_alike(slices)
        slices, notes = order(slices, source, resample_irregular)
        hu, padding_notes = decode(slices, source)
    hu, affine, more = to_grid(hu, slices, source)
    if not any(one.has_modality for one in slices):
        more.append("its headers name no modality: taken for CT by their SOP class")
    notes = [*_left_out_notes(left_out), *notes, *padding_notes, *more]
    return CTVolume(hu.T, affine, source, tuple(notes))  # (k, row, column) -> (column, row, k)


def _collect(files: Sequence[ByteSource], source: str) -> tuple[list[_CTFile], Counter]:
    """All CT images among files, and how many files of other kinds there are."""
    found: list[_CTFile] = []
    left_out: Counter = Counter()
    for file in files:
        with file.open() as stream:
            if not is_dicom(stream.read(132)):
                left_out["no DICOM file"] += 1
                continue
            header, pixel_offset = _read_header(file, stream)
        reason = _why_no_slice(file, header)
        if reason is None:
            found.append((file, header, pixel_offset))
        else:
            left_out[reason] += 1
    if not found:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common(5)) or "it is empty"
        raise VolumeError(source, f"it holds no CT slices ({kinds})", "Pass the files of a CT series")
    del left_out[_DICOMDIR]  # it lies beside the images of every disc
    return found, left_out


def _read_header(file: ByteSource, stream: BinaryIO) -> tuple[Any, int | None]:
    """Everything before the pixels, and at which byte those begin in the file (not if it is deflated)."""
    try:
        is_deflated = _check_deflated(file, stream)
        stream.seek(0)
        header = pydicom.dcmread(stream, stop_before_pixels=True)
        return header, None if is_deflated else stream.tell()
    except VolumeError:
        raise
    except Exception as error:  # pydicom raises many kinds; their texts hold values of the header
        raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", AGAIN) from None


def _check_deflated(file: ByteSource, stream: BinaryIO) -> bool:
    """Whether a data set is deflated; refuses a bomb before pydicom inflates it in one piece."""
    stream.seek(0)
    head = stream.read(2**12)
    # The first element of the file meta information, in 12 bytes behind the mark, is the length of what follows it.
    start = 144 + int.from_bytes(head[140:144], "little")
    if DEFLATED.encode() not in head[:start]:
        return False
    stream.seek(start)
    inflater, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflater.eof and (packed := inflater.unconsumed_tail or stream.read(2**16)):
        count += len(inflater.decompress(packed, 2**20))
        if too_inflated(count, file.size):
            raise VolumeError(file.name, f"its {file.size} bytes would inflate to more than {count}", "Check the file")
    return True


def _why_no_slice(file: ByteSource, header: Any) -> str | None:
    """What a file is if it is no CT slice; none if it is one."""
    try:
        # The file meta information has it where a data set leaves it empty, as some anonymizers do.
        kind = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
        modality, image_type = str(header.get("Modality") or "CT"), header.get("ImageType") or []
        image_types = [str(value).upper() for value in ([image_type] if isinstance(image_type, str) else image_type)]
    except Exception as error:  # as above
        raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", AGAIN) from None
    if kind == _DICOMDIR_CLASS:
        return _DICOMDIR
    if not kind or not len(header):
        raise VolumeError(file.name, "it is a damaged DICOM file (without a SOP class or any data)", AGAIN)
    if kind not in _CT_CLASSES:
        uid = pydicom.uid.UID(kind)
        return uid.name if uid.name != kind else "unknown kind of DICOM file"
    if modality != "CT":
        return f"modality {modality}" if modality in _MODALITIES else "modality other than CT"
    return "localizer" if "LOCALIZER" in image_types else None


def _slices_of(
    file: ByteSource, header: Any, pixel_offset: int | None, rescale: tuple[float | None, float | None]
) -> list[Slice]:
    """One slice, or those of a multi-frame file."""
    try:
        samples = int(header.get("SamplesPerPixel") or 1)
        grey = str(header.get("PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME")
        frames = header.get("PerFrameFunctionalGroupsSequence")
        number = int(header.get("NumberOfFrames") or 1)
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        pixels = layout_of(header, pixel_offset)
    except Exception as error:  # as above
        raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", AGAIN) from None
    if min(pixels.shape) < 1 or number < 1:
        raise VolumeError(file.name, f"it promises {number} frames of {pixels.shape} pixels", AGAIN)
    if samples != 1 or not grey:
        raise VolumeError(file.name, "it is no grey image", "Pass the files of a CT series")
    if frames is None:
        if number != 1:
            raise VolumeError(file.name, f"its {number} frames have no positions", "Export the series anew")
        return [_slice(file, header, None, None, None, pixels, rescale)]
    if len(frames) != number:
        raise VolumeError(file.name, f"it promises {number} frames and describes {len(frames)}", AGAIN)
    return [_slice(file, header, k, frame, shared, pixels, rescale) for k, frame in enumerate(frames)]


def _slice(
    file: ByteSource,
    header: Any,
    frame: int | None,
    own: Any,
    shared: Any,
    pixels: PixelLayout,
    rescale: tuple[float | None, float | None],
) -> Slice:
    name = name_of(file, frame)

    def value(sequence: str, attribute: str) -> Any:
        """An attribute of the frame's functional groups, or of a flat data set."""
        if frame is None:
            return header.get(attribute)
        for groups in (own, shared):
            if groups is not None and groups.get(sequence):
                found = groups.get(sequence)[0].get(attribute)
                if found is not None:
                    return found
        return None

    def numbers(sequence: str, attribute: str, count: int) -> np.ndarray:
        found = value(sequence, attribute)
        if found is None or found == "":
            raise VolumeError(name, f"it has no {attribute}", "Export the series with its geometry")
        array = np.array(found, dtype=float).reshape(-1)
        if array.shape != (count,) or not np.isfinite(array).all():
            raise VolumeError(name, f"its {attribute} is no list of {count} numbers", AGAIN)
        return array

    try:
        position = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
        steps = [value("PixelMeasuresSequence", step) for step in ("SpacingBetweenSlices", "SliceThickness")]
        steps = tuple(float(step) for step in steps if isinstance(step, int | float))
        scale = [value("PixelValueTransformationSequence", part) for part in ("RescaleSlope", "RescaleIntercept")]
        unit = str(value("PixelValueTransformationSequence", "RescaleType") or "HU").strip().upper()
        has_modality = bool(header.get("Modality"))
        slope, intercept = _rescale(name, scale, rescale)
    except VolumeError:
        raise
    except Exception as error:  # as above
        raise VolumeError(name, f"it is a damaged DICOM file ({type(error).__name__})", AGAIN) from None
    if unit not in ("HU", "HU_MOD"):
        unit = unit if unit in _RESCALE_TYPES else "of another unit"
        raise VolumeError(name, f"its RescaleType is {unit}, not HU", "Pass the CT series, not a map computed from it")
    if not (spacing > 0).all():
        raise VolumeError(name, f"its spacing is {tuple(spacing.tolist())} mm", AGAIN)
    return Slice(file, frame, has_modality, pixels, position, orientation, spacing, steps, slope, intercept)


def _rescale(name: str, found: list[Any], given: tuple[float | None, float | None]) -> tuple[float, float]:
    """Slope and intercept, of the header or of the caller, and never of both."""
    if None not in found and "" not in found:
        slope, intercept = float(found[0]), float(found[1])
        if given != (None, None):
            refuse_second_rescale(name, slope, intercept)
    elif None in given:
        raise VolumeError(
            name,
            "RescaleSlope or RescaleIntercept is missing, so HU are not known",
            "Pass both `rescale_slope=` and `rescale_intercept=` if you know them",
        )
    else:
        slope, intercept = float(given[0]), float(given[1])
    if not (np.isfinite([slope, intercept]).all() and slope != 0 and max(abs(slope), abs(intercept)) < 1e6):
        raise VolumeError(name, f"its rescale slope is {slope:g} and its intercept {intercept:g}", AGAIN)
    return slope, intercept


def _choose_series(files: list[_CTFile], source: str, series: int | str | None) -> list[_CTFile]:
    """The files of one series; the list of a refusal counts their slices, largest series first."""
    groups: dict[str, list[_CTFile]] = defaultdict(list)
    for file, header, pixel_offset in files:
        try:
            uid = str(header.get("SeriesInstanceUID") or "")
        except Exception as error:  # as above
            raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", AGAIN) from None
        groups[uid].append((file, header, pixel_offset))
    ordered = sorted(groups.items(), key=lambda group: (-_count(group[1]), group[0]))
    if series is None and len(ordered) == 1:
        return files
    listed = "; ".join(f"{number}: {_describe(group)}" for number, (_, group) in enumerate(ordered, 1))
    if series is None:
        raise VolumeError(
            source, f"it holds {len(ordered)} CT series ({listed})", "Pass `series=` with the number of one, or its UID"
        )
    if isinstance(series, str) and series in groups:
        return groups[series]
    number = int(series) if isinstance(series, int | np.integer) or str(series).isdecimal() else 0
    if not 1 <= number <= len(ordered):
        raise VolumeError(source, f"it holds no such series ({listed})", "Pass `series=` with one of these numbers")
    return ordered[number - 1][1]


def _count(group: list[_CTFile]) -> int:
    return sum(_number(header, "NumberOfFrames") or 1 for _, header, _ in group)


def _describe(group: list[_CTFile]) -> str:
    header = group[0][1]
    return f"{_count(group)} slices of {_number(header, 'Rows')} x {_number(header, 'Columns')} pixels"


def _number(header: Any, attribute: str) -> int:
    """A whole number of a header for a list of series; 0 if it is damaged, which the reading of that series tells."""
    try:
        return int(header.get(attribute) or 0)
    except Exception:  # as above
        return 0


def _left_out_notes(left_out: Counter) -> list[str]:
    if not left_out:
        return []
    kinds = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common(5))
    return [f"{left_out.total()} files were left out ({kinds})"]
