"""Slices of one series that are several scans: reconstructions, acquisitions or phases over the same positions.

Laid into each other they would make a volume with every other slice of another scan. They are told apart by attributes
that differ between slices whose positions overlap (in slices beside each other the same attributes differ for good
reasons), by multi-frame files, each of which is a scan unless it says that it is a part of one, and by instance
numbers, or the frames of one file, that run through the positions more than once: by whatever makes the fewest scans,
attributes first. What cuts one even stack into uneven ones tells no scans apart.

Source: DICOM PS3.3 (C.7.6.1, C.7.6.2, C.8.2, C.7.6.16).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from .dicom_elements_medct import Elements, kind_of
from .dicom_pixels_medct import Slice

TELLING = {
    0x00200012: "AcquisitionNumber",
    0x00080032: "AcquisitionTime",
    0x0008002A: "AcquisitionDateTime",
    0x00083010: "IrradiationEventUID",
    0x00080017: "AcquisitionUID",
    0x00209156: "FrameAcquisitionNumber",
    0x00209056: "StackID",
    0x00200100: "TemporalPositionIdentifier",
    0x00209128: "TemporalPositionIndex",
    0x00209241: "NominalPercentageOfCardiacPhase",
    0x00209245: "NominalPercentageOfRespiratoryPhase",
    0x00181060: "TriggerTime",
    0x00180060: "KVP",
    0x00180010: "ContrastBolusAgent",
    0x00181210: "ConvolutionKernel",
    0x00189315: "ReconstructionAlgorithm",
    0x00181160: "FilterType",
    0x00181100: "ReconstructionDiameter",
    0x00180050: "SliceThickness",
    0x00180022: "ScanOptions",
    0x00080008: "ImageType",
    0x00089007: "FrameType",
    0x00200011: "SeriesNumber",
    0x0008103E: "SeriesDescription",
    0x0020000D: "StudyInstanceUID",
    0x00200052: "FrameOfReferenceUID",
    0x00209161: "ConcatenationUID",
}
"""Attributes that tell scans apart. Times of making an image do not: its parts are computed side by side."""
_OF_ALL_SLICES = ("StudyInstanceUID", "FrameOfReferenceUID")
"""Those that every slice of a series must have: where some lack it, that tells nothing."""
_NUMBERS_IN_LETTERS = ("DS", "IS", "TM")
_INSTANCE_NUMBER, _CONCATENATION = 0x00200013, 0x00209161
_LEAST_SLICES = 2
_LEAST_RUN = 3
MISSING_STEPS = 1.75
"""Usual steps from which on a gap is one of a missing slice."""
SAME_POSITION_MM = 1e-3


def told_by(header: Elements, groups: Sequence[Elements]) -> tuple[Hashable, ...]:
    """What a slice has of `TELLING`, then its instance number; numbers as such, the rest as written, to be compared.

    Args:
        header: Of the file.
        groups: Functional groups of the frame and those that all frames share, if the file holds several.
    """
    items = [*(found[0] for each in groups for found in each.sequences() if found), header]
    return tuple(_comparable(_written(items, tag), tag) for tag in (*TELLING, _INSTANCE_NUMBER))


def _written(items: list[Elements], tag: int) -> bytes | None:
    values = (item.written(tag).strip(b" \0") for item in items)
    return next((value for value in values if value), None)


def _comparable(written: bytes | None, tag: int) -> Hashable:
    """The same for 2 and 2.0, where an attribute is a number in letters."""
    if written is None or kind_of(tag) not in _NUMBERS_IN_LETTERS:
        return written
    try:
        numbers = tuple(float(part) for part in written.split(b"\\"))
    except ValueError:
        return written
    return written if not all(map(math.isfinite, numbers)) else numbers if len(numbers) > 1 else numbers[0]


def stacks_of(slices: list[Slice]) -> tuple[list[list[Slice]], str]:
    """Scans over the same positions, largest first, and the names of what tells them apart; often only one."""
    orientation = np.array([one.orientation for one in slices])
    if np.ptp(orientation, axis=0).max() > 0.01:
        return [slices], ""  # which is refused for it
    stacks, names = _told_apart(slices, np.cross(orientation[0, :3], orientation[0, 3:]))
    return sorted(stacks, key=len, reverse=True), ", ".join(dict.fromkeys(names))


def _told_apart(slices: list[Slice], normal: np.ndarray) -> tuple[list[list[Slice]], list[str]]:
    """Scans and the names of what tells them apart: first what makes the fewest, then what tells within these.

    A time or a number that each turn of a step-and-shoot scanner has for itself would cut every scan into its turns.
    """
    along = np.array([one.position_mm for one in slices]) @ normal
    attributes, others = (
        [(name, values) for name, values in each if _overlap(values, along) and not _is_cut(values, along)]
        for each in (_attributes(slices), _others(slices, along))
    )
    fewest = min((len({*values}) for _, values in attributes + others), default=0)
    chosen, fallback = ([each for each in some if len({*each[1]}) == fewest] for some in (attributes, others))
    chosen = chosen or fallback[:1]
    if not chosen:
        return [slices], []
    stacks, names = [], [name for name, _ in chosen]
    for group in _split(slices, list(zip(*(values for _, values in chosen), strict=True))):
        more_stacks, more_names = _told_apart(group, normal)
        stacks, names = stacks + more_stacks, names + more_names
    return stacks, names


def mixed_by(slices: list[Slice], along: np.ndarray) -> str:
    """The names of attributes that differ among the slices of one scan without regard to positions.

    Args:
        slices: Of the scan.
        along: `(n,)`, their positions along their normal, mm.
    """
    found = _attributes(slices)
    return ", ".join(name for name, values in found if _overlap(values, along) and _is_cut(values, along))


def _attributes(slices: list[Slice]) -> list[tuple[str, Sequence[Hashable]]]:
    """The names of attributes and their values in each slice."""
    spacing_mm = np.array([one.spacing_mm for one in slices]).round(3).tolist()
    keys = [
        ("Rows and Columns", [one.pixels.shape for one in slices]),
        ("PixelSpacing", list(map(tuple, spacing_mm))),
        *zip(TELLING.values(), zip(*(one.told[:-1] for one in slices), strict=True), strict=True),
    ]
    return [(name, _completed(values) if name in _OF_ALL_SLICES else values) for name, values in keys]


def _others(slices: list[Slice], along: np.ndarray) -> list[tuple[str, Sequence[Hashable]]]:
    """What else tells scans apart, and its labels of each slice; one label if it says nothing."""
    is_one_file = len({one.file for one in slices}) == 1
    runs = _runs([one.frame if is_one_file else one.instance_number for one in slices], along)
    return [("file", _files(slices)), ("frame number" if is_one_file else "InstanceNumber", runs or [0] * len(slices))]


def _files(slices: list[Slice]) -> list[Hashable]:
    """The multi-frame file of each slice; one for all that are the parts of a larger one."""
    which = [*TELLING].index(_CONCATENATION)
    return [one.frame is not None and (one.told[which] or (str(one.instance_number), one.file.name)) for one in slices]


def _completed(values: Sequence[Hashable]) -> Sequence[Hashable]:
    """Values of slices of which some lack theirs, and all others have the same."""
    return values if len({*values} - {None}) > 1 else [None] * len(values)


def _split(slices: list[Slice], labels: Sequence[Hashable]) -> list[list[Slice]]:
    groups: dict[Hashable, list[Slice]] = defaultdict(list)
    for one, label in zip(slices, labels, strict=True):
        groups[label].append(one)
    # Values as written sort well enough: what matters is that their order does not depend on that of the files.
    return [groups[label] for label in sorted(groups, key=lambda label: (-len(groups[label]), str(label)))]


def _overlap(labels: Sequence[Hashable], along: np.ndarray) -> bool:
    """Whether slices of one label lie among those of another; a single one does not tell."""
    groups = _places_of_labels(labels, along)
    for k, one in enumerate(groups):
        for other in groups[k + 1 :]:
            if other.min() > one.max() + SAME_POSITION_MM:
                break  # as those after it begin later still
            if min(_within(one, other), _within(other, one)) >= 1 and _within(one, other) + _within(other, one) > 2:
                return True
    return False


def _is_cut(labels: Sequence[Hashable], along: np.ndarray) -> bool:
    """Whether labels cut one even stack into uneven ones, and so were given without regard to positions.

    So do numbers in the order of file names (1, 10, 11, ..., 2, 20), and what redacting some slices writes into these.
    """
    return _is_even(along) and not all(map(_is_even, _places_of_labels(labels, along)))


def _places_of_labels(labels: Sequence[Hashable], along: np.ndarray) -> list[np.ndarray]:
    """Positions of the slices of each label that has several, from the lowest on; none if nearly each has its own."""
    counts = Counter(labels)
    if len(counts) == 1 or len(counts) > len(labels) // _LEAST_SLICES:
        return []
    places: dict[Hashable, list[float]] = defaultdict(list)
    for label, position in zip(labels, along.tolist(), strict=True):
        places[label].append(position)
    return sorted((np.array(found) for found in places.values() if len(found) >= _LEAST_SLICES), key=np.min)


def _within(one: np.ndarray, other: np.ndarray) -> int:
    """How many slices lie between the first and the last of others."""
    inside = (one >= other.min() - SAME_POSITION_MM) & (one <= other.max() + SAME_POSITION_MM)
    return int(np.count_nonzero(inside))


def _runs(numbers: list[Hashable], along: np.ndarray) -> list[int] | None:
    """Through which run of numbers each slice came, if they run through the positions more than once."""
    try:
        numbers = [int(number) for number in numbers]
    except (TypeError, ValueError):
        return None
    counts = Counter(numbers)
    if max(counts.values()) > 1 and np.diff(np.sort(along)).min() < SAME_POSITION_MM:
        return None  # which of two slices with one number and one position is of the first run cannot be known
    if len(set(counts.values())) == 1 and max(counts.values()) > 1:  # each run has numbers of its own
        seen, labels = Counter(), [0] * len(numbers)
        for k in np.argsort(along):
            labels[k] = seen[numbers[k]]
            seen[numbers[k]] += 1
        return labels
    if len(numbers) < 2 * _LEAST_RUN:
        return None
    labels = _turns(numbers, along)
    return labels.tolist() if np.bincount(labels).min() >= _LEAST_RUN else None


def _turns(numbers: list[int], along: np.ndarray) -> np.ndarray:
    """How often a table has turned round before each slice."""
    labels = np.zeros(len(numbers), int)
    ordered, run, sign = np.argsort(numbers, kind="stable"), 0, 0
    steps = np.diff(along[ordered])
    steps[np.abs(steps) < SAME_POSITION_MM] = 0
    unusual = np.abs(np.abs(steps) - np.median(np.abs(steps)))
    for n, step in enumerate(np.sign(steps)):
        is_turn = sign not in (0, step)
        run, sign = (run + 1, 0) if is_turn else (run, step)
        if is_turn and unusual[n] < unusual[n - 1]:  # where a table turned round beyond the end of the run before
            labels[ordered[n]], sign = run, step
        labels[ordered[n + 1]] = run
    return labels


def _is_even(along: np.ndarray) -> bool:
    """Whether positions are a stack without a gap."""
    gaps = np.diff(np.sort(along))
    return bool(gaps.max() < MISSING_STEPS * gaps.min())
