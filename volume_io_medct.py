"""Any supported CT source to Hounsfield units and an affine: the one place that reads volumes.

Unusual: NIfTI files are inflated here and handed to nibabel as bytes, because nibabel by itself never reads the gzip
checksum; and what cannot be one finite 3-D volume with a certain geometry is refused instead of guessed at.

Source: specification of CT-CLIP, section 1, step 1; NIfTI-1 standard.
"""

import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import nibabel
except ImportError:
    nibabel = None
try:  # inflates about twice as fast
    from isal import igzip as fast_gzip
except ImportError:
    fast_gzip = gzip

_GZIP_MAGIC = b"\x1f\x8b"
_NIFTI2_HEADER_BYTES = 540
# What the letters of an orientation mean in the world space of an affine, RAS+: (axis, direction).
_RAS_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
# Spacings come from float32 headers: 0.7 mm arrives as 0.69999999 and would lose a voxel to the floor of resampling.
_SPACING_DECIMALS = 6


class VolumeError(ValueError):
    """A source that is no usable CT volume: what it is, why it is refused, and what to do.

    Args:
        source: The file or array, as the caller knows it; never anything from a header.
        reason: Why it is refused.
        remedy: What the caller can do.
    """

    def __init__(self, source: str, reason: str = "", remedy: str = ""):
        text = f"{source}: {reason}. {remedy}."
        if not reason:
            # Pickle, and torch for an error of a loader process, rebuild an error from its text alone; the last line of
            # a traceback's text is the message.
            text = source.strip().splitlines()[-1].split("VolumeError: ")[-1]
        super().__init__(" ".join(text.split()))
        self.source, self.reason, self.remedy = source, reason, remedy


@dataclass(frozen=True)
class CTVolume:
    """A CT volume in Hounsfield units and where it lies.

    Args:
        array: `(i, j, k)`, HU, any real dtype.
        affine: `(4, 4)`, from voxel indices to patient millimetres, RAS+ (as NIfTI has it).
        source: What to call it in messages.
    """

    array: np.ndarray
    affine: np.ndarray
    source: str = "volume"

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbours along each array axis, mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).round(_SPACING_DECIMALS)
        return float(i), float(j), float(k)


def affine_from_spacing(spacing_mm: Sequence[float], orientation: str) -> np.ndarray:
    """The affine of an axis-aligned array whose first voxel is the origin.

    Args:
        spacing_mm: One number an array axis, mm.
        orientation: Direction in which each index grows, such as "SLP".

    Returns:
        `(4, 4)`, voxel indices to RAS+ mm.
    """
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for column, (letter, spacing) in enumerate(zip(orientation, spacing_mm, strict=True)):
        axis, direction = _RAS_DIRECTIONS[letter]
        affine[axis, column] = direction * spacing
    return affine


def axis_order(affine: np.ndarray, orientation: str) -> tuple[list[int], list[int]]:
    """Which array axis lies along each axis of an orientation, and whether it runs against it.

    Args:
        affine: `(4, 4)`, voxel indices to RAS+ mm.
        orientation: Such as "SLP".

    Returns:
        For each letter the array axis, and 1 or -1. Axes need not be aligned: each goes to the patient axis it is
        closest to, taken together (no patient axis is used twice).
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # The rotation closest to the cosines assigns axes even where one array axis lies between two patient axes.
    left, _, right = np.linalg.svd(cosines)
    remaining = np.abs(left @ right)
    patient_to_array = {}
    for _ in range(3):
        patient_axis, array_axis = np.unravel_index(np.argmax(remaining), remaining.shape)
        patient_to_array[int(patient_axis)] = int(array_axis)
        remaining[patient_axis, :] = remaining[:, array_axis] = -1
    axes = [patient_to_array[_RAS_DIRECTIONS[letter][0]] for letter in orientation]
    signs = [
        int(np.sign(cosines[_RAS_DIRECTIONS[letter][0], axis])) * _RAS_DIRECTIONS[letter][1]
        for letter, axis in zip(orientation, axes, strict=True)
    ]
    return axes, signs


def rescale_to_hu(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Stored values to Hounsfield units: `slope * stored + intercept`, float32; unchanged if that is the identity."""
    if slope == 1 and intercept == 0:
        return array
    return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def read_volume(
    source: Any,
    *,
    spacing_mm: Sequence[float] | None = None,
    orientation: str = "SLP",
    affine: np.ndarray | None = None,
    rescale_slope: float | None = None,
    rescale_intercept: float | None = None,
) -> CTVolume:
    """Read one CT volume.

    Args:
        source: Path of a NIfTI file (`.nii`, `.nii.gz`), nibabel image, `CTVolume`, or array or tensor `(i, j, k)`.
        spacing_mm: Of an array whose axes run as `orientation` says: one number an axis, mm.
        orientation: Direction in which the indices of an array with `spacing_mm` grow.
        affine: `(4, 4)`, voxel indices to RAS+ mm: of an array, or instead of a file's own.
        rescale_slope: HU of one stored unit, for stored values that are not HU yet.
        rescale_intercept: HU of the stored value 0, likewise.

    Returns:
        The volume, in HU.

    Raises:
        VolumeError: If the source is no single finite 3-D volume with a certain geometry.
    """
    volume = _load(source, spacing_mm, orientation, affine, rescale=(rescale_slope, rescale_intercept) != (None, None))
    _check(volume)
    hu = rescale_to_hu(
        volume.array,
        1.0 if rescale_slope is None else float(rescale_slope),
        0.0 if rescale_intercept is None else float(rescale_intercept),
    )
    return CTVolume(hu, volume.affine, volume.source)


