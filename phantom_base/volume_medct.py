"""What a CT volume is: Hounsfield units and an affine, the rules both obey, and the error of what breaks them.

Rules for values, in one place. Stored values become HU exactly once (`slope * stored + intercept`), and then
- refused: NaN or infinite values; values that all lie within -1..1 (scaled for some network, or a mask);
- remarked on (`VolumeWarning`, `CTVolume.notes`): all values within 0..255 (a picture already windowed, or labels); no
  air, that is nothing below -500 HU (another modality, another unit, or a scan not rescaled); hardly anything above
  -500 HU (a scan rescaled twice, or a picture that was rescaled); values above 30710 HU (padding, or signed values
  read as unsigned ones).
A volume of one single value is not judged, since nothing can be told from it.

Rules for space, the same for all formats. An affine is finite and not singular, its spacings are positive, and no axis
has only one voxel. Grids are taken for straight and even; an error of a header is judged by how far that puts voxels
off their place, anywhere in the scan: less than `MAX_VOXELS_OFF` is read, with a remark from `REMARKED_VOXELS_OFF` on,
and more is refused unless the caller asks for a straight grid (gantry tilt, shear). So are axes that lie more than
`MAX_OBLIQUE_DEGREES` off the patient's, because the model has only seen scans along the patient's axes.

Axes: arrays are `(i, j, k)` with an affine from voxel indices to patient millimetres, RAS+, as NIfTI has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .errors_medct import MedCTError

if TYPE_CHECKING:
    from .pictures_medct import Picture

MAX_OBLIQUE_DEGREES = 10.0
"""How far an array axis may lie off the patient axis that it stands for."""
MAX_VOXELS_OFF = 0.5
"""Voxels by which one may lie off its place on a straight and even grid."""
REMARKED_VOXELS_OFF = 0.1
MAX_VOXELS = 2**31
"""More than any scanner makes (1024 x 1024 x 2048); a header that promises more is damaged or hostile."""

_SPACING_DECIMALS = 6
_EXTENT_PARTS = 4
"""Of a millimetre: fields of view are whole millimetres, halves or quarters, whatever their number of pixels."""
NO_SECOND_RESCALE = "Leave out `rescale_slope` and `rescale_intercept`, or HU would be computed twice"
"""The remedy where a header and the caller both rescale."""
AIR_HU = -1000
HIGHEST_HU = 30710
"""The end of the extended scale, on which metal is ten times the usual 3071 HU."""
NO_AIR_HU = -500
_LEAST_TISSUE = 0.02
"""Share of voxels above that; of a chest it is far more, of one rescaled twice only hard bone is left."""
_USUAL_SHAPE = (512, 512, 512)
# What the letters of an orientation mean in the world space of an affine, RAS+: (axis, direction).
_RAS_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


class VolumeError(MedCTError, ValueError):
    """A source that is not a usable CT volume: what it is, why it is refused, and what to do.

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


class VolumeWarning(UserWarning):
    """A volume was read, and something about it deserves a look."""


@dataclass(frozen=True)
class CTVolume:
    """A CT volume in Hounsfield units and where it lies.

    Args:
        array: `(i, j, k)`, HU, any real dtype.
        affine: `(4, 4)`, from voxel indices to patient millimetres, RAS+ (as NIfTI has it).
        source: What to call it in messages.
        notes: What was remarked on while reading, one sentence each.
    """

    array: np.ndarray
    affine: np.ndarray
    source: str = "volume"
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbours along each array axis, mm."""
        i, j, k = map(without_noise, np.linalg.norm(self.affine[:3, :3], axis=0).tolist(), self.array.shape)
        return i, j, k

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.array.shape))
        notes = f", {len(self.notes)} notes" if self.notes else ""
        return f"CTVolume({self.source!r}, {shape} {self.array.dtype}, {grid_in_words(self.affine)}{notes})"

    def plot(self, window_hu: tuple[float, float] = (-1000, 400)) -> "Picture":
        """Draw the axial, coronal and sagittal slices through the middle, upright, the patient's right on the left.

        Args:
            window_hu: Values that are black and white, HU.

        Returns:
            A matplotlib figure, which a notebook shows by itself.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from .pictures_medct import plot_volume

        return plot_volume(self, window_hu)


def without_noise(spacing_mm: float, length: int) -> float:
    """The spacing that is meant, without the noise of float32 and of short decimals: 0.7 mm arrives as 0.69999999.

    Args:
        spacing_mm: As computed from a header, mm.
        length: Voxels along the axis.

    Returns:
        The nearest number of six decimals; or one that makes an extent of quarters of a millimetre, if that is nearer
        or float32 the same: 330 mm over 340 pixels are 0.97058823... mm, which has more decimals.
    """
    rounded = round(spacing_mm, _SPACING_DECIMALS)
    of_extent = round(spacing_mm * length * _EXTENT_PARTS) / _EXTENT_PARTS / length
    off, noise = abs(rounded - spacing_mm), float(np.spacing(np.float32(spacing_mm))) / 2
    # Noise may bring it nearer to six decimals by chance, which nearly every number is close to, unlike such extents.
    return of_extent if off and abs(of_extent - spacing_mm) <= max(off, noise) else rounded


