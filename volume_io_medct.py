"""Any CT source to Hounsfield units and an affine: the one public reader.

The format of a source is recognised by its content, not by its name. Files of one format are read in `nifti_io_medct`,
`dicom_io_medct` and `itk_formats_medct`; the rules for values and geometry stand in `volume_medct`.

Source: specification of CT-CLIP, section 1, step 1; NIfTI-1 and DICOM standards.
"""

import contextlib
import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .byte_sources_medct import (
    GZIP_MAGIC,
    HEAD_BYTES,
    ZIP_MAGIC,
    ByteSource,
    Finder,
    base_name,
    find_among,
    inflated_head,
    is_address,
    of_address,
    of_bytes,
    of_file_object,
    of_path,
    of_zip,
    without_secrets,
)
from .configuration_medct import MedCTVisionConfig, is_orientation
from .dicom_io_medct import has_mark, is_dicom, places_of_slices, read_dicom
from .itk_formats_medct import is_metaimage, is_nrrd, read_metaimage, read_nrrd
from .nifti_io_medct import is_nifti, read_nibabel_image, read_nifti
from .no_scans_medct import what_is
from .volume_medct import (
    AIR_HU,
    NO_SECOND_RESCALE,
    CTVolume,
    VolumeError,
    VolumeWarning,
    affine_from_spacing,
    as_straight,
    axis_order,
    check_affine,
    check_values,
    check_voxels,
    is_straight,
    rescale_to_hu,
    straighten,
)

_FLOATS_OF_NUMPY = (torch.float16, torch.float32, torch.float64)
_KNOWN = "NIfTI (.nii, .nii.gz), DICOM, NRRD or MetaImage (.mha, .mhd)"


class Assumed(str):
    """An orientation that nobody has stated: a scan whose geometry it decides comes with a note."""


def read_volume(
    source: Any,
    *,
    spacing_mm: Sequence[float] | None = None,
    orientation: str = Assumed(MedCTVisionConfig.orientation),
    affine: np.ndarray | None = None,
    rescale_slope: float | None = None,
    rescale_intercept: float | None = None,
    series: int | str | None = None,
    resample_irregular: bool = False,
) -> CTVolume:
    """Read one CT volume.

    Args:
        source: Path of a NIfTI, NRRD or MetaImage file, of a DICOM folder, zip archive or multi-frame file; list of
            DICOM files; `hf://` or other fsspec address of any of these; their bytes, or a binary file object; what a
            column of `datasets.Nifti()` holds, decoded or not; nibabel image; `CTVolume`; array or tensor `(i, j, k)`.
        spacing_mm: Of an array without `affine`, whose axes run as `orientation` says: one number an axis, mm.
        orientation: Direction in which the indices of an array with `spacing_mm` grow: "SPL" of one from SimpleITK,
            "SLP" unless it is stated.
        affine: `(4, 4)`, voxel indices to RAS+ mm: of an array, or instead of a file's or nibabel image's own.
        rescale_slope: HU of one stored unit, for stored values that are not HU yet.
        rescale_intercept: HU of the stored value 0, likewise.
        series: Which of several DICOM series: its number in the list that the refusal shows, or its SeriesInstanceUID.
            A source of another format is its own number 1.
        resample_irregular: Resample tilted, oblique and unevenly spaced scans to a straight grid instead of refusing.

    Returns:
        The volume, in HU by the rules of `volume_medct`. Its notes are issued as warnings (`VolumeWarning`) too.

    Raises:
        VolumeError: If the source is not a single finite 3-D volume in HU with a known geometry, or if an argument is
            invalid or does not apply to such a source.
    """
    rescale = _number("rescale_slope", rescale_slope), _number("rescale_intercept", rescale_intercept)
    if rescale[0] == 0:
        raise VolumeError("rescale_slope", "it is 0, which would make all voxels the same", "Pass HU per stored unit")
    affine = None if affine is None else _numbers("affine", affine, "Pass a matrix of 4 x 4 numbers")
    if not is_orientation(orientation):
        raise VolumeError(
            "orientation", f"{orientation!r} does not name each patient axis once", 'Pass three letters such as "SLP"'
        )
    volume = _load(source, spacing_mm, orientation, affine, rescale, series, resample_irregular)
    check_affine(volume.source, volume.affine)
    check_voxels(volume.source, volume.array.shape, volume.array.dtype)
    known = volume.notes if isinstance(source, CTVolume) else ()
    volume = replace(volume, notes=tuple(dict.fromkeys((*volume.notes, *check_values(volume)))))
    if resample_irregular and not is_straight(volume.affine, volume.array.shape):
        volume = straighten(volume)
    volume = as_straight(volume)
    for note in volume.notes:
        if note not in known:
            warnings.warn(f"{volume.source}: {note}.", VolumeWarning, stacklevel=2)
    return volume


