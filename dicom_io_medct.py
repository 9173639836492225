"""DICOM: one CT series out of files in any order, or one Enhanced multi-frame file.

Unusual:
- A damaged file is never left out, since that would turn it into a missing slice. What is left out (other kinds of image,
  localizers, files that are no DICOM) is counted in the notes.
- Slices are ordered and spaced by their positions along their common normal; instance numbers, slice thickness and file
  names are not asked. Positions must be even and lie on a line, or the series is refused with the figures.
- Rescale slope and intercept must both be there, slice by slice (or be given by the caller), because a default of 1 and 0
  would make air of 0 HU.
- Uncompressed pixels are read straight from the file into the volume. For compressed ones the decoder is named, because
  pydicom would try one after the other until one "decodes" a damaged stream.
- No message holds text from a header but terms of the standard's own lists: other fields, and pydicom's own messages,
  may hold names, dates and identifiers.

Source: DICOM PS3.3 (C.7.6.2, C.7.6.16, C.8.2, C.11.1), PS3.5.
"""

import contextlib
import logging
import re
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import ByteSource, too_inflated
from .volume_medct import AIR_HU, MAX_VOXELS, CTVolume, VolumeError, check_affine

try:
    import pydicom
    import pydicom.pixels
except ImportError:
    pydicom = None

_CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image",
}
_DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT_LITTLE, _EXPLICIT_LITTLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
# Decoders that refuse damaged streams, in the order of their speed.
_DECODERS = {
    "1.2.840.10008.1.2.5": ("pydicom",),
    "1.2.840.10008.1.2.4.50": ("gdcm",),
    "1.2.840.10008.1.2.4.57": ("gdcm",),
    "1.2.840.10008.1.2.4.70": ("gdcm",),
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "gdcm"),
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "gdcm"),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "gdcm"),
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "gdcm"),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
}
_UNCOMPRESSED = (_IMPLICIT_LITTLE, _EXPLICIT_LITTLE, "1.2.840.10008.1.2.2", _DEFLATED)
_RESCALE_TYPES = ("HU", "HU_MOD", "US", "OD", "MGML", "PCT", "Z_EFF", "ED", "EDW")
_MODALITIES = (
    "CT",
    "MR",
    "PT",
    "NM",
    "US",
    "CR",
    "DX",
    "MG",
    "XA",
    "SC",
    "OT",
    "SEG",
    "RTSTRUCT",
    "RTDOSE",
    "SR",
    "PR",
)
_GAP_TOLERANCE = 0.02
"""Share of the usual slice step by which one may differ."""
_POSITION_DIGITS_MM = 2e-3
"""How exactly headers write positions."""
_MAX_DRIFT_DEGREES = 0.1
_MAX_GAP_STEPS = 5
"""Usual steps that interpolation bridges when the caller asks for it."""
_AGAIN = "Copy or export the file again"
_STRAIGHT = "Pass `resample_irregular=True` to have the slices interpolated"


@dataclass(frozen=True)
class _Slice:
    """One frame of one file: where it lies, what its values mean, and how to get at them."""

    file: ByteSource
    frame: int | None
    header: Any
    series: str
    position_mm: np.ndarray
    orientation: np.ndarray
    spacing_mm: np.ndarray
    slope: float
    intercept: float
    pixel_offset: int | None

    @property
    def name(self) -> str:
        return self.file.name if self.frame is None else f"{self.file.name} frame {self.frame + 1}"

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.header.Rows), int(self.header.Columns)


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
    with _quiet_pydicom():
        slices, left_out = _collect(files, source, rescale)
        slices = _choose_series(slices, source, series)
        _check_alike(slices)
        slices, notes = _order(slices, source, resample_irregular)
        hu = _decode(slices, source)
    hu, affine, more = _to_grid(hu, slices, source)
    notes = [*_left_out_notes(left_out), *notes, *more]
    return CTVolume(hu.T, affine, source, tuple(notes))  # (k, row, column) -> (column, row, k)