def grid_in_words(affine: np.ndarray) -> str:
    """Spacing and orientation of a grid of voxels, such as "0.7 x 0.7 x 1.25 mm towards LPS"."""
    axes, signs = axis_order(affine, "RAS")
    towards = [""] * 3
    for axis, sign, (grows, falls) in zip(axes, signs, ("RL", "AP", "SI"), strict=True):
        towards[axis] = grows if sign > 0 else falls
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return f"{' x '.join(f'{step:.4g}' for step in spacing)} mm towards {''.join(towards)}"


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
    """Convert stored values to Hounsfield units: `slope * stored + intercept`.

    Args:
        array: Stored values, any shape and real dtype.
        slope: HU of one stored unit.
        intercept: HU of the stored value 0.

    Returns:
        The array itself if nothing changes; int16 where a whole intercept is added to whole numbers and all values fit
        (as for most scans, at half the memory); else float32.
    """
    if slope == 1 and intercept == 0:
        return array
    if slope == 1 and float(intercept).is_integer() and array.dtype.kind in "iu" and array.size:
        lowest, highest = int(array.min()) + int(intercept), int(array.max()) + int(intercept)
        if np.iinfo(np.int16).min <= lowest and highest <= np.iinfo(np.int16).max:
            hu = np.empty_like(array, np.int16)
            # Both wrap around in the same way, so what overflows on the way comes back.
            np.copyto(hu, array, casting="unsafe")
            hu += np.array(int(intercept)).astype(np.int16)
            return hu
    hu = np.empty_like(array, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, which `check_values` refuses
        np.multiply(array, np.float32(slope), out=hu, casting="unsafe")
        hu += np.float32(intercept)
    return hu


def refuse_second_rescale(source: str, slope: float, intercept: float) -> None:
    """Refuse to rescale what a header already rescales, since HU would be computed twice.

    Args:
        source: What to call the volume in messages.
        slope: The header's slope, HU per stored unit.
        intercept: The header's intercept, HU.
    """
    raise VolumeError(
        source,
        f"its header already rescales (slope {slope}, intercept {intercept})",
        NO_SECOND_RESCALE,
    )


def drop_singletons(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without a fourth and later axes of length one, a habit of some writers.

    Args:
        shape: Voxels along each axis.

    Returns:
        The same if a later axis is longer.
    """
    shape = tuple(int(length) for length in shape)
    return shape[:3] if len(shape) > 3 and set(shape[3:]) == {1} else shape


def check_voxels(source: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse anything but a single 3-D volume of numbers; allocates nothing, so it can be called before reading.

    Args:
        source: What to call the volume in messages.
        shape: Voxels along each axis.
        dtype: As stored.
    """
    if len(shape) != 3 or 0 in shape:
        raise VolumeError(source, f"it has shape {tuple(shape)}", "Pass one volume with three axes, one at a time")
    if 1 in shape:
        raise VolumeError(source, f"it is one slice (shape {tuple(shape)}), which is not a volume", "Pass all slices")
    if dtype.kind not in "iuf":
        raise VolumeError(source, f"its values are of type {dtype}", "Pass whole or real numbers")
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise VolumeError(
            source,
            f"its header promises {np.prod(shape, dtype=float):.2g} voxels, more than the limit of {MAX_VOXELS:.2g}",
            "Check the file, or crop the scan",
        )


def check_values(volume: CTVolume) -> tuple[str, ...]:
    """Judge values that should be HU by the rules at the top of this file.

    Returns:
        The remarks, one sentence each.
    """
    array = volume.array
    # min and max carry a NaN or an infinity through, and need no second array.
    lowest, highest = array.min(), array.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        count = sum(int(np.count_nonzero(~np.isfinite(array[..., k]))) for k in range(array.shape[-1]))
        raise VolumeError(
            volume.source,
            f"{count} of its {array.size} voxels are NaN or infinite",
            f"Replace them, by {AIR_HU} HU where there is air",
        )
    if lowest == highest:
        return ()
    if lowest >= -1 and highest <= 1:
        raise VolumeError(
            volume.source,
            f"its values lie within {lowest:g}..{highest:g}, which no scan in HU does",
            "Pass the scan before it was scaled, or `rescale_slope=` and `rescale_intercept=` that give HU",
        )
    if lowest >= 0 and highest <= 255:
        return (f"its values lie within {lowest:g}..{highest:g}: a windowed picture or labels rather than HU",)
    notes = []
    if lowest > NO_AIR_HU:
        notes.append(f"it holds no air (its lowest value is {lowest:g}): perhaps not rescaled, or no CT")
    elif (tissue := _share_of_tissue(array)) < _LEAST_TISSUE:
        notes.append(
            f"it holds hardly any tissue ({tissue:.1%} above {NO_AIR_HU} HU): perhaps rescaled twice, or a picture"
        )
    if highest > HIGHEST_HU:
        notes.append(f"its highest value is {highest:g}, more than any CT has: padding, or values that lost their sign")
    return tuple(notes)


def _share_of_tissue(array: np.ndarray) -> float:
    """Of some voxels all over a scan."""
    some = array[tuple(slice(None, None, max(1, length // 64)) for length in array.shape)]
    return float(np.mean(some > NO_AIR_HU))


def check_affine(source: str, affine: np.ndarray) -> None:
    """Refuse an affine that cannot place a volume: of another shape, singular, not finite or implausibly large.

    Args:
        source: What to call the volume in messages.
        affine: `(4, 4)`, voxel indices to RAS+ mm.
    """
    if not isinstance(affine, np.ndarray) or affine.shape != (4, 4):
        raise VolumeError(source, f"its affine has shape {np.shape(affine)}", "Pass an array of 4 x 4 numbers")
    with np.errstate(all="ignore"):
        sound = (
            np.isfinite(affine).all()
            and np.array_equal(affine[3], (0, 0, 0, 1))
            and 1e-9 < abs(np.linalg.det(affine[:3, :3])) < 1e9
            and np.abs(affine).max() < 1e6
        )
    if not sound:
        raise VolumeError(source, "its affine is singular", "Correct the header, or pass `affine=`")


def shear_of(affine: np.ndarray) -> float:
    """How far two array axes are from perpendicular at most, degrees."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arcsin(min(1.0, np.abs(cosines.T @ cosines - np.eye(3)).max()))))


def obliqueness_of(affine: np.ndarray) -> float:
    """Largest angle between an array axis and the patient axis that it stands for, degrees."""
    axes, _ = axis_order(affine, "RAS")
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    along = min(cosines[patient_axis, array_axis] for patient_axis, array_axis in enumerate(axes))
    return float(np.degrees(np.arccos(np.clip(along, 0, 1))))


def straight_affine(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The closest affine with perpendicular axes that keeps the centre of the array in place.

    The first axis is kept, of the second only the part perpendicular to it, and of the third, along which scans are
    stacked, only the part perpendicular to both.

    Args:
        affine: `(4, 4)`, voxel indices to RAS+ mm.
        shape: `(i, j, k)`, voxels.

    Returns:
        `(4, 4)`, voxel indices to RAS+ mm.
    """
    directions, parts = np.linalg.qr(affine[:3, :3])
    centre = (np.array(shape) - 1) / 2
    straight = np.eye(4)
    straight[:3, :3] = directions * np.diag(parts)
    straight[:3, 3] = affine[:3, :3] @ centre + affine[:3, 3] - straight[:3, :3] @ centre
    return straight


def voxels_off(affine: np.ndarray, shape: Sequence[int], other: np.ndarray) -> float:
    """The largest distance between the places that two affines give to the same voxel.

    Args:
        affine: `(4, 4)`, voxel indices to RAS+ mm.
        shape: `(i, j, k)`, voxels.
        other: `(4, 4)`, likewise.

    Returns:
        Distance along an array axis, in voxels of `affine`.
    """
    difference = np.linalg.inv(affine) @ (other - affine)
    centre = (np.array(shape) - 1) / 2
    at_centre = difference[:3, :3] @ centre + difference[:3, 3]
    return float((np.abs(at_centre) + np.abs(difference[:3, :3]) @ centre).max())


def remark_on_offset(what: str, off: float) -> list[str]:
    """A remark if voxels lie noticeably off a grid that is treated as straight and even.

    Args:
        what: Subject of the remark, plural, such as "its slices".
        off: Largest offset, voxels.

    Returns:
        One sentence if `off` exceeds `REMARKED_VOXELS_OFF`, else none.
    """
    if off <= REMARKED_VOXELS_OFF:
        return []
    return [f"{what} lie up to {off:.2f} voxels off the straight and even grid that is taken for theirs"]


def _is_sheared(affine: np.ndarray, shape: Sequence[int]) -> bool:
    return voxels_off(straight_affine(affine, shape), shape, affine) >= MAX_VOXELS_OFF


def is_straight(affine: np.ndarray, shape: Sequence[int] = _USUAL_SHAPE) -> bool:
    """Whether the array axes are perpendicular and aligned with the patient's, within the tolerances.

    Args:
        affine: `(4, 4)`, voxel indices to RAS+ mm.
        shape: `(i, j, k)`, voxels.
    """
    return not _is_sheared(affine, shape) and obliqueness_of(affine) <= MAX_OBLIQUE_DEGREES


def as_straight(volume: CTVolume) -> CTVolume:
    """A volume whose axes are perpendicular but for a small error, without it; tilted and oblique ones are refused."""
    source, affine, shape = volume.source, volume.affine, volume.array.shape
    remedy = "Pass `resample_irregular=True` to have it resampled to a straight grid"
    if _is_sheared(affine, shape):
        reason = f"its axes are not perpendicular (sheared by {shear_of(affine):.1f} degrees, as by gantry tilt)"
        raise VolumeError(source, reason, remedy)
    if obliqueness_of(affine) > MAX_OBLIQUE_DEGREES:
        raise VolumeError(
            source,
            f"its axes lie {obliqueness_of(affine):.1f} degrees off the patient's "
            f"(tolerance {MAX_OBLIQUE_DEGREES:g} degrees)",
            remedy,
        )
    straight = straight_affine(affine, shape)
    off = voxels_off(straight, shape, affine)
    if off < 1e-6:
        return volume
    return replace(volume, affine=straight, notes=(*volume.notes, *remark_on_offset("its voxels", off)))


def straighten(volume: CTVolume) -> CTVolume:
    """Resample a tilted, sheared or oblique volume to a grid along the patient's axes, air outside of it.

    Spacing stays that of the array axis which lies closest (of slices: their perpendicular distance). Interpolation is
    trilinear, slice by slice of the result, so that memory stays at the input, the result and a few slices.
    """
    matrix = volume.affine[:3, :3]
    axes, _ = axis_order(volume.affine, "RAS")
    # Rows of the inverse are perpendicular to the other two axes; their lengths are one over the distance of planes.
    planes_mm = 1 / np.linalg.norm(np.linalg.inv(matrix), axis=1)
    spacing_mm = planes_mm[axes]
    shape = np.array(volume.array.shape)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    corners_mm = matrix @ corners + volume.affine[:3, 3:]
    first_mm = corners_mm.min(axis=1)
    lengths = np.floor((corners_mm.max(axis=1) - first_mm) / spacing_mm + 1e-6).astype(np.int64) + 1
    if np.prod(lengths, dtype=float) > max(8 * volume.array.size, 10**6):
        raise VolumeError(
            volume.source,
            f"a straight grid around it would have shape {tuple(lengths.tolist())}",
            "Check its geometry, or crop the scan",
        )
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = first_mm
    to_input = np.linalg.inv(volume.affine) @ affine
    # Fortran order, like the readers': the last axis is the slowest.
    result = np.empty(lengths, volume.array.dtype if volume.array.dtype.kind == "f" else np.int16, order="F")
    plane = to_input[:3, :2] @ np.indices(lengths[:2]).reshape(2, -1)  # (3, i*j)
    for k in range(lengths[2]):
        values = _trilinear(volume.array, plane + (to_input[:3, 2] * k + to_input[:3, 3])[:, None])
        if result.dtype.kind != "f":
            values = values.round().clip(-32768, 32767)
        result[..., k] = values.reshape(lengths[:2])
    note = f"resampled from a grid {_irregularity(volume)} to a straight one of {tuple(lengths.tolist())} voxels"
    return replace(volume, array=result, affine=affine, notes=(*volume.notes, note))


def _irregularity(volume: CTVolume) -> str:
    if _is_sheared(volume.affine, volume.array.shape):
        return f"sheared by {shear_of(volume.affine):.1f} degrees"
    return f"{obliqueness_of(volume.affine):.1f} degrees off the patient's axes"


def _trilinear(array: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values at fractional voxel positions `(3, n)`; air where they lie outside."""
    shape = np.array(array.shape)[:, None]
    inside = ((points >= -1e-3) & (points <= shape - 1 + 1e-3)).all(axis=0)
    points = points[:, inside].clip(0, shape - 1)
    lower = np.minimum(points.astype(np.int64), np.maximum(shape - 2, 0))
    upper = np.minimum(lower + 1, shape - 1)
    weight = (points - lower).astype(np.float32)
    found = np.zeros(points.shape[1], np.float32)
    for corner in np.ndindex(2, 2, 2):
        index = tuple(np.where(c, u, low) for c, u, low in zip(corner, upper, lower, strict=True))
        share = np.prod([w if c else 1 - w for c, w in zip(corner, weight, strict=True)], axis=0)
        found += share * array[index]
    values = np.full(inside.shape, AIR_HU, np.float32)
    values[inside] = found
    return values