def _load(source: Any, spacing_mm, orientation: str, affine, rescale: bool) -> CTVolume:
    if isinstance(source, CTVolume):
        return source
    if isinstance(source, str | os.PathLike):
        return _load_nifti(_read_nifti_file(Path(source)), affine, str(source), rescale)
    if hasattr(source, "dataobj") and hasattr(source, "affine"):
        return _load_nifti(source, affine, "nibabel image", rescale)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        if affine is None and spacing_mm is None:
            raise VolumeError(
                f"array {source.shape}", "it comes without a geometry", "Pass `spacing_mm=(z, y, x)` or `affine=`"
            )
        return CTVolume(
            source,
            np.asarray(affine_from_spacing(spacing_mm, orientation) if affine is None else affine, float),
            f"array {source.shape}",
        )
    raise VolumeError(
        type(source).__name__, "it is no CT source", "Pass a NIfTI path, a nibabel image, a CTVolume or an array"
    )


def _read_nifti_file(path: Path):
    """A NIfTI file as a nibabel image over the inflated bytes; the gzip checksum is verified."""
    if nibabel is None:
        raise VolumeError(str(path), "NIfTI files need nibabel", "Install it: pip install nibabel")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise VolumeError(str(path), f"it cannot be read ({error.strerror})", "Check the path") from error
    damaged = "Copy or download the file again"
    if raw[:2] == _GZIP_MAGIC:  # by content: files are often misnamed
        try:
            raw = fast_gzip.decompress(raw)
        except (OSError, EOFError, ValueError, zlib.error, fast_gzip.BadGzipFile) as error:
            raise VolumeError(str(path), f"the gzip stream is damaged ({error})", damaged) from error
    header_bytes = {int.from_bytes(raw[:4], order) for order in ("little", "big")}
    image_class = nibabel.Nifti2Image if _NIFTI2_HEADER_BYTES in header_bytes else nibabel.Nifti1Image
    try:
        return image_class.from_bytes(raw)
    except Exception as error:  # nibabel raises its own, struct's, numpy's and OverflowError on damaged headers
        raise VolumeError(str(path), f"it is no NIfTI file ({error})", "Pass a .nii or .nii.gz file") from error


def _load_nifti(image: Any, affine, source: str, rescale: bool) -> CTVolume:
    """Array and affine of a nibabel image, with what its header says of scale and unit."""
    header = image.header
    slope, intercept = getattr(image.dataobj, "slope", 1), getattr(image.dataobj, "inter", 0)
    if rescale and (slope, intercept) != (1, 0):
        raise VolumeError(
            source,
            f"its header already rescales (slope {slope}, intercept {intercept})",
            "Leave out `rescale_slope` and `rescale_intercept`, or HU would be computed twice",
        )
    if affine is None:
        affine = image.affine
        if hasattr(header, "get_xyzt_units"):
            if header["qform_code"] == 0 and header["sform_code"] == 0:
                raise VolumeError(source, "its header holds no orientation", "Pass the `affine=` of the scan")
            unit_mm = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
            affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ affine
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # as above
        raise VolumeError(source, f"its voxels cannot be read ({error})", "Copy or download the file again") from error
    return CTVolume(array, np.asarray(affine, float), source)


def _check(volume: CTVolume) -> None:
    """Refuse what is no single finite 3-D volume in a sound space."""
    array, affine, source = volume.array, volume.affine, volume.source
    if array.ndim != 3 or 0 in array.shape:
        raise VolumeError(source, f"it has shape {array.shape}", "Pass one volume with three axes, one at a time")
    if array.dtype.kind not in "iuf":
        raise VolumeError(source, f"its values are of type {array.dtype}", "Pass whole or real numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise VolumeError(
            source,
            f"{count} of its {array.size} voxels are NaN or infinite",
            "Replace them, by -1000 HU where there is air",
        )
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(source, "its affine is singular", "Correct the header, or pass `affine=`")
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-3:
        raise VolumeError(
            source, "its axes are not perpendicular (sheared affine)", "Resample the scan to a straight grid"
        )


__all__ = ["CTVolume", "VolumeError", "affine_from_spacing", "axis_order", "read_volume", "rescale_to_hu"]
