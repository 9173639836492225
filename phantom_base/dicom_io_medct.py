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

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import ByteSource
from .dicom_elements_medct import Elements, read_data_set, read_meta
from .dicom_frames_medct import AGAIN, DEFLATED, EXPLICIT_BIG, inflated_header, warm_up_for
from .dicom_pixels_medct import PixelLayout, Slice, decode, hu_of, layout_of, name_of
from .volume_medct import CTVolume, VolumeError, check_affine, refuse_second_rescale

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
_GAP_TOLERANCE = 0.02
"""Share of the usual slice step by which one may differ."""
_POSITION_DIGITS_MM = 2e-3
"""How exactly headers write positions."""
_MAX_LEAN_DEGREES = 0.1
_MAX_GAP_STEPS = 5
"""Usual steps that interpolation bridges when the caller asks for it."""
_ALL_FILES = "Pass all files of the series together: a folder, or a list of them (in a list, for a processor)"
_STRAIGHT = "Pass `resample_irregular=True` to have the slices interpolated"


_CTFile = tuple[ByteSource, Elements, int]
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
    found, left_out = _collect(files, source)
    slices = [one for file in _choose_series(found, source, series) for one in _slices_of(*file, rescale)]
    _check_alike(slices)
    slices, notes = _order(slices, source, resample_irregular)
    hu = decode(slices, source)
    hu, affine, more = _to_grid(hu, slices, source)
    notes = [*_left_out_notes(left_out), *notes, *more]
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


def _read_header(file: ByteSource, stream: BinaryIO) -> tuple[Elements, int]:
    """Everything before the pixels, and at which byte those begin, in the inflated data set if that is deflated."""
    try:
        meta = read_meta(stream)
        syntax = str(meta.get("TransferSyntaxUID") or "")
        if syntax == DEFLATED:
            stream = io.BytesIO(inflated_header(file, stream))
        header = read_data_set(stream, is_little=syntax != EXPLICIT_BIG)
        header.file_meta = meta
        warm_up_for(syntax)
        return header, stream.tell()
    except VolumeError:
        raise
    except Exception as error:  # of many kinds; their texts may hold values of the header
        raise VolumeError(file.name, f"it is a damaged DICOM file ({type(error).__name__})", AGAIN) from None


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
    file: ByteSource, header: Elements, pixel_offset: int, rescale: tuple[float | None, float | None]
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


def _check_alike(slices: list[Slice]) -> None:
    """Refuse slices that are not all of one size, spacing and direction."""
    first = slices[0]
    for one in slices:
        (rows, columns), others = one.pixels.shape, first.pixels.shape
        if (rows, columns) != others:
            reason = f"it is {rows} x {columns}, others are {others[0]} x {others[1]}"
        elif np.abs(one.spacing_mm - first.spacing_mm).max() > 1e-4 * first.spacing_mm.min():
            reason = f"its PixelSpacing {one.spacing_mm.tolist()} differs from {first.spacing_mm.tolist()} of others"
        elif np.abs(one.orientation - first.orientation).max() > 1e-4:
            turned, usual = one.orientation.round(4).tolist(), first.orientation.round(4).tolist()
            reason = f"its orientation {turned} differs from {usual} of others"
        else:
            continue
        raise VolumeError(one.name, reason, "Pass the files of one stack of slices")
    row, column = first.orientation[:3], first.orientation[3:]
    if max(abs(np.linalg.norm(row) - 1), abs(np.linalg.norm(column) - 1), abs(row @ column)) > 1e-3:
        raise VolumeError(first.name, "its ImageOrientationPatient is no pair of perpendicular unit vectors", AGAIN)


def _normal(slices: Sequence[Slice]) -> np.ndarray:
    return np.cross(slices[0].orientation[:3], slices[0].orientation[3:])


def _along(slices: Sequence[Slice]) -> np.ndarray:
    """Positions along the normal, mm."""
    return np.array([one.position_mm for one in slices]) @ _normal(slices)


def _order(slices: list[Slice], source: str, resample_irregular: bool) -> tuple[list[Slice], list[str]]:
    """Slices by position, after the checks of their positions."""
    slices = [slices[k] for k in np.argsort(_along(slices), kind="stable")]
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


def _without_repeats(slices: list[Slice], source: str, resample_irregular: bool) -> tuple[list[Slice], list[str]]:
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
        elif not np.array_equal(hu_of(before, {}), hu_of(one, {})):
            raise VolumeError(source, f"{reason}, with different pixels", "Pass the files of one phase of one series")
    return kept, [f"{len(repeats)} repeated slices with the same pixels were left out"]


def _check_line(slices: list[Slice], source: str, along: np.ndarray, step: float, resample_irregular: bool) -> None:
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
    sideways, lean = _lean(slices)
    if not resample_irregular and _is_leaning(slices):
        raise VolumeError(
            source,
            f"its slices are stacked {lean:.1f} degrees off their normal (gantry tilt or a sheared stack, "
            f"{np.linalg.norm(sideways):.1f} mm from end to end)",
            "Pass `resample_irregular=True` to have it resampled to a straight grid",
        )


def _lean(slices: list[Slice]) -> tuple[np.ndarray, float]:
    """How far ordered slices slide sideways from the first to the last, mm, and the angle of that, degrees."""
    whole, normal = slices[-1].position_mm - slices[0].position_mm, _normal(slices)
    sideways = whole - (whole @ normal) * normal
    return sideways, float(np.degrees(np.arctan2(np.linalg.norm(sideways), whole @ normal)))


def _is_leaning(slices: list[Slice]) -> bool:
    """Whether a stack leans; under a pixel over the whole of it no voxel is misplaced."""
    sideways, lean = _lean(slices)
    return bool(np.linalg.norm(sideways) > slices[0].spacing_mm.min() and lean > _MAX_LEAN_DEGREES)


def _to_grid(hu: np.ndarray, slices: list[Slice], source: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
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
    first, whole = slices[0].position_mm, slices[-1].position_mm - slices[0].position_mm
    if not _is_leaning(slices):
        # What it slides all the same is shared between both ends.
        sideways, _ = _lean(slices)
        first, whole = first + sideways / 2, whole - sideways
    length = float(np.linalg.norm(whole))
    orientation, spacing = slices[0].orientation, slices[0].spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * spacing[1]
    affine[:3, 1] = orientation[3:] * spacing[0]
    affine[:3, 2] = whole / length * _exact_step(slices, length, count)
    affine[:3, 3] = first
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS -> RAS
    check_affine(source, affine)
    if not any(one.has_modality for one in slices):
        notes.append("its headers name no modality: taken for CT by their SOP class")
    return hu, affine, notes


def _exact_step(slices: list[Slice], length_mm: float, count: int) -> float:
    """Step of slices over a length, mm: as written, or round, where positions of a few digits cannot tell them apart.

    Else steps of 5 mm would come back as 4.999999 from positions.
    """
    measured = length_mm / (count - 1)
    for step in (*slices[0].written_steps_mm, round(measured, 3)):
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