def dicom_slices(
    source: Any,
    *,
    series: int | str | None = None,
    resample_irregular: bool = False,
    rescale_slope: float | None = None,
    rescale_intercept: float | None = None,
) -> list[tuple[ByteSource, int | None]]:
    """The files that the slices of a DICOM study lie in, for those who need more of their headers than HU and geometry.

    Args:
        source, series, resample_irregular, rescale_slope, rescale_intercept: See `read_volume`.

    Returns:
        File and frame (from 0; `None` in a file of one slice) of each slice, ascending along the slices' normal.

    Raises:
        VolumeError: If the source is no DICOM study, or no usable one.
    """
    kind, files, name = _opened(source)
    if kind != "dicom":
        raise VolumeError(name, "it is not DICOM, so there is no study that it belongs to", "Pass the DICOM files")
    return places_of_slices(files, name, series, (rescale_slope, rescale_intercept), resample_irregular)


def is_dicom_study(source: Any) -> bool:
    """Whether a source is a DICOM study, by the beginning of its files.

    Raises:
        VolumeError: If it cannot be opened, or is not a scan.
    """
    return _opened(source)[0] == "dicom"


def _opened(source: Any) -> tuple[str, list[ByteSource], str]:
    """The format of a source's files, these, and what to call it."""
    files, name = _files_of(source)
    if len(files) == 1 and files[0].head(4) == ZIP_MAGIC:
        files = of_zip(files[0])
    kind, files, _ = _kind_of(files, name)
    return kind, files, name


def _load(source: Any, spacing_mm, orientation: str, affine, rescale, series, resample_irregular: bool) -> CTVolume:
    """The volume in HU, before any judgement of its values and geometry."""
    is_rescaled = rescale != (None, None)
    if isinstance(source, torch.Tensor):
        source = _of_tensor(source)
    if isinstance(source, np.ndarray):
        volume = _of_array(source, spacing_mm, orientation, affine)
        _refuse_unused(volume.source, series=series)
        return _rescaled(volume, rescale)
    if isinstance(source, CTVolume):
        _refuse_unused(source.source, spacing_mm=spacing_mm, affine=affine, series=series)
        return _rescaled(source, rescale)
    if hasattr(source, "dataobj") and hasattr(source, "affine"):
        _refuse_unused("nibabel image", spacing_mm=spacing_mm, series=series)
        return _rescaled(read_nibabel_image(source, affine, is_rescaled), rescale)
    files, name = _files_of(source)
    _refuse_unused(name, spacing_mm=spacing_mm)
    if is_rescaled:
        _refuse_rescale_of_fixed(name, rescale)
    if len(files) == 1 and files[0].head(4) == ZIP_MAGIC:
        files = of_zip(files[0])
    kind, files, others = _kind_of(files, name)
    if kind == "dicom":
        return _placed(read_dicom(files, name, series, rescale, resample_irregular), affine)
    _refuse_unused(name, series=series)
    beside = None if others else files[0].beside
    find = partial(find_among, _folder(files[0]), others) if beside is None else beside
    return _rescaled(_read_scan(kind, files[0], find, affine, is_rescaled), rescale)


def _read_scan(kind: str, file: ByteSource, find: Finder, affine: Any = None, is_rescaled: bool = False) -> CTVolume:
    """A scan that is one file, or one with its voxels in another."""
    if kind == "nifti":
        return read_nifti(file, affine, is_rescaled, find)
    read = read_nrrd if kind == "nrrd" else read_metaimage
    return _placed(read(file, find, is_rescaled), affine)