@contextlib.contextmanager
def _quiet_pydicom() -> Iterator[None]:
    """Without pydicom's warnings and log lines, which hold values of the header."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _collect(
    files: Sequence[ByteSource], source: str, rescale: tuple[float | None, float | None]
) -> tuple[list[_Slice], Counter]:
    """All CT slices among files, and how many files of other kinds there are."""
    slices: list[_Slice] = []
    left_out: Counter = Counter()
    for file in files:
        with file.open() as stream:
            if not is_dicom(stream.read(132)):
                left_out["no DICOM file"] += 1
                continue
            header, pixel_offset = _read_header(file, stream)
        reason = _why_no_slice(file, header)
        if reason is None:
            slices += _slices_of(file, header, pixel_offset, rescale)
        elif reason:
            left_out[reason] += 1
    if not slices:
        found = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common(5)) or "it is empty"
        raise VolumeError(source, f"it holds no CT slices ({found})", "Pass the files of a CT series")
    return slices, left_out


def _read_header(file: ByteSource, stream: BinaryIO) -> tuple[Any, int | None]:
    """Everything before the pixels, and at which byte those begin in the file (not if it is deflated)."""
    try:
        stream.seek(0)
        meta = pydicom.filereader.read_file_meta_info(stream) if _is_deflated(stream) else None
        if meta is not None:
            _check_deflated(file, stream)
        stream.seek(0)
        header = pydicom.dcmread(stream, stop_before_pixels=True)
        offset = stream.tell() if meta is None else None
        # The file meta information has it where a data set leaves it empty, as some anonymizers do.
        header.SOPClassUID = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
        return header, offset
    except VolumeError:
        raise
    except Exception as error:  # pydicom raises many kinds; their texts hold values of the header
        raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", _AGAIN) from None


def _is_deflated(stream: BinaryIO) -> bool:
    head = stream.read(2048)
    stream.seek(0)
    return _DEFLATED.encode() in head


def _check_deflated(file: ByteSource, stream: BinaryIO) -> None:
    """Refuse a bomb before pydicom inflates it in one piece; the stream stands behind the file meta information."""
    inflater, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while packed := inflater.unconsumed_tail or stream.read(2**16):
        count += len(inflater.decompress(packed, 2**20))
        if inflater.eof or too_inflated(count, file.size):
            break
    if too_inflated(count, file.size):
        raise VolumeError(file.name, f"its {file.size} bytes would inflate to more than {count}", "Check the file")


def _why_no_slice(file: ByteSource, header: Any) -> str | None:
    """What a file is if it is no CT slice; empty if that deserves no word, none if it is one."""
    kind = str(header.SOPClassUID)
    if kind == _DICOMDIR_CLASS:
        return ""
    if not kind:
        raise VolumeError(file.name, "it is a damaged DICOM file (without a SOP class)", _AGAIN)
    if kind not in _CT_CLASSES:
        uid = pydicom.uid.UID(kind)
        return uid.name if uid.name != kind else "unknown kind of DICOM file"
    modality = str(header.get("Modality") or "CT")
    if modality != "CT":
        return f"modality {modality}" if modality in _MODALITIES else "modality other than CT"
    image_type = header.get("ImageType") or []
    if "LOCALIZER" in [str(value).upper() for value in ([image_type] if isinstance(image_type, str) else image_type)]:
        return "localizer"
    return None


def _slices_of(
    file: ByteSource, header: Any, pixel_offset: int | None, rescale: tuple[float | None, float | None]
) -> list[_Slice]:
    """One slice, or those of a multi-frame file."""
    try:
        rows, columns = int(header.Rows), int(header.Columns)
        samples = int(header.get("SamplesPerPixel") or 1)
        grey = str(header.get("PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME")
        frames = header.get("PerFrameFunctionalGroupsSequence")
        number = int(header.get("NumberOfFrames") or 1)
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    except Exception as error:  # as above
        raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", _AGAIN) from None
    if rows < 1 or columns < 1 or number < 1:
        raise VolumeError(file.name, f"it promises {number} frames of {rows} x {columns} pixels", _AGAIN)
    if samples != 1 or not grey:
        raise VolumeError(file.name, "it is no grey image", "Pass the files of a CT series")
    if frames is None:
        if number != 1:
            raise VolumeError(file.name, f"its {number} frames have no positions", "Export the series anew")
        return [_slice(file, header, None, None, None, pixel_offset, rescale)]
    if len(frames) != number:
        raise VolumeError(file.name, f"it promises {number} frames and describes {len(frames)}", _AGAIN)
    return [_slice(file, header, k, frame, shared, pixel_offset, rescale) for k, frame in enumerate(frames)]


def _slice(
    file: ByteSource,
    header: Any,
    frame: int | None,
    own: Any,
    shared: Any,
    pixel_offset: int | None,
    rescale: tuple[float | None, float | None],
) -> _Slice:
    name = file.name if frame is None else f"{file.name} frame {frame + 1}"

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
            raise VolumeError(name, f"its {attribute} is no list of {count} numbers", _AGAIN)
        return array

    try:
        position = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
        found = [
            value("PixelValueTransformationSequence", attribute) for attribute in ("RescaleSlope", "RescaleIntercept")
        ]
        unit = str(value("PixelValueTransformationSequence", "RescaleType") or "HU").strip().upper()
        series = str(header.get("SeriesInstanceUID") or "")
        slope, intercept = _rescale(name, found, rescale)
    except VolumeError:
        raise
    except Exception as error:  # as above
        raise VolumeError(name, f"it is a damaged DICOM file ({type(error).__name__})", _AGAIN) from None
    if unit not in ("HU", "HU_MOD"):
        unit = unit if unit in _RESCALE_TYPES else "of another unit"
        raise VolumeError(name, f"its RescaleType is {unit}, not HU", "Pass the CT series, not a map computed from it")
    if not (spacing > 0).all():
        raise VolumeError(name, f"its spacing is {tuple(spacing.tolist())} mm", _AGAIN)
    return _Slice(file, frame, header, series, position, orientation, spacing, slope, intercept, pixel_offset)


def _rescale(name: str, found: list[Any], given: tuple[float | None, float | None]) -> tuple[float, float]:
    """Slope and intercept, of the header or of the caller, and never of both."""
    if None not in found and "" not in found:
        slope, intercept = float(found[0]), float(found[1])
        if given != (None, None):
            raise VolumeError(
                name,
                f"its header already rescales (slope {slope}, intercept {intercept})",
                "Leave out `rescale_slope` and `rescale_intercept`, or HU would be computed twice",
            )
    elif None in given:
        raise VolumeError(
            name,
            "RescaleSlope or RescaleIntercept is missing, so HU are not known",
            "Pass both `rescale_slope=` and `rescale_intercept=` if you know them",
        )
    else:
        slope, intercept = float(given[0]), float(given[1])
    if not (np.isfinite([slope, intercept]).all() and slope != 0 and max(abs(slope), abs(intercept)) < 1e6):
        raise VolumeError(name, f"its rescale slope is {slope:g} and its intercept {intercept:g}", _AGAIN)
    return slope, intercept


def _choose_series(slices: list[_Slice], source: str, series: int | str | None) -> list[_Slice]:
    """The slices of one series; the list of a refusal counts them, largest first."""
    groups: dict[str, list[_Slice]] = defaultdict(list)
    for one in slices:
        groups[one.series].append(one)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    if series is None and len(ordered) == 1:
        return slices
    listed = "; ".join(f"{number}: {_describe(group)}" for number, (_, group) in enumerate(ordered, 1))
    if series is None:
        raise VolumeError(
            source, f"it holds {len(ordered)} CT series ({listed})", "Pass `series=` with the number of one, or its UID"
        )
    if isinstance(series, str) and series in groups:
        return groups[series]
    number = int(series) if isinstance(series, int | np.integer) or str(series).isdigit() else 0
    if not 1 <= number <= len(ordered):
        raise VolumeError(source, f"it holds no such series ({listed})", "Pass `series=` with one of these numbers")
    return ordered[number - 1][1]


def _describe(group: list[_Slice]) -> str:
    rows, columns = group[0].shape
    return f"{len(group)} slices of {rows} x {columns}, {group[0].spacing_mm[0]:.3g} mm pixels"


def _check_alike(slices: list[_Slice]) -> None:
    """Refuse slices that are not all of one size, spacing and direction."""
    first = slices[0]
    for one in slices:
        if one.shape != first.shape:
            reason = f"it is {one.shape[0]} x {one.shape[1]}, others are {first.shape[0]} x {first.shape[1]}"
        elif not np.allclose(one.spacing_mm, first.spacing_mm, rtol=1e-4, atol=0):
            reason = f"its PixelSpacing {one.spacing_mm.tolist()} differs from {first.spacing_mm.tolist()} of others"
        elif not np.allclose(one.orientation, first.orientation, atol=1e-4):
            reason = f"its orientation {one.orientation.round(4).tolist()} differs from {first.orientation.round(4).tolist()}"
        else:
            continue
        raise VolumeError(one.name, reason, "Pass the files of one stack of slices")
    row, column = first.orientation[:3], first.orientation[3:]
    if max(abs(np.linalg.norm(row) - 1), abs(np.linalg.norm(column) - 1), abs(row @ column)) > 1e-3:
        raise VolumeError(first.name, "its ImageOrientationPatient is no pair of perpendicular unit vectors", _AGAIN)


def _normal(slices: Sequence[_Slice]) -> np.ndarray:
    return np.cross(slices[0].orientation[:3], slices[0].orientation[3:])


def _along(slices: Sequence[_Slice]) -> np.ndarray:
    """Positions along the normal, mm."""
    return np.array([one.position_mm @ _normal(slices) for one in slices])


def _order(slices: list[_Slice], source: str, resample_irregular: bool) -> tuple[list[_Slice], list[str]]:
    """Slices by position, after the checks of their positions."""
    slices = sorted(slices, key=lambda one: float(one.position_mm @ _normal(slices)))
    slices, notes = _without_repeats(slices, source, resample_irregular)
    if len(slices) < 2:
        raise VolumeError(
            source,
            "it holds one slice, which is no volume",
            "Pass all files of the series together: a folder or a list",
        )
    along = _along(slices)
    gaps = np.diff(along)
    step = float(np.median(gaps))
    uneven = np.flatnonzero(np.abs(gaps - step) > _GAP_TOLERANCE * step)
    if len(uneven):
        figures = ", ".join(f"{gaps[k]:.3f} mm between {along[k]:.2f} and {along[k + 1]:.2f}" for k in uneven[:5])
        reason = f"its slice steps are uneven (usually {step:.3f} mm, but {figures})"
        if not resample_irregular:
            raise VolumeError(source, f"{reason}: slices are missing or of two stacks", _STRAIGHT)
        if gaps.max() > _MAX_GAP_STEPS * step:
            raise VolumeError(source, reason, "Find the missing slices: the gap is too wide to interpolate")
    _check_line(slices, source, along, step, resample_irregular)
    return slices, notes


def _without_repeats(slices: list[_Slice], source: str, resample_irregular: bool) -> tuple[list[_Slice], list[str]]:
    """Refuse positions that occur more than once, or keep one slice of each if all its pixels are the same."""
    along = _along(slices)
    repeats = np.flatnonzero(np.diff(along) < 1e-3)
    if not len(repeats):
        return slices, []
    k = int(repeats[0])
    reason = (
        f"{len(repeats)} slice positions occur more than once, such as {along[k]:.3f} mm in "
        f"{slices[k].name} and {slices[k + 1].name}"
    )
    if not resample_irregular:
        raise VolumeError(source, reason, "Pass the files of one phase of one series")
    kept = [slices[0]]
    for before, one, repeated in zip(slices, slices[1:], np.diff(along) < 1e-3, strict=False):
        if not repeated:
            kept.append(one)
        elif not np.array_equal(_hu_of(before, {}), _hu_of(one, {})):
            raise VolumeError(source, f"{reason}, with different pixels", "Pass the files of one phase of one series")
    return kept, [f"{len(repeats)} repeated slices with the same pixels were left out"]


def _check_line(slices: list[_Slice], source: str, along: np.ndarray, step: float, resample_irregular: bool) -> None:
    """Refuse stacks whose slices lie beside each other, or lean."""
    origins = np.array([one.position_mm for one in slices])
    share = (along - along[0]) / (along[-1] - along[0])
    off_line = np.linalg.norm(origins - (origins[0] + share[:, None] * (origins[-1] - origins[0])), axis=1)
    if off_line.max() > 0.1 * step + 0.01:
        k = int(off_line.argmax())
        raise VolumeError(
            source,
            f"its slices do not lie on a line ({slices[k].name} is {off_line[k]:.2f} mm beside it)",
            "Pass the files of one stack of slices",
        )
    whole = origins[-1] - origins[0]
    sideways = np.linalg.norm(whole - (whole @ _normal(slices)) * _normal(slices))
    lean = np.degrees(np.arctan2(sideways, along[-1] - along[0]))
    # Under a pixel over the whole stack no voxel is misplaced.
    if not resample_irregular and sideways > slices[0].spacing_mm.min() and lean > _MAX_DRIFT_DEGREES:
        raise VolumeError(
            source,
            f"its slices are stacked {lean:.1f} degrees off their normal (gantry tilt or a sheared stack)",
            "Pass `resample_irregular=True` to have it resampled to a straight grid",
        )


def _decode(slices: list[_Slice], source: str) -> np.ndarray:
    """HU of ordered slices, `(k, row, column)`: int16 if slopes are 1 and all values fit, else float32."""
    shape = (len(slices), *slices[0].shape)
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise VolumeError(source, f"its headers promise shape {shape}", "Check the files, or crop the scan")
    for one in slices:
        _check_pixel_bytes(one)
    whole = all(one.slope == 1 and one.intercept.is_integer() for one in slices)
    hu = np.empty(shape, np.int16 if whole else np.float32)
    data_sets: dict[str, Any] = {}
    for k, one in enumerate(slices):
        values = _hu_of(one, data_sets)
        if hu.dtype == np.int16 and values.dtype != np.int16:
            hu = hu.astype(np.float32)
        hu[k] = values
    return hu


def _check_pixel_bytes(one: _Slice) -> None:
    """Refuse uncompressed images that are longer than their file."""
    syntax = _syntax(one)
    if syntax in _UNCOMPRESSED and syntax != _DEFLATED:
        rows, columns = one.shape
        promised = rows * columns * int(one.header.get("BitsAllocated") or 16) // 8
        if promised * ((one.frame or 0) + 1) > one.file.size:
            raise VolumeError(
                one.name, f"it is cut short ({one.file.size} bytes for {rows} x {columns} pixels)", _AGAIN
            )


def _syntax(one: _Slice) -> str:
    return str(one.header.file_meta.get("TransferSyntaxUID") or _IMPLICIT_LITTLE)


def _hu_of(one: _Slice, data_sets: dict[str, Any]) -> np.ndarray:
    """HU of one slice, `(row, column)`: int16 if exact, else float32; padding outside the scan becomes air."""
    try:
        stored = _plain_pixels(one)
        if stored is None:
            stored = _decoded_pixels(one, data_sets)
        padding = one.header.get("PixelPaddingValue")
        padding = None if padding is None or padding == "" else int(padding)
    except VolumeError:
        raise
    except Exception as error:  # decoders raise many kinds; as above for their texts
        raise VolumeError(one.name, f"its pixels cannot be decoded ({type(error).__name__})", _AGAIN) from None
    if stored.shape != one.shape:
        raise VolumeError(one.name, f"its pixels have shape {stored.shape} instead of {one.shape}", _AGAIN)
    hu = _scaled(stored, one.slope, one.intercept)
    if padding is not None:
        # Modulo 2^16, because a padding of signed pixels is often written as if it were unsigned.
        outside = (stored.astype(np.int32) & 0xFFFF) == (padding & 0xFFFF)
        if outside.any() and hu[outside].flat[0] < AIR_HU:
            hu[outside] = AIR_HU
    return hu


def _scaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    if slope == 1 and intercept.is_integer():
        lowest, highest = int(stored.min()) + int(intercept), int(stored.max()) + int(intercept)
        if lowest >= -(2**15) and highest < 2**15:
            return (stored.astype(np.int32) + int(intercept)).astype(np.int16)
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _plain_pixels(one: _Slice) -> np.ndarray | None:
    """Pixels of 16 bits straight from the file, without pydicom reading it again; none where they lie otherwise."""
    header, syntax = one.header, _syntax(one)
    stored_bits = int(header.get("BitsStored") or 16)
    if (
        one.pixel_offset is None
        or syntax not in (_IMPLICIT_LITTLE, _EXPLICIT_LITTLE)
        or int(header.get("BitsAllocated") or 0) != 16
        or not 1 <= stored_bits <= 16
        or int(header.get("HighBit", stored_bits - 1)) != stored_bits - 1
    ):
        return None
    rows, columns = one.shape
    count = rows * columns * 2
    with one.file.open() as stream:
        stream.seek(one.pixel_offset)
        element = stream.read(8 if syntax == _IMPLICIT_LITTLE else 12)
        if element[:4] != b"\xe0\x7f\x10\x00" or (syntax == _EXPLICIT_LITTLE and element[4:6] not in (b"OW", b"OB")):
            return None
        length = int.from_bytes(element[-4:], "little")
        if length < count * ((one.frame or 0) + 1):
            raise VolumeError(one.name, f"it is cut short ({length} bytes of pixels)", _AGAIN)
        stream.seek(count * (one.frame or 0), 1)
        pixels = stream.read(count)
    if len(pixels) != count:
        raise VolumeError(one.name, f"it is cut short ({len(pixels)} of {count} bytes of pixels)", _AGAIN)
    signed = int(header.get("PixelRepresentation") or 0) == 1
    stored = np.frombuffer(pixels, "<i2" if signed else "<u2").reshape(rows, columns)
    unused = 16 - stored_bits
    # Some scanners keep overlays in the unused bits; shifting up and down drops them and restores the sign.
    return stored if unused == 0 else (stored << unused) >> unused


def _decoded_pixels(one: _Slice, data_sets: dict[str, Any]) -> np.ndarray:
    """Pixels by pydicom and its decoders; a multi-frame file is read once."""
    data_set = data_sets.get(one.file.name)
    if data_set is None:
        data_sets.clear()
        with one.file.open() as stream:
            data_set = pydicom.dcmread(stream)
        data_sets[one.file.name] = data_set
    # Of a compressed file that is cut short, pydicom makes a data set without any elements.
    if "PixelData" not in data_set:
        raise VolumeError(one.name, "it holds no pixels (cut short?)", _AGAIN)
    syntax = _syntax(one)
    options = {}
    if syntax not in _UNCOMPRESSED:
        options["decoding_plugin"] = _decoder(one.name, syntax)
        _check_code_stream(one, bytes(data_set.PixelData[: 2**12]))
    return np.asarray(pydicom.pixels.pixel_array(data_set, index=one.frame or 0, **options))


def _decoder(name: str, syntax: str) -> str:
    known = _DECODERS.get(syntax)
    kind = pydicom.uid.UID(syntax).name
    if known is None:
        kind = kind if kind != syntax else "an unknown transfer syntax"
        raise VolumeError(name, f"its pixels are compressed in a way not supported ({kind})", "Export it uncompressed")
    available = pydicom.pixels.get_decoder(syntax).available_plugins
    for plugin in known:
        if plugin in available:
            return plugin
    raise VolumeError(
        name, f"its pixels are compressed ({kind}), which needs a decoder", "Install it: pip install medct[dicom]"
    )


def _check_code_stream(one: _Slice, head: bytes) -> None:
    """Refuse a first code stream whose own size is not the header's, since decoders ask memory for what it claims."""
    size = None
    if (at := head.find(b"\xff\x4f\xff\x51")) >= 0:  # JPEG 2000: start of code stream, SIZ
        x1, y1, x0, y0 = (int.from_bytes(head[at + 8 + 4 * k : at + 12 + 4 * k], "big") for k in range(4))
        size = (y1 - y0, x1 - x0)
    elif head.find(b"\xff\xd8\xff") >= 0 and (
        found := re.search(rb"\xff[\xc0-\xc3\xf7]..[\x02-\x10](....)", head, re.S)
    ):
        size = (int.from_bytes(found[1][:2], "big"), int.from_bytes(found[1][2:], "big"))  # JPEG: start of frame
    if size is not None and size != one.shape:
        raise VolumeError(one.name, f"its compressed pixels are {size[0]} x {size[1]} instead of {one.shape}", _AGAIN)


