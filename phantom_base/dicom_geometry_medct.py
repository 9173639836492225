"""Where the slices of a CT series lie: their order, the checks of their positions, and the grid they make.

A header's error is judged by what it does to voxels. Slices whose grid puts every voxel less than `MAX_VOXELS_OFF` from
its place are read, with a remark from `REMARKED_VOXELS_OFF` on; others are refused, or resampled for the caller. So it
does not matter with how many digits positions were written, or whether a stack leans by less than a pixel.

Unusual: a missing slice of a short stack puts no voxel of an even grid half a voxel off. So a gap of about two steps is
refused too, unless the step that the headers write fits the whole stack but for the rounding of positions, and instance
numbers run on across the gap.

Source: DICOM PS3.3 (C.7.6.2).
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .dicom_frames_medct import AGAIN
from .dicom_pixels_medct import Slice, hu_of
from .dicom_stacks_medct import MISSING_STEPS, SAME_POSITION_MM, mixed_by
from .volume_medct import MAX_VOXELS_OFF, REMARKED_VOXELS_OFF, VolumeError, check_affine, remark_on_offset

_USUAL_PIXELS = 512
_POSITION_DIGITS_MM = 2e-3
"""How exactly headers write positions, unless the positions themselves show that they are coarser."""
_UNIT_VECTOR_TOLERANCE = 1e-2
_MAX_GAP_STEPS = 5
"""Usual steps that interpolation bridges when the caller asks for it."""
_LEAST_SKIPPED = 2
_LISTED_GAP = 0.02
_HALF_STEP = 0.02
_ONE_STACK = "Pass the files of one stack of slices"
_STRAIGHT = "Pass `resample_irregular=True` to have the slices interpolated"


def check_alike(slices: list[Slice]) -> None:
    """Refuse slices that are not all of one size, spacing and direction."""
    figures = [(*one.pixels.shape, *one.spacing_mm.tolist(), *one.orientation.tolist()) for one in slices]
    most = Counter(figures).most_common(1)[0][0]
    first = slices[figures.index(most)]  # which of them stands first among the files does not matter
    differing = np.flatnonzero(np.abs(np.array(figures) - most).max(axis=1))
    for one in (slices[k] for k in differing):
        (rows, columns), others = one.pixels.shape, first.pixels.shape
        half = np.maximum((columns, rows), _USUAL_PIXELS) / 2
        if (rows, columns) != others:
            reason = f"it is {rows} x {columns}, others are {others[0]} x {others[1]}"
        elif (np.abs(one.spacing_mm - first.spacing_mm) / first.spacing_mm * half[::-1]).max() >= MAX_VOXELS_OFF:
            reason = f"its PixelSpacing {one.spacing_mm.tolist()} differs from {first.spacing_mm.tolist()} of others"
        elif _turned(one, first, half) >= MAX_VOXELS_OFF:
            turned, usual = one.orientation.round(4).tolist(), first.orientation.round(4).tolist()
            reason = f"its orientation {turned} differs from {usual} of others"
        else:
            continue
        raise VolumeError(one.name, reason, _ONE_STACK)
    row, column = first.orientation[:3], first.orientation[3:]
    lengths = np.linalg.norm((row, column), axis=1)
    if np.abs(lengths - 1).max() > _UNIT_VECTOR_TOLERANCE or abs(row @ column) > _UNIT_VECTOR_TOLERANCE:
        raise VolumeError(first.name, "its ImageOrientationPatient is not a pair of perpendicular unit vectors", AGAIN)


def _turned(one: Slice, first: Slice, half: np.ndarray) -> float:
    """How far the corners of a slice are from where another slice has them, pixels."""
    difference = (one.orientation - first.orientation).reshape(2, 3) * one.spacing_mm[::-1, None] * half[:, None]
    return float(np.abs(difference).sum(axis=0).max() / first.spacing_mm.min())


def _axes(slices: Sequence[Slice]) -> np.ndarray:
    """Unit vectors `(3, 3)`: along a row, along a column as far as it is perpendicular to that, and the normal."""
    row, column = slices[0].orientation[:3], slices[0].orientation[3:]
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return np.array((row, column, np.cross(row, column)))


def _places(slices: Sequence[Slice]) -> np.ndarray:
    """Positions `(n, 3)` along those axes, mm."""
    return np.array([one.position_mm for one in slices]) @ _axes(slices).T


def order(slices: list[Slice], source: str, resample_irregular: bool) -> tuple[list[Slice], list[str]]:
    """Sort slices by position and check their positions.

    Args:
        slices: In any order, all of one size, spacing and orientation (see `check_alike`).
        source: What to call them in messages.
        resample_irregular: Accept uneven, tilted and repeated slices that can be resampled.

    Returns:
        The slices in ascending order along their normal, and remarks.

    Raises:
        VolumeError: If the positions do not make one stack.
    """
    slices = [slices[k] for k in np.argsort(_places(slices)[:, 2], kind="stable")]
    slices, notes = _without_repeats(slices, source, resample_irregular)
    if len(slices) < 2:
        raise VolumeError(
            source,
            "it holds one slice, which is not a volume",
            "Pass all files of the series together: a folder, a zip or a list",
        )
    _check_interleaved(slices, source)
    if _is_uneven(slices):
        _check_gaps(slices, source, resample_irregular)
    _check_line(slices, source, resample_irregular)
    notes += _remarks_on_overlap(slices) + _remarks_on_skipped(slices) + _remarks_on_mixed(slices)
    beside = np.abs(_beside(slices) / _pixel_mm(slices)).max() if _is_leaning(slices) else _off_place(slices)
    notes += remark_on_offset("its slices", max(float(beside), 0 if _is_uneven(slices) else _unevenness(slices)))
    return slices, notes


def _without_repeats(slices: list[Slice], source: str, resample_irregular: bool) -> tuple[list[Slice], list[str]]:
    """Refuse positions that occur more than once, or keep one slice of each if all its pixels are the same."""
    along = _places(slices)[:, 2]
    is_repeated = np.diff(along) < SAME_POSITION_MM
    repeats = np.flatnonzero(is_repeated)
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
    for before, one, repeated in zip(slices, slices[1:], is_repeated, strict=False):
        if not repeated:
            kept.append(one)
        elif not np.array_equal(hu_of(before, {})[0], hu_of(one, {})[0]):
            raise VolumeError(source, f"{reason}, with different pixels", "Pass the files of one phase of one series")
    return kept, [f"repeated slices with the same pixels left out: {len(repeats)}"]


def _check_interleaved(slices: list[Slice], source: str) -> None:
    """Refuse two stacks that lie in each other, which shows as two steps that take turns."""
    along = _places(slices)[:, 2]
    gaps = np.diff(along)
    first, second = gaps[::2], gaps[1::2]
    if len(gaps) < 5 or max(np.ptp(first), np.ptp(second)) > 0.1 * gaps.mean():
        return
    if abs(first.mean() - second.mean()) > max(2 * REMARKED_VOXELS_OFF * gaps.mean(), 1.01 * _rounding_mm(slices)):
        raise VolumeError(
            source,
            f"steps of {first.mean():.3f} and {second.mean():.3f} mm take turns between its slices: two stacks lie in "
            "each other",
            _ONE_STACK,
        )


def _remarks_on_overlap(slices: list[Slice]) -> list[str]:
    """Two passes half a step apart that no attribute tells apart look like one reconstruction with overlap."""
    step = float(np.diff(_places(slices)[:, 2]).mean())
    # A thickness alone says nothing: chest CT is often reconstructed with overlap.
    written = min(slices[0].written_steps_mm) if len(slices[0].written_steps_mm) > 1 else math.nan
    if not abs(written / step - 2) < _HALF_STEP:
        return []
    return [
        f"its slices lie {step:g} mm apart, half of the {written:g} mm that its headers say: they overlap, or are two "
        "passes"
    ]


def _remarks_on_skipped(slices: list[Slice]) -> list[str]:
    """Every second slice alone looks like a whole scan of wider steps."""
    jumps = _jumps(slices)
    if jumps is None or np.ptp(jumps) or jumps[0] < _LEAST_SKIPPED:
        return []
    step, times = float(np.diff(_places(slices)[:, 2]).mean()), int(jumps[0])
    for written in slices[0].written_steps_mm:
        if abs(step - times * written) < _HALF_STEP * step:
            return [
                f"its slices lie {step:g} mm apart, {times} times the {written:g} mm that its headers say, and their "
                f"instance numbers run in steps of {times}: those between may be missing"
            ]
    return []


def _remarks_on_mixed(slices: list[Slice]) -> list[str]:
    names = mixed_by(slices, _places(slices)[:, 2])
    return [f"its slices differ in {names}, but make one even stack: taken for one scan"] if names else []


def _jumps(slices: list[Slice]) -> np.ndarray | None:
    """By how much instance numbers differ from slice to slice; none if one has none."""
    numbers = [one.instance_number for one in slices]
    return np.abs(np.diff(numbers)) if all(isinstance(number, float) for number in numbers) else None


def _check_gaps(slices: list[Slice], source: str, resample_irregular: bool) -> None:
    along = _places(slices)[:, 2]
    gaps = np.diff(along)
    step = float(np.median(gaps))
    uneven = np.flatnonzero(np.abs(gaps - step) > _LISTED_GAP * step)
    figures = ", ".join(f"{gaps[k]:.3f} mm between {along[k]:.2f} and {along[k + 1]:.2f}" for k in uneven[:5])
    reason = f"its slice steps are uneven (usually {step:.3f} mm, but {figures})"
    if not resample_irregular:
        raise VolumeError(source, f"{reason}: slices are missing or of two stacks", _STRAIGHT)
    if gaps.max() > _MAX_GAP_STEPS * step:
        raise VolumeError(source, reason, "Find the missing slices: the gap is too wide to interpolate")


def _is_uneven(slices: list[Slice]) -> bool:
    """Whether slices are missing, or one lies half a step or more off its place."""
    gaps = np.diff(_places(slices)[:, 2])
    is_wide = gaps >= MISSING_STEPS * _usual(gaps)
    is_missing = is_wide.any() and not _is_rounded(slices, is_wide)
    return bool(is_missing) or _unevenness(slices) >= MAX_VOXELS_OFF


def _is_rounded(slices: list[Slice], is_wide: np.ndarray) -> bool:
    """Whether wide gaps come of rounded positions alone, of slices that are all there."""
    jumps = _jumps(slices)
    if jumps is not None and np.ptp(usual := jumps[~is_wide]) == 0 and jumps[is_wide].max() > usual[0] > 0:
        return False
    along = _places(slices)[:, 2]
    noise_mm = 1.1 * _rounding_mm(slices, 0.0)
    return any(np.ptp(along - step * np.arange(len(along))) < noise_mm for step in slices[0].written_steps_mm)


def _usual(gaps: np.ndarray) -> float:
    """The middle gap, of two the smaller: of three slices one may be missing."""
    return float(np.sort(gaps)[(len(gaps) - 1) // 2])


def _unevenness(slices: list[Slice]) -> float:
    """How far a slice lies off its place on an even grid at most, steps."""
    residues, step = _residues(slices)
    return float(np.abs(residues - np.median(residues)).max() / step)


def _residues(slices: list[Slice]) -> tuple[np.ndarray, float]:
    """Distance of each slice from the even grid that begins at the first one, mm, and the step of that grid."""
    along = _places(slices)[:, 2]
    step = _exact_step(slices, along)
    return along - (along[0] + step * np.arange(len(along))), step


def _check_line(slices: list[Slice], source: str, resample_irregular: bool) -> None:
    """Refuse stacks whose slices lie beside each other, or lean."""
    beside = _beside(slices)
    off_mm = np.linalg.norm(beside, axis=1)
    k = int(off_mm.argmax())
    is_off = (np.abs(beside) / _pixel_mm(slices)).max() >= MAX_VOXELS_OFF
    if is_off or (_off_place(slices) >= MAX_VOXELS_OFF and not _is_leaning(slices)):
        raise VolumeError(
            source,
            f"its slices do not lie on a line ({slices[k].name} is {off_mm[k]:.2f} mm beside it)",
            _ONE_STACK,
        )
    if not resample_irregular and _is_leaning(slices):
        sideways, whole = _sideways(slices), np.ptp(_places(slices)[:, 2])
        raise VolumeError(
            source,
            f"its slices are stacked {np.degrees(np.arctan2(np.linalg.norm(sideways), whole)):.1f} degrees off their "
            f"normal (gantry tilt or a sheared stack, {np.linalg.norm(sideways):.1f} mm from end to end)",
            "Pass `resample_irregular=True` to have it resampled to a straight grid",
        )


def _pixel_mm(slices: list[Slice]) -> np.ndarray:
    """Distance of pixels within a row and within a column, mm."""
    return slices[0].spacing_mm[::-1]


def _sideways(slices: list[Slice]) -> np.ndarray:
    """How far ordered slices slide along rows and columns from the first to the last, mm."""
    places = _places(slices)
    return places[-1, :2] - places[0, :2]


def _beside(slices: list[Slice]) -> np.ndarray:
    """How far each slice lies beside the line from the first to the last, along rows and columns, mm."""
    places = _places(slices)
    share = (places[:, 2] - places[0, 2]) / np.ptp(places[:, 2])
    return places[:, :2] - places[0, :2] - share[:, None] * _sideways(slices)


def _off_place(slices: list[Slice]) -> float:
    """How far a slice lies sideways off the stack's upright middle line at most, pixels."""
    places = _places(slices)
    return float((np.abs(places[:, :2] - places[[0, -1], :2].mean(axis=0)) / _pixel_mm(slices)).max())