def _number(argument: str, value: Any) -> float | None:
    """A finite number that the caller gave, or none."""
    if value is None:
        return None
    number = _numbers(argument, value, "Pass a finite number")
    if number.size != 1 or not np.isfinite(number).all():
        raise VolumeError(argument, "it is not a finite number", "Pass a finite number")
    return number.item()


def _numbers(argument: str, value: Any, remedy: str) -> np.ndarray:
    try:
        return np.asarray(value, float)
    except (TypeError, ValueError) as error:
        raise VolumeError(argument, "it does not hold the numbers that it should", remedy) from error


def _refuse_unused(name: str, *, spacing_mm: Any = None, affine: Any = None, series: Any = None) -> None:
    """Refuse arguments that a source has no use for: whoever gives them expects them to be heeded."""
    if spacing_mm is not None:
        raise VolumeError(name, "it has a geometry of its own", "Leave out `spacing_mm=`, which is for arrays")
    if affine is not None:
        raise VolumeError(name, "it has an affine already", "Leave out `affine=`, or pass its `array` with another one")
    if series is not None and str(series) != "1":
        raise VolumeError(name, "it is one scan, and not DICOM with several series", "Leave out `series=` for it")


def _of_tensor(tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise VolumeError(
            f"tensor {tuple(tensor.shape)}",
            "it does not hold one value a voxel (meta, sparse or quantized)",
            "Pass a dense tensor",
        )
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS_OF_NUMPY:
        tensor = tensor.float()
    return tensor.numpy(force=True)


def _of_array(array: np.ndarray, spacing_mm, orientation: str, affine) -> CTVolume:
    name, notes = f"array {array.shape}", ()
    if affine is None and spacing_mm is None:
        remedy = "Pass `affine=`, or `spacing_mm=` if its axes run as `orientation` says"
        raise VolumeError(name, "it comes without a geometry", remedy)
    if affine is not None and spacing_mm is not None:
        raise VolumeError(name, "it comes with two geometries", "Pass either `spacing_mm=` or `affine=`")
    if affine is None:
        spacing_mm = _numbers("spacing_mm", spacing_mm, "Pass three positive numbers, one an array axis")
        if spacing_mm.shape != (3,) or not (np.isfinite(spacing_mm) & (spacing_mm > 0)).all():
            raise VolumeError(
                name,
                f"its spacing is {spacing_mm.tolist()} mm",
                "Pass three positive numbers, one an array axis",
            )
        affine = affine_from_spacing(spacing_mm.tolist(), orientation)
        if isinstance(orientation, Assumed):
            said = "if they do not, pass `affine=`, or make a volume of it with `read_volume(..., orientation=)`"
            notes = (f"its axes are taken to run towards {', '.join(orientation)}: {said}",)
    return _placed(CTVolume(array, np.eye(4), name, notes), affine)


def _placed(volume: CTVolume, affine) -> CTVolume:
    return volume if affine is None else replace(volume, affine=affine)


def _rescaled(volume: CTVolume, rescale: tuple[float | None, float | None]) -> CTVolume:
    """Stored values to HU by what the caller knows: a slope of 1 and an intercept of 0 where only one is given."""
    check_voxels(volume.source, volume.array.shape, volume.array.dtype)
    if np.ma.is_masked(volume.array):
        raise VolumeError(
            volume.source, "some of its voxels are masked", f"Pass `array.filled({AIR_HU})` if they are air"
        )
    slope, intercept = (default if given is None else given for given, default in zip(rescale, (1, 0), strict=True))
    return replace(volume, array=rescale_to_hu(np.asarray(volume.array), slope, intercept))


def _refuse_rescale_of_fixed(name: str, rescale: tuple[float | None, float | None]) -> None:
    """CT-RATE's second version lies in folders such as `train_fixed`, and its values are HU already."""
    if rescale not in ((1, 0), (1, None), (None, 0)) and any(part.endswith("_fixed") for part in Path(name).parts):
        raise VolumeError(
            name,
            "it is of CT-RATE's second version (`_fixed`), whose values are HU already",
            NO_SECOND_RESCALE,
        )


def _files_of(source: Any) -> tuple[list[ByteSource], str]:
    """The files that a source stands for, and what to call them together."""
    if isinstance(source, dict) and {"bytes", "path"} & set(source):  # an undecoded `datasets.Nifti()`
        if source.get("bytes") is None:
            source = source.get("path")
        else:
            name = Path(str(source.get("path") or "bytes")).name
            return [replace(of_bytes(_bytes_of(source["bytes"]), name), beside=source.get("beside"))], name
    if isinstance(source, bytes | bytearray | memoryview):
        return [of_bytes(bytes(source), "bytes")], "bytes"
    if is_address(source):
        return of_address(source), without_secrets(source)
    if isinstance(source, str) and not source:
        raise VolumeError("path", "it is empty, and would stand for the current folder", 'Pass a path, if only "."')
    if isinstance(source, str | os.PathLike):
        return of_path(Path(source)), str(source)
    if isinstance(source, list | tuple) and source:
        files = [file for one in source for file in _files_of(one)[0]]
        return files, f"list of {len(files)} files"
    if hasattr(source, "read"):
        name = Path(str(getattr(source, "name", "") or "file object")).name
        return [of_file_object(source, name)], name
    raise VolumeError(type(source).__name__, "it is not a CT source", f"Pass a {_KNOWN} path, array or nibabel image")


def _bytes_of(content: Any) -> bytes:
    try:
        return bytes(memoryview(content))  # which takes no text, and no number for a length
    except TypeError as error:
        raise VolumeError("bytes", f"they are of type {type(content).__name__}", "Pass the bytes of a file") from error


def _kind_of(files: list[ByteSource], source: str) -> tuple[str, list[ByteSource], list[ByteSource]]:
    """What format files have, those of the scan, and the others.

    Of several files they are DICOM if any of them is; else one of them is the scan, and the others are its voxels, or
    what programs write beside a scan. Voxels can look like DICOM without its mark, and are no DICOM for that.
    """
    if len(files) == 1:
        kind = _format_of(files[0])
        if kind is None:
            what, remedy = what_is(files[0]) or ("", f"Pass a {_KNOWN} file")
            reason = "it is not a NIfTI, DICOM, NRRD or MetaImage file" + (f", but {what}" if what else "")
            raise VolumeError(files[0].name, reason, remedy)
        return kind, files, []
    scans, unmarked = [], []
    for file in files:
        kind = _format_of(file)
        if kind == "dicom" and has_mark(file.head(HEAD_BYTES)):
            return kind, files, []
        if kind == "dicom":
            unmarked.append(file)
        elif kind is not None:
            scans.append((kind, file))
    if unmarked and not all(_are_voxels(file, scans) for file in unmarked):
        return "dicom", files, []
    if len(scans) > 1:
        names = ", ".join(base_name(file.name) for _, file in scans[:5])
        raise VolumeError(source, f"it holds {len(scans)} scans ({names})", "Pass one of them")
    if not scans:
        return "dicom", files, []  # which says what it holds
    kind, scan = scans[0]
    return kind, [scan], [file for file in files if file is not scan]


def _folder(file: ByteSource) -> str:
    """How the names of the files in the folder of one begin."""
    return file.name.removesuffix(base_name(file.name))


def _are_voxels(file: ByteSource, scans: list[tuple[str, ByteSource]]) -> bool:
    """Whether the header of a scan asks for a file."""
    asked: list[ByteSource] = []

    def find(folder: str, names: Collection[str]) -> None:
        if (found := find_among(folder, [file], names)) is not None:
            asked.append(found)

    for kind, scan in scans:
        with contextlib.suppress(VolumeError):  # that the voxels are missing, or what the reader will say
            _read_scan(kind, scan, partial(find, _folder(scan)))
    return bool(asked)


def _format_of(file: ByteSource) -> str | None:
    """The format of a file by its content; none if it is not a scan."""
    head = file.head(HEAD_BYTES)
    if is_dicom(head):
        return "dicom"
    if is_nrrd(head):
        return "nrrd"
    if is_metaimage(head):
        return "metaimage"
    # A gzip stream without any readable beginning is left to the NIfTI reader, which says how it is damaged.
    is_gzip = head[:2] == GZIP_MAGIC
    start = inflated_head(file, 4) if is_gzip else head
    return "nifti" if is_nifti(start) or (is_gzip and not start) else None


__all__ = [
    "CTVolume",
    "VolumeError",
    "VolumeWarning",
    "affine_from_spacing",
    "axis_order",
    "read_volume",
    "rescale_to_hu",
]