def _to_grid(hu: np.ndarray, slices: list[_Slice], source: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """HU on even steps, and the affine of `(column, row, k)` to RAS+ mm; uneven steps are interpolated."""
    notes, along = [], _along(slices)
    gaps = np.diff(along)
    step = float(np.median(gaps))
    count = len(slices)
    if (np.abs(gaps - step) > _GAP_TOLERANCE * step).any():
        count = round((along[-1] - along[0]) / step) + 1
        hu = _on_even_steps(hu, along, count)
        notes.append(
            f"slices with steps of {gaps.min():.3f} to {gaps.max():.3f} mm were interpolated to {count} even ones"
        )
    first, last = slices[0].position_mm, slices[-1].position_mm
    orientation, spacing = slices[0].orientation, slices[0].spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * spacing[1]
    affine[:3, 1] = orientation[3:] * spacing[0]
    affine[:3, 2] = (last - first) / np.linalg.norm(last - first) * _exact_step(slices, count)
    affine[:3, 3] = first
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS -> RAS
    check_affine(source, affine)
    if not any(one.header.get("Modality") for one in slices):
        notes.append("its headers name no modality: taken for CT by their SOP class")
    return hu, affine, notes


def _exact_step(slices: list[_Slice], count: int) -> float:
    """Step of the slices, mm: as written, or round, where positions of a few digits cannot tell it from the measured one.

    Else 3.987342 mm would come back as 3.987337 from positions, and lose a voxel to the floor of resampling.
    """
    first, last = slices[0], slices[-1]
    measured = float(np.linalg.norm(last.position_mm - first.position_mm)) / (count - 1)
    written = [first.header.get("SpacingBetweenSlices"), first.header.get("SliceThickness")]
    for step in (*[float(value) for value in written if isinstance(value, int | float)], round(measured, 3)):
        if abs(step - measured) * (count - 1) < _POSITION_DIGITS_MM:
            return step
    return measured


def _on_even_steps(hu: np.ndarray, along: np.ndarray, count: int) -> np.ndarray:
    even = np.empty((count, *hu.shape[1:]), hu.dtype)
    for k, position in enumerate(np.linspace(along[0], along[-1], count)):
        lower = min(int(np.searchsorted(along, position, side="right")) - 1, len(along) - 2)
        weight = np.float32((position - along[lower]) / (along[lower + 1] - along[lower]))
        values = hu[lower] * (1 - weight) + hu[lower + 1] * weight
        even[k] = values.round() if hu.dtype == np.int16 else values
    return even


def _left_out_notes(left_out: Counter) -> list[str]:
    if not left_out:
        return []
    kinds = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common(5))
    return [f"{left_out.total()} files were left out ({kinds})"]