def _is_leaning(slices: list[Slice]) -> bool:
    """Whether a stack that is taken for upright has its ends off their place."""
    return bool((np.abs(_sideways(slices)) / 2 / _pixel_mm(slices)).max() >= MAX_VOXELS_OFF)


def to_grid(hu: np.ndarray, slices: list[Slice], source: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Put slices on an even grid, interpolating uneven steps.

    Args:
        hu: `(k, row, column)`, HU, in the order of `slices`.
        slices: From `order`.
        source: What to call them in messages.

    Returns:
        HU `(k, row, column)` on even steps, the affine `(4, 4)` from `(column, row, k)` to RAS+ mm, and remarks.
    """
    notes, places, count = [], _places(slices), len(slices)
    along = places[:, 2]
    gaps = np.diff(along)
    start = np.median(_residues(slices)[0])
    if _is_uneven(slices):
        # The mean step, a gap of missing slices being several.
        steps = gaps / _usual(gaps)
        count, start = int(np.where(steps < MISSING_STEPS, 1, np.rint(steps)).sum()) + 1, 0.0
        even = np.linspace(along[0], along[-1], count)
        hu, along = _on_even_steps(hu, along, even), even
        notes.append(
            f"slices with steps of {gaps.min():.3f} to {gaps.max():.3f} mm were interpolated to {count} even ones"
        )
    axes, (column_mm, row_mm) = _axes(slices), _pixel_mm(slices)
    first, sideways = places[0] + (0, 0, start), _sideways(slices)
    step = np.array((0, 0, _exact_step(slices, along)))
    if _is_leaning(slices):
        step[:2] = sideways / (count - 1)
    else:
        first[:2] += sideways / 2  # what it slides all the same is shared between both ends
    affine = np.eye(4)
    affine[:3, :3] = (axes.T @ np.diag((column_mm, row_mm, 0))) + np.outer(axes.T @ step, (0, 0, 1))
    affine[:3, 3] = axes.T @ first
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS -> RAS
    check_affine(source, affine)
    return hu, affine, notes


def _exact_step(slices: list[Slice], along: np.ndarray) -> float:
    """Step of positions, mm: as written, or round, where positions of a few digits cannot tell them apart.

    Else steps of 5 mm would come back as 4.999999 from positions, and of 0.625 mm as 0.6256 from rounded ones.
    """
    count = len(along)
    measured = float(np.ptp(along)) / (count - 1)
    is_even = np.ptp(np.diff(along)) < _POSITION_DIGITS_MM
    noise_mm = _POSITION_DIGITS_MM if is_even else max(_POSITION_DIGITS_MM, _rounding_mm(slices))
    for step in slices[0].written_steps_mm:
        if abs(step - measured) * (count - 1) < noise_mm:
            return _with_all_digits(step, count)
    round_steps = (round(measured, digits) for digits in range(4))
    # Both ends may be off by a whole half of the last digit.
    return next((step for step in round_steps if abs(step - measured) * (count - 1) < 1.01 * noise_mm), measured)


def _with_all_digits(step: float, count: int) -> float:
    """A step written with six digits, as C does, if it is that of whole millimetres over all slices: 3.98734 of 315/79.

    The same scan as NIfTI has all digits, and should not get another number of voxels for it.
    """
    exact = round(step * count) / count
    return exact if exact > 0 and float(f"{exact:.6g}") == step else step


def _rounding_mm(slices: list[Slice], start: float | None = None) -> float:
    """How far rounding may move one slice from another along their normal, which has a share in each coordinate, mm.

    Digits are counted from another start than the first position if that is given.
    """
    positions = np.array([one.position_mm for one in slices])
    distances = positions - (positions[0] if start is None else start)
    return float(np.abs(_axes(slices)[2]) @ [_last_digit_mm(each) for each in distances.T])


def _last_digit_mm(distance: np.ndarray) -> float:
    """The unit of the last decimal with which a coordinate was written, mm; 0 if it is the same in all slices."""
    if np.ptp(distance) < 1e-6:
        return 0.0
    for digits in range(3):
        if np.abs(distance - distance.round(digits)).max() < 1e-6:
            return 10.0**-digits
    return 10.0**-3


def _on_even_steps(hu: np.ndarray, along: np.ndarray, positions: np.ndarray) -> np.ndarray:
    even = np.empty((len(positions), *hu.shape[1:]), hu.dtype)
    for k, position in enumerate(positions):
        lower = min(int(np.searchsorted(along, position, side="right")) - 1, len(along) - 2)
        weight = np.float32((position - along[lower]) / (along[lower + 1] - along[lower]))
        values = hu[lower] * (1 - weight) + hu[lower + 1] * weight
        even[k] = values.round() if hu.dtype == np.int16 else values
    return even
