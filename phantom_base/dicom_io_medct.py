"""DICOM: one CT series out of files in any order, or one Enhanced multi-frame file.

Unusual:
- A damaged file is never left out, since that would turn it into a missing slice; nor is one that lies in the place of
  a slice (empty, zeros, a pointer, without the mark of DICOM). What is left out (other kinds of image, localizers, and
  files that never were DICOM) is counted in the notes.
- Slices are ordered and spaced by their positions along their common normal; instance numbers, slice thickness and file
  names are not asked. Positions must be even and lie on a line, or the series is refused with the figures.
- Rescale slope and intercept must both be there, slice by slice (or be given by the caller), because a default of 1 and
  0 would make air of 0 HU. RescaleType US is that of values without a unit, and what GDCM and ITK write into every CT
  that had none: of single-frame CT images it is taken for HU if they show air.
- No message holds text from a header but terms of the standard's own lists: other fields may hold names, dates and
  identifiers.

Source: DICOM PS3.3 (C.7.6.2, C.7.6.16, C.8.2, C.11.1), PS3.5.
"""

import contextlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np

from .byte_sources_medct import GZIP_MAGIC, HEAD_BYTES, ByteSource, base_name, inflated_head, of_path
from .dicom_elements_medct import INSTALL, Elements, name_of_uid, read_data_set, read_meta
from .dicom_frames_medct import AGAIN, DEFLATED, EXPLICIT_BIG, inflated_header, warm_up_for
from .dicom_geometry_medct import check_alike, order, to_grid
from .dicom_pixels_medct import AIR_HU_RANGE, PixelLayout, Slice, decode, layout_of, name_of
from .dicom_stacks_medct import stacks_of, told_by
from .no_scans_medct import STANDS_FOR_A_FILE, what_is
from .volume_medct import AIR_HU, NO_AIR_HU, CTVolume, VolumeError, refuse_second_rescale

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
_HU = ("HU", "HU_MOD")
_RESCALE_TYPES = ("HU", "HU_MOD", "US", "OD", "MGML", "PCT", "Z_EFF", "ED", "EDW")
_MAPS = ("MAT_SPECIFIC", "MAT_FRACTIONAL", "MAT_VALUE_BASED", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY")
"""Types of multi-energy images whose values are no attenuation, whatever their RescaleType says."""
_MODIFIED = ("MAT_REMOVED", "MAT_MODIFIED")
"""Those whose values are HU if their RescaleType says so."""
_NO_PLANES = {
    "LOCALIZER": "it is a localizer, not a slice",
    "CURVED_MPR": "it is cut out along a curve (CURVED_MPR), not a slice",
    "DISTORTED": "it is cut out along a curve (DISTORTED), not a slice",
    "VOLUME_RENDER": "it is a rendered picture (VOLUME_RENDER), not a slice",
    "SURFACE_RENDER": "it is a rendered picture (SURFACE_RENDER), not a slice",
}
_PROJECTIONS = ("MIP", "MINIP", "MNIP", "MAX_IP", "MIN_IP", "PROJECTION")
"""Words for pictures each of which shows the highest or lowest values of several slices, such as in "CT_SOM5 MIP"."""
_LOSSY = "1.2.840.10008.1.2.4.50"
"""A transfer syntax that always loses something; of others that may, the header says whether they did."""
_MODALITIES = ("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "SC", "OT", "SEG", "RTSTRUCT", "RTDOSE", "SR")
SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
"""Of files that stand for a DICOM file whatever they hold."""
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
_DECIMALS = (0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053, 0x00180050, 0x00180088)
"""Position, orientation, spacing, intercept, slope, thickness and step."""
_MOST_MM = 1e6
"""Of a position or spacing; numbers beyond it overflow where they are multiplied."""
_LEAST_AIR = 0.01
"""Share of voxels in that range which shows that values without a unit are HU; of a chest it is far more."""


_CTFile = tuple[ByteSource, Elements, int]
"""A file of CT slices, its header, and where its pixels begin."""


def is_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM: with the mark, or with a data set that was stored without one."""
    return has_mark(head) or _is_bare(head)


def has_mark(head: bytes) -> bool:
    """Whether a file begins with a preamble and DICOM's mark."""
    return head[128:132] == b"DICM"


def _is_bare(head: bytes) -> bool:
    """Whether the first bytes are an element of the first groups of a data set, with a plausible length."""
    if len(head) < 12 or head[:2] not in _FIRST_GROUPS or head[3] > 0x20:
        return False
    if head[4:6].isalpha() and head[4:6].isupper():
        return int.from_bytes(head[6:8], "little") <= 128
    length = int.from_bytes(head[4:8], "little")
    return 0 < length <= 128 and length % 2 == 0


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
    _need_pydicom(source)
    found, left_out = _collect(files, source)
    slices = _choose(found, source, series, rescale)
    check_alike(slices)
    slices, notes = order(slices, source, resample_irregular)
    hu, padded, more_notes = decode(slices, source)
    if not all(one.is_hu for one in slices):
        more_notes += _check_air(hu, padded, source)
    elif padded.any() and not _shows_air(hu, padded):
        more_notes.append("it holds no air but its padding: perhaps not rescaled, or no CT")
    hu, affine, more = to_grid(hu, slices, source)
    remarks = dict.fromkeys(remark for one in slices for remark in one.remarks)
    notes = [*_left_out_notes(left_out), *notes, *more_notes, *more, *remarks]
    return CTVolume(hu.T, affine, source, tuple(notes))  # (k, row, column) -> (column, row, k)


def _need_pydicom(source: str) -> None:
    if pydicom is None:
        raise VolumeError(source, "DICOM needs pydicom and decoders", f"Install them: {INSTALL}")


def places_of_slices(
    files: Sequence[ByteSource],
    source: str,
    series: int | str | None = None,
    rescale: tuple[float | None, float | None] = (None, None),
    resample_irregular: bool = False,
) -> list[tuple[ByteSource, int | None]]:
    """Where the slices of a volume that `read_dicom` gives lie: file and frame of each, in the same order.

    Args:
        files, source, series, rescale, resample_irregular: See `read_dicom`.

    Returns:
        Frames count from 0; `None` in a file of one slice.
    """
    _need_pydicom(source)
    found, _ = _collect(files, source)
    slices, _ = order(_choose(found, source, series, rescale), source, resample_irregular)
    return [(one.file, one.frame) for one in slices]


def _collect(files: Sequence[ByteSource], source: str) -> tuple[list[_CTFile], Counter]:
    """All CT images among files, and how many files of other kinds there are."""
    found: list[_CTFile] = []
    left_out: Counter = Counter()
    others: list[ByteSource] = []
    for file in files:
        with file.open() as stream:
            if not is_dicom(stream.read(HEAD_BYTES)):
                others.append(file)
                continue
            header, pixel_offset = _read_header(file, stream)
        reason = _why_no_slice(file, header)
        if reason is None:
            found.append((file, header, pixel_offset))
            warm_up_for(str(header.file_meta.get("TransferSyntaxUID") or ""))
        else:
            left_out[reason] += 1
    names = {_place_and_suffix(file) for file, _, _ in found}
    for file in others:
        _check_other(file, names)
        left_out["not a DICOM file"] += 1
    if not found:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common(5)) or "it is empty"
        raise VolumeError(source, f"it holds no CT slices ({kinds})", "Pass the files of a CT series")
    del left_out[_DICOMDIR]  # it lies beside the images of every disc
    return found, left_out


def _place_and_suffix(file: ByteSource) -> tuple[str, str]:
    base = base_name(file.name)
    return file.name.removesuffix(base), PurePath(base).suffix.lower()


def _check_other(file: ByteSource, names: set[tuple[str, str]]) -> None:
    """Refuse what is not a DICOM file and lies in the place of one, which its name, content or emptiness shows."""
    if file.head(len(GZIP_MAGIC)) == GZIP_MAGIC and is_dicom(inflated_head(file, HEAD_BYTES)):
        raise VolumeError(file.name, "it is a DICOM file in gzip, which may be a slice", "Unpack it (gunzip)")
    what, remedy = what_is(file) or (None, AGAIN)
    name = _place_and_suffix(file)
    is_alike = name in names and (what is None or remedy in STANDS_FOR_A_FILE)
    if is_alike or name[1] in SUFFIXES or (not names and remedy in STANDS_FOR_A_FILE):
        lacks = "it is damaged: it lacks the mark of a DICOM file"
        raise VolumeError(file.name, lacks if what is None else f"it is not a DICOM file, but {what}", remedy)


def _read_header(file: ByteSource, stream: BinaryIO) -> tuple[Elements, int]:
    """Everything before the pixels, and at which byte those begin, in the inflated data set if that is deflated."""
    with _undamaged(file.name):
        meta = read_meta(stream)
        syntax = str(meta.get("TransferSyntaxUID") or "")
        if syntax == DEFLATED:
            stream = io.BytesIO(inflated_header(stream))
        header = read_data_set(stream, syntax != EXPLICIT_BIG if syntax else None)
        header.file_meta = meta
        return header, stream.tell()


def _damaged(name: str, how: str) -> VolumeError:
    return VolumeError(name, f"it is a damaged DICOM file ({how})", AGAIN)


@contextlib.contextmanager
def _undamaged(name: str) -> Iterator[None]:
    """Refuse a file whose header cannot be read, for the kind of the error: its text may hold values of the header."""
    try:
        yield
    except Exception as error:
        raise _damaged(name, type(error).__name__) from None


def series_of(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file; none if it has none or cannot be read, which reading it tells."""
    if pydicom is None:
        return None
    try:
        (file,) = of_path(path)
        with file.open() as stream:
            return str(_read_header(file, stream)[0].get("SeriesInstanceUID") or "") or None
    except Exception:  # of many kinds
        return None


def _why_no_slice(file: ByteSource, header: Elements) -> str | None:
    """What a file is if it is not a CT slice; none if it is one."""
    with _undamaged(file.name):
        kind, stored_as = _classes_of(header)
        modality = str(header.get("Modality") or ("CT" if kind else "")).strip().upper()
        types = _types(header.get("ImageType"))
    if kind == _DICOMDIR_CLASS:
        return _DICOMDIR
    if not modality or not len(header):
        raise _damaged(file.name, "without a SOP class, a modality or any data")
    if kind not in _CT_CLASSES and stored_as in _CT_CLASSES:
        raise _damaged(file.name, "its SOP classes contradict each other")
    if kind and kind not in _CT_CLASSES:
        return name_of_uid(kind) or "unknown kind of DICOM file"
    if modality != "CT":
        return f"modality {modality}" if modality in _MODALITIES else "modality other than CT"
    if "Rows" not in header or "Columns" not in header:
        raise _damaged(file.name, "without the size of its image")
    return "localizer" if "LOCALIZER" in types else None


def _classes_of(header: Elements) -> tuple[str, str]:
    """The SOP class of a file, and that of its meta information, which has it where anonymizers emptied the data set's.

    Some remove both, as they do all UIDs.
    """
    stored_as = str(header.file_meta.get("MediaStorageSOPClassUID") or "")
    return str(header.get("SOPClassUID") or stored_as), stored_as


def _types(found: Any) -> list[str]:
    """Values of ImageType or FrameType."""
    return [str(value).strip().upper() for value in ([found] if isinstance(found, str) else found or [])]


def _slices_of(
    file: ByteSource, header: Elements, pixel_offset: int, rescale: tuple[float | None, float | None]
) -> list[Slice]:
    """One slice, or those of a multi-frame file."""
    with _undamaged(file.name):
        samples = int(header.get("SamplesPerPixel") or 1)
        grey = str(header.get("PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME")
        frames = header.get("PerFrameFunctionalGroupsSequence")
        number = int(header.get("NumberOfFrames") or 1)
        shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
        pixels = layout_of(header, pixel_offset)
    if min(pixels.shape) < 1 or number < 1:
        raise VolumeError(file.name, f"it promises {number} frames of {pixels.shape} pixels", AGAIN)
    if samples != 1 or not grey:
        raise VolumeError(file.name, "it is not a greyscale image", "Pass the files of a CT series")
    if frames is None:
        if number != 1:
            raise VolumeError(file.name, f"its {number} frames have no positions", "Export the series again")
        return [_slice(file, header, None, None, None, pixels, rescale)]
    if len(frames) != number:
        raise VolumeError(file.name, f"it promises {number} frames and describes {len(frames)}", AGAIN)
    return [_slice(file, header, k, frame, shared, pixels, rescale) for k, frame in enumerate(frames)]


@dataclass(frozen=True)
class _Attributes:
    """What is said of a slice: by the functional groups of a frame, or by a flat data set.

    Args:
        name: Of the slice.
        header: Of its file.
        groups: Of its frame, the frame's own first; `None` in a flat data set.
    """

    name: str
    header: Elements
    groups: list[Elements] | None

    def value(self, sequence: str, attribute: str) -> Any:
        """An attribute; `None` if nobody says it. What belongs together (slope and intercept) is of one group."""
        if self.groups is None:
            return self.header.get(attribute)
        items = (group.get(sequence)[0] for group in self.groups if group.get(sequence))
        said = next((item for item in items if len(item)), None)
        return None if said is None else said.get(attribute)

    def numbers(self, sequence: str, attribute: str, count: int) -> np.ndarray:
        """`(count,)`, an attribute of the slice's place."""
        found = self.value(sequence, attribute)
        if found is None:
            raise VolumeError(self.name, f"it has no {attribute}", "Export the series with its geometry")
        array = np.array(found, dtype=float).reshape(-1)
        if array.shape != (count,) or not (np.abs(array) < _MOST_MM).all():
            raise VolumeError(self.name, f"its {attribute} is not a list of {count} numbers below {_MOST_MM:g}", AGAIN)
        return array


def _slice(
    file: ByteSource,
    header: Elements,
    frame: int | None,
    own: Elements | None,
    shared: Elements | None,
    pixels: PixelLayout,
    rescale: tuple[float | None, float | None],
) -> Slice:
    name = name_of(file, frame)
    said = _Attributes(name, header, None if frame is None else [each for each in (own, shared) if each is not None])
    value, numbers = said.value, said.numbers
    try:
        position = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
        steps = [value("PixelMeasuresSequence", step) for step in ("SpacingBetweenSlices", "SliceThickness")]
        # Some scanners write a step with the sign of its direction.
        steps = tuple(abs(float(step)) for step in steps if isinstance(step, int | float))
        scale = [value("PixelValueTransformationSequence", part) for part in ("RescaleSlope", "RescaleIntercept")]
        unit = str(value("PixelValueTransformationSequence", "RescaleType") or "").strip().upper()
        types = _types(header.get("ImageType"))
        for kind in ("FrameType", "VolumetricProperties", "VolumeBasedCalculationTechnique"):
            types += _types(value("CTImageFrameTypeSequence", kind)) + _types(header.get(kind))
        has_lookup = bool(header.get("ModalityLUTSequence")) and None not in scale
        remarks = _remarks_on(header, types)
        if no_plane := next((kind for kind in types if kind in _NO_PLANES), None):
            raise VolumeError(name, _NO_PLANES[no_plane], "Export the slices without it")
        why = _why_no_hu(types, unit, has_lookup, is_single=frame is None)
        is_hu = why is None and unit != "US"
        slope, intercept = _rescale(name, scale, rescale, is_hu, why)
        told = told_by(header, said.groups or [])
    except VolumeError:
        raise
    except Exception as error:  # as in `_undamaged`
        if _has_decimal_comma(header):
            raise VolumeError(name, "its numbers are written with decimal commas", "Export it with points") from None
        raise _damaged(name, type(error).__name__) from None
    if not (spacing > 0).all():
        raise VolumeError(name, f"its spacing is {tuple(spacing.tolist())} mm", AGAIN)
    return Slice(
        file=file,
        frame=frame,
        remarks=remarks,
        pixels=pixels,
        position_mm=position,
        orientation=orientation,
        spacing_mm=spacing,
        written_steps_mm=steps,
        slope=slope,
        intercept=intercept,
        is_hu=is_hu or None not in rescale,
        told=told,
    )


def _remarks_on(header: Elements, types: list[str]) -> tuple[str, ...]:
    """What a user should know of a slice that is read all the same."""
    is_lossy = header.get("LossyImageCompression") == "01" or header.file_meta.get("TransferSyntaxUID") == _LOSSY
    said = {
        "its slices are projections of several (MIP and the like), not what a scanner gives": (
            not set(" ".join(types).split()).isdisjoint(_PROJECTIONS)
        ),
        "its headers name no modality: taken for CT by their SOP class": not header.get("Modality"),
        "its headers name no SOP class: taken for CT by their modality": not _classes_of(header)[0],
        "its pixels were compressed with loss: values are off by some HU": is_lossy,
    }
    return tuple(remark for remark, holds in said.items() if holds)


def _why_no_hu(types: list[str], unit: str, has_lookup: bool, is_single: bool) -> str | None:
    """Why slope and intercept of a header do not give HU; none if they do, or if the values tell (`_check_air`)."""
    for kind in types:
        if kind in _MAPS or (kind in _MODIFIED and unit not in _HU):
            return f"its ImageType is {kind}, a map computed from several energies, not HU"
    if has_lookup:
        return "its ModalityLUTSequence and its RescaleSlope contradict each other, so HU are not known"
    if unit in ("", *_HU) or (unit == "US" and is_single):
        return None
    return f"its RescaleType is {unit if unit in _RESCALE_TYPES else 'of another unit'}, not HU"


def _rescale(
    name: str, found: list[Any], given: tuple[float | None, float | None], is_hu: bool, why: str | None
) -> tuple[float, float]:
    """Slope and intercept, of the header or of the caller, and never of both where those of the header give HU."""
    is_known = None not in found
    if None not in given and not (is_known and is_hu):
        slope, intercept = float(given[0]), float(given[1])
    elif why is not None:
        raise _no_hu(name, why)
    elif not is_known:
        raise VolumeError(
            name,
            "RescaleSlope or RescaleIntercept is missing, so HU are not known",
            "Pass both `rescale_slope=` and `rescale_intercept=` if you know them",
        )
    else:
        slope, intercept = float(found[0]), float(found[1])
        if given != (None, None):
            refuse_second_rescale(name, slope, intercept)
    if not (np.isfinite([slope, intercept]).all() and slope != 0 and max(abs(slope), abs(intercept)) < 1e6):
        raise VolumeError(name, f"its rescale slope is {slope:g} and its intercept {intercept:g}", AGAIN)
    return slope, intercept


def _no_hu(name: str, why: str) -> VolumeError:
    return VolumeError(
        name,
        why,
        "Pass the CT series, not a map computed from it, or both `rescale_slope=` and `rescale_intercept=` to HU",
    )


def _shows_air(hu: np.ndarray, padded: np.ndarray) -> bool:
    """Whether other voxels than the padding of a slice are as low as air."""
    return any(np.count_nonzero(values < NO_AIR_HU) > count for values, count in zip(hu, padded, strict=True))


def _check_air(hu: np.ndarray, padded: np.ndarray, source: str) -> list[str]:
    """A remark on values without a unit that show air as HU do, and not as padding alone; others are refused."""
    lowest, highest = AIR_HU_RANGE
    share = (np.count_nonzero((hu >= lowest) & (hu <= highest)) - padded.sum()) / hu.size
    if share < _LEAST_AIR:
        raise _no_hu(source, f"its RescaleType is US, not HU, and it shows no air near {AIR_HU} HU")
    return [f"its RescaleType is US, as GDCM and ITK write: taken for HU, since {share:.0%} of it is air"]


def _choose(
    files: list[_CTFile], source: str, series: int | str | None, rescale: tuple[float | None, float | None]
) -> list[Slice]:
    """The slices of one scan; the list of a refusal counts those of all, largest series first."""
    groups = _by_series(files)
    by_uid = isinstance(series, str) and series in groups
    if by_uid or (series is None and len(groups) == 1):
        slices = _slices(groups[series] if by_uid else next(iter(groups.values())), rescale)
        if len(stacks_of(slices)[0]) == 1:
            return slices
    if len(groups) > 1 and all(_count(group) == 1 for group in groups.values()):
        reason = f"each of its {len(groups)} slices has a SeriesInstanceUID of its own, as if they were no scan"
        raise VolumeError(source, reason, "Give all slices of the scan the same one: anonymize them together")
    entries = [entry for group in groups.values() for entry in _entries(group, rescale)]
    listed = "; ".join(f"{number}: {text}" for number, (text, _, _) in enumerate(entries, 1))
    if series is None or by_uid:
        is_split = any(stack is not None for _, _, stack in entries)
        what = "scans, of which some lie in each other" if is_split else "CT series"
        remedy = "Pass `series=` with the number of one" + ("" if is_split else ", or its UID")
        raise VolumeError(source, f"it holds {len(entries)} {what} ({listed})", remedy)
    number = int(series) if isinstance(series, int | np.integer) or str(series).isdecimal() else 0
    if not 1 <= number <= len(entries):
        raise VolumeError(source, f"it holds no such series ({listed})", "Pass `series=` with one of these numbers")
    _, group, stack = entries[number - 1]
    return _slices(group, rescale) if stack is None else stack


def _by_series(files: list[_CTFile]) -> dict[str, list[_CTFile]]:
    """The files of each series by its UID, largest series first."""
    groups: dict[str, list[_CTFile]] = defaultdict(list)
    for file, header, pixel_offset in files:
        with _undamaged(file.name):
            uid = str(header.get("SeriesInstanceUID") or "")
        groups[uid].append((file, header, pixel_offset))
    return dict(sorted(groups.items(), key=lambda group: (-_count(group[1]), group[0])))


def _slices(group: list[_CTFile], rescale: tuple[float | None, float | None]) -> list[Slice]:
    return [one for file in group for one in _slices_of(*file, rescale)]


def _entries(
    group: list[_CTFile], rescale: tuple[float | None, float | None]
) -> list[tuple[str, list[_CTFile], list[Slice] | None]]:
    """The scans of one series for a list: what to call each, its files, and its slices if those are only some."""
    try:
        stacks, names = stacks_of(_slices(group, rescale))
    except VolumeError:  # told when it is chosen
        return [(_describe(group), group, None)]
    if len(stacks) == 1:
        return [(_describe(group), group, None)]
    return [(f"{_in_words(len(stack), *stack[0].pixels.shape)}, by {names}", group, stack) for stack in stacks]


def _has_decimal_comma(item: Elements) -> bool:
    """Whether a number of a data set is written with a comma."""
    if any(re.search(rb"\d,\d", item.written(tag)) for tag in _DECIMALS):
        return True
    try:
        return any(_has_decimal_comma(part) for parts in item.sequences() for part in parts)
    except (ValueError, EOFError):
        return False


def _count(group: list[_CTFile]) -> int:
    return sum(_number(header, "NumberOfFrames") or 1 for _, header, _ in group)


def _describe(group: list[_CTFile]) -> str:
    header = group[0][1]
    return _in_words(_count(group), _number(header, "Rows"), _number(header, "Columns"))


def _in_words(count: int, rows: int, columns: int) -> str:
    return f"{count} slice{'s' if count > 1 else ''} of {rows} x {columns} pixels"


def _number(header: Elements, attribute: str) -> int:
    """A whole number of a header for a list of series; 0 if it is damaged, which the reading of that series tells."""
    try:
        return int(header.get(attribute) or 0)
    except Exception:  # of many kinds
        return 0


def _left_out_notes(left_out: Counter) -> list[str]:
    if not left_out:
        return []
    kinds = ", ".join(f"{count} x {kind}" for kind, count in left_out.most_common(5))
    return [f"files left out: {left_out.total()} ({kinds})"]
